"""What `gpu.py` measures: its rows, their sizes, and how a row's process times and reports."""

import dataclasses
import fnmatch
import json
import math
import statistics
import time

TASKS = ('agreement', 'peak', 'attention', 'sample', 'lora', 'full')
SIDES = ('ours', 'diffusers')
# What a row's process prints in front of what it found.
MARK = 'measured: '
_GROUPS = 3


@dataclasses.dataclass(frozen=True)
class Row:
  """One process of the comparison.

  Attributes:
    task: one of TASKS; 'lora' trains adapters, 'full' the whole backbone.
    side: one of SIDES.
    pixels: edge of the pictures, 0 where there are none.
    options: ours a rematerialisation policy and 'unrolled', diffusers' 'checkpoint' (gradient
      checkpointing) and 'compiled' (torch.compile of its repeated blocks).
  """

  task: str
  side: str
  pixels: int = 0
  options: tuple[str, ...] = ()

  @property
  def name(self):
    pixels = (str(self.pixels),) if self.pixels else ()
    return '-'.join((self.task, *pixels, self.side, *self.options))


def _all_rows():
  """What is wanted first comes first: the time may end anywhere."""
  rows = [Row(task, side) for task in ('peak', 'attention') for side in SIDES]
  kinds = {
    'sample': [('ours',), ('diffusers', 'compiled')],
    'full': [('ours', 'names'), ('diffusers', 'checkpoint', 'compiled')],
    'lora': [('ours', 'names'), ('diffusers', 'checkpoint', 'compiled')],
  }
  more = {
    'sample': [('ours', 'unrolled'), ('diffusers',)],
    'full': [('ours', 'attn'), ('ours', 'full'), ('diffusers', 'checkpoint')],
    'lora': [
      ('ours', 'none'),
      ('diffusers', 'compiled'),
      ('ours', 'attn'),
      ('ours', 'full'),
      ('diffusers', 'checkpoint'),
    ],
  }
  for chosen in (kinds, more):
    for pixels in (1024, 512):
      for task, variants in chosen.items():
        rows += [Row(task, side, pixels, tuple(options)) for side, *options in variants]
  return tuple(rows)


AGREEMENT = tuple(Row('agreement', side) for side in SIDES)
ROWS = _all_rows()


def chosen_rows(patterns):
  """Rows whose names match one of the patterns, in order; all of them without any.

  Raises:
    ValueError: naming a pattern that matches no row.
  """
  for pattern in patterns:
    if not any(fnmatch.fnmatchcase(row.name, pattern) for row in ROWS):
      raise ValueError(f'--rows: {pattern!r} matches no row; --list shows them.')
  if not patterns:
    return list(ROWS)
  return [row for row in ROWS if any(fnmatch.fnmatchcase(row.name, p) for p in patterns)]


def row_named(name):
  return next(row for row in (*AGREEMENT, *ROWS) if row.name == name)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How large everything is; the defaults are FLUX.1-dev's.

  Attributes:
    architecture: keys of FluxConfig.
    scale: divides the pixels a row is named after.
    text_tokens: length of the text.
    batches: batch sizes, 1 first.
    rank: of the adapters.
    matmul: edge of the matrices of the peak.
    euler_steps: Euler steps in one timed call of the sampler.
    least_seconds: how long a group of calls is timed at least.
    gpu: whether to insist on a GPU.
  """

  architecture: dict = dataclasses.field(default_factory=dict)
  scale: int = 1
  text_tokens: int = 512
  batches: tuple[int, ...] = (1, 2, 4, 8)
  rank: int = 64
  matmul: int = 8192
  euler_steps: int = 4
  least_seconds: float = 1.0
  gpu: bool = True

  def config(self):
    from eru_jax.models.flux import FluxConfig

    return FluxConfig(**self.architecture)

  def grid(self, pixels):
    """Rows and columns of image tokens: latents have an eighth of the pixels, tokens half."""
    return (pixels // self.scale // 16,) * 2


FULL = Sizes()
QUICK = Sizes(
  architecture=dict(
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    axes_dims_rope=(4, 6, 6),
  ),
  scale=16,
  text_tokens=8,
  batches=(1, 2),
  rank=4,
  matmul=256,
  euler_steps=2,
  least_seconds=0.0,
  gpu=False,
)


def tell(**found):
  """Hands the parent what has been found so far; it merges and saves it at once."""
  print(MARK + json.dumps(found), flush=True)


def merge(into, found):
  """Merges nested dicts in place."""
  for key, value in found.items():
    if isinstance(value, dict) and isinstance(into.get(key), dict):
      merge(into[key], value)
    else:
      into[key] = value


def seconds_a_call(run, wait, least):
  """Median over groups of calls; each group is waited for once, so that launches overlap."""
  run()
  wait()
  began = time.perf_counter()
  run()
  wait()
  pilot = time.perf_counter() - began
  count = max(1, min(20, math.ceil(least / pilot)))
  groups = []
  for _ in range(_GROUPS):
    began = time.perf_counter()
    for _ in range(count):
      run()
    wait()
    groups.append((time.perf_counter() - began) / count)
  return statistics.median(groups)


def sweep(batches, measure, seconds):
  """Tells of batch 1, and of the largest other batch that fits into memory and the time left.

  Args:
    batches: sizes, 1 first.
    measure: batch -> dict with `call_seconds`, how long one timed call takes.
    seconds: how long all of it may take.
  """
  began = time.perf_counter()
  first = measure(batches[0])
  tell(batches={str(batches[0]): first})
  spent = time.perf_counter() - began
  for batch in sorted(batches[1:], reverse=True):
    # Preparing takes as long again, and calls grow with the batch: two to warm up, three groups.
    expected = spent + batch * (2 + _GROUPS) * first['call_seconds']
    if time.perf_counter() - began + expected > seconds:
      tell(skipped={str(batch): 'no time'})
      continue
    try:
      tell(batches={str(batch): measure(batch)})
      return
    except Exception as error:  # Memory ends in many ways; whichever it was is reported.
      tell(skipped={str(batch): reason(error)})


def reason(error):
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:300]}'
