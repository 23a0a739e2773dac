"""What is wrong is told before text encoders run and the backbone is read: hours, at full size."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from test_flux_training import CONFIGS, settings

from eru_jax.config_file import load_config
from eru_jax.errors import UserError
from eru_jax.evaluating.evaluator import evaluate
from eru_jax.evaluating.request import EvaluationRequest
from eru_jax.training import config as config_lib
from eru_jax.training import experiment, modules
from eru_jax.training import workdir as workdir_lib
from eru_jax.training.run import train
from eru_jax.training.sampling import SampleRequest, sample
from eru_jax.weights.conversion import ConversionRequest, convert
from eru_jax.weights.safetensors_io import write_safetensors
from eru_jax.weights.tiny_models import write_tiny_flux


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('ERU_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield


@pytest.fixture(autouse=True)
def nothing_large(monkeypatch):
  """Fails a test in which an encoder or a backbone would be read."""
  for name in ('open_text', 'load_snapshot'):
    monkeypatch.setattr(experiment, name, lambda *_, name=name: pytest.fail(f'{name} was called'))


@pytest.fixture(scope='module')
def rounded(cache, tmp_path_factory):
  """The tiny FLUX.1 with kernels in int8."""
  experiment.prepare_model('tiny_flux')
  directory = tmp_path_factory.mktemp('models') / 'int8'
  source = str(config_lib.model_path('tiny_flux'))
  convert(ConversionRequest('flux', source, str(directory), int8=True))
  return str(directory)


def refusal(name, workdir, **overrides):
  with pytest.raises(UserError) as caught:
    train(settings(name, **overrides), str(workdir))
  assert '\n' not in caught.value.sentence
  return str(caught.value)


@pytest.mark.parametrize('name', ['flux_dev_dk_dm', 'flux_dev_no_rl', 'flux_finetune'])
def test_kernels_in_int8_are_not_trained(name, rounded, tmp_path):
  message = refusal(f'{name}.py:runlocal,full', tmp_path / 'run', model__source=rounded)
  assert f'{rounded} holds kernels in int8, which can only stay frozen' in message


@pytest.mark.parametrize('stage', ['flux_dev_dk_dm', 'flux_dev_no_rl', 'flux_finetune'])
def test_the_adapter_to_begin_with(stage, tmp_path):
  path = tmp_path / 'adapter.safetensors'
  message = refusal(f'{stage}.py:runlocal', tmp_path / 'run', adapter=str(path))
  assert f'There is no weights file {path}' in message
  path.write_bytes(b'no adapter')
  message = refusal(f'{stage}.py:runlocal', tmp_path / 'run', adapter=str(path))
  assert 'is not a whole safetensors file' in message
  names = ('transformer.x_embedder.lora_A.weight', 'transformer.x_embedder.lora_B.weight')
  shapes = ((2, 64), (3072, 2))
  tensors = {name: np.ones(s, np.float32) for name, s in zip(names, shapes, strict=True)}
  write_safetensors(path, tensors)
  message = refusal(f'{stage}.py:runlocal', tmp_path / 'run', adapter=str(path))
  assert 'wrong shape: x_embedder (2, 64) (3072, 2) for 16 -> 32' in message


def test_a_pattern_without_a_layer(tmp_path):
  rules = ({'pattern': 'attnx', 'rank': 4, 'alpha': 4.0},)
  message = refusal('flux_dev_dk_dm.py:runlocal', tmp_path / 'run', lora=rules)
  assert "LoRA pattern 'attnx' matches no layer" in message


@pytest.mark.parametrize(
  ('image', 'words'),
  [
    (None, '2 training pairs have no `image` (pairs:1)'),
    ('nosuch.png', "pair 'pairs:1': there is no picture"),
    ('broken.png', 'broken.png is not a readable picture'),
  ],
)
def test_pictures_to_learn_from(image, words, tmp_path):
  (tmp_path / 'broken.png').write_bytes(b'no picture')
  Image.new('RGB', (8, 8)).save(tmp_path / 'whole.png')
  pairs = [{'implicit': 'a', 'explicit': 'a'}, {'implicit': 'b', 'explicit': 'b'}]
  for pair, name in zip(pairs, (image, 'whole.png'), strict=True):
    pair |= {'split': 'train'} if name is None else {'split': 'train', 'image': name}
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
  message = refusal('flux_finetune.py:runlocal', tmp_path / 'run', data__pairs=str(path))
  assert words in message, message


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    ({'lora': ('nosuch.safetensors',)}, 'nosuch.safetensors'),
    ({'lora': ('broken.png',)}, 'is not a whole safetensors file'),
    ({'lora': ('a', 'b'), 'lora_scale': (1.0, 1.0, 1.0)}, '3 --lora_scale for 2 --lora'),
    ({'height': 50}, 'Pictures of 50 x 64 pixels: this model needs multiples of 16'),
    ({'width': 24}, 'multiples of 16'),
    ({'latents': 'noise.npy'}, r'has shape (2, 12, 16), but these prompts need (1, 16, 16)'),
    ({'image': 'nosuch.png'}, '--image: there is no picture nosuch.png'),
    ({'image': 'broken.png'}, '--image: broken.png is not a readable picture'),
    ({'image': 'whole.png', 'strength': 0.0}, 'leaves none of 2 steps'),
    ({'stage': 'nosuch'}, '--stage=nosuch: this model has base, give one of these'),
  ],
)
def test_flags_of_sample(flags, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'broken.png').write_bytes(b'no picture')
  Image.new('RGB', (8, 8)).save(tmp_path / 'whole.png')
  np.save(tmp_path / 'noise.npy', np.zeros((2, 12, 16), np.float32))
  request = {'prompts': ('a cat',), 'height': 64, 'width': 64, 'steps': 2} | flags
  with pytest.raises(UserError) as caught:
    sample(SampleRequest('tiny_flux', 'out', **request))
  assert words in str(caught.value)


def evaluated(model, tmp_path, **options):
  """The refusal of an evaluation, before which nothing is written."""
  with pytest.raises(UserError) as caught:
    evaluate(EvaluationRequest((str(model),), str(tmp_path / 'out'), **options))
  assert '\n' not in caught.value.sentence and not (tmp_path / 'out').exists()
  return str(caught.value)


@pytest.mark.parametrize('kind', ['benchmark', 'prompts', 'run', 'snapshot'])
def test_models_whose_pictures_no_judge_knows(kind, tmp_path):
  model, data = 'tiny_flux', None
  if kind == 'prompts':  # the judge would not know this either
    data = tmp_path / 'mine.jsonl'
    data.write_text('{"implicit": "a riddle", "explicit": "what no emoji shows"}\n')
  elif kind == 'run':
    values = settings('flux_dev_dk_dm.py:runlocal')
    model = tmp_path / 'run'
    found = experiment.resolve(config_lib.from_mapping(config_lib.ExperimentConfig, values))
    workdir_lib.claim(model, dataclasses.asdict(found))
  elif kind == 'snapshot':
    model = tmp_path / 'snapshot'
    write_tiny_flux(model, guidance=True)
  message = evaluated(model, tmp_path, data=data and str(data))
  assert (
    f"--model={model}: no judge knows what its pictures should show, as its data.world is 'pr"
    in message
  )
  assert '--benchmark=science_t2i or wise' in message


def test_models_of_a_size_that_the_judge_does_not_know(tmp_path):
  message = evaluated('emoji_base', tmp_path, height=128, width=64)
  assert 'draws pictures of 128 x 64 pixels, but the judge knows those of 64 x 64' in message


def test_kernels_in_int8_stay_as_they_are_under_adapters(rounded):
  for argument in ('runlocal', 'runlocal,int8'):
    values = settings(f'flux_dev_dk_dm.py:{argument}', model__source=rounded)
    config = config_lib.from_mapping(config_lib.ExperimentConfig, values)
    modules.check_training(experiment.resolve(config))


@pytest.mark.parametrize('name', ['flux_dev_dk_dm', 'flux_dev_no_rl', 'flux_finetune'])
@pytest.mark.parametrize(
  ('guidance', 'sampler'), [(True, (28, None, 3.5)), (False, (4, 0.0, 0.0))], ids=['dev', 'schnell']
)
def test_pictures_are_made_as_the_model_wants(name, guidance, sampler, tmp_path):
  """The configs are for either of the published models."""
  write_tiny_flux(tmp_path / 'model', guidance=guidance)
  values = load_config(str(CONFIGS / f'{name}.py'), {'model.source': str(tmp_path / 'model')})
  found = experiment.resolve(config_lib.from_mapping(config_lib.ExperimentConfig, values))
  sampling = found.sampling
  assert (sampling.num_steps, sampling.shift_mu, sampling.guidance) == sampler
  values['sampling'] |= {'num_steps': 9}
  found = experiment.resolve(config_lib.from_mapping(config_lib.ExperimentConfig, values))
  assert found.sampling.num_steps == 9 and found.sampling.shift_mu == sampler[1]
