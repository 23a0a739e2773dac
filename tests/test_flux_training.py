"""FLUX.1 from a snapshot to an adapter that diffusers loads: the `:runlocal` configs."""

import json
import pathlib

import numpy as np
import pytest
from oracle import relative_error

from eru_jax.config_file import load_config
from eru_jax.errors import UserError
from eru_jax.training import config as config_lib
from eru_jax.training.metrics import read_metrics
from eru_jax.training.run import train
from eru_jax.training.sampling import SampleRequest, sample

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'
PROMPT = 'the fruit that fell on Newton'


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('ERU_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield


def settings(name, **overrides):
  return load_config(str(CONFIGS / name), {k.replace('__', '.'): v for k, v in overrides.items()})


@pytest.fixture(scope='module')
def dk_dm(tmp_path_factory):
  """Workdir of DK-DM."""
  workdir = tmp_path_factory.mktemp('flux') / 'dk_dm'
  train(settings('flux_dev_dk_dm.py:runlocal'), str(workdir))
  return workdir


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


def test_dk_dm_leaves_an_adapter_that_diffusers_draws_with(dk_dm, tmp_path):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  pytest.importorskip('peft')
  snapshot = config_lib.model_path('tiny_flux')
  adapter = dk_dm / 'adapters' / 'dk_dm.safetensors'
  trained = draw(dk_dm, tmp_path / 'trained')
  loaded = draw(snapshot, tmp_path / 'loaded', lora=(str(adapter),))
  np.testing.assert_allclose(loaded, trained, rtol=1e-5, atol=1e-5)
  plain = draw(snapshot, tmp_path / 'plain')
  assert relative_error(plain, trained) > 1e-5

  pipeline = diffusers.FluxPipeline.from_pretrained(snapshot, torch_dtype=torch.float32)
  pipeline.set_progress_bar_config(disable=True)
  latents = torch.from_numpy(np.load(_noise(tmp_path)))
  options = dict(
    prompt=PROMPT, height=48, width=64, num_inference_steps=3, guidance_scale=3.5,
    latents=latents, output_type='latent',
  )  # fmt: skip
  before = pipeline(**options).images.numpy()
  assert relative_error(plain, before) <= 1e-4
  pipeline.load_lora_weights(str(adapter))
  after = pipeline(**options).images.numpy()
  assert relative_error(trained, after) <= 1e-4
  # What the adapter does is small after a few steps, and still the same.
  assert relative_error(trained - plain, after - before) <= 0.05


def test_a_run_is_measured_without_a_judge(dk_dm):
  stages = json.loads((dk_dm / 'summary.json').read_text())['stages']
  assert list(stages) == ['base', 'dk_dm']
  assert stages['dk_dm']['train']['anchor_distance'] > 0
  assert 'No judge looked' in (dk_dm / 'report.html').read_text()


def enumerate_adapters(directory):
  return [(path.stem, path) for path in sorted(directory.iterdir())]


def test_no_rl_goes_on_from_the_adapter_of_dk_dm(dk_dm, tmp_path):
  adapter = str(dk_dm / 'adapters' / 'dk_dm.safetensors')
  values = settings('flux_dev_no_rl.py:runlocal', adapter=adapter)
  train(values, str(tmp_path / 'more'))
  stages = json.loads((tmp_path / 'more' / 'summary.json').read_text())['stages']
  first = json.loads((dk_dm / 'summary.json').read_text())['stages']
  assert list(stages) == ['base', 'adapter', 'no_rl']
  metrics = read_metrics(tmp_path / 'more' / 'metrics.jsonl')
  assert all(0 < row['reward'] < 100 for row in metrics)
  drawn = [
    draw(config_lib.model_path('tiny_flux'), tmp_path / form, lora=(str(path),))
    for form, path in enumerate_adapters(tmp_path / 'more' / 'adapters')
  ]
  np.testing.assert_allclose(*drawn, rtol=1e-4, atol=1e-4)
  for name, before in (('base', 'base'), ('adapter', 'dk_dm')):
    distance = [s['train']['anchor_distance'] for s in (stages[name], first[before])]
    assert distance[0] == pytest.approx(distance[1], rel=1e-3)
  with pytest.raises(UserError, match='belongs to a run of another config .adapter was'):
    train(values | {'adapter': ''}, str(tmp_path / 'more'))


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
  # Stored in half precision.
  assert relative_error(draw(tmp_path / 'full' / 'model', tmp_path / 'model'), tuned) <= 0.05


@pytest.mark.slow
def test_int8_kernels_stay_frozen_under_adapters(tmp_path):
  values = settings('flux_dev_dk_dm.py:runlocal,int8', dk_dm__num_steps='2')
  train(values, str(tmp_path / 'int8'))
  assert (tmp_path / 'int8' / 'adapters' / 'dk_dm.safetensors').is_file()
  with pytest.raises(UserError, match="model.params is 'int8', which cannot be trained"):
    train(values | {'lora': ()}, str(tmp_path / 'full'))


@pytest.mark.parametrize('name', ['flux_dev_dk_dm', 'flux_dev_no_rl', 'flux_finetune'])
def test_configs_are_whole_and_say_what_they_take(name):
  for argument in ('', ':res=1024', ':int8', ':runlocal'):
    values = settings(f'{name}.py{argument}')
    config = config_lib.from_mapping(config_lib.ExperimentConfig, values)
    assert config.model.resolution == {':res=1024': 1024, ':runlocal': 64}.get(argument, 512)
  with pytest.raises(UserError, match='no argument of this config; there are .*runlocal'):
    settings(f'{name}.py:nosuch')
  with pytest.raises(UserError, match='res=big'):
    settings(f'{name}.py:res=big')
