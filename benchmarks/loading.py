"""How fast, and in how much memory, are weights read from safetensors?

    python benchmarks/loading.py --directory=/tmp/loading

Writes a random bfloat16 checkpoint with FLUX.1's names and proportions of about `--gigabytes`, in
shards as diffusers makes them, and reads it in fresh processes: into arrays as they are, cast to
float32, rounded to int8, and as Orbax arrays that a conversion made of it. Peak memory is that of
the whole process; what it has before it reads is given beside it. The operating system's cache is
asked to forget the file before each turn, which it may not do.
"""

import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time

from absl import app, flags

_DIRECTORY = flags.DEFINE_string('directory', None, 'Where the checkpoint goes.', required=True)
_GIGABYTES = flags.DEFINE_float('gigabytes', 2.0, 'Its size.')
_TURNS = flags.DEFINE_integer('turns', 3, 'Turns of each kind; the median counts.', lower_bound=1)
_ONE = flags.DEFINE_string('one', None, 'Internal: read once in this process.')
_KINDS = {
  'as it is': dict(dtype=None),
  'float32': dict(dtype='float32'),
  'int8': dict(dtype=None, int8=''),
  'orbax': dict(dtype=None),
}


def _memory(field: str) -> int:
  """VmHWM (most) or VmRSS (now) of this process in bytes; Linux only. getrusage's maximum would
  begin with that of the process that started this one."""
  found = re.search(rf'{field}:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())
  return int(found[1]) * 1024


def _config(gigabytes: float):
  """FLUX.1's proportions at a size: as many blocks as it has, of fewer heads."""
  from eru_jax.models import registry

  family = registry.family('flux')
  heads = max(1, round(24 * (gigabytes / 23.8) ** 0.5))
  return family, family.config(num_attention_heads=heads)


def _write(directory: pathlib.Path, gigabytes: float) -> int:
  """Writes the checkpoint, and returns its bytes."""
  import ml_dtypes
  import numpy as np

  from eru_jax.weights import layouts, table
  from eru_jax.weights.tensor_files import TensorWriter, make_header

  family, config = _config(gigabytes)
  component = layouts.backbone(family)
  rows = component.layouts['diffusers'].rows(config)
  shapes = table.torch_shapes(rows, component.counts(config), component.shapes(config))
  header = make_header({n: (s, ml_dtypes.bfloat16) for n, s in shapes.items()}, {'format': 'pt'})
  rng = np.random.default_rng(0)
  writer = TensorWriter(directory / component.layouts['diffusers'].file, header)
  for name, shape in shapes.items():
    writer.write(name, 0, rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16))
  writer.finish()
  path = directory / component.layouts['diffusers'].file
  (path.parent / 'config.json').write_text(json.dumps(config.to_dict()))
  return path.stat().st_size


def _read(directory: pathlib.Path, kind: str) -> dict:
  """Reads the backbone onto the devices, and says what that took."""
  import jax
  from flax import traverse_util

  from eru_jax import sharding
  from eru_jax.models import registry
  from eru_jax.weights import layouts, sources

  options = dict(_KINDS[kind])
  component = layouts.backbone(registry.family('flux'))
  weights = sources.open_weights(component, directory, options['dtype'], options.get('int8'))
  mesh = sharding.make_mesh(sharding.MeshConfig())
  boxed = component.boxed(weights.config)
  places = traverse_util.flatten_dict(sharding.logical_shardings(boxed, mesh), sep='/')
  specs = weights.specs()
  before, began = _memory('VmRSS'), time.monotonic()
  params = dict(weights.arrays(places))
  seconds = time.monotonic() - began
  return {
    'seconds': seconds,
    'before': before,
    'peak': _memory('VmHWM'),
    'target': sum(array.nbytes for array in params.values()),
    'largest': max(array.nbytes for array in params.values()),
    'arrays': len(specs),
    'devices': [str(device) for device in jax.devices()],
  }


def _forget(directory: pathlib.Path) -> None:
  """Asks for the directory's files to be dropped from the cache."""
  for path in directory.rglob('*'):
    if path.is_file():
      with open(path, 'rb') as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv):
  del argv
  directory = pathlib.Path(_DIRECTORY.value)
  if _ONE.value:
    print(json.dumps(_read(directory, _ONE.value)))
    return
  from eru_jax.training.run import versions
  from eru_jax.weights.conversion import ConversionRequest, convert

  source, converted = directory / 'diffusers', directory / 'eru'
  for path in (source, converted):
    shutil.rmtree(path, ignore_errors=True)
  size = _write(source, _GIGABYTES.value)
  before, began = _memory('VmHWM'), time.monotonic()
  convert(ConversionRequest('flux', str(source), str(converted)))
  results = {
    'conversion to Orbax arrays': {
      'seconds': round(time.monotonic() - began, 2),
      'before_gb': before / 1e9,
      'peak_gb': _memory('VmHWM') / 1e9,
    }
  }
  for kind in _KINDS:
    place, turns = converted if kind == 'orbax' else source, []
    for _ in range(_TURNS.value):
      _forget(place)
      command = [sys.executable, __file__, f'--directory={place}', f'--one={kind}']
      done = subprocess.run(command, capture_output=True, text=True, check=True)
      turns.append(json.loads(done.stdout.splitlines()[-1]))
    one = sorted(turns, key=lambda turn: turn['seconds'])[len(turns) // 2]
    peak = max(turn['peak'] - turn['before'] for turn in turns)
    results[kind] = {
      'seconds': round(one['seconds'], 2),
      'gb_per_second': round(size / 1e9 / one['seconds'], 3),
      'target_gb': one['target'] / 1e9,
      'largest_array_gb': one['largest'] / 1e9,
      'before_gb': one['before'] / 1e9,
      'peak_beyond_before_gb': peak / 1e9,
      'beyond_target_gb': (peak - one['target']) / 1e9,
    }
    print(kind, results[kind])
  record = {
    'date': datetime.date.today().isoformat(),
    'file_gb': size / 1e9,
    'machine': {'processor': platform.machine(), 'load': os.getloadavg()},
    'versions': versions(),
    'results': results,
  }
  print(json.dumps(record))


if __name__ == '__main__':
  app.run(main)
