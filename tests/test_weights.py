"""Weight tables invert exactly; safetensors files are read, checked and never half-written."""

import contextlib
import errno
import json
import resource

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import traverse_util

from eru_jax import files
from eru_jax.errors import UserError
from eru_jax.models import registry
from eru_jax.models.autoencoder_kl import AutoencoderConfig, AutoencoderKL
from eru_jax.models.flux import FluxConfig
from eru_jax.models.minilm import BertConfig, MiniLM
from eru_jax.types import Conditioning
from eru_jax.weights import autoencoder_kl as autoencoder_table
from eru_jax.weights import flux as flux_table
from eru_jax.weights import minilm as minilm_table
from eru_jax.weights.safetensors_io import read_safetensors, write_safetensors
from eru_jax.weights.table import Row, to_flax, to_torch

FLUX = FluxConfig.from_dict(
  registry.family('flux').tiny | dict(num_layers=2, num_single_layers=3, guidance_embeds=True)
)
AUTOENCODER = AutoencoderConfig(
  latent_channels=4, block_out_channels=(8, 12), layers_per_block=2, norm_num_groups=4
)
MINILM = BertConfig(50, 24, 3, 2, 40, 16, 2)


def flux_shapes():
  config, family = FLUX, registry.family('flux')
  conditioning = Conditioning(jnp.zeros((1, 3, 32)), None, jnp.zeros((1, 32)))
  x, t, ids = jnp.zeros((1, 4, config.in_channels)), jnp.zeros(1), family.latent_ids(2, 2)
  return lambda key: family.backbone(config).init(key, x, t, conditioning, ids, t)['params']


def autoencoder_shapes():
  return lambda key: AutoencoderKL(AUTOENCODER).init(key, jnp.zeros((1, 8, 8, 3)))['params']


def minilm_shapes():
  ids = jnp.zeros((1, 4), jnp.int32)
  return lambda key: MiniLM(MINILM).init(key, ids, ids >= 0)['params']


# (rows, counts, shapes) of every table.
TABLES = {
  'flux': (flux_table.rows(FLUX), flux_table.counts(FLUX), flux_shapes),
  'autoencoder_kl': (
    autoencoder_table.rows(AUTOENCODER),
    autoencoder_table.counts(AUTOENCODER),
    autoencoder_shapes,
  ),
  'minilm': (minilm_table.rows(MINILM), minilm_table.counts(MINILM), minilm_shapes),
}


@pytest.fixture(params=TABLES)
def model(request):
  """(rows, counts, shapes, random bfloat16 parameters) of a tiny model."""
  rows, counts, shapes = TABLES[request.param]
  shapes = nn.unbox(jax.eval_shape(shapes(), jax.random.key(0)))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(ml_dtypes.bfloat16), shapes)
  return rows, counts, shapes, params


def assert_same(a, b):
  """Same names, dtypes, shapes and bytes."""
  assert a.keys() == b.keys()
  for name, x in a.items():
    y = b[name]
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


def test_tables_invert_exactly_through_a_file(model, tmp_path):
  rows, counts, shapes, params = model
  tensors = to_torch(params, rows, counts)
  assert all(value.flags.c_contiguous for value in tensors.values())
  assert sum(value.size for value in tensors.values()) == sum(
    s.size for s in jax.tree.leaves(shapes)
  )
  write_safetensors(tmp_path / 'a.safetensors', tensors)
  read = read_safetensors(tmp_path / 'a.safetensors')
  assert_same(read, tensors)
  back = to_flax(read, rows, counts, shapes)
  flat = [traverse_util.flatten_dict(tree, sep='/') for tree in (back, params)]
  assert_same(*flat)
  # And from the reference's side, which is how users come: file -> flax -> file, byte by byte.
  write_safetensors(tmp_path / 'b.safetensors', to_torch(back, rows, counts))
  before, after = ((tmp_path / f'{name}.safetensors').read_bytes() for name in 'ab')
  assert before == after


def test_all_that_does_not_fit_is_listed_in_one_error(model):
  rows, counts, shapes, params = model
  tensors = to_torch(params, rows, counts)
  missing, wrong, transposed = [n for n, x in tensors.items() if len(set(x.shape[:2])) == 2][:3]
  del tensors[missing]
  tensors[wrong] = tensors[wrong][:-1]
  tensors[transposed] = np.swapaxes(tensors[transposed], 0, 1)
  tensors['nosuch.weight'] = np.zeros(3)
  with pytest.raises(UserError) as caught:
    to_flax(tensors, rows, counts, shapes)
  message = str(caught.value)
  for kind, name in (
    ('missing', missing), ('unexpected', 'nosuch.weight'), ('wrong shape', wrong), ('', transposed)
  ):  # fmt: skip
    assert kind in message and name in message, message
  # In the reference's own order of axes, in which the file has them.
  shape = tensors[transposed].shape
  swapped = (shape[1], shape[0], *shape[2:])
  assert f'wrong shape: {transposed} {shape} instead of {swapped}' in caught.value.details


def test_a_layer_of_another_width_is_named_beside_its_neighbours(model):
  """Stacked layers must agree with each other before they can be stacked."""
  rows, counts, shapes, params = model
  tensors = to_torch(params, rows, counts)
  name = next(n for n, x in tensors.items() if '.1.' in n and x.ndim == 1)
  tensors[name] = np.zeros(5, np.float32)
  with pytest.raises(UserError, match='wrong shape') as caught:
    to_flax(tensors, rows, counts, shapes)
  assert name in str(caught.value) and '(5,)' in str(caught.value)


def test_every_missing_tensor_is_listed_in_a_line_of_its_own(model):
  rows, counts, shapes, params = model
  with pytest.raises(UserError) as caught:
    to_flax({}, rows, counts, shapes)
  wanted = {f'missing: {name}' for name in to_torch(params, rows, counts)}
  assert set(caught.value.details) == wanted and '\n' not in caught.value.sentence
  assert str(caught.value).splitlines()[1:] == [f'  {line}' for line in caught.value.details]


def test_parameters_that_are_not_in_the_table_are_refused():
  rows = [Row('a.weight', 'a/kernel', 'linear')]
  with pytest.raises(UserError, match='missing: a/kernel\n  unknown: b/kernel'):
    to_torch({'b': {'kernel': np.zeros((2, 3))}}, rows, {})


# Files.

EVERY_DTYPE = {
  str(np.dtype(dtype)): (np.arange(6) % 2).reshape(2, 3).astype(dtype)
  for dtype in (
    np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8,
    np.uint8, np.bool_,
  )
}  # fmt: skip
ODD_SHAPES = {
  'scalar': np.array(3.0, np.float32),
  'empty': np.zeros((0, 4), np.float32),
  'transposed': np.arange(6, dtype=np.int32).reshape(2, 3).T,
  'bfloat16': np.array([[np.nan, -np.inf], [-0.0, 1e-40]], ml_dtypes.bfloat16),
}


@pytest.mark.parametrize('tensors', [EVERY_DTYPE, ODD_SHAPES], ids=['dtypes', 'shapes'])
def test_files_agree_with_the_safetensors_library(tensors, tmp_path):
  path = tmp_path / 'x.safetensors'
  write_safetensors(path, tensors, {'format': 'pt'})
  assert_same(safetensors.numpy.load_file(path), tensors)
  with safetensors.safe_open(path, 'np') as file:
    assert file.metadata() == {'format': 'pt'}
  contiguous = {k: np.asarray(v, order='C') for k, v in tensors.items()}
  safetensors.numpy.save_file(contiguous, tmp_path / 'theirs.safetensors')
  assert_same(read_safetensors(tmp_path / 'theirs.safetensors'), tensors)


def test_bfloat16_files_of_torch_are_read(tmp_path):
  torch = pytest.importorskip('torch')
  from safetensors.torch import load_file, save_file

  theirs = {'w': torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()}
  save_file(theirs, tmp_path / 'x.safetensors')
  ours = read_safetensors(tmp_path / 'x.safetensors')
  assert ours['w'].dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(ours['w'].astype(np.float32), theirs['w'].float().numpy())
  write_safetensors(tmp_path / 'y.safetensors', ours)
  assert torch.equal(load_file(tmp_path / 'y.safetensors')['w'], theirs['w'])


@pytest.fixture
def shards(tmp_path):
  """Base name of a file that is there in two shards and an index only, and its tensors."""
  tensors = {name: np.full(3, i, np.float32) for i, name in enumerate(('a', 'b', 'c'))}
  parts = {'m-1.safetensors': ('a', 'c'), 'm-2.safetensors': ('b',)}
  for file, names in parts.items():
    write_safetensors(tmp_path / file, {name: tensors[name] for name in names})
  weight_map = {name: file for file, names in parts.items() for name in names}
  index = tmp_path / 'm.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {'total_size': 36}, 'weight_map': weight_map}))
  return tmp_path / 'm.safetensors', tensors


def test_sharded_files_are_read_by_either_name(shards):
  path, tensors = shards
  assert_same(read_safetensors(path), tensors)
  assert_same(read_safetensors(f'{path}.index.json'), tensors)
  # A whole file comes before shards of the same name.
  write_safetensors(path, {'whole': np.zeros(1)})
  assert list(read_safetensors(path)) == ['whole']


@pytest.mark.parametrize(
  ('index', 'words'),
  [
    ('{', 'm.safetensors.index.json is not a readable safetensors index'),
    ('{}', 'is not a readable safetensors index'),
    ('[]', 'is not a readable safetensors index'),
    ('{"weight_map": ["a"]}', 'is not a readable safetensors index'),
    ('{"weight_map": {"a": {}}}', 'is not a readable safetensors index'),
    ('{"weight_map": {"a": 1}}', "weight_map has 1 for 'a', which is no file name"),
    ('{"weight_map": {"a": ["m-1.safetensors"]}}', 'for .a., which is no file name'),
    ('{"weight_map": {"a": "../m-1.safetensors"}}', 'outside its own directory'),
    ('{"weight_map": {"a": "/etc/passwd"}}', 'outside its own directory'),
    ('{"weight_map": {"a": "m-3.safetensors"}}', 'no weights file .*m-3.safetensors'),
    ('{"weight_map": {"z": "m-1.safetensors"}}', 'promises 1 tensors'),
  ],
)
def test_bad_shard_indices(shards, index, words):
  path, _ = shards
  path.with_name(f'{path.name}.index.json').write_text(index)
  with pytest.raises(UserError, match=words) as caught:
    read_safetensors(path)
  assert '\n' not in caught.value.sentence


def header(text, body=b''):
  return len(text).to_bytes(8, 'little') + text.encode() + body


ENTRY = '{"a":{"dtype":"%s","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'PK\x03\x04 a zip archive, such as torch.save writes',
    b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n',
    header('{', b''),
    (2**60).to_bytes(8, 'little') + b'{}',
    header(ENTRY % 'F32', bytes(7)),
    header(ENTRY % 'F32', bytes(9)),
    header(ENTRY % 'X99', bytes(8)),
    header(ENTRY % 'F64', bytes(8)),
    header(ENTRY.replace('[0,8]', '[8,0]') % 'F32', bytes(8)),
  ],
  ids=['empty', 'zip', 'lfs', 'header', 'huge', 'short', 'long', 'dtype', 'size', 'offsets'],
)
def test_what_is_no_safetensors_file_is_one_error_that_names_it(content, tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(content)
  with pytest.raises(UserError, match='x.safetensors is not a whole safetensors file') as caught:
    read_safetensors(path)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('share', [0.01, 0.3, 0.9, 0.999])
def test_truncated_files_are_noticed(share, tmp_path):
  path = tmp_path / 'x.safetensors'
  write_safetensors(path, EVERY_DTYPE)
  data = path.read_bytes()
  path.write_bytes(data[: int(share * len(data))])
  with pytest.raises(UserError, match='not a whole safetensors file'):
    read_safetensors(path)


def test_missing_files_and_directories(tmp_path):
  path = tmp_path / 'x.safetensors'
  for beside, words in (
    (None, 'copy or download it'),
    ('x.bin', 'x.bin is there, which may hold programs'),
    ('x.fp16.safetensors', 'rename it to x.safetensors'),
  ):
    if beside is not None:
      (tmp_path / beside).touch()
    with pytest.raises(UserError, match=f'There is no weights file {path}: .*{words}'):
      read_safetensors(path)
  (tmp_path / 'd.safetensors').mkdir()
  with pytest.raises(UserError, match='d.safetensors'):
    read_safetensors(tmp_path / 'd.safetensors')


# Writing.

OLD, NEW = {'w': np.zeros(4, np.float32)}, {'w': np.ones(100_000, np.float32)}


@contextlib.contextmanager
def file_size_limit(size):
  """The kernel itself refuses to let a file of this process grow beyond `size` bytes."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full(*args):
  raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('failing', ['size limit', 'fsync', 'replace'])
def test_a_write_that_fails_half_way_leaves_the_earlier_file(failing, tmp_path, monkeypatch):
  path = tmp_path / 'x.safetensors'
  write_safetensors(path, OLD)
  before = path.read_bytes()
  with contextlib.ExitStack() as stack:
    if failing == 'size limit':
      stack.enter_context(file_size_limit(50_000))
    else:
      monkeypatch.setattr(files.os, failing, full)
    with pytest.raises(UserError, match='x.safetensors cannot be written: (No space|File too)'):
      write_safetensors(path, NEW)
    monkeypatch.undo()
  assert path.read_bytes() == before
  # What was written of the new file is gone too: it would only keep the disk full.
  assert [p.name for p in tmp_path.iterdir()] == ['x.safetensors']
  write_safetensors(path, NEW)
  assert_same(read_safetensors(path), NEW)


def test_a_write_makes_its_directory_or_says_why_not(tmp_path):
  write_safetensors(tmp_path / 'a' / 'b' / 'x.safetensors', OLD)
  with pytest.raises(UserError, match='y.safetensors cannot be written: File exists'):
    write_safetensors(tmp_path / 'a' / 'b' / 'x.safetensors' / 'y.safetensors', OLD)
