"""Conversion between layouts: the same tensors, and where it can be the same files."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from oracle import randomise

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.models import registry
from eru_jax.models.quantize import quantize
from eru_jax.weights import arrays, conversion, model_directory, tensor_files
from eru_jax.weights.conversion import ConversionRequest, convert
from eru_jax.weights.safetensors_io import read_safetensors, write_safetensors
from eru_jax.weights.tiny_models import write_tiny_flux

SHARD = 100_000
TRANSFORMER = 'transformer/diffusion_pytorch_model.safetensors'
VAE = 'vae/diffusion_pytorch_model.safetensors'
LEVELS = 2


@pytest.fixture(scope='module')
def snapshot(tmp_path_factory):
  """A tiny random FLUX.1 as diffusers writes it, the backbone in several shards."""
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  directory = tmp_path_factory.mktemp('hub') / 'snapshot'
  transformer = diffusers.FluxTransformer2DModel(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
  )
  vae = diffusers.AutoencoderKL(
    block_out_channels=(4, 8),
    down_block_types=('DownEncoderBlock2D',) * LEVELS,
    up_block_types=('UpDecoderBlock2D',) * LEVELS,
    latent_channels=4,
    norm_num_groups=2,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
  )
  transformer = randomise(transformer).to(torch.bfloat16)
  transformer.save_pretrained(directory / 'transformer', max_shard_size=SHARD)
  randomise(vae, 1).save_pretrained(directory / 'vae')
  # What else a snapshot holds comes along unopened.
  (directory / 'model_index.json').write_text('{"_class_name": "FluxPipeline"}')
  (directory / 'text_encoder').mkdir()
  (directory / 'text_encoder' / 'model.safetensors').write_bytes(bytes(100))
  (directory / 'README.md').write_text('# FLUX')
  return directory


@pytest.fixture(scope='module')
def converted(snapshot, tmp_path_factory):
  """The snapshot in every layout, by its name."""
  root = tmp_path_factory.mktemp('converted')
  found = {'diffusers': snapshot}
  for to in ('eru', 'original', 'comfyui'):
    convert(request(snapshot, root / to, to))
    found[to] = root / to
  return found


def request(source, output, to='eru', **options):
  return ConversionRequest('flux', str(source), str(output), to, shard_bytes=SHARD, **options)


def contents(directory):
  """Path -> bytes of all files below a directory."""
  return {
    str(path.relative_to(directory)): path.read_bytes()
    for path in sorted(directory.rglob('*'))
    if path.is_file()
  }


def flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


def assert_same_model(ours, theirs):
  assert ours.architecture == theirs.architecture
  assert ours.autoencoder_config == theirs.autoencoder_config
  for name in ('backbone', 'autoencoder'):
    mine, wanted = flat(getattr(ours, name)), flat(getattr(theirs, name))
    assert mine.keys() == wanted.keys()
    for path, value in wanted.items():
      assert mine[path].dtype == value.dtype, path
      np.testing.assert_array_equal(mine[path], value, path)


def test_there_and_back_the_files_are_the_same_to_the_byte(snapshot, converted, tmp_path):
  assert len(list((snapshot / 'transformer').glob('*.safetensors'))) > 2
  convert(request(converted['eru'], tmp_path / 'back', 'diffusers'))
  assert contents(tmp_path / 'back') == contents(snapshot)


def test_a_whole_snapshot_with_its_encoders_too(tmp_path):
  write_tiny_flux(tmp_path / 'snapshot')
  for source, to in (('snapshot', 'eru'), ('eru', 'diffusers')):
    convert(ConversionRequest('flux', str(tmp_path / source), str(tmp_path / to), to))
  back, first = (contents(tmp_path / name) for name in ('diffusers', 'snapshot'))
  assert back == first and any(name.startswith('text_encoder_2/') for name in back)


@pytest.mark.parametrize('to', ['original', 'comfyui'])
def test_single_files_come_back_the_same_too(converted, to, tmp_path):
  convert(request(converted[to], tmp_path / 'eru'))
  convert(request(tmp_path / 'eru', tmp_path / 'back', to))
  assert contents(tmp_path / 'back') == contents(converted[to])


@pytest.mark.parametrize('source', ['original', 'comfyui'])
def test_what_was_never_in_diffusers_layout_gets_the_files_it_would_write(
  snapshot, converted, source, tmp_path
):
  convert(request(converted[source], tmp_path / 'out', 'diffusers'))
  assert contents(tmp_path / 'out') == contents(snapshot)


@pytest.mark.parametrize('source', conversion.LAYOUTS)
@pytest.mark.parametrize('to', ['original', 'comfyui'])
def test_every_way_to_a_single_file_gives_the_same(converted, source, to, tmp_path):
  convert(request(converted[source], tmp_path / 'out', to))
  assert contents(tmp_path / 'out') == contents(converted[to])


@pytest.mark.parametrize('source', conversion.LAYOUTS)
def test_every_layout_loads(snapshot, converted, source):
  theirs = model_directory.load(snapshot, dtype=None)
  ours = model_directory.load(converted[source], dtype=None)
  assert_same_model(ours, theirs)
  assert ours.settings['family'] == 'flux' and ours.reward is None
  assert {x.dtype for x in flat(ours.backbone).values()} == {np.dtype(ml_dtypes.bfloat16)}
  whole = model_directory.load(converted[source])
  assert {x.dtype for x in flat(whole.backbone).values()} == {np.dtype(np.float32)}


def test_paths_may_be_relative(snapshot, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  convert(ConversionRequest('flux', os.path.relpath(snapshot), 'ours'))
  assert_same_model(
    model_directory.load('ours', dtype=None), model_directory.load(snapshot, dtype=None)
  )
  convert(request('ours', 'back', 'diffusers'))
  assert contents(tmp_path / 'back') == contents(snapshot)


def test_our_arrays_are_those_of_the_table(snapshot, converted):
  loaded = dict(arrays.load(converted['eru'] / 'transformer' / 'arrays'))
  wanted = flat(model_directory.load(snapshot, dtype=None).backbone)
  assert loaded.keys() == wanted.keys()
  for path, value in wanted.items():
    assert loaded[path].tobytes() == np.ascontiguousarray(value).tobytes(), path


def test_the_package_base_survives_all_layouts(tmp_path):
  base = pathlib.Path(model_directory.__file__).parents[1] / 'assets' / 'emoji_base'
  source = base
  for to in ('eru', 'original', 'comfyui', 'diffusers'):
    convert(ConversionRequest('flux', str(source), str(tmp_path / to), to))
    source = tmp_path / to
  assert contents(source).keys() == contents(base).keys()
  for path in contents(base):
    assert read_or_bytes(source / path) == read_or_bytes(base / path), path


def read_or_bytes(path):
  """Tensors of a safetensors file, whose metadata may differ; bytes of another."""
  if path.suffix != '.safetensors':
    return path.read_bytes()
  return {name: (x.dtype, x.shape, x.tobytes()) for name, x in read_safetensors(path).items()}


def test_a_backbone_alone_in_a_file(snapshot, converted, tmp_path):
  """Black Forest Labs' file says what it is but for the rotary channels of odd heads."""
  alone = tmp_path / 'in'
  (alone / 'transformer').mkdir(parents=True)
  shutil.copy(converted['original'] / 'flux1.safetensors', alone / 'flux1-dev.safetensors')
  with pytest.raises(UserError, match='Heads of 16 channels'):
    convert(request(alone / 'flux1-dev.safetensors', tmp_path / 'eru'))
  shutil.copy(snapshot / 'transformer' / 'config.json', alone / 'transformer')
  lines = convert(request(alone / 'flux1-dev.safetensors', tmp_path / 'eru'))
  assert 'has no autoencoder: to draw with' in lines[-1]
  assert not (tmp_path / 'eru' / 'vae').exists()
  convert(request(tmp_path / 'eru', tmp_path / 'out', 'diffusers'))
  for path, data in contents(snapshot / 'transformer').items():
    assert (tmp_path / 'out' / 'transformer' / path).read_bytes() == data
  with pytest.raises(UserError, match='vae/config.json is missing'):
    model_directory.load(tmp_path / 'eru')
  # What docs/weights.md tells to do then.
  shutil.copy(snapshot / 'model_index.json', tmp_path / 'eru')
  shutil.copytree(snapshot / 'vae', tmp_path / 'eru' / 'vae')
  completed = model_directory.load(tmp_path / 'eru', dtype=None)
  assert_same_model(completed, model_directory.load(snapshot, dtype=None))
  assert completed.settings['text_encoder'] == 'flux'


# int8 and casts.


def test_int8_arrays(snapshot, tmp_path):
  lines = convert(request(snapshot, tmp_path / 'int8', int8=True))
  ours = model_directory.load(tmp_path / 'int8')
  whole = model_directory.load(snapshot)
  assert lines[0].startswith(
    f'transformer: {sum(x.size for x in flat(whole.backbone).values()):,} '
  )
  # As `model.params='int8'` rounds on the way, so that one stands for the other.
  blocks = registry.family('flux').blocks
  wanted = flat(quantize(whole.backbone, blocks))
  assert flat(ours.backbone).keys() == wanted.keys()
  for path, value in wanted.items():
    np.testing.assert_array_equal(flat(ours.backbone)[path], value, path)
  dtypes = {path: x.dtype for path, x in flat(ours.backbone).items() if path.endswith('/kernel')}
  for path, dtype in dtypes.items():
    assert dtype == (np.int8 if path.startswith(('transf', 'single_transf')) else np.float32), path
  assert_same_model(dataclasses.replace(ours, backbone={}), dataclasses.replace(whole, backbone={}))
  # On the way it is the same.
  on_the_way = model_directory.load(snapshot, int8=blocks)
  again = model_directory.load(tmp_path / 'int8', int8=blocks)
  for path, value in wanted.items():
    np.testing.assert_array_equal(flat(on_the_way.backbone)[path], value, path)
    np.testing.assert_array_equal(flat(again.backbone)[path], value, path)
  assert not (tmp_path / 'int8' / 'source.json').exists()
  for to in ('diffusers', 'original'):
    with pytest.raises(UserError, match='holds int8 kernels'):
      convert(request(tmp_path / 'int8', tmp_path / 'out', to))
  convert(request(snapshot, tmp_path / 'whole'))
  for directory, pattern in ((tmp_path / 'whole', blocks), (tmp_path / 'int8', '')):
    with pytest.raises(UserError, match='convert the files they were made of once more'):
      model_directory.load(directory, int8=pattern)


def test_a_cast(snapshot, tmp_path):
  convert(request(snapshot, tmp_path / 'out', 'diffusers', dtype='float32'))
  ours = model_directory.load(tmp_path / 'out', dtype=None)
  assert_same_model(ours, model_directory.load(snapshot))
  assert {x.dtype for x in flat(ours.backbone).values()} == {np.dtype(np.float32)}


def test_what_the_dtype_cannot_hold_is_refused(damaged):
  path = damaged / 'diffusers' / VAE
  tensors = read_safetensors(path)
  tensors['encoder.conv_in.bias'][1] = 1e30
  tensors['encoder.conv_out.bias'][0] = np.inf  # which stays what it was
  write_safetensors(path, tensors)
  for to in ('eru', 'original'):
    message = error_of(damaged / 'diffusers', damaged / 'out', to, dtype='float16')
    assert f'{path}: encoder.conv_in.bias holds 1e+30, which is too large for float16' in message
    assert not (damaged / 'out').exists()
  convert(request(damaged / 'diffusers', damaged / 'whole', dtype='bfloat16'))
  message = error_of(damaged / 'whole', damaged / 'out', 'diffusers', dtype='float16')
  assert 'vae/arrays: encoder/conv_in/bias holds' in message


# Mistakes.


def error_of(*args, **options):
  with pytest.raises(UserError) as caught:
    convert(request(*args, **options))
  assert '\n' not in caught.value.sentence
  return str(caught.value)


def test_requests_that_cannot_be_met(snapshot, tmp_path):
  out = tmp_path / 'out'
  assert 'choose one of eru, diffusers' in error_of(snapshot, out, 'pickle')
  assert 'choose one of float32' in error_of(snapshot, out, dtype='int4')
  assert '--int8 is a storage of our own' in error_of(snapshot, out, 'diffusers', int8=True)
  assert 'There is nothing at' in error_of(tmp_path / 'nosuch', out)
  assert 'lies inside of' in error_of(snapshot, snapshot / 'out')
  with pytest.raises(UserError, match='Unknown model family'):
    convert(ConversionRequest('sd9', str(snapshot), str(out)))
  (tmp_path / 'empty').mkdir()
  assert 'transformer/config.json is missing' in error_of(tmp_path / 'empty', out)
  write_safetensors(tmp_path / 'x.safetensors', {'model.layers.0': np.zeros(2)})
  assert 'holds no weights of this kind' in error_of(tmp_path / 'x.safetensors', out)
  assert not out.exists()
  out.mkdir()
  (out / 'mine').write_text('')
  assert 'is there already' in error_of(snapshot, out)
  assert [path.name for path in out.iterdir()] == ['mine']


@pytest.fixture
def damaged(snapshot, converted, tmp_path):
  """Copies of the snapshot and of its conversion that the test may damage."""
  shutil.copytree(snapshot, tmp_path / 'diffusers')
  shutil.copytree(converted['eru'], tmp_path / 'eru')
  return tmp_path


def test_tensors_that_do_not_fit_are_all_listed_before_anything_is_read(damaged, monkeypatch):
  vae = damaged / 'diffusers' / VAE
  tensors = read_safetensors(vae)
  del tensors['encoder.conv_in.bias']
  tensors['decoder.conv_in.bias'] = np.zeros(3, np.float32)
  tensors['nosuch'] = np.zeros(3, np.float32)
  write_safetensors(vae, tensors)

  def never(*args):
    raise AssertionError('a tensor was read')

  monkeypatch.setattr(tensor_files, '_read_exactly', never)
  message = error_of(damaged / 'diffusers', damaged / 'out')
  for words in (str(vae), 'missing: encoder.conv_in.bias', 'unexpected: nosuch',
                'wrong shape: decoder.conv_in.bias (3,)'):  # fmt: skip
    assert words in message, message
  assert not (damaged / 'out').exists() and not list(damaged.glob('*.partial'))


def test_a_missing_shard(damaged):
  shard = sorted((damaged / 'diffusers' / 'transformer').glob('*-00002-of-*'))[0]
  shard.unlink()
  assert f'no weights file {shard}' in error_of(damaged / 'diffusers', damaged / 'out')


@pytest.mark.parametrize(
  ('name', 'content', 'words'),
  [
    ('source.json', '{', 'source.json cannot be read'),
    ('source.json', '{}', 'source.json is damaged'),
    (
      'source.json',
      '{"layouts": {"transformer": "diffusers"}, "headers": {"../x": "{}"}, "indices": {}}',
      'no path below',
    ),
    ('transformer/arrays/state/_METADATA', '{', 'transformer/arrays is damaged'),
    ('transformer/arrays/state/_METADATA', None, 'transformer/arrays'),
    ('transformer/arrays/state/manifest.ocdbt', '', 'transformer/arrays is damaged'),
    ('transformer/arrays.json', '{', 'transformer/arrays.json cannot be read'),
    ('transformer/arrays.json', '{}', 'have changed'),
    ('transformer/config.json', None, 'transformer/config.json is missing'),
  ],
)
def test_damaged_directories_of_ours(damaged, name, content, words):
  path = damaged / 'eru' / name
  path.unlink()
  if content is not None:
    path.write_text(content)
  message = error_of(damaged / 'eru', damaged / 'out', 'diffusers')
  assert words in message and not (damaged / 'out').exists(), message


@pytest.mark.parametrize('places', ['host', 'devices'])
def test_a_flipped_bit_is_noticed(damaged, places):
  path = 'transformer_blocks/attn/to_q/kernel'
  folder = damaged / 'eru' / 'transformer' / 'arrays'
  data = dict(arrays.load(folder))[path].tobytes()
  (file,) = [file for file in folder.rglob('*') if file.is_file() and data in file.read_bytes()]
  whole = bytearray(file.read_bytes())
  whole[whole.index(data) + len(data) // 2] ^= 4
  file.write_bytes(whole)
  with pytest.raises(UserError, match=f'arrays is damaged .the bytes of {path} have changed'):
    if places == 'host':
      convert(request(damaged / 'eru', damaged / 'out', 'diffusers'))
    else:
      mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
      model_directory.load(damaged / 'eru', mesh, dtype=None)
  (folder.parent / 'arrays.json').unlink()  # as earlier versions wrote it
  assert data != dict(arrays.load(folder))[path].tobytes()


def test_an_unknown_key_is_named_with_its_file(damaged):
  path = damaged / 'eru' / 'transformer' / 'config.json'
  config = json.loads(path.read_text())
  for key, hint in (('zzz', 'known: in_channels, num_layers'), ('num_layer', 'did you mean `num_')):
    path.write_text(json.dumps(config | {key: 1}))
    message = error_of(damaged / 'eru', damaged / 'out', 'diffusers')
    assert message.startswith(f'{path}: FLUX config: unknown key `{key}`; {hint}'), message


def test_arrays_of_another_architecture(damaged):
  path = damaged / 'eru' / 'transformer' / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'num_layers': 3}))
  message = error_of(damaged / 'eru', damaged / 'out', 'original')
  assert 'the arrays do not fit this model' in message
  assert 'wrong shape: transformer_blocks/' in message
  with pytest.raises(UserError, match='the arrays do not fit'):
    model_directory.load(damaged / 'eru')


@pytest.mark.parametrize('to', ['eru', 'original'])
def test_an_interrupted_conversion_leaves_nothing(snapshot, to, tmp_path, monkeypatch):
  def interrupt(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(conversion, '_carry_over', interrupt)
  with pytest.raises(KeyboardInterrupt):
    convert(request(snapshot, tmp_path / 'out', to))
  assert list(tmp_path.iterdir()) == []


# The command.


def start(*args):
  root = pathlib.Path(__file__).resolve().parents[1]
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(root)}
  return subprocess.Popen(
    [sys.executable, *map(str, args)],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(*args):
  return start('-m', 'eru_jax.convert', *args)


def test_the_command(snapshot, tmp_path):
  common = ('--family=flux', f'--source={snapshot}', f'--output={tmp_path / "out"}')
  process = run(*common, '--to=original')
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert 'transformer: ' in out and 'diffusers -> original' in out
  assert (tmp_path / 'out' / 'flux1.safetensors').is_file()
  process = run(*common)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 2 and err.splitlines()[-1].startswith('error: ')
  assert 'is there already' in err and 'Traceback' not in err
  process = run('--family=flux')
  _, err = process.communicate(timeout=300)
  assert process.returncode == 2 and '--source' in err and '--output' in err


KILLED = """
import os, signal, sys
from eru_jax.weights import conversion
conversion._carry_over = lambda *unused: os.kill(os.getpid(), signal.SIGKILL)
conversion.convert(conversion.ConversionRequest('flux', *sys.argv[1:]))
"""


def test_a_killed_conversion_leaves_nothing_that_looks_whole(snapshot, tmp_path):
  """When all arrays are written, and what is carried over is not."""
  process = start('-c', KILLED, snapshot, tmp_path / 'out')
  _, err = process.communicate(timeout=300)
  assert process.returncode == -signal.SIGKILL, err
  (left,) = tmp_path.iterdir()
  assert left.name == f'out.{process.pid}.partial' and any(left.iterdir())
  convert(request(snapshot, tmp_path / 'out'))
  assert jax.tree.leaves(model_directory.load(tmp_path / 'out').backbone)
