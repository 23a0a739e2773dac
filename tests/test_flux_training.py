"""FLUX.1 from a snapshot to an adapter that diffusers loads: the `:runlocal` configs."""

import json
import pathlib

import jax
import numpy as np
import pytest
from oracle import relative_error

from eru_jax.config_file import load_config
from eru_jax.errors import UserError
from eru_jax.training import config as config_lib
from eru_jax.training import experiment, modules
from eru_jax.training.metrics import read_metrics
from eru_jax.training.run import train
from eru_jax.training.sampling import SampleRequest, sample
from eru_jax.weights import model_directory
from eru_jax.weights.conversion import ConversionRequest, convert
from eru_jax.weights.tiny_models import write_tiny_flux

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
PROMPT = 'the fruit that fell on Newton'


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('ERU_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield


def settings(name, **overrides):
  return load_config(str(CONFIGS / name), {k.replace('__', '.'): v for k, v in overrides.items()})


def draw(model, output, **options):
  request = SampleRequest(
    str(model), str(output), prompts=(PROMPT,), steps=3, height=48, width=64,
    latents=str(_noise(output.parent)), save_latents=True, **options,
  )  # fmt: skip
  sample(request)
  return np.load(output / 'latents_final.npy')


def _noise(directory):
  path = directory / 'noise.npy'
  np.save(path, np.random.default_rng(0).standard_normal((1, 12, 16)).astype(np.float32))
  return path


def stages_of(workdir):
  return json.loads((workdir / 'summary.json').read_text())['stages']


def test_from_a_snapshot_to_an_adapter_that_diffusers_draws_with(tmp_path):
  """Convert, embed prompts, DK-DM, NO-RL, export: and then the same picture in both libraries."""
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  pytest.importorskip('peft')
  snapshot, converted = tmp_path / 'snapshot', tmp_path / 'converted'
  write_tiny_flux(snapshot)
  convert(ConversionRequest('flux', str(snapshot), str(converted)))
  # All that follows is read from what was converted.
  assert not list((converted / 'transformer').glob('*.safetensors'))

  first, second = tmp_path / 'dk_dm', tmp_path / 'no_rl'
  source = {'model__source': str(converted)}
  train(settings('flux_dev_dk_dm.py:runlocal', **source), str(first))
  adapter = first / 'adapters' / 'dk_dm.safetensors'
  values = settings('flux_dev_no_rl.py:runlocal', adapter=str(adapter), **source)
  train(values, str(second))
  before, after = stages_of(first), stages_of(second)
  assert list(before) == ['base', 'dk_dm'] and list(after) == ['base', 'adapter', 'no_rl']
  assert before['dk_dm']['train']['anchor_distance'] > 0
  assert 'No judge looked' in (first / 'report.html').read_text()
  for name, earlier in (('base', 'base'), ('adapter', 'dk_dm')):
    distance = [s['train']['anchor_distance'] for s in (after[name], before[earlier])]
    assert distance[0] == pytest.approx(distance[1], rel=1e-3)
  metrics = read_metrics(second / 'metrics.jsonl')
  assert metrics and all(0 < row['reward'] < 100 for row in metrics)
  with pytest.raises(UserError, match='belongs to a run of another config .adapter was'):
    train(values | {'adapter': ''}, str(second))

  exported = second / 'adapters'
  assert {path.name for path in exported.iterdir()} == {
    'no_rl.safetensors',
    'no_rl_kohya.safetensors',
  }
  plain, trained = draw(converted, tmp_path / 'plain'), draw(second, tmp_path / 'trained')
  kohya = draw(snapshot, tmp_path / 'kohya', lora=(str(exported / 'no_rl_kohya.safetensors'),))
  np.testing.assert_allclose(kohya, trained, rtol=1e-4, atol=1e-4)

  pipeline = diffusers.FluxPipeline.from_pretrained(snapshot, torch_dtype=torch.float32)
  pipeline.set_progress_bar_config(disable=True)
  latents = torch.from_numpy(np.load(_noise(tmp_path)))
  options = dict(
    prompt=PROMPT, height=48, width=64, num_inference_steps=3, guidance_scale=3.5,
    latents=latents, output_type='latent',
  )  # fmt: skip
  theirs = pipeline(**options).images.numpy()
  assert relative_error(plain, theirs) <= 1e-4
  pipeline.load_lora_weights(str(exported / 'no_rl.safetensors'))
  adapted = pipeline(**options).images.numpy()
  assert relative_error(trained, adapted) <= 1e-4
  # What the adapter does is small after a few steps, and still the same.
  assert relative_error(plain, trained) > 1e-5
  assert relative_error(trained - plain, adapted - theirs) <= 0.05


@pytest.mark.slow
def test_fine_tuning_on_pictures_keeps_their_latents(tmp_path, monkeypatch):
  from eru_jax.training.stages import flow_matching

  values = settings('flux_finetune.py:runlocal', flow_matching__num_steps='2')
  train(values, str(tmp_path / 'lora'))
  assert (tmp_path / 'lora' / 'adapters' / 'flow_matching.safetensors').is_file()
  assert not (tmp_path / 'lora' / 'model').exists()
  # Encoded once: another run of other parameters reads what is there.
  monkeypatch.setattr(flow_matching, '_encoded', None)
  full = settings('flux_finetune.py:runlocal,full', flow_matching__num_steps='2')
  train(full, str(tmp_path / 'full'))
  tuned = draw(tmp_path / 'full', tmp_path / 'run')
  base = draw(config_lib.model_path('tiny_flux'), tmp_path / 'base')
  stored = draw(tmp_path / 'full' / 'model', tmp_path / 'model')
  assert relative_error(stored, tuned) <= 0.01 * relative_error(base, tuned)


@pytest.mark.slow
def test_int8_kernels_stay_frozen_under_adapters(tmp_path, monkeypatch):
  values = settings('flux_dev_dk_dm.py:runlocal,int8', dk_dm__num_steps='2')
  begun = []

  def remember(config, mesh, load=experiment.load_snapshot):
    begun.append(load(config, mesh))
    return begun[-1]

  monkeypatch.setattr(experiment, 'load_snapshot', remember)
  train(values, str(tmp_path / 'int8'))
  assert (tmp_path / 'int8' / 'adapters' / 'dk_dm.safetensors').is_file()
  source = config_lib.model_path('tiny_flux')
  stored = model_directory.load(source, int8='transformer_blocks').backbone
  (snapshot,) = begun
  kernels = [x for x in jax.tree.leaves(snapshot.backbone) if x.dtype == np.int8]
  assert len(kernels) == sum(x.dtype == np.int8 for x in jax.tree.leaves(stored)) > 0
  jax.tree.map(np.testing.assert_array_equal, snapshot.backbone, stored)
  with pytest.raises(UserError, match="model.params is 'int8', which cannot be trained"):
    train(values | {'lora': ()}, str(tmp_path / 'full'))


@pytest.mark.parametrize('name', ['flux_dev_dk_dm', 'flux_dev_no_rl', 'flux_finetune'])
def test_configs_are_whole_and_say_what_they_take(name):
  sizes = {'': 512, ':res=1024': 1024, ':int8': 512, ':full': 512, ':runlocal': 64}
  for argument, size in (sizes | {':full,runlocal': 64, ':runlocal,res=128': 128}).items():
    values = settings(f'{name}.py{argument}')
    config = config_lib.from_mapping(config_lib.ExperimentConfig, values)
    assert modules.trains_backbone(config) == ('full' in argument)
    assert config.model.resolution == size
  with pytest.raises(
    UserError, match=f"{name}.py: 'ful' is no argument of this config; .*runlocal"
  ):
    settings(f'{name}.py:ful')
  with pytest.raises(UserError, match='res=big'):
    settings(f'{name}.py:res=big')
  with pytest.raises(UserError, match="'full' and 'int8' contradict each other"):
    settings(f'{name}.py:full,int8')
