"""What the comparisons with diffusers share: operations by formula, errors, times, ratios."""

import contextlib
import json
import pathlib
import platform
import signal

from eru_jax.flops import FORMULAS, adapter_flops, flops, full_flops, lora_flops

__all__ = [
  'FORMULAS',
  'adapter_flops',
  'flops',
  'full_flops',
  'last_line',
  'lora_flops',
  'processor',
  'relative_error',
  'time_limit',
]


def relative_error(ours, theirs):
  import numpy as np

  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@contextlib.contextmanager
def time_limit(seconds):
  """Raises TimeoutError inside if it takes longer."""

  def expire(signum, frame):
    del signum, frame
    raise TimeoutError(f'not ready after {seconds} s')

  previous = signal.signal(signal.SIGALRM, expire)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def processor():
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.split(':', 1)[1].strip()
  return platform.processor()


def last_line(result, quick):
  """The ratios as JSON, marked where they are those of a tiny network."""
  ratios = {f'{task}_ratio': result[task]['ratio'] for task in ('train', 'sample')}
  return json.dumps({'quick': True} | ratios if quick else ratios)
