"""The emoji world's judge and its reward classifier, on pictures whose content is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eru_jax.rewards import emoji as lib


@pytest.fixture(scope='module')
def pictures(emoji_cache):
  """All pictures of the world, (N, 64, 64, 3) uint8."""
  del emoji_cache
  from eru_jax.data.emoji_knowledge import load_pictures
  from eru_jax.files import cache_directory

  return load_pictures(cache_directory() / 'datasets').images


def judged(pictures, change):
  """The class the judge sees in every picture after a change, by parts."""
  judge = lib.TemplateJudge(pictures)
  see = jax.jit(lambda images: judge(images))
  parts = np.array_split(np.arange(len(pictures)), max(1, len(pictures) // 128))
  return np.concatenate([see(change(pictures[part] / np.float32(255))) for part in parts])


def shifted(by):
  def change(images):
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=1.0)
    return padded[:, 2 - by : 66 - by, 2 - by : 66 - by]

  return change


@pytest.mark.parametrize('by', [-2, 0, 2])
def test_judge_sees_every_picture_even_when_shifted(pictures, by):
  np.testing.assert_array_equal(judged(pictures, shifted(by)), np.arange(len(pictures)))


def test_judge_sees_every_picture_through_noise(pictures):
  rng = np.random.default_rng(0)
  seen = judged(pictures, lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32))
  np.testing.assert_array_equal(seen, np.arange(len(pictures)))


def test_judge_measures_the_mean_square_difference():
  templates = np.full((3, 8, 8, 3), 255, np.uint8)
  templates[1, :4] = 0
  templates[2] = 51
  # White comes in at the edges, so all nine shifts of a white picture are the same.
  distances = lib.TemplateJudge(templates).distances(jnp.ones((1, 8, 8, 3)))
  np.testing.assert_allclose(distances[0], [0, 0.5, 0.8**2], atol=1e-6)


@pytest.fixture(scope='module')
def scores(pictures):
  """(pictures, targets) -> what the shipped reward says, (B,)."""
  from eru_jax.training.config import ModelConfig, model_path
  from eru_jax.weights import model_directory

  params = model_directory.load(model_path(ModelConfig().source)).reward
  return jax.jit(lambda x, targets: lib.EmojiReward(len(pictures))(params, x, targets))


def test_shipped_reward_tells_pictures_from_blends(pictures, scores):
  rows = np.linspace(0, len(pictures) - 1, 256).round().astype(int)
  images = pictures[rows] / np.float32(255)
  true = np.asarray(scores(images, rows))
  # Measured: 0.73 and 0.95; of blends 0.84, of other pictures 1.
  assert np.mean(true > 0.5) >= 0.65 and np.mean(true > 0.1) >= 0.9
  # A third of the catalogue away, so that it is no near relative (a flag and another flag).
  blends = (images + np.roll(images, 85, axis=0)) / 2
  assert np.mean(np.asarray(scores(blends, rows)) < 0.05) >= 0.75
  other = np.asarray(scores(images, np.roll(rows, 85)))
  assert np.mean(other < 0.05) >= 0.98


def test_reward_is_the_softmax_probability_of_the_target():
  reward = lib.EmojiReward(classes=3)
  images = jax.random.uniform(jax.random.key(0), (4, 64, 64, 3))
  params = reward.module.init(jax.random.key(1), images)['params']
  params = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), _unboxed(params)
  )
  logits = np.asarray(reward.module.apply({'params': params}, images))
  assert logits.shape == (4, 4)
  targets = np.array([0, 2, 1, 2])
  expected = np.exp(logits[np.arange(4), targets]) / np.exp(logits).sum(axis=1)
  np.testing.assert_allclose(reward(params, images, targets), expected, rtol=1e-5)


def _unboxed(tree):
  import flax.linen as nn

  return nn.unbox(tree)


def test_distort_labels_a_fifth_as_nothing_and_leaves_the_other_labels():
  count = 2000
  labels = jnp.arange(count, dtype=jnp.int32) % 7
  images = jnp.broadcast_to((labels / 10)[:, None, None, None], (count, 8, 8, 3))
  out, named = jax.jit(lib.distort, static_argnums=3)(jax.random.key(0), images, labels, 7)
  assert out.shape == images.shape and named.shape == labels.shape
  assert float(out.min()) >= 0 and float(out.max()) <= 1
  garbage = np.asarray(named) == 7
  # Five standard deviations of a share of 2,000 draws at 0.2 are 0.045.
  assert abs(garbage.mean() - 0.2) < 0.045
  np.testing.assert_array_equal(np.asarray(named)[~garbage], np.asarray(labels)[~garbage])


def test_classifier_loss_by_hand():
  logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
  labels = jnp.array([0, 1])
  loss, aux = lib.classifier_loss(logits, labels, smoothing=0.0)
  np.testing.assert_allclose(loss, -(np.log(0.5) + np.log(0.1)) / 2, rtol=1e-6)
  assert float(aux['accuracy']) == 0.5
  smooth, _ = lib.classifier_loss(logits, labels, smoothing=0.3)
  spread = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).mean()
  np.testing.assert_allclose(smooth, 0.7 * loss - 0.3 * spread, rtol=1e-6)
