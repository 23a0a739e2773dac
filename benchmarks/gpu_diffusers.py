"""PyTorch's side of `gpu.py`, as somebody would write it for diffusers' FLUX."""

import contextlib
import functools
import gc
import time

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from gpu_rows import reason, seconds_a_call, sweep, tell
from side_by_side import flops, full_flops, lora_flops, relative_error, time_limit
from torch.nn.attention import SDPBackend, sdpa_kernel

from eru_jax.models import flux

_LEARNING_RATE, _EMA_DECAY, _CLIP, _GUIDANCE = 1e-4, 0.99, 1.0, 3.5
# Seconds for torch.compile to be ready.
_COMPILE_LIMIT = 150
_GIB = 2**30
_AGREE = 1e-3


def _device():
  return 'cuda' if torch.cuda.is_available() else 'cpu'


def _wait():
  if torch.cuda.is_available():
    torch.cuda.synchronize()


def random_network(sizes, device, dtype):
  """diffusers' model with random weights that never lay anywhere else, nor in another dtype."""
  values = {k: v for k, v in sizes.config().to_dict().items() if not k.startswith('_')}
  with torch.device('meta'):
    network = diffusers.FluxTransformer2DModel(**values)
  network = network.to(dtype).to_empty(device=device)
  generator = torch.Generator(device).manual_seed(0)
  with torch.no_grad():
    for name, parameter in network.named_parameters():
      parameter.normal_(generator=generator)
      if parameter.ndim == 2:
        parameter.mul_(parameter.shape[1] ** -0.5)
      else:
        parameter.mul_(0.1).add_(name.endswith('weight'))
  return network


def add_adapter(network, rank):
  """Adapters on every linear layer of the blocks; the rest is frozen."""
  from peft import LoraConfig

  layers = [
    name
    for name, module in network.named_modules()
    if isinstance(module, torch.nn.Linear) and 'transformer_blocks.' in name
  ]
  dtype = network.dtype
  network.requires_grad_(False)
  network.add_adapter(
    LoraConfig(r=rank, lora_alpha=rank, init_lora_weights='gaussian', target_modules=layers)
  )
  for parameter in network.parameters():
    if parameter.requires_grad:
      # In the backbone's dtype on either side: float32 ones would put PyTorch under autocast.
      parameter.data = parameter.data.to(dtype)


def velocity(network, ids, x, t, tokens, pooled):
  return network(
    hidden_states=x,
    timestep=t,
    guidance=torch.full_like(t, _GUIDANCE),
    encoder_hidden_states=tokens,
    pooled_projections=pooled,
    img_ids=ids,
    txt_ids=torch.zeros(tokens.shape[1], 3, device=ids.device, dtype=ids.dtype),
    return_dict=False,
  )[0]


def image_ids(sizes, pixels, device, dtype):
  return torch.from_numpy(flux.image_ids(*sizes.grid(pixels))).to(device, dtype)


def loss_of(network, ids, x_0, noise, t, tokens, pooled):
  times = t[:, None, None]
  x_t = ((1 - times) * x_0 + times * noise).to(network.dtype)
  predicted = velocity(network, ids, x_t, t.to(network.dtype), tokens, pooled)
  return F.mse_loss(predicted.float(), noise - x_0)


def _compile(network, sizes):
  # Inductor is not what a tiny network on a processor is to show.
  backend = 'inductor' if sizes.gpu else 'eager'
  network.compile_repeated_blocks(dynamic=False, backend=backend)


def _warm_up(run, compiled):
  """Seconds of the first call, which compiles."""
  began = time.perf_counter()
  with time_limit(_COMPILE_LIMIT) if compiled else contextlib.nullcontext():
    run()
    _wait()
  return time.perf_counter() - began


def _random(sizes, tokens, batch, device, dtype):
  cfg = sizes.config()
  normal = functools.partial(torch.randn, device=device)
  return (
    normal(batch, tokens, cfg.in_channels),
    normal(batch, sizes.text_tokens, cfg.joint_attention_dim, dtype=dtype),
    normal(batch, cfg.pooled_projection_dim, dtype=dtype),
  )


def _reset_peak():
  gc.collect()
  if torch.cuda.is_available():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _peak():
  if not torch.cuda.is_available():
    return {}
  return {'peak_gib': torch.cuda.max_memory_allocated() / _GIB}


def train(row, sizes):
  """batch -> seconds of a training step and what belongs to it."""
  device, dtype = _device(), torch.bfloat16
  network = random_network(sizes, device, dtype).train()
  if row.task == 'lora':
    add_adapter(network, sizes.rank)
  if 'checkpoint' in row.options:
    network.enable_gradient_checkpointing()
  compiled = 'compiled' in row.options
  if compiled:
    _compile(network, sizes)
  parameters = [p for p in network.parameters() if p.requires_grad]
  average = [p.detach().clone() for p in parameters]
  optimizer = torch.optim.AdamW(parameters, _LEARNING_RATE, weight_decay=0.0, fused=True)
  ids = image_ids(sizes, row.pixels, device, dtype)
  cfg, image_tokens = sizes.config(), int(np.prod(sizes.grid(row.pixels)))

  def measure(batch):
    optimizer.zero_grad()
    _reset_peak()
    x_0, tokens, pooled = _random(sizes, image_tokens, batch, device, dtype)
    value = [None]

    def run():
      noise = torch.randn_like(x_0)
      t = torch.sigmoid(torch.randn(batch, device=device))
      value[0] = loss_of(network, ids, x_0, noise, t, tokens, pooled)
      value[0].backward()
      torch.nn.utils.clip_grad_norm_(parameters, _CLIP, foreach=True)
      optimizer.step()
      optimizer.zero_grad()
      with torch.no_grad():
        torch._foreach_lerp_(average, parameters, 1 - _EMA_DECAY)

    first = _warm_up(run, compiled)
    seconds = seconds_a_call(run, _wait, sizes.least_seconds)
    counts = (cfg, batch, image_tokens, sizes.text_tokens)
    work = lora_flops(*counts, sizes.rank) if row.task == 'lora' else full_flops(*counts)
    return {
      'seconds': seconds,
      'call_seconds': seconds,
      'compile_seconds': first - seconds if compiled else 0.0,
      'tflop': work / 1e12,
      'finite': bool(torch.isfinite(value[0])),
      **_peak(),
    }

  return measure


@torch.inference_mode()
def draw(network, ids, noise, tokens, pooled, num_steps):
  """Euler's method, the state in float32."""
  sigmas = [1 - step / num_steps for step in range(num_steps)] + [0.0]
  x = noise
  for t, t_next in zip(sigmas, sigmas[1:], strict=False):
    times = torch.full((len(x),), t, device=x.device, dtype=network.dtype)
    v = velocity(network, ids, x.to(network.dtype), times, tokens, pooled)
    x = x + (t_next - t) * v.float()
  return x


def sample(row, sizes):
  """batch -> seconds of an Euler step and what belongs to it."""
  device, dtype = _device(), torch.bfloat16
  network = random_network(sizes, device, dtype).eval()
  compiled = 'compiled' in row.options
  if compiled:
    _compile(network, sizes)
  ids = image_ids(sizes, row.pixels, device, dtype)
  cfg, image_tokens = sizes.config(), int(np.prod(sizes.grid(row.pixels)))

  def measure(batch):
    _reset_peak()
    data = _random(sizes, image_tokens, batch, device, dtype)
    drawn = [None]

    def run():
      drawn[0] = draw(network, ids, *data, sizes.euler_steps)

    first = _warm_up(run, compiled)
    seconds = seconds_a_call(run, _wait, sizes.least_seconds)
    return {
      'seconds': seconds / sizes.euler_steps,
      'call_seconds': seconds,
      'compile_seconds': first - seconds if compiled else 0.0,
      'tflop': flops(cfg, batch, image_tokens, sizes.text_tokens) / 1e12,
      'finite': bool(torch.isfinite(drawn[0]).all()),
      **_peak(),
    }

  return measure


def peak(sizes):
  edge = sizes.matmul
  a, b = (torch.randn(edge, edge, device=_device(), dtype=torch.bfloat16) for _ in range(2))
  seconds = seconds_a_call(lambda: torch.mm(a, b), _wait, sizes.least_seconds)
  tell(matmul_tflops=2 * edge**3 / seconds / 1e12)


def attentions(sizes):
  """Seconds of PyTorch's kernels, and which it prefers."""
  cfg = sizes.config()
  kernels = {
    'default': None,
    'cudnn': SDPBackend.CUDNN_ATTENTION,
    'flash': SDPBackend.FLASH_ATTENTION,
  }
  for pixels in (1024, 512):
    length = int(np.prod(sizes.grid(pixels))) + sizes.text_tokens
    shape = (1, cfg.num_attention_heads, length, cfg.attention_head_dim)
    operands = [
      torch.randn(shape, device=_device(), dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    ]
    direction = torch.randn_like(operands[0])
    work = 4 * cfg.width * length**2 / 1e12
    for name, kernel in kernels.items():

      def forward(operands=operands):
        with torch.no_grad():
          F.scaled_dot_product_attention(*operands)

      def both(operands=operands, direction=direction):
        out = F.scaled_dot_product_attention(*operands)
        torch.autograd.grad(out, operands, direction)

      found = {}
      with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
        for label, run, factor in (('forward', forward, 1), ('forward and backward', both, 3)):
          try:
            seconds = seconds_a_call(run, _wait, sizes.least_seconds / 4)
          except RuntimeError as error:  # PyTorch lacks this kernel for this device or shape.
            found[label] = reason(error)
          else:
            found[label] = {'milliseconds': 1e3 * seconds, 'tflops': factor * work / seconds}
      tell(attention={str(pixels): {name: found}})


def agree(sizes, path):
  """Computes in float32 what our side wrote, with the same weights.

  Raises:
    SystemExit: if the two sides do not compute the same.
  """
  stored = np.load(path)
  device = _device()

  def part(prefix):
    names = [name for name in stored.files if name.startswith(prefix + '/')]
    return {name.removeprefix(prefix + '/'): stored[name] for name in names}

  def load(network, prefix):
    values = {name: torch.from_numpy(value).to(device) for name, value in part(prefix).items()}
    own = dict(network.named_parameters())
    with torch.no_grad():
      for name, value in values.items():
        own[name].copy_(value)
    return [own[name] for name in values], list(values)

  network = random_network(sizes, device, torch.float32)
  ids = image_ids(sizes, 1024, device, torch.float32)
  data = {name: torch.from_numpy(value).to(device) for name, value in part('input').items()}
  x_0, noise, t, tokens, pooled = data.values()
  times = t[:, None, None]
  x_t, results = (1 - times) * x_0 + times * noise, part('result')
  differences = {}

  def compare(prefix, gradient, trained, names):
    value = loss_of(network, ids, x_0, noise, t, tokens, pooled)
    gradients = torch.autograd.grad(value, trained)
    predicted = velocity(network, ids, x_t, t, tokens, pooled).detach().cpu()
    differences[f'{prefix}loss'] = abs(float(results[f'{prefix}loss']) / value.item() - 1)
    differences[f'{prefix}velocity'] = relative_error(results[f'{prefix}velocity'], predicted)
    differences[f'{prefix}worst gradient'] = max(
      relative_error(stored[f'{gradient}/{name}'], value.cpu())
      for name, value in zip(names, gradients, strict=True)
    )

  trained, names = load(network, 'weight')
  missing = dict(network.named_parameters()).keys() ^ set(names)
  if missing:
    raise SystemExit(f'The two sides differ in parameters: {sorted(missing)[:5]}')
  compare('', 'gradient', trained, names)
  drawn = draw(network, ids, noise, tokens, pooled, sizes.euler_steps).cpu()
  differences['sample'] = relative_error(results['sample'], drawn)
  add_adapter(network, sizes.rank)
  adapters = [name for name, p in network.named_parameters() if p.requires_grad]
  trained, names = load(network, 'adapter')
  if set(adapters) != set(names):
    raise SystemExit(f'The two sides adapt other layers: {sorted(set(adapters) ^ set(names))[:5]}')
  compare('lora_', 'adapter_gradient', trained, names)
  tell(differences={name: float(f'{value:.1e}') for name, value in differences.items()})
  if not max(differences.values()) < _AGREE:
    raise SystemExit(f'The two sides do not compute the same: {differences}')


def measure(row, sizes, seconds, exchange):
  """As `gpu_ours.measure`."""
  if sizes.gpu and not torch.cuda.is_available():
    raise SystemExit('PyTorch finds no GPU: install its CUDA build, or pass --quick.')
  tell(device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')
  if row.task == 'agreement':
    agree(sizes, exchange)
  elif row.task == 'peak':
    peak(sizes)
  elif row.task == 'attention':
    attentions(sizes)
  else:
    task = sample if row.task == 'sample' else train
    sweep(sizes.batches, task(row, sizes), seconds)
