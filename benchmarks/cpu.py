"""Our training step and sampler beside diffusers' FLUX in PyTorch, on this machine's processor.

    python benchmarks/cpu.py                    # writes benchmarks/results/cpu.json
    python benchmarks/cpu.py --quick            # tiny network, no compiler, writes nothing

Both sides hold the same random weights of the toy base's architecture, and must agree before they
are timed. A training step draws noise and times, takes the flow-matching loss forwards and
backwards, clips the gradient, and updates AdamW and the parameters' average: ours is
`compile_stage`'s. Sampling is Euler's method on a batch. PyTorch runs eagerly in float32, in
bfloat16 and under `torch.compile`, and in float32 also in microbatches; we run float32 only, whole
and in microbatches. The best of either side counts. Candidates take turns, so that a disturbance
hits all of them; ratios are of the medians of one turn.

The last line is JSON: {"train_ratio", "sample_ratio"}, PyTorch's time over ours; with --quick it
holds "quick": true beside them, as ratios of a tiny network say nothing about speed. The process
starts itself anew with `launch/local.sh`'s settings of glibc's allocator, which both sides
profit from.
"""

import contextlib
import copy
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time

from absl import app, flags
from side_by_side import flops, last_line, processor, relative_error, time_limit

_QUICK = flags.DEFINE_bool('quick', False, 'A tiny network and few repetitions.')
_BATCH = flags.DEFINE_integer('batch', 64, 'Pictures in a batch.', lower_bound=1)
_TEXT = flags.DEFINE_integer('text_tokens', 1, 'Text tokens; the base has one.', lower_bound=1)
_ROWS = flags.DEFINE_integer('rows', 4, 'Edge of the square of image tokens.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 8, 'Euler steps of sampling.', lower_bound=1)
_MICRO = flags.DEFINE_integer('accumulation', 4, 'Microbatches, beside none.', lower_bound=1)
_TURNS = flags.DEFINE_integer('turns', 12, 'Turns of every candidate.', lower_bound=1)
_THREADS = flags.DEFINE_integer('threads', 2, "PyTorch's threads; XLA takes all cores.")
_COMPILE = flags.DEFINE_integer(
  'compile_limit', None, 'Seconds for torch.compile; 0 leaves it out. 240, with --quick 0.'
)
_OUTPUT = flags.DEFINE_string('output', 'benchmarks/results/cpu.json', 'File of the results.')

# As in launch/local.sh, which says why. glibc reads them when a process starts.
_ALLOCATOR = {
  'MALLOC_MMAP_MAX_': '0',
  'MALLOC_TRIM_THRESHOLD_': '17179869184',
  'MALLOC_ARENA_MAX': '1',
  'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
}
_ARCHITECTURE = 'eru_jax/assets/emoji_base'
# A candidate this much slower than the best of its side when warmed up is not raced.
_HOPELESS = 2.5
_LEARNING_RATE, _EMA_DECAY, _CLIP = 1e-4, 0.99, 1.0


def build(quick):
  """Sizes of the problem, our model and parameters, and diffusers' model with the same weights."""
  import diffusers
  import torch

  from eru_jax.models import flux, registry
  from eru_jax.models.autoencoder_kl import AutoencoderKL
  from eru_jax.weights import flux as flux_table
  from eru_jax.weights import model_directory, table

  stored = model_directory.load(pathlib.Path(__file__).parents[1] / _ARCHITECTURE)
  cfg, batch, rows = stored.architecture, _BATCH.value, _ROWS.value
  if quick:
    tiny = registry.family('flux').tiny | {'in_channels': cfg.in_channels}
    cfg, batch, rows = flux.FluxConfig.from_dict(tiny), min(batch, 4), 2
  values = {k: v for k, v in cfg.to_dict().items() if not k.startswith('_')}
  torch.manual_seed(0)
  reference = diffusers.FluxTransformer2DModel(**values)
  with torch.no_grad():
    for parameter in reference.parameters():
      # diffusers' own initialisation leaves biases of nearly nothing and norms of exactly one.
      if parameter.ndim == 1:
        parameter.add_(0.1 * torch.randn_like(parameter))
  tensors = {name: value.numpy() for name, value in reference.state_dict().items()}
  params = table.to_flax(tensors, flux_table.rows(cfg), flux_table.counts(cfg))
  autoencoder = stored.autoencoder_config
  pixels = rows * 2 * autoencoder.downscale
  model = registry.DiffusionModel(
    # As configs/emoji.py has it.
    stored.family, stored.family.backbone(cfg, scan=False), AutoencoderKL(autoencoder),
    pixels, pixels,
  )  # fmt: skip
  return cfg, batch, model, params, reference


def inputs(cfg, batch, tokens):
  """Numpy arrays of one batch: latents, noise, times, text states and pooled text."""
  import numpy as np

  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  return {
    'latents': normal(batch, tokens, cfg.in_channels),
    'noise': normal(batch, tokens, cfg.in_channels),
    't': rng.uniform(0.05, 0.95, batch).astype(np.float32),
    'tokens': normal(batch, _TEXT.value, cfg.joint_attention_dim),
    'pooled': normal(batch, cfg.pooled_projection_dim),
  }


def suffix(accumulation):
  return f', {accumulation} microbatches' if accumulation > 1 else ''


class Ours:
  """Our side: the compiled stage and the sampler."""

  def __init__(self, model, params, data, num_steps, counts):
    import jax
    import jax.numpy as jnp

    from eru_jax import flow
    from eru_jax.losses.flow_matching import flow_matching
    from eru_jax.training.state import OptimizerConfig, init_state
    from eru_jax.training.step import StageProgram, compile_stage
    from eru_jax.types import Conditioning

    params, data, key = jax.device_put(params), jax.device_put(data), jax.random.key(0)
    conditioning = Conditioning(tokens=data['tokens'], pooled=data['pooled'])
    batch = {'latents': data['latents'], 'text': conditioning}
    optimizer = OptimizerConfig(learning_rate=_LEARNING_RATE, clip_norm=_CLIP).build(10**6)
    density = flow.TimestepDensity()

    def loss(params, frozen, batch, key, step):
      del frozen, step
      time_key, noise_key = jax.random.split(key)
      noise = jax.random.normal(noise_key, batch['latents'].shape)
      t = density.sample(time_key, noise.shape[:1])
      return flow_matching(model.velocity(None, params), batch['latents'], noise, t, batch['text'])

    def trainer(accumulation):
      program = StageProgram(loss, accumulation=accumulation)
      iterate = compile_stage(program, optimizer, _EMA_DECAY)
      state = [init_state(params, optimizer)]

      def run():
        state[0], measured = iterate(state[0], {}, batch, key)
        jax.block_until_ready((state[0], measured))

      return run

    schedule = flow.timestep_schedule(num_steps)

    def draw(params, noise, conditioning):
      return model.sample(model.velocity(params), noise, conditioning, schedule)

    sampler = jax.jit(draw)
    trainers = {f'float32{suffix(count)}': functools.partial(trainer, count) for count in counts}
    self.sample = functools.partial(sampler, params, data['noise'], conditioning)
    samplers = {'float32': lambda: lambda: self.sample().block_until_ready()}
    self.candidates = {'train': trainers, 'sample': samplers}

    def checked(params):
      x_t = flow.interpolate(data['latents'], data['noise'], data['t'])
      velocity = model.velocity(None, params)
      loss, _ = flow_matching(velocity, data['latents'], data['noise'], data['t'], conditioning)
      return loss, velocity(x_t, data['t'], conditioning)

    self.check = functools.partial(jax.jit(jax.value_and_grad(checked, has_aux=True)), params)

    a = jnp.ones((2048, 2048))
    product = jax.jit(jnp.dot)
    self.matmul = lambda: product(a, a).block_until_ready()


class Theirs:
  """PyTorch's side, as somebody would write it for diffusers' model."""

  def __init__(self, reference, data, ids, num_steps, counts, compiled):
    import torch
    import torch.nn.functional as F

    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    img_ids = torch.from_numpy(ids).float()
    txt_ids = torch.zeros(tensors['tokens'].shape[1], 3)

    def velocity(network, x, t, tokens, pooled):
      return network(
        hidden_states=x, timestep=t, encoder_hidden_states=tokens, pooled_projections=pooled,
        img_ids=img_ids, txt_ids=txt_ids, return_dict=False,
      )[0]  # fmt: skip

    def loss(network, x_0, noise, t, tokens, pooled):
      times = t[:, None, None]
      x_t = (1 - times) * x_0 + times * noise
      return F.mse_loss(velocity(network, x_t, t, tokens, pooled).float(), noise - x_0)

    def trainer(accumulation, wrap=lambda network: network, context=contextlib.nullcontext):
      network = copy.deepcopy(reference).train()
      parameters = list(network.parameters())
      average = [parameter.detach().clone() for parameter in parameters]
      optimizer = torch.optim.AdamW(parameters, _LEARNING_RATE, weight_decay=0.0, fused=True)
      called = wrap(network)
      names = ('latents', 'tokens', 'pooled')

      def run():
        for x_0, tokens, pooled in zip(
          *(tensors[name].chunk(accumulation) for name in names), strict=True
        ):
          noise = torch.randn_like(x_0)
          t = torch.sigmoid(torch.randn(len(x_0)))
          with context():
            value = loss(called, x_0, noise, t, tokens, pooled) / accumulation
          value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
          torch._foreach_lerp_(average, parameters, 1 - _EMA_DECAY)
        return value.item()

      return run

    sigmas = [1 - step / num_steps for step in range(num_steps)] + [0.0]

    @torch.inference_mode()
    def sample(network, dtype=torch.float32):
      x, tokens, pooled = (tensors[name].to(dtype) for name in ('noise', 'tokens', 'pooled'))
      for t, t_next in zip(sigmas, sigmas[1:], strict=False):
        v = velocity(network, x, torch.full((len(x),), t, dtype=dtype), tokens, pooled)
        x = (x.float() + (t_next - t) * v.float()).to(dtype)
      return x.float()

    network = copy.deepcopy(reference).eval()
    half = torch.bfloat16
    autocast = functools.partial(torch.autocast, 'cpu', dtype=half)
    trainers = {'bfloat16': functools.partial(trainer, 1, context=autocast)}
    for accumulation in counts:
      trainers[f'float32{suffix(accumulation)}'] = functools.partial(trainer, accumulation)
      if compiled:
        trainers[f'float32, compiled{suffix(accumulation)}'] = functools.partial(
          trainer, accumulation, wrap=torch.compile
        )
    samplers = {
      'float32': lambda: functools.partial(sample, network),
      'bfloat16': lambda: functools.partial(sample, copy.deepcopy(network).to(half), half),
    }
    if compiled:
      samplers['float32, compiled'] = lambda: functools.partial(sample, torch.compile(network))
    self.candidates = {'train': trainers, 'sample': samplers}
    self.sample = lambda: sample(network).numpy()

    def check():
      checked = copy.deepcopy(reference)
      x_0, noise, t, tokens, pooled = tensors.values()
      times = t[:, None, None]
      v = velocity(checked, (1 - times) * x_0 + times * noise, t, tokens, pooled)
      value = F.mse_loss(v, noise - x_0)
      value.backward()
      gradients = {name: p.grad.numpy() for name, p in checked.named_parameters()}
      return value.item(), v.detach().numpy(), gradients

    self.check = check
    a = torch.ones(2048, 2048)
    self.matmul = lambda: torch.mm(a, a)


def prepare(makers, compile_limit):
  """Builds and warms up candidates: ({name: run}, {name: seconds}, {name: why it does not run})."""
  ready, pilot, failed = {}, {}, {}
  for name, make in makers.items():
    try:
      limit = time_limit(compile_limit) if 'compiled' in name else contextlib.nullcontext()
      with limit:
        run = make()
        run()
        began = time.perf_counter()
        run()
      pilot[name] = time.perf_counter() - began
      ready[name] = run
    except Exception as error:  # Whatever a compiler may raise; it is reported.
      if 'compiled' not in name:
        raise
      failed[name] = f'{type(error).__name__}: {str(error).splitlines()[0][:200]}'
  # Waiting for the hopeless would only lengthen the race.
  best = min(pilot.values())
  return {n: run for n, run in ready.items() if pilot[n] < _HOPELESS * best}, pilot, failed


def turn(run, repeats):
  """Median seconds of one call, after one that brings its data back into the caches."""
  run()
  seconds = []
  for _ in range(repeats):
    began = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - began)
  return statistics.median(seconds)


def race(sides, turns, repeats):
  """{side: {name: run}} -> {side: {name: [seconds of each turn]}}."""
  seconds = {side: {name: [] for name in runs} for side, runs in sides.items()}
  order = [(side, name) for side, runs in sides.items() for name in runs]
  for number in range(turns):
    for side, name in order if number % 2 else reversed(order):
      seconds[side][name].append(turn(sides[side][name], repeats))
  return seconds


def milliseconds(seconds):
  return {name: round(1e3 * value, 2) for name, value in seconds.items()}


def compare(seconds):
  """The best candidate of either side, and the ratio of their times, turn by turn."""
  medians = {
    side: {name: statistics.median(taken) for name, taken in runs.items()}
    for side, runs in seconds.items()
  }
  best = {side: min(runs, key=runs.get) for side, runs in medians.items()}
  pairs = zip(seconds['torch'][best['torch']], seconds['ours'][best['ours']], strict=True)
  ratios = sorted(theirs / ours for theirs, ours in pairs)
  quarter = len(ratios) // 4
  return {
    'ratio': round(statistics.median(ratios), 3),
    'ratio, quartiles': [round(ratios[quarter], 3), round(ratios[-1 - quarter], 3)],
    'best': best,
    'milliseconds': {side: milliseconds(runs) for side, runs in medians.items()},
  }


def agreement(cfg, ours, theirs):
  """Relative differences of loss, velocity, gradients and samples; raises where they are large."""
  from eru_jax.weights import flux as flux_table
  from eru_jax.weights import table

  (loss, velocity), grads = ours.check()
  reference_loss, reference_velocity, gradients = theirs.check()
  tensors = table.to_torch(grads, flux_table.rows(cfg), flux_table.counts(cfg))
  differences = {
    'loss': abs(float(loss) / reference_loss - 1),
    'velocity': relative_error(velocity, reference_velocity),
    'worst gradient': max(relative_error(tensors[name], g) for name, g in gradients.items()),
    'samples': relative_error(ours.sample(), theirs.sample()),
  }
  if max(differences.values()) > 1e-3:
    raise SystemExit(f'The two sides do not compute the same: {differences}')
  return {name: float(f'{value:.1e}') for name, value in differences.items()}


def measure(quick, report=print):
  """Builds both sides, checks that they agree, and times them; returns the results."""
  import jax
  import torch

  torch.set_num_threads(_THREADS.value)
  cfg, batch, model, params, reference = build(quick)
  tokens, _ = model.latent_shape
  steps = 2 if quick else _STEPS.value
  # Numbers of microbatches.
  counts = sorted({1, 1 if quick else _MICRO.value})
  data = inputs(cfg, batch, tokens)
  ours = Ours(model, params, data, steps, counts)
  compile_limit = _COMPILE.value
  if compile_limit is None:
    compile_limit = 0 if quick else 240
  ids = model.family.latent_ids(*model.grid)
  theirs = Theirs(reference, data, ids, steps, counts, compile_limit > 0)
  both = {'ours': ours, 'torch': theirs}
  result = {
    'date': datetime.date.today().isoformat(),
    'processor': processor(),
    'cores': os.cpu_count(),
    'versions': {'python': platform.python_version()}
    | {name: importlib.metadata.version(name) for name in ('jax', 'flax', 'torch', 'diffusers')},
    'setting': {
      'architecture': cfg.to_dict(),
      'parameters': sum(x.size for x in jax.tree.leaves(params)),
      'batch': batch,
      'image tokens': tokens,
      'text tokens': _TEXT.value,
      'euler steps': steps,
      'torch threads': torch.get_num_threads(),
      'environment': {name: os.environ.get(name) for name in _ALLOCATOR},
    },
    'agreement': agreement(cfg, ours, theirs),
  }
  report(json.dumps(result['agreement']))
  forward = flops(cfg, batch, tokens, _TEXT.value)
  prepared = {
    task: {side: prepare(maker.candidates[task], compile_limit) for side, maker in both.items()}
    for task in ('train', 'sample')
  }
  report('timing')
  turns, repeats = (2, 1) if quick else (_TURNS.value, 3)
  peak = dict.fromkeys(both, 0)
  for task, work in (('train', 3 * forward), ('sample', steps * forward)):
    sides = prepared[task]
    result[task] = compare(race({side: sides[side][0] for side in sides}, turns, repeats)) | {
      'milliseconds warming up': {side: milliseconds(sides[side][1]) for side in sides},
      'does not run': sides['torch'][2],
      'gflop': round(work / 1e9, 2),
    }
    for side, maker in both.items():
      best = min(turn(maker.matmul, 1) for _ in range(2 if quick else 20))
      peak[side] = max(peak[side], 2 * 2048**3 / best / 1e9)
  result['matmul peak, gflop/s'] = {
    'jnp.dot': round(peak['ours']),
    'torch.mm': round(peak['torch']),
  }
  top = max(peak.values())
  for task in ('train', 'sample'):
    compared = result[task]
    rates = {
      side: compared['gflop'] / compared['milliseconds'][side][name] * 1e3
      for side, name in compared['best'].items()
    }
    compared['gflop/s'] = {side: round(rate, 1) for side, rate in rates.items()}
    compared['share of peak'] = {side: round(rate / top, 3) for side, rate in rates.items()}
  return result


def main(argv):
  del argv
  if not _ALLOCATOR.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], {**_ALLOCATOR, **os.environ})
  result = measure(_QUICK.value)
  if not _QUICK.value:
    path = pathlib.Path(_OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + '\n')
  print(json.dumps(result, indent=1))
  print(last_line(result, _QUICK.value))


if __name__ == '__main__':
  app.run(main)
