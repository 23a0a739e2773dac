"""Our side of `gpu.py`: the compiled training step and the sampler, as the commands run them."""

import functools
import math
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from gpu_rows import seconds_a_call, sweep, tell
from side_by_side import flops, full_flops, lora_flops, relative_error

from eru_jax import flow
from eru_jax.losses.flow_matching import flow_matching
from eru_jax.models import flux, registry, stack
from eru_jax.models import lora as lora_lib
from eru_jax.models.attention import attention
from eru_jax.models.autoencoder_kl import AutoencoderConfig, AutoencoderKL
from eru_jax.training.state import OptimizerConfig, init_state
from eru_jax.training.step import StageProgram, compile_stage
from eru_jax.types import Conditioning
from eru_jax.weights import flux as flux_table
from eru_jax.weights import table

_LEARNING_RATE, _EMA_DECAY, _CLIP = 1e-4, 0.99, 1.0
_GIB = 2**30


def _noise(shape, seed, dtype=jnp.float32):
  """Uniform numbers of mean 0 and variance 1, by MurmurHash3's finalizer of their positions.

  jax.random would take long to compile for every shape of a network, and longer to run.
  """
  # Far apart on the one sequence of 2^32.
  start = np.uint32(seed * 0x9E3779B9 % 2**32)
  bits = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) + start
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    bits = (bits ^ (bits >> shift)) * np.uint32(factor)
  bits = bits ^ (bits >> 16)
  return (bits.astype(jnp.float32) * (12**0.5 / 2**32) - 3**0.5).astype(dtype)


def _rules(rank):
  return (lora_lib.LoraRule('transformer_blocks/', rank, float(rank)),)


def diffusion_model(sizes, pixels, *, dtype=jnp.bfloat16, lora=False, **options):
  """FLUX at a picture size; `options` are FluxTransformer's."""
  cfg = sizes.config()
  # FLUX.1's downscaling by eight; its parameters are never made.
  autoencoder = AutoencoderConfig(
    latent_channels=cfg.in_channels // 4, block_out_channels=(32,) * 4, norm_num_groups=32
  )
  edge = pixels // sizes.scale
  return registry.DiffusionModel(
    registry.family('flux'),
    flux.FluxTransformer(cfg, dtype, **options),
    AutoencoderKL(autoencoder),
    edge,
    edge,
    lora=_rules(sizes.rank) if lora else (),
  )


def parameter_shapes(model, sizes):
  return nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), sizes.text_tokens)))


def random_parameters(shapes, dtype=jnp.bfloat16):
  """Parameters of a trained network's magnitude, in a dtype, wherever the program runs."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
  out = []
  for number, (path, leaf) in enumerate(leaves):
    noise, name = _noise(leaf.shape, number), path[-1].key
    value = noise * leaf.shape[-2] ** -0.5 if name == 'kernel' else 0.1 * noise + (name == 'scale')
    out.append(value.astype(dtype))
  return structure.unflatten(out)


def random_adapter(shapes, sizes, dtype=jnp.bfloat16):
  """An adapter on every linear layer of the blocks, as if trained a little: b is not zero.

  It is held in the backbone's dtype on either side: float32 would put PyTorch under autocast.
  """
  adapter = jax.eval_shape(lambda: lora_lib.init(jax.random.key(0), shapes, _rules(sizes.rank)))
  leaves, structure = jax.tree.flatten(adapter)
  values = [_noise(x.shape, 1000 + i) * x.shape[-2] ** -0.5 for i, x in enumerate(leaves)]
  return structure.unflatten([(0.3 * value).astype(dtype) for value in values])


def random_inputs(model, sizes, batch, dtype=jnp.bfloat16):
  cfg, latents = model.backbone.config, (batch, *model.latent_shape)
  conditioning = Conditioning(
    tokens=_noise((batch, sizes.text_tokens, cfg.joint_attention_dim), 2000, dtype),
    pooled=_noise((batch, cfg.pooled_projection_dim), 2001, dtype),
  )
  return {'latents': _noise(latents, 2002), 'noise': _noise(latents, 2003), 'text': conditioning}


def _compiled(jitted, *args):
  """Compiles before anything lies in memory, so that what will not fit is known in time."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  began = time.perf_counter()
  compiled = jitted.lower(*shapes).compile()
  seconds = time.perf_counter() - began
  sizes = compiled.memory_analysis()
  needed = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
  needed += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
  limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  if limit is not None and needed > limit:
    raise MemoryError(f'needs {needed / _GIB:.1f} GiB of {limit / _GIB:.1f}')
  kernel = 'cudnn' if 'cudnn$fmha' in compiled.as_text() else 'xla'
  return compiled, {
    'compile_seconds': seconds,
    'compiler_gib': needed / _GIB,
    'attention': kernel,
  }


def _peak():
  """Peak of this process: what would not fit was told from its program, and never allocated."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return {'peak_gib': stats['peak_bytes_in_use'] / _GIB} if 'peak_bytes_in_use' in stats else {}


def _options(row):
  policy = [option for option in row.options if option in stack.REMAT_POLICIES]
  return {'remat': policy[0] if policy else 'none', 'scan': 'unrolled' not in row.options}


def train(row, sizes, batch):
  """Seconds of one step of `compile_stage`, and what belongs to them."""
  lora = row.task == 'lora'
  model = diffusion_model(sizes, row.pixels, lora=lora, **_options(row))
  shapes = parameter_shapes(model, sizes)
  optimizer = OptimizerConfig(learning_rate=_LEARNING_RATE, clip_norm=_CLIP).build(10**6)
  density = flow.TimestepDensity()

  def loss(params, frozen, batch, key, step):
    del step
    time_key, noise_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, batch['latents'].shape)
    t = density.sample(time_key, noise.shape[:1])
    velocity = model.velocity(frozen, params)
    return flow_matching(velocity, batch['latents'], noise, t, batch['text'])

  def fresh():
    params = random_adapter(shapes, sizes) if lora else random_parameters(shapes)
    return init_state(params, optimizer)

  # The backbone is an argument: a constant would be compiled into the program.
  def base():
    return random_parameters(shapes) if lora else {}

  makers = fresh, base, functools.partial(random_inputs, model, sizes, batch)
  iterate = compile_stage(StageProgram(loss), optimizer, _EMA_DECAY)
  key = jax.random.key(0)
  step, found = _compiled(iterate, *map(jax.eval_shape, makers), key)
  state, frozen, data = (jax.jit(make)() for make in makers)
  measured = {}

  def run():
    nonlocal state, measured
    state, measured = step(state, frozen, data, key)

  seconds = seconds_a_call(
    run, lambda: jax.block_until_ready((state, measured)), sizes.least_seconds
  )
  tokens, cfg = int(np.prod(sizes.grid(row.pixels))), sizes.config()
  counts = (cfg, batch, tokens, sizes.text_tokens)
  work = lora_flops(*counts, sizes.rank) if row.task == 'lora' else full_flops(*counts)
  return found | {
    'seconds': seconds,
    'call_seconds': seconds,
    'tflop': work / 1e12,
    'finite': int(measured['skipped']) == 0,
    **_peak(),
  }


def sample(row, sizes, batch):
  model = diffusion_model(sizes, row.pixels, **_options(row))
  shapes = parameter_shapes(model, sizes)
  schedule = flow.timestep_schedule(sizes.euler_steps)

  def draw(params, noise, conditioning):
    return model.sample(model.velocity(params), noise, conditioning, schedule)

  def inputs():
    data = random_inputs(model, sizes, batch)
    return random_parameters(shapes), data['noise'], data['text']

  sampler, found = _compiled(jax.jit(draw), *jax.eval_shape(inputs))
  data = jax.jit(inputs)()
  drawn = None

  def run():
    nonlocal drawn
    drawn = sampler(*data)

  seconds = seconds_a_call(run, lambda: drawn.block_until_ready(), sizes.least_seconds)
  tokens = int(np.prod(sizes.grid(row.pixels)))
  work = flops(sizes.config(), batch, tokens, sizes.text_tokens)
  return found | {
    'seconds': seconds / sizes.euler_steps,
    'call_seconds': seconds,
    'tflop': work / 1e12,
    'finite': bool(jnp.all(jnp.isfinite(drawn))),
    **_peak(),
  }


def peak(sizes):
  edge = sizes.matmul
  # Zeros or ones would run faster than numbers do.
  a, b = (_noise((edge, edge), seed, jnp.bfloat16) for seed in (0, 1))
  product, out = jax.jit(jnp.dot), None

  def run():
    nonlocal out
    out = product(a, b)

  seconds = seconds_a_call(run, lambda: out.block_until_ready(), sizes.least_seconds)
  tell(matmul_tflops=2 * edge**3 / seconds / 1e12)


def attentions(sizes):
  """Seconds of each implementation, with and without a mask, and whether they agree."""
  cfg = sizes.config()
  for pixels in (1024, 512):
    length = int(np.prod(sizes.grid(pixels))) + sizes.text_tokens
    shape = (1, length, cfg.num_attention_heads, cfg.attention_head_dim)
    query, key, value, direction = _noise((4, *shape), 0, jnp.bfloat16)
    # Half of the text is padding.
    mask = jnp.ones((1, length), bool).at[:, sizes.text_tokens // 2 : sizes.text_tokens].set(False)
    for masked in (False, True):
      kept, results = mask if masked else None, {}
      for name in ('xla', 'cudnn') if jax.default_backend() == 'gpu' else ('xla',):
        label = f'{name}, masked' if masked else name
        results[name], found = _attention_times(
          name, (query, key, value), direction, kept, sizes.least_seconds / 4
        )
        tell(attention={str(pixels): {label: found}})
      if len(results) == 2:
        pairs = zip(*(jax.tree.leaves(results[name]) for name in ('cudnn', 'xla')), strict=True)
        # Gradients of what is masked out are zero on both sides.
        errors = [relative_error(a.astype('float32'), b.astype('float32')) for a, b in pairs]
        label = 'cudnn and xla differ by' + (', masked' if masked else '')
        tell(attention={str(pixels): {label: max(errors)}})
    chosen = jax.jit(attention).lower(query, key, value, mask).compile().as_text()
    tell(attention={str(pixels): {'auto': 'cudnn' if 'cudnn$fmha' in chosen else 'xla'}})


def _attention_times(implementation, operands, direction, mask, least):
  def forward(operands):
    return attention(*operands, mask, implementation)

  def both(operands):
    def loss(operands):
      out = forward(operands)
      return jnp.sum((out * direction).astype(jnp.float32)), out

    gradients, out = jax.grad(loss, has_aux=True)(operands)
    return out, gradients

  found, out = {}, None
  batch, length, heads, size = operands[0].shape
  work = 4 * batch * heads * size * length**2 / 1e12
  for name, function, factor in (('forward', forward, 1), ('forward and backward', both, 3)):
    jitted = jax.jit(function)

    def run(jitted=jitted):
      nonlocal out
      out = jitted(operands)

    seconds = seconds_a_call(run, lambda: jax.block_until_ready(out), least)
    found[name] = {'milliseconds': 1e3 * seconds, 'tflops': factor * work / seconds}
  return out, found


def agree(sizes, path):
  """Writes weights, inputs, and what we make of them in float32, under diffusers' names."""
  dtype, cfg, batch = jnp.float32, sizes.config(), 2
  jax.config.update('jax_default_matmul_precision', 'highest')
  model = diffusion_model(sizes, 1024, dtype=dtype)
  adapted = diffusion_model(sizes, 1024, dtype=dtype, lora=True, remat='names')
  shapes = parameter_shapes(model, sizes)
  t = jnp.linspace(0.3, 0.8, batch, dtype=dtype)

  def loss(trainable, frozen, model, data):
    velocity = model.velocity(frozen, trainable)
    value, _ = flow_matching(velocity, data['latents'], data['noise'], t, data['text'])
    x_t = flow.interpolate(data['latents'], data['noise'], t)
    return value, velocity(x_t, t, data['text'])

  def compute():
    params = random_parameters(shapes, dtype)
    adapter = random_adapter(shapes, sizes, dtype)
    data = random_inputs(model, sizes, batch, dtype)
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, velocity), gradients = grad(params, None, model, data)
    (lora_value, lora_velocity), lora_gradients = grad(adapter, params, adapted, data)
    schedule = flow.timestep_schedule(sizes.euler_steps)
    results = {
      'loss': value,
      'velocity': velocity,
      'lora_loss': lora_value,
      'lora_velocity': lora_velocity,
      'sample': model.sample(model.velocity(params), data['noise'], data['text'], schedule),
    }
    trees = {'weight': params, 'gradient': gradients}
    adapters = {'adapter': adapter, 'adapter_gradient': lora_gradients}
    return data, results, trees, adapters

  data, results, trees, adapters = jax.device_get(jax.jit(compute)())
  text = data['text']
  inputs = {'latents': data['latents'], 'noise': data['noise'], 't': np.asarray(t)}
  named = {
    'input': inputs | {'tokens': text.tokens, 'pooled': text.pooled},
    'result': results,
  }
  for prefix, tree in trees.items():
    named[prefix] = table.to_torch(tree, flux_table.rows(cfg), flux_table.counts(cfg))
  for prefix, tree in adapters.items():
    named[prefix] = adapter_tensors(cfg, tree)
  arrays = {f'{prefix}/{k}': value for prefix, part in named.items() for k, value in part.items()}
  np.savez(path, **arrays)


def adapter_tensors(cfg, adapter):
  """An adapter under peft's names, through the weight table: a and b stand for the kernels."""
  from flax import traverse_util

  flat, tensors = traverse_util.flatten_dict(adapter, sep='/'), {}
  layers = {path.rpartition('/')[0] for path in flat}
  rows = [row for row in flux_table.rows(cfg) if row.flax.removesuffix('/kernel') in layers]
  for ours, theirs in (('a', 'lora_A'), ('b', 'lora_B')):
    kernels = {f'{layer}/kernel': flat[f'{layer}/{ours}'] for layer in layers}
    tree = traverse_util.unflatten_dict(kernels, sep='/')
    for name, tensor in table.to_torch(tree, rows, flux_table.counts(cfg)).items():
      tensors[f'{name.removesuffix(".weight")}.{theirs}.default.weight'] = tensor
  return tensors


def measure(row, sizes, seconds, exchange):
  """Runs one row and tells what it finds.

  Args:
    row: the row.
    sizes: how large.
    seconds: how long it may take.
    exchange: file through which the two sides are compared.
  """
  device = jax.local_devices()[0]
  if sizes.gpu and device.platform != 'gpu':
    raise SystemExit(f'JAX runs on {device.platform}: install jax[cuda13], or pass --quick.')
  tell(device=device.device_kind)
  if row.task == 'agreement':
    agree(sizes, exchange)
  elif row.task == 'peak':
    peak(sizes)
  elif row.task == 'attention':
    attentions(sizes)
  else:
    task = sample if row.task == 'sample' else train
    sweep(sizes.batches, lambda batch: task(row, sizes, batch), seconds)
