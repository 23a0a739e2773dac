"""CLIP as a reward: both scores against transformers, files, anchors, devices, and the stage."""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import relative_error
from tiny_clip import write_clip

from eru_jax import flow, sharding
from eru_jax.data.emoji_knowledge import PairTable
from eru_jax.data.pairs import KnowledgePair
from eru_jax.errors import UserError
from eru_jax.models.clip import ClipTextConfig
from eru_jax.models.clip_vision import ClipConfig, ClipVisionConfig
from eru_jax.rewards.anchors import anchored, read_anchors
from eru_jax.rewards.base import Reward
from eru_jax.rewards.clip import SCORES, ClipReward, load_clip_reward
from eru_jax.rewards.image_processing import ImageProcessor
from eru_jax.sharding import MeshConfig
from eru_jax.training.batches import on_mesh
from eru_jax.training.config import ExperimentConfig, from_mapping
from eru_jax.training.stage_config import NoRlStageConfig
from eru_jax.types import Conditioning
from eru_jax.weights import clip_model

TOLERANCE = 1e-5
# Of a score that runs to 100: bfloat16's eight bits, over a handful of roundings a block.
BFLOAT16_DISTANCE = 1.5
PROMPTS = ['a red apple', 'the fruit that keeps the doctor away', 'what bees make', 'a ewe']


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
  """(directory, transformers' model, tokeniser and image processor)."""
  directory = tmp_path_factory.mktemp('clip')
  return directory, *write_clip(directory)


def _pictures(height, width, count=4, seed=0):
  return np.random.default_rng(seed).random((count, height, width, 3)).astype(np.float32)


def _reference(clip, pictures, prompts):
  """transformers' scores of each picture and its prompt, the pictures as SciScore rounds them."""
  torch = pytest.importorskip('torch')
  _, model, tokenizer, processor = clip
  levels = list((pictures * 255).round().clip(0, 255).astype(np.uint8))
  texts = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors='pt')
  with torch.no_grad():
    out = model(**texts, **processor(levels, return_tensors='pt'))
  return out.logits_per_image.diag().numpy(), np.exp(float(model.logit_scale.detach())), out


@pytest.mark.parametrize('size', [(28, 28), (64, 80), (41, 33)])
def test_scores_equal_transformers(clip, size):
  pictures = _pictures(*size)
  theirs, scale, _ = _reference(clip, pictures, PROMPTS)
  assert theirs.std() > 1
  for kind, wanted in (('sci_score', theirs), ('clip_score', 100 * np.maximum(theirs / scale, 0))):
    reward = load_clip_reward(clip[0], kind)
    score = jax.jit(reward.score)(reward.params, pictures, reward.text_features(PROMPTS))
    assert score.shape == (4,) and score.dtype == jnp.float32
    assert relative_error(score, wanted) <= TOLERANCE


def test_scores_by_hand():
  cosine, scale = jnp.array([-0.5, 0.0, 0.25]), jnp.log(80.0)
  np.testing.assert_allclose(SCORES['clip_score'](cosine, scale), [0, 0, 25])
  np.testing.assert_allclose(SCORES['sci_score'](cosine, scale), [-40, 0, 20], rtol=1e-6)


def test_gradients_with_respect_to_pictures_equal_transformers(clip):
  torch = pytest.importorskip('torch')
  _, model, tokenizer, processor = clip
  reward = load_clip_reward(clip[0])
  pictures = (_pictures(28, 28) * 255).round() / 255  # of the model's own size: nothing is rounded
  features = reward.text_features(PROMPTS)
  ours = jax.jit(jax.grad(lambda x: reward.score(reward.params, x, features).sum()))(pictures)
  seen = torch.from_numpy(pictures.transpose(0, 3, 1, 2)).requires_grad_()
  mean, std = (
    torch.tensor(v).reshape(3, 1, 1) for v in (processor.image_mean, processor.image_std)
  )
  texts = tokenizer(PROMPTS, padding=True, return_tensors='pt')
  model(**texts, pixel_values=(seen - mean) / std).logits_per_image.diag().sum().backward()
  assert relative_error(ours, seen.grad.numpy().transpose(0, 2, 3, 1)) <= TOLERANCE


def test_bfloat16_stays_near(clip):
  pictures, near = _pictures(28, 28), load_clip_reward(clip[0], dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(near.params['vision_model'])} == {jnp.dtype('bfloat16')}
  score = near.score(near.params, pictures, near.text_features(PROMPTS))
  np.testing.assert_allclose(
    score, _reference(clip, pictures, PROMPTS)[0], rtol=0, atol=BFLOAT16_DISTANCE
  )


def test_text_features_equal_transformers_in_any_number(clip):
  reward = load_clip_reward(clip[0])
  prompts = [f'{n} red apples' for n in range(70)]  # more than one batch, the last one padded
  features = reward.text_features(prompts)
  out = _reference(clip, _pictures(28, 28, 70), prompts)[2]
  assert relative_error(features, out.text_embeds.numpy()) <= TOLERANCE
  np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
  assert reward.text_features([]).shape == (0, features.shape[1])


def test_long_prompts_are_cut_as_transformers_cuts_them_with_one_warning(clip, caplog):
  reward, tokenizer = load_clip_reward(clip[0]), clip[2]
  exact = 'x ' * 75
  prompts = ['x y ' * 60, 'short', 'z ' * 76, exact]
  with caplog.at_level(logging.WARNING):
    ids = reward.tokenize(prompts)
  theirs = tokenizer(
    prompts, padding='max_length', truncation=True, max_length=77, return_tensors='np'
  )
  np.testing.assert_array_equal(ids, theirs['input_ids'])
  (record,) = caplog.records
  assert record.getMessage().startswith('CLIP reads 77 tokens: 2 of 4 prompts are longer')
  assert repr(prompts[0][:200]) in record.getMessage()


@pytest.mark.parametrize('bad', ['', ' \n'])
def test_empty_prompts_are_refused_by_index(clip, bad):
  with pytest.raises(UserError, match='Prompt 1 '):
    load_clip_reward(clip[0]).text_features(['fine', bad])


def _copy(clip, directory):
  return pathlib.Path(shutil.copytree(clip[0], directory / 'copy'))


@pytest.mark.parametrize(
  'name, message',
  [
    ('config.json', 'lacks config.json'),
    ('model.safetensors', 'lacks model.safetensors'),
    ('preprocessor_config.json', 'lacks preprocessor_config.json'),
    ('tokenizer.json', 'lacks tokenizer.json or vocab.json and merges.txt'),
  ],
)
def test_a_missing_file_is_named(clip, tmp_path, name, message):
  directory = _copy(clip, tmp_path)
  for path in (name, *(('vocab.json', 'merges.txt') if name == 'tokenizer.json' else ())):
    (directory / path).unlink(missing_ok=True)
  with pytest.raises(UserError, match=message) as caught:
    load_clip_reward(directory)
  assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
  'name, text, message',
  [
    ('config.json', '{', 'cannot be read'),
    ('config.json', '[]', 'no JSON object'),
    ('config.json', '{"model_type": "clip_text_model"}', "must be 'clip', a model with both"),
    ('preprocessor_config.json', '{"resample": 2}', 'resample is 2'),
    ('preprocessor_config.json', '{"image_processor": 3}', 'image_processor is 3'),
    ('preprocessor_config.json', '{}', 'cuts pictures to 224 pixels, but the model sees 28'),
    ('tokenizer.json', '{"a": 1}', 'no readable CLIP tokeniser'),
    ('model.safetensors', 'x', 'not a whole safetensors file'),
  ],
)
def test_a_damaged_file_is_named(clip, tmp_path, name, text, message):
  directory = _copy(clip, tmp_path)
  (directory / name).write_text(text)
  with pytest.raises(UserError, match=message) as caught:
    load_clip_reward(directory)
  assert str(directory) in str(caught.value) and '\n' not in str(caught.value)


def test_what_does_not_belong_together_is_refused(clip, tmp_path):
  directory = _copy(clip, tmp_path)
  values = json.loads((directory / 'config.json').read_text())
  values['text_config']['vocab_size'] = 100
  (directory / 'config.json').write_text(json.dumps(values))
  with pytest.raises(UserError, match='but the model has 100: take both from the same model'):
    load_clip_reward(directory)
  values['text_config']['vocab_size'] = 50_000
  (directory / 'config.json').write_text(json.dumps(values))
  with pytest.raises(UserError, match='wrong shape: text_model.embeddings.token_embedding'):
    load_clip_reward(directory)
  with pytest.raises(UserError, match='There is no CLIP directory'):
    load_clip_reward(tmp_path / 'none')
  with pytest.raises(UserError, match="Unknown score 'sci'"):
    load_clip_reward(clip[0], 'sci')


def test_the_layouts_of_todays_processors_and_of_shards_are_read(clip, tmp_path):
  directory = _copy(clip, tmp_path)
  part = json.loads((directory / 'preprocessor_config.json').read_text())
  (directory / 'preprocessor_config.json').unlink()
  (directory / 'processor_config.json').write_text(json.dumps({'image_processor': part}))
  (directory / 'model.safetensors').rename(directory / 'model-1.safetensors')
  names = dict.fromkeys(clip[1].state_dict(), 'model-1.safetensors')
  index = json.dumps({'weight_map': names})
  (directory / 'model.safetensors.index.json').write_text(index)
  ours, other = load_clip_reward(clip[0]), load_clip_reward(directory)
  assert ours.processor == other.processor
  jax.tree.map(np.testing.assert_array_equal, ours.params, other.params)


def _table(*prompts):
  return PairTable(tuple(KnowledgePair(prompt, 'anything') for prompt in prompts))


def test_every_prompt_has_a_scale_of_its_own():
  plain = Reward(
    jnp.float32(2.0),
    lambda params, images, targets: params * images.mean((1, 2, 3)) + targets,
    lambda table: np.arange(len(table.pairs), dtype=np.float32),
  )
  reward = anchored(plain, {'a': (1.0, 3.0), 'b': (0.0, 8.0), 'c': (-1.0, 0.0)})
  targets = reward.targets(_table('a', 'b', 'c'))
  images = jnp.full((3, 2, 2, 3), 0.5)  # scores 1 + 0, 1 + 1, 1 + 2
  score = jax.jit(reward.score)(reward.params, images, targets)
  np.testing.assert_allclose(score, [0.0, 0.25, 1.0])
  with pytest.raises(UserError, match="1 of 2 prompts have no reward anchors, the first is 'd'"):
    reward.targets(_table('a', 'd'))


def test_anchors_are_read_and_bad_ones_refused(tmp_path):
  path = tmp_path / 'anchors.jsonl'
  good = {'prompt': 'what bees make', 'low': 17, 'high': 32.5}
  path.write_text(json.dumps(good) + '\n\n')
  assert read_anchors(path) == {'what bees make': (17.0, 32.5)}
  bad = [
    ('[]', 'no JSON object'), ('{"prompt": "a"}', 'no JSON object'), ('{', 'no JSON object'),
    (json.dumps(good | {'prompt': 3}), 'a text for prompt'),
    (json.dumps(good | {'low': '17'}), 'numbers for low'),
    (json.dumps(good | {'high': float('nan')}), 'numbers for low'),
    (json.dumps(good | {'low': 33}), 'above low'), (json.dumps(good), 'twice'),
  ]  # fmt: skip
  for line, message in bad:
    path.write_text(json.dumps(good) + '\n' + line)
    with pytest.raises(UserError, match=message) as caught:
      read_anchors(path)
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)


CLIP = dict(reward='sci_score', reward_model='clip')


@pytest.mark.parametrize(
  'values, message',
  [
    ({'reward': 'pick_score'}, '`reward` is'),
    ({'reward': 'clip_score'}, '`reward_model` is'),
    ({'reward_model': 'clip'}, '`reward_model` is'),
    (CLIP, 'would call every picture right'),
    (CLIP | {'reward_scale': 'group', 'drop_solved': True}, 'would call every picture right'),
    (CLIP | {'reward_anchors': 'a.jsonl', 'reward_high': 30.0}, '`reward_anchors` is'),
  ],
)
def test_rewards_that_cannot_work_are_refused(values, message):
  with pytest.raises(UserError, match=message):
    NoRlStageConfig(**values)


def test_rewards_that_can_work_are_not():
  for values in (
    {'reward_low': 18.0, 'reward_high': 33.0},
    {'reward_anchors': 'a'},
    {'reward_scale': 'group'},
  ):
    assert NoRlStageConfig(**CLIP, **values).reward == 'sci_score'


def test_a_world_of_prompts_needs_a_clip():
  data = {'world': 'prompts', 'pairs': 'x.jsonl'}
  settings = CLIP | {'reward_low': 18.0, 'reward_high': 33.0}
  values = {'stages': ('no_rl',), 'data': data, 'no_rl': settings}
  assert from_mapping(ExperimentConfig, values).no_rl.reward_model == 'clip'
  with pytest.raises(UserError, match="no_rl.reward is 'emoji', the classifier of another world"):
    from_mapping(ExperimentConfig, values | {'no_rl': {}})


def test_a_workdir_keeps_the_places_of_its_reward_and_what_its_anchors_said(tmp_path, monkeypatch):
  from eru_jax.training.config import to_json
  from eru_jax.training.experiment import resolve
  from eru_jax.training.workdir import claim

  monkeypatch.chdir(tmp_path)
  anchors = tmp_path / 'a.jsonl'
  anchors.write_text('{}')
  settings = CLIP | {'reward_anchors': 'a.jsonl'}
  config = resolve(from_mapping(ExperimentConfig, {'stages': ('no_rl',), 'no_rl': settings}))
  places = (str(tmp_path / 'clip'), str(anchors))
  assert (config.no_rl.reward_model, config.no_rl.reward_anchors) == places
  claim(tmp_path / 'run', to_json(config))
  (tmp_path / 'run' / 'metrics.jsonl').touch()
  claim(tmp_path / 'run', to_json(config))
  anchors.write_text('{"other": 1}')
  with pytest.raises(UserError, match='a.jsonl has changed since'):
    claim(tmp_path / 'run', to_json(config))


# The stage.

LATENT = (3, 5)


@dataclasses.dataclass(frozen=True)
class _Model:
  """Stands in for a DiffusionModel: draws what noise and prompt say, decodes by a matrix."""

  latent_shape = LATENT

  def velocity(self, base, trainable=None):
    del base
    return lambda x, t, text: x * trainable + text.tokens[:, :, :5]

  def sample(self, field, noise, text, schedule):
    del schedule
    return noise - field(noise, jnp.ones(noise.shape[0]), text)

  def decode(self, params, x):
    return nn.sigmoid((x.reshape(x.shape[0], -1) @ params).reshape(-1, 30, 34, 3))


def test_the_stage_holds_every_picture_against_the_implicit_prompt_of_its_pair(clip):
  from eru_jax.data.world import World
  from eru_jax.training.experiment import Snapshot, TextTable
  from eru_jax.training.stages import no_rl

  # The last two lead to one answer: its pictures are held against the first of them.
  answers = ['answer 0', 'answer 1', 'answer 2', 'Answer 2']
  pairs = [KnowledgePair(*both) for both in zip(PROMPTS, answers, strict=True)]
  explicit = [dataclasses.replace(p, implicit=p.explicit, split='explicit') for p in pairs]
  world = World({'train': PairTable(tuple(pairs)), 'explicit': PairTable(tuple(explicit))})
  prompts = ['', *world.all_prompts]
  rng = np.random.default_rng(0)
  tokens = rng.standard_normal((len(prompts), *LATENT)).astype(np.float32)
  text = TextTable(
    {prompt: n for n, prompt in enumerate(prompts)},
    lambda rows: Conditioning(tokens[rows]),
    Conditioning(tokens[:1]),
  )
  config = from_mapping(ExperimentConfig, {
    'stages': ('no_rl',), 'data': {'world': 'prompts', 'pairs': 'x.jsonl'},
    'no_rl': {
      'reward': 'clip_score', 'reward_model': str(clip[0]), 'reward_low': 5.0, 'reward_high': 30.0,
      'prompts_per_step': 6, 'images_per_prompt': 2, 'updates_per_step': 3, 'explicit_share': 0.5,
    },
  })  # fmt: skip
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  experiment = types.SimpleNamespace(
    config=config,
    planned=False,
    place=jax.device_put,
    mesh=mesh,
    world=world,
    text=text,
    prompts=lambda split: world.splits[split].pairs,
    schedule=lambda model, steps: flow.timestep_schedule(steps),
  )
  decoder = rng.standard_normal((15, 30 * 34 * 3)).astype(np.float32)
  snapshot = Snapshot(_Model(), None, decoder, trainable=jnp.float32(0.1))
  stage = no_rl.build(experiment, snapshot, config.no_rl)
  frozen, index = stage.make_frozen(), next(stage.batches)
  batch = on_mesh(stage.assemble(index), mesh)
  examples, measured = jax.jit(stage.program.prepare)(
    jnp.float32(0.1), frozen, batch, jax.random.key(3)
  )

  drawn = np.concatenate([[p.implicit for p in pairs], [p.implicit for p in explicit]])
  rows = np.concatenate([index['implicit'], 4 + index['explicit']])
  rows = np.repeat(rows[np.argsort(np.arange(6) % 3, kind='stable')], 2)
  np.testing.assert_array_equal(batch['text'].tokens, tokens[text.index(list(drawn[rows]))])
  names = np.array([PROMPTS[row] for row in (0, 1, 2, 3, 0, 1, 2, 2)])[rows]
  pictures = np.asarray(_Model().decode(decoder, examples['x_0']))
  theirs, scale, _ = _reference(clip, pictures, list(names))
  wanted = 100 * np.maximum(theirs / scale, 0)
  np.testing.assert_allclose(examples['r'], np.clip((wanted - 5) / 25, 0, 1), atol=1e-4)
  assert 0 < examples['r'].std()
  np.testing.assert_allclose(measured['reward'], wanted.mean(), rtol=1e-4)


def test_a_run_looks_for_its_reward_before_it_begins(tmp_path):
  from eru_jax.training.stages.no_rl import check_reward

  settings = dict(reward='clip_score', reward_model=str(tmp_path / 'none'))
  with pytest.raises(UserError, match='There is no CLIP directory'):
    check_reward(NoRlStageConfig(**settings, reward_scale='group'))
  check_reward(NoRlStageConfig())


# Many devices: in a process of their own, this file run as a script.

MESHES = {
  'data': MeshConfig(data=8),
  'all': MeshConfig(data=2, fsdp=2, tensor=2),
  'sequence': MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
}


def _score_on(mesh):
  sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
  vision = ClipVisionConfig(**sizes, projection_dim=6, image_size=16, patch_size=8)
  config = ClipConfig(ClipTextConfig(**sizes), vision)
  rng = np.random.default_rng(0)
  shapes = clip_model.shapes(config)
  params = {
    name: jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes[name])
    for name in ('vision_model', 'logit_scale')
  }
  reward = ClipReward('sci_score', config, ImageProcessor(16, 16), None, params, None, jnp.float32)
  pictures, features = rng.random((8, 20, 24, 3)), rng.standard_normal((8, 6))
  with sharding.use_mesh(mesh):
    placed = jax.device_put(params, reward.shardings(mesh))
    batch = jax.device_put((pictures, features), sharding.replicated(mesh))
    score = jax.jit(reward.score)
    kernel = placed['vision_model']['encoder']['layers']['mlp']['fc1']['kernel']
    return np.asarray(score(placed, *batch)), list(kernel.sharding.spec)


def main(path):
  one = _score_on(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
  found = {name: _score_on(sharding.make_mesh(config)) for name, config in MESHES.items()}
  arrays = {name: (score.tolist(), spec) for name, (score, spec) in (found | {'one': one}).items()}
  pathlib.Path(path).write_text(json.dumps(arrays))


def test_many_devices_score_as_one(tmp_path):
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'PYTHONPATH': os.pathsep.join(p for p in sys.path if p),
  }
  path = tmp_path / 'found.json'
  subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True)
  found = json.loads(path.read_text())
  one, _ = found.pop('one')
  assert np.std(one) > 0.1
  for score, spec in found.values():
    assert spec == [None, 'fsdp', 'tensor']
    assert relative_error(score, one) <= TOLERANCE


if __name__ == '__main__':
  main(sys.argv[1])
