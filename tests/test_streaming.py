"""Weights go from files into arrays piece by piece: exactly, within bounds, or not at all.

Sharding needs a process with several devices: this file, run as a script, is that process.
"""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.models import registry
from eru_jax.models.quantize import quantize
from eru_jax.weights import arrays, layouts, streaming, table, tensor_files
from eru_jax.weights.safetensors_io import write_safetensors
from eru_jax.weights.tensor_files import TensorFiles, TensorWriter, make_header

FAMILY = registry.family('flux')
FLUX = layouts.backbone(FAMILY)
CONFIG = FAMILY.config.from_dict(
  FAMILY.tiny | dict(num_layers=2, num_single_layers=3, guidance_embeds=True)
)


def random_params(dtype=np.float32):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: rng.standard_normal(s.shape).astype(np.float32).astype(dtype), FLUX.shapes(CONFIG)
  )


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


def write(path, layout='diffusers', dtype=np.float32):
  """A file with random parameters, and these."""
  params = random_params(dtype)
  tensors = table.to_torch(params, FLUX.layouts[layout].rows(CONFIG), FLUX.counts(CONFIG))
  write_safetensors(path, tensors)
  return params


def stored(path, layout='diffusers', **options):
  rows = FLUX.layouts[layout].rows(CONFIG)
  return streaming.Stored(
    TensorFiles(path), rows, FLUX.counts(CONFIG), FLUX.shapes(CONFIG), **options
  )


def assert_same(ours, theirs):
  ours, theirs = flat(ours), flat(theirs)
  assert ours.keys() == theirs.keys()
  for path, value in theirs.items():
    mine, value = np.asarray(ours[path]), np.asarray(value)
    assert mine.dtype == value.dtype, path
    np.testing.assert_array_equal(mine, value, path)


@pytest.mark.parametrize('layout', FLUX.layouts)
@pytest.mark.parametrize('cast', [None, np.float32, ml_dtypes.bfloat16])
def test_what_is_read_is_what_was_written(layout, cast, tmp_path, monkeypatch):
  params = write(tmp_path / 'x.safetensors', layout, ml_dtypes.bfloat16)
  files = stored(tmp_path / 'x.safetensors', layout, cast=cast)
  wanted = jax.tree.map(lambda x: x.astype(cast or x.dtype), params)
  assert_same(streaming.load(files), wanted)
  specs = {path: (spec.shape, spec.dtype) for path, spec in files.specs().items()}
  assert specs == {path: (x.shape, x.dtype) for path, x in flat(wanted).items()}
  # Where tensors have to be cast, they come in several chunks.
  monkeypatch.setattr(tensor_files, 'CHUNK', 100)
  assert_same(streaming.load(files), wanted)


@pytest.mark.parametrize('layout', ['diffusers', 'original'])
def test_int8_is_that_of_quantize(layout, tmp_path, monkeypatch):
  params = write(tmp_path / 'x.safetensors', layout, ml_dtypes.bfloat16)
  params['x_embedder']['kernel'][:, 3] = 0  # A column without a largest number.
  tensors = table.to_torch(params, FLUX.layouts[layout].rows(CONFIG), FLUX.counts(CONFIG))
  write_safetensors(tmp_path / 'x.safetensors', tensors)
  pattern = 'attn|embedder'
  wanted = quantize(jax.tree.map(jnp.asarray, params), pattern)
  assert wanted['x_embedder']['kernel'].dtype == np.int8
  for chunk in (streaming.CHUNK, 1000):
    monkeypatch.setattr(streaming, 'CHUNK', chunk)
    assert_same(streaming.load(stored(tmp_path / 'x.safetensors', layout, int8=pattern)), wanted)


def test_slices_read_no_more_rows_than_they_hold(tmp_path, monkeypatch):
  params = write(tmp_path / 'x.safetensors')
  files = stored(tmp_path / 'x.safetensors')
  read, seen = tensor_files._read_exactly, []

  def counting(tensor, offset, out):
    seen.append(out.nbytes)
    read(tensor, offset, out)

  monkeypatch.setattr(tensor_files, '_read_exactly', counting)
  cell = next(
    c for c in table.cells(files.rows, files.counts) if c.path.endswith('proj_mlp/kernel')
  )
  kernel = flat(params)[cell.path]
  layers, inputs, outputs = kernel.shape
  index = (slice(1, 3), slice(0, inputs), slice(outputs // 2, outputs))
  found = table.gather(cell, index, kernel.dtype, files.files.read_into)
  np.testing.assert_array_equal(found, kernel[index])
  # A matrix lies with its outputs first: half of them in two of three layers are a third of it.
  assert sum(seen) == kernel.nbytes * 2 / layers / 2
  index = (slice(0, layers), slice(3, 7), slice(0, outputs))
  found = table.gather(cell, index, kernel.dtype, files.files.read_into)
  np.testing.assert_array_equal(found, kernel[index])


@pytest.mark.parametrize('int8', [None, ''])
def test_the_host_holds_one_array_at_a_time(int8, tmp_path, monkeypatch):
  """In Python's own account of living bytes, which numpy's arrays are in and JAX's are not."""
  shapes = {'a': (6, 256, 512), 'b': (6, 512, 256), 'c': (6, 512, 512)}
  rows = [row for name in shapes for row in table.linear(name + '.{i}', name, bias=False)]
  params = {name: {'kernel': np.ones(shape, np.float32)} for name, shape in shapes.items()}
  write_safetensors(tmp_path / 'x.safetensors', table.to_torch(params, rows, {'i': 6}))
  chunk = 1 << 16
  monkeypatch.setattr(tensor_files, 'CHUNK', chunk)
  monkeypatch.setattr(streaming, 'CHUNK', chunk)
  files = TensorFiles(tmp_path / 'x.safetensors')
  of = jax.eval_shape(lambda: params)
  source = streaming.Stored(files, rows, {'i': 6}, of, ml_dtypes.bfloat16, int8)
  largest = math.prod(shapes['c']) * (2 if int8 is None else 1)
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  places = dict.fromkeys(flat(params), where)
  list(source.arrays(places))  # What is imported and compiled on the way does not count.
  tracemalloc.start()
  try:
    for _, array in source.arrays(places):
      assert array.size
      del array  # On the CPU it may be the host's own copy.
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    whole = streaming.load(source)
    held = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  extra = 8 * chunk + 100_000
  assert largest <= peak < largest + extra, (peak, largest)
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
  assert total <= held < total + extra, (held, total)


def never(*args):
  raise AssertionError('a tensor was read')


def test_all_problems_are_found_in_the_headers(tmp_path, monkeypatch):
  params = write(tmp_path / 'x.safetensors', dtype=ml_dtypes.bfloat16)
  tensors = table.to_torch(params, FLUX.layouts['diffusers'].rows(CONFIG), FLUX.counts(CONFIG))
  del tensors['x_embedder.bias']
  tensors['single_transformer_blocks.1.proj_out.bias'] = np.zeros(5, ml_dtypes.bfloat16)
  tensors['transformer_blocks.0.attn.to_q.bias'] = np.zeros(32, np.int32)
  tensors['transformer_blocks.1.attn.to_k.bias'] = np.zeros(32, np.float32)
  tensors['lora.weight'] = np.zeros(2)
  write_safetensors(tmp_path / 'x.safetensors', tensors)
  monkeypatch.setattr(tensor_files, '_read_exactly', never)
  for source, mixed in (
    (stored(tmp_path / 'x.safetensors'), True),
    (stored(tmp_path / 'x.safetensors', cast=np.float32), False),
  ):
    with pytest.raises(UserError) as caught:
      next(source.arrays())
    message = str(caught.value)
    assert 'x.safetensors: The weights do not fit this model' in message
    for words in (
      'missing: x_embedder.bias', 'unexpected: lora.weight',
      'wrong shape: single_transformer_blocks.1.proj_out.bias (5,) instead of (32,)',
      'transformer_blocks.0.attn.to_q.bias int32, which is no floating point',
    ):  # fmt: skip
      assert words in message
    assert ('transformer_blocks.1.attn.to_k.bias float32, but' in message) == mixed


def header(entries, body=8):
  data = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
  return len(data).to_bytes(8, 'little') + data + bytes(body)


def entry(start, stop, shape=(2,), dtype='F32'):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [start, stop]}


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (header({'a': entry(0, 8), 'b': entry(0, 8)}), "'b' begins at 0, where 8 is free"),
    (header({'a': entry(0, 8), 'b': entry(4, 12)}, 12), "'b' begins at 4, where 8 is free"),
    (header({'a': entry(8, 16)}, 16), "'a' begins at 8, where 0 is free"),
    (header({'a': entry(0, 8, (3,))}), "'a' has 8 bytes, but 12 by its shape"),
    (header({'a': entry(0, 8, (2**40, 2**40))}), "'a' has the shape"),
    (header({'a': entry(0, 8, (-2,))}), 'no lists of natural numbers'),
    (header({'a': entry(0, 8, (True,))}), 'no lists of natural numbers'),
    (header({'a': entry(0, 8, (2.0,))}), 'no lists of natural numbers'),
    (header({'a': entry(8, 0)}), 'data_offsets of'),
    (header({'a': entry(0, 8) | {'more': 1}}), 'or more than these'),
    (header({'a': 1}), 'has no dtype'),
    (header({'a': entry(0, 8, dtype='Q4')}), "'Q4', which is not known"),
    (header({'a': entry(0, 8, dtype=['F32'])}), 'which is not known'),
    (header({'a': entry(0, 8), '__metadata__': {'x': 1}}), 'no table of strings'),
    (header('{"a":1,"a":2}'), 'occurs twice'),
    (header('[' * 100_000), 'not a whole safetensors file'),
    (header('[]'), 'no JSON object'),
    ((4).to_bytes(8, 'little') + '{}'.encode('utf-16-le'), 'not a whole safetensors file'),
    (header({'a': entry(0, 8)}, 9), 'bytes by its header|but'),
    (header({'a': entry(0, 8)}, 7), 'bytes by its header|but'),
  ],
)
def test_a_header_is_not_trusted(content, words, tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(content)
  with pytest.raises(UserError, match='x.safetensors is not a whole safetensors file') as caught:
    TensorFiles(path)
  assert re.search(words, str(caught.value)) and '\n' not in str(caught.value)


def test_a_tensor_in_two_shards(tmp_path):
  for name in ('1', '2'):
    write_safetensors(tmp_path / f'{name}.safetensors', {'a': np.zeros(2), name: np.zeros(2)})
  index = {'weight_map': {'a': '1.safetensors', '2': '2.safetensors'}}
  (tmp_path / 'm.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(
    UserError, match='2.safetensors holds tensors that another shard has'
  ) as caught:
    TensorFiles(tmp_path / 'm.safetensors')
  assert caught.value.details == ('twice: a',)


def test_a_file_cut_off_while_it_is_read(tmp_path):
  path = tmp_path / 'x.safetensors'
  write(path)
  source = stored(path)
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(UserError, match='x.safetensors has become shorter'):
    streaming.load(source)
  path.unlink()
  with pytest.raises(UserError, match='x.safetensors cannot be read: No such file'):
    streaming.load(source)


EVERY_DTYPE = {
  code: (np.arange(12) % 2).reshape(3, 4).astype(dtype)
  for code, dtype in tensor_files.DTYPES.items()
}


def test_what_is_written_is_what_the_library_writes(tmp_path):
  tensors = EVERY_DTYPE | {
    'scalar': np.array(3.0, np.float32),
    'empty': np.zeros((3, 0), np.float32),
    'ünï"\\\n': np.zeros(2, ml_dtypes.bfloat16),
  }
  for metadata in ({'format': 'pt'}, None):
    header = make_header({n: (x.shape, x.dtype) for n, x in tensors.items()}, metadata)
    path = tmp_path / f'{metadata is None}.safetensors'
    writer = TensorWriter(path, header)
    for name in reversed(list(tensors)):
      value = tensors[name]
      if value.ndim == 2:  # In pieces, the last first, and not contiguous.
        writer.write(name, 1, np.asarray(value[1:], order='F'))
        writer.write(name, 0, value[:1])
      else:
        writer.write(name, 0, value)
    writer.finish()
    assert path.read_bytes() == safetensors.numpy.save(tensors, metadata)
    files = TensorFiles(path)
    for name, value in tensors.items():
      np.testing.assert_array_equal(files.read(name), value)


def test_a_file_that_is_not_filled_is_not_finished(tmp_path):
  header = make_header({'a': ((4,), np.float32)})
  writer = TensorWriter(tmp_path / 'x.safetensors', header)
  writer.write('a', 0, np.zeros(3, np.float32))
  with pytest.raises(AssertionError, match='4 bytes were not written'):
    writer.finish()
  writer.close()
  with pytest.raises(UserError, match='x.safetensors cannot be written: File exists'):
    TensorWriter(tmp_path / 'x.safetensors', header)


# Several devices.


def _on_mesh(directory):
  """Reads a file and Orbax arrays onto a mesh of eight, and compares with the host's."""
  mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  places = flat(sharding.logical_shardings(FLUX.boxed(CONFIG), mesh))
  path = directory / 'x.safetensors'
  split = 0
  for options in ({}, {'int8': 'attn'}):
    source = stored(path, **options)
    whole = dict(source.arrays())
    saved = directory / f'arrays{len(options)}'
    arrays.save(saved, iter(whole.items()))
    where = {name: streaming.sharding_of(name, spec.ndim, places) for name, spec in whole.items()}
    for found in (dict(source.arrays(places)), dict(arrays.load(saved, where))):
      assert found.keys() == whole.keys()
      for name, value in whole.items():
        array = found[name]
        assert array.sharding == where[name] and array.dtype == value.dtype, name
        np.testing.assert_array_equal(np.asarray(array), value, name)
        for shard in array.addressable_shards:
          np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index], name)
        split += array.addressable_shards[0].data.size < array.size
    kernels = [name for name in whole if name.endswith('attn/to_out_0/kernel')]
    assert all(where[name].spec[1:] == ('tensor', 'fsdp') for name in kernels) and kernels
  print(json.dumps({'devices': jax.device_count(), 'split': split}))


def test_shards_on_eight_devices(tmp_path):
  write(tmp_path / 'x.safetensors', dtype=ml_dtypes.bfloat16)
  root = pathlib.Path(__file__).resolve().parents[1]
  env = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': os.pathsep.join([str(root), str(root / 'tests')]),
  }
  done = subprocess.run(
    [sys.executable, __file__, str(tmp_path)], env=env, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr[-3000:]
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['devices'] == 8 and result['split'] > 50


if __name__ == '__main__':
  _on_mesh(pathlib.Path(sys.argv[1]))
