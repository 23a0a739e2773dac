"""Pretraining: the autoencoder's objective, quantised kernels, and a whole run from scratch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from eru_jax.losses.autoencoding import autoencoding
from eru_jax.models import registry
from eru_jax.models.quantize import quantize
from eru_jax.types import Conditioning


def objective(mean, logvar, decode, images, **options):
  shape = (images.shape[0], 64, 64, 4)
  moments = [jnp.full(shape, value, jnp.float32) for value in (mean, logvar)]
  return autoencoding(lambda x: moments, decode, images, jax.random.key(0), **options)


def test_kl_is_that_of_two_gaussians():
  images = jnp.zeros((2, 8, 8, 3))

  def black(z):
    return jnp.zeros(images.shape)

  loss, parts = objective(0.0, 0.0, black, images)
  assert float(loss) == float(parts['kl']) == 0  # the unit normal itself
  mean, deviation = 1.5, 0.2
  loss, parts = objective(mean, 2 * np.log(deviation), black, images, kl_weight=0.1)
  # KL(N(m, s^2) || N(0, 1)) = -log s + (s^2 + m^2 - 1) / 2
  kl = -np.log(deviation) + (deviation**2 + mean**2 - 1) / 2
  np.testing.assert_allclose(parts['kl'], kl, rtol=1e-5)
  np.testing.assert_allclose(loss, 0.1 * kl, rtol=1e-5)


def test_reconstruction_is_of_a_sample_of_the_posterior():
  images = jnp.full((2, 64, 64, 4), 0.5)
  mean, deviation = 2.0, 0.3
  loss, parts = objective(mean, 2 * np.log(deviation), lambda z: z, images, kl_weight=0.0)
  # 32,768 values: five standard errors are below 1 %.
  np.testing.assert_allclose(parts['l1'], mean - 0.5, rtol=0.01)
  np.testing.assert_allclose(parts['l2'], (mean - 0.5) ** 2 + deviation**2, rtol=0.01)
  np.testing.assert_allclose(loss, parts['l1'] + parts['l2'], rtol=1e-6)


@pytest.fixture(scope='module')
def toy():
  """(kernel-bearing parameters, forward) of a small FLUX with random parameters."""
  import flax.linen as nn

  family = registry.family('flux')
  module = family.backbone(family.config.from_dict(family.tiny), scan=False)
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  conditioning = Conditioning(tokens=normal(2, 5, 32), pooled=normal(2, 32))
  inputs = (normal(2, 12, 16), jnp.array([0.2, 0.9]), conditioning, family.latent_ids(3, 4))
  shapes = nn.unbox(
    jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, jnp.ones(2))['params'])
  )
  params = jax.tree.map(
    lambda s: normal(*s.shape) * (s.shape[0] ** -0.5 if len(s.shape) > 1 else 0.1), shapes
  )
  forward = jax.jit(lambda p: module.apply({'params': p}, *inputs, jnp.ones(2)))
  return params, forward


def test_a_quantised_network_is_nearly_the_float_one(toy):
  params, forward = toy
  whole, small = forward(params), forward(quantize(params))
  error = jnp.linalg.norm(small - whole) / jnp.linalg.norm(whole)
  assert 0 < error < 0.03


def test_quantised_kernels_are_within_half_a_step(toy):
  params, _ = toy
  params = params | {'zero': {'kernel': jnp.zeros((3, 2))}}
  small = traverse_util.flatten_dict(quantize(params, 'x_embedder|zero'), sep='/')
  changed = {name.rpartition('/')[0] for name in small if name.endswith('/kernel_scale')}
  assert changed == {'x_embedder', 'zero'}
  assert (small['zero/kernel_scale'] == 1).all() and not small['zero/kernel'].any()
  kernel, scale = small['x_embedder/kernel'], small['x_embedder/kernel_scale']
  assert kernel.dtype == jnp.int8 and scale.shape == kernel.shape[-1:]
  error = jnp.abs(kernel * scale - params['x_embedder']['kernel'])
  assert (error <= 0.5001 * scale).all() and (jnp.abs(kernel).max(axis=0) == 127).all()
  others = {n: v for n, v in small.items() if n.rpartition('/')[0] not in changed}
  flat = traverse_util.flatten_dict(params, sep='/')
  assert all(value is flat[name] for name, value in others.items())


@pytest.mark.slow
def test_a_run_from_scratch_makes_a_model(tiny_config, tiny_model_dir, tmp_path):
  from eru_jax.models.autoencoder_kl import AutoencoderKL, scale_latents
  from eru_jax.training.evaluation import SPLITS
  from eru_jax.training.metrics import read_metrics
  from eru_jax.training.restore import open_model
  from eru_jax.training.run import train
  from eru_jax.weights import model_directory

  architecture, autoencoder = (
    json.loads((tiny_model_dir / part / 'config.json').read_text())
    for part in ('transformer', 'vae')
  )
  stages = ('autoencoder', 'reward', 'flow_matching', 'dk_dm')
  config = tiny_config | dict(
    stages=stages,
    model=dict(source='scratch', architecture=architecture, autoencoder=autoencoder, scan=False),
  )
  del config['no_rl']
  config['evaluation'] |= dict(max_prompts=2, batch_size=2, gallery=1)
  for stage in stages:
    batch = {} if stage == 'dk_dm' else {'batch_size': 2}
    shared = dict(num_steps=2, accumulation=2, save_every=2, log_every=1)
    config[stage] = config.get(stage, {}) | batch | shared
  workdir = tmp_path / 'run'
  train(config, str(workdir))

  rows = read_metrics(workdir / 'metrics.jsonl')
  assert [(row['stage'], row['step']) for row in rows] == [(s, n) for s in stages for n in (1, 2)]
  assert all(np.isfinite(row['loss']) and row['grad_norm'] > 0 for row in rows)
  summary = json.loads((workdir / 'summary.json').read_text())
  assert list(summary['stages']) == ['base', 'dk_dm']
  assert set(summary['stages']['base']) <= {*SPLITS, 'unrelated_drift'}
  assert (workdir / 'report.html').is_file()

  stored = model_directory.load(workdir / 'model')
  assert stored.settings['text_encoder'] == 'minilm' and stored.reward is not None
  experiment, snapshot, _ = open_model(str(workdir / 'model'), ['red apple'])
  # The scale is that of the trained autoencoder's latents, over all pictures of the world.
  module = AutoencoderKL(stored.autoencoder_config)
  encode = jax.jit(lambda p, x: module.apply({'params': p}, x / 127.5 - 1, method='encode')[0])
  pictures = experiment.world.pictures.images
  latents = np.concatenate(
    [
      encode(stored.autoencoder, pictures[start : start + 64].astype(np.float32))
      for start in range(0, len(pictures), 64)
    ]
  )
  scaled = scale_latents(latents, stored.autoencoder_config)
  assert abs(np.mean(scaled)) < 0.05
  np.testing.assert_allclose(np.std(scaled), 1, rtol=0.05)
  assert abs(stored.autoencoder_config.scaling_factor - autoencoder['scaling_factor']) > 0.01
  assert snapshot.reward is not None and snapshot.trainable is None
