"""Model directories: what is stored is what is loaded, and what is damaged is named."""

import dataclasses
import errno
import json
import shutil
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from eru_jax import files
from eru_jax.errors import UserError
from eru_jax.models import registry
from eru_jax.training.config import ModelConfig, model_path
from eru_jax.weights import layouts, model_directory, tensor_files, writing
from eru_jax.weights.safetensors_io import read_safetensors, write_safetensors

WEIGHTS = 'diffusion_pytorch_model.safetensors'
PARTS = ('backbone', 'autoencoder', 'reward')


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


@pytest.fixture(scope='module')
def stored(tiny_model_dir):
  """The tiny model with parameters that bfloat16 does not have."""
  model = model_directory.load(tiny_model_dir)
  rng = np.random.default_rng(1)
  parts = {
    name: jax.tree.map(
      lambda x: rng.standard_normal(x.shape).astype(np.float32), getattr(model, name)
    )
    for name in PARTS
  }
  return dataclasses.replace(model, **parts)


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float32], ids=['bfloat16', 'float32'])
def test_round_trip(stored, dtype, tmp_path):
  model_directory.save(tmp_path / 'm', stored, dtype)
  loaded = model_directory.load(tmp_path / 'm')
  for name in PARTS:
    before, after = flat(getattr(stored, name)), flat(getattr(loaded, name))
    assert before.keys() == after.keys()
    for path, value in before.items():
      # Rounded once, to the nearest value of the stored type, and float32 in memory.
      assert after[path].dtype == np.float32
      np.testing.assert_array_equal(after[path], value.astype(dtype).astype(np.float32), path)
  for name in ('family', 'architecture', 'autoencoder_config'):
    assert getattr(loaded, name) == getattr(stored, name)
  assert loaded.settings == {**stored.settings, 'family': 'flux'}
  # What has been rounded stays as it is.
  model_directory.save(tmp_path / 'again', loaded, dtype)
  for path in (tmp_path / 'm').rglob('*.*'):
    assert path.read_bytes() == (tmp_path / 'again' / path.relative_to(tmp_path / 'm')).read_bytes()


@pytest.mark.parametrize('on_devices', [False, True])
def test_parameters_keep_their_dtype(stored, on_devices, tmp_path):
  half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), stored.autoencoder)
  mixed = dataclasses.replace(stored, autoencoder=half)
  if on_devices:
    mixed = dataclasses.replace(mixed, **jax.device_put({k: getattr(mixed, k) for k in PARTS}))
  model_directory.save(tmp_path / 'm', mixed)
  loaded = model_directory.load(tmp_path / 'm', dtype=None)
  for name in PARTS:
    before, after = flat(getattr(mixed, name)), flat(getattr(loaded, name))
    for path, value in before.items():
      assert after[path].dtype == value.dtype
      np.testing.assert_array_equal(after[path], value, path)


def test_bfloat16_costs_less_than_a_percent(stored, tmp_path):
  model_directory.save(tmp_path / 'm', stored, ml_dtypes.bfloat16)
  raw = read_safetensors(tmp_path / 'm' / 'transformer' / WEIGHTS)
  assert {value.dtype for value in raw.values()} == {np.dtype(ml_dtypes.bfloat16)}
  loaded = model_directory.load(tmp_path / 'm')
  for path, value in flat(stored.backbone).items():
    np.testing.assert_allclose(flat(loaded.backbone)[path], value, rtol=2**-8)


def test_a_model_without_reward(stored, tmp_path):
  model_directory.save(tmp_path / 'm', dataclasses.replace(stored, reward=None))
  assert model_directory.load(tmp_path / 'm').reward is None
  assert not (tmp_path / 'm' / 'reward').exists()


def test_the_names_on_disk_are_those_of_diffusers(stored, tmp_path):
  diffusers = pytest.importorskip('diffusers')
  model_directory.save(tmp_path / 'm', stored, np.float32)
  oracle = diffusers.FluxTransformer2DModel.from_pretrained(
    tmp_path / 'm' / 'transformer', use_safetensors=True
  )
  raw = read_safetensors(tmp_path / 'm' / 'transformer' / WEIGHTS)
  theirs = oracle.state_dict()
  assert theirs.keys() == raw.keys()
  for name, value in raw.items():
    np.testing.assert_array_equal(theirs[name].numpy(), value, name)


def test_large_models_are_written_in_shards_that_replace_what_was_there(
  stored, tmp_path, monkeypatch
):
  diffusers = pytest.importorskip('diffusers')
  whole, folder = tmp_path / 'whole', tmp_path / 'm' / 'transformer'
  model_directory.save(whole, stored, np.float32)
  model_directory.save(tmp_path / 'm', stored, np.float32)
  size = (folder / WEIGHTS).stat().st_size
  monkeypatch.setattr(writing.new_files, '__defaults__', (size // 3,))
  model_directory.save(tmp_path / 'm', stored, np.float32)
  shards = {f'diffusion_pytorch_model-{i}-of-00004.safetensors' for i in ('00001', '00002')}
  names = {path.name for path in folder.iterdir()}
  assert shards < names and f'{WEIGHTS}.index.json' in names and WEIGHTS not in names
  loaded = model_directory.load(tmp_path / 'm')
  jax.tree.map(np.testing.assert_array_equal, loaded.backbone, stored.backbone)
  theirs = diffusers.FluxTransformer2DModel.from_pretrained(folder).state_dict()
  for name, value in read_safetensors(whole / 'transformer' / WEIGHTS).items():
    np.testing.assert_array_equal(theirs[name].numpy(), value, name)
  monkeypatch.undo()
  model_directory.save(tmp_path / 'm', stored, np.float32)
  assert {path.name for path in folder.iterdir()} == {WEIGHTS, 'config.json'}
  for path in whole.rglob('*.*'):
    assert path.read_bytes() == (tmp_path / 'm' / path.relative_to(whole)).read_bytes()


def test_nothing_is_held_twice_while_it_is_written(tmp_path, monkeypatch):
  monkeypatch.setattr(tensor_files, 'CHUNK', 1 << 16)
  family = registry.family('flux')
  sizes = dict(num_attention_heads=8, num_layers=3, num_single_layers=3)
  part = layouts.backbone(family)
  architecture = family.config.from_dict(family.tiny | sizes)
  params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), part.shapes(architecture))
  held = writing.Held(part, architecture, params, ml_dtypes.bfloat16)
  files = writing.new_files([held], 'diffusers')
  tracemalloc.start()
  try:
    writing.write(tmp_path, 'diffusers', [held], files)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  (file,) = files.headers
  assert peak < 1e6 < (tmp_path / file).stat().st_size / 2


def test_the_base_in_the_package():
  model = model_directory.load(model_path(ModelConfig().source))
  for name in PARTS:
    for path, value in flat(getattr(model, name)).items():
      assert value.dtype == np.float32 and np.isfinite(value).all(), path
      # Everything is used: no tensor was left as zeros.
      assert value.any() or path.endswith('bias'), path
  assert model.settings['resolution'] == 64 and model.settings['text_encoder'] == 'minilm_sentence'
  assert 4e6 < sum(value.size for value in flat(model.backbone).values()) < 7e6


# Damage.


@pytest.fixture
def directory(tiny_model_dir, tmp_path):
  """A copy of the tiny model that the test may damage."""
  shutil.copytree(tiny_model_dir, tmp_path / 'm')
  return tmp_path / 'm'


def error_of(directory):
  with pytest.raises(UserError) as caught:
    model_directory.load(directory)
  assert '\n' not in caught.value.sentence
  return str(caught.value)


def test_missing_folders(directory, tmp_path):
  assert f'no model directory {tmp_path / "nosuch"}' in error_of(tmp_path / 'nosuch')
  for name in ('vae', 'transformer'):
    shutil.rmtree(directory / name)
    message = error_of(directory)
    assert f'{name}/config.json is missing' in message and 'transformer/ and vae/' in message


@pytest.mark.parametrize('name', ['eru_jax.json', 'transformer/config.json', 'vae/config.json'])
@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (None, 'is missing'),
    (b'', 'cannot be read'),
    (b'{"a": 1', 'cannot be read'),
    (b'\xff\xfe', 'cannot be read'),
    (b'[1]', 'holds no JSON object'),
    (b'null', 'holds no JSON object'),
  ],
)
def test_damaged_json(directory, name, content, words):
  (directory / name).unlink()
  if content is not None:
    (directory / name).write_bytes(content)
  message = error_of(directory)
  assert str(directory / name) in message and words in message


@pytest.mark.parametrize(
  ('name', 'key', 'value'),
  [
    ('eru_jax.json', 'family', 'sd9'),
    ('transformer/config.json', 'num_layers', '2'),
    ('transformer/config.json', 'num_layers', 0),
    ('transformer/config.json', 'num_attention_heads', 2.5),
    ('transformer/config.json', 'axes_dims_rope', 16),
    ('transformer/config.json', 'axes_dims_rope', [4, 6, 7]),
    ('transformer/config.json', 'patch_size', 2),
    ('vae/config.json', 'latent_channels', 'many'),
    ('vae/config.json', 'block_out_channels', []),
    ('vae/config.json', 'act_fn', 'relu'),
  ],
)
def test_configs_of_another_kind(directory, name, key, value):
  values = json.loads((directory / name).read_text())
  (directory / name).write_text(json.dumps(values | {key: value}))
  message = error_of(directory)
  assert key in message or str(value) in message, message


@pytest.mark.parametrize(
  ('name', 'key', 'value'),
  [
    ('transformer', 'num_layers', 2),
    ('transformer', 'num_single_layers', 3),
    ('transformer', 'joint_attention_dim', 99),
    ('transformer', 'guidance_embeds', True),
    ('vae', 'latent_channels', 8),
    ('vae', 'block_out_channels', [16]),
    ('vae', 'use_quant_conv', True),
  ],
)
def test_weights_of_another_architecture_are_named_with_their_file(directory, name, key, value):
  path = directory / name / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
  message = error_of(directory)
  assert str(directory / name / WEIGHTS) in message and 'do not fit this model' in message
  assert 'missing: ' in message or 'wrong shape: ' in message


def drop(tensors):
  del tensors[next(iter(tensors))]


def add(tensors):
  tensors['nosuch/kernel'] = np.zeros(2, np.float32)


def cut(tensors):
  name = max(tensors, key=lambda n: tensors[n].size)
  tensors[name] = tensors[name][:-1]


@pytest.mark.parametrize(
  'file', [f'transformer/{WEIGHTS}', f'vae/{WEIGHTS}', 'reward/model.safetensors']
)
@pytest.mark.parametrize(
  ('damage', 'words'), [(drop, 'missing: '), (add, 'unexpected: nosuch'), (cut, 'wrong shape: ')]
)
def test_tensors_that_do_not_fit(directory, file, damage, words):
  tensors = read_safetensors(directory / file)
  damage(tensors)
  write_safetensors(directory / file, tensors)
  message = error_of(directory)
  assert str(directory / file) in message and words in message, message


def test_a_reward_that_is_something_else(directory):
  write_safetensors(directory / 'reward' / 'model.safetensors', {'x': np.zeros(2)})
  assert 'is not the reward classifier' in error_of(directory)


# Writing.


def test_a_full_disk_is_one_error_and_the_earlier_files_stay(directory, stored, monkeypatch):
  before = {path: path.read_bytes() for path in directory.rglob('*.*')}
  replace, done = files.os.replace, []

  def full_at_the_third(*paths):
    if len(done) == 2:
      raise OSError(errno.ENOSPC, 'No space left on device')
    done.append(paths[1])
    replace(*paths)

  monkeypatch.setattr(files.os, 'replace', full_at_the_third)
  with pytest.raises(UserError, match='cannot be written: No space left on device') as caught:
    model_directory.save(directory, stored)
  assert '\n' not in str(caught.value)
  after = {path: path.read_bytes() for path in directory.rglob('*.*')}
  assert after.keys() == before.keys()
  changed = {path for path in before if before[path] != after[path]}
  assert changed <= {directory / 'transformer' / WEIGHTS, directory / 'vae' / WEIGHTS}
  # Every file is whole, so that even this half-way state loads.
  model_directory.load(directory)


def test_a_directory_that_cannot_be_made(stored, tmp_path):
  (tmp_path / 'file').write_text('x')
  with pytest.raises(UserError, match='cannot be written'):
    model_directory.save(tmp_path / 'file' / 'm', stored)
