"""Which emoji does a picture show? A reward for training and, apart from it, a judge for reports.

The two are different models, so that a policy which learns to please the reward does not please
the judge for the same reason:
  - the reward is a convolutional classifier trained on distorted pictures, whose last class is
    "nothing recognisable" (blends of two pictures, and pieces of two put together);
  - the judge has no training at all: the nearest blurred picture, under small shifts.
How often each is wrong on generated pictures is recorded in docs/benchmarks.md.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from eru_jax.models.layers import Dense, LayerNorm

PyTree = Any


class EmojiClassifier(nn.Module):
  """A small residual network: picture -> class logits.

  Pixels are folded 4 x 4 into channels first: full-resolution convolutions over three channels
  are what a CPU does worst.

  Attributes:
    classes: emoji in the catalogue; one logit more stands for "nothing recognisable".
    widths: channels at 16, 8 and 4 pixels.
  """

  classes: int
  widths: tuple[int, ...] = (64, 128, 192)

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps (B, 64, 64, 3) in [0, 1] to (B, classes + 1) float32 logits."""
    batch, height, width, channels = images.shape
    x = (images * 2 - 1).reshape(batch, height // 4, 4, width // 4, 4, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // 4, width // 4, 16 * channels)
    x = Dense(self.widths[0], axes=('conv_in', 'conv_out'), name='stem')(x)
    for level, features in enumerate(self.widths):
      if level:
        x = nn.Conv(features, (2, 2), (2, 2), name=f'down_{level}')(x)
      for block in range(2):
        y = LayerNorm(affine=True, name=f'norm_{level}_{block}')(x)
        y = nn.Conv(features, (3, 3), name=f'conv_{level}_{block}_1')(y)
        y = nn.gelu(y, approximate=True)
        y = nn.Conv(
          features, (3, 3), kernel_init=nn.initializers.zeros, name=f'conv_{level}_{block}_2'
        )(y)
        x = x + y
    x = LayerNorm(affine=True, name='norm_out')(x).mean(axis=(1, 2))
    # Classes are too odd a number to be split.
    return Dense(self.classes + 1, axes=('embed', None), name='head')(x).astype(jnp.float32)


def _shift(image: jax.Array, offset: jax.Array) -> jax.Array:
  """Moves a picture (H, W, C) by up to 5 whole pixels, white coming in."""
  padded = jnp.pad(image, ((5, 5), (5, 5), (0, 0)), constant_values=1.0)
  start = (5 + offset[0], 5 + offset[1], 0)
  return jax.lax.dynamic_slice(padded, start, image.shape)


def _blur(images: jax.Array) -> jax.Array:
  """A 3 x 3 box blur; outside the picture, its edge goes on."""
  padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='edge')
  height, width = images.shape[1:3]
  parts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
  return sum(parts) / 9


def distort(
  key: jax.Array, images: jax.Array, labels: jax.Array, nothing: int
) -> tuple[jax.Array, jax.Array]:
  """Training pictures for the classifier: distorted ones, and some that show nothing.

  Args:
    key: randomness.
    images: (B, H, W, 3) float32 in [0, 1].
    labels: (B,) int32 classes.
    nothing: the class of a picture without content.

  Returns:
    (images, labels) of the same shapes: shifted, blurred, recoloured, noised. A fifth of them
    are labelled `nothing`: even blends of a picture and its neighbour in the batch, or pieces of
    both put together. Up to a quarter of the neighbour also shines through all the others, which
    keep their labels.
  """
  keys = jax.random.split(key, 9)
  batch = images.shape[0]
  per_image = (batch, 1, 1, 1)
  shifted = jax.vmap(_shift)(images, jax.random.randint(keys[0], (batch, 2), -4, 5))

  other = jnp.roll(shifted, 1, axis=0)
  share = jax.random.uniform(keys[1], per_image, minval=0.4, maxval=0.6)
  blend = share * shifted + (1 - share) * other
  half = images.shape[1] // 2
  pieces = jnp.concatenate([shifted[:, half:], other[:, :half]], axis=1)
  pieces = jnp.concatenate([pieces[:, :, half:], blend[:, :, :half]], axis=2)
  garbage = jnp.where(jax.random.bernoulli(keys[2], 0.5, per_image), blend, pieces)
  is_garbage = jax.random.bernoulli(keys[3], 0.2, (batch,))
  out = jnp.where(is_garbage[:, None, None, None], garbage, shifted)

  ghost = jax.random.uniform(keys[4], per_image, maxval=0.25)
  out = (1 - ghost) * out + ghost * other
  amount = jax.random.uniform(keys[5], per_image)
  out = amount * _blur(_blur(out)) + (1 - amount) * out
  gain = jax.random.uniform(keys[6], (batch, 1, 1, 3), minval=0.85, maxval=1.1)
  offset = jax.random.uniform(keys[7], (batch, 1, 1, 3), minval=-0.08, maxval=0.08)
  noise = 0.06 * jax.random.normal(keys[8], out.shape)
  return jnp.clip(gain * out + offset + noise, 0, 1), jnp.where(is_garbage, nothing, labels)


def classifier_loss(
  logits: jax.Array, labels: jax.Array, smoothing: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy with label smoothing.

  Args:
    logits: (B, K).
    labels: (B,) int32.
    smoothing: share of the target spread over all classes.

  Returns:
    (loss, {'accuracy'}).
  """
  log_probabilities = jax.nn.log_softmax(logits)
  right = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
  loss = -jnp.mean((1 - smoothing) * right + smoothing * jnp.mean(log_probabilities, axis=-1))
  return loss, {'accuracy': jnp.mean(jnp.argmax(logits, -1) == labels)}


@dataclasses.dataclass(frozen=True)
class EmojiReward:
  """The in-graph reward of NO-RL: the classifier's probability of the right emoji."""

  classes: int

  @property
  def module(self) -> EmojiClassifier:
    return EmojiClassifier(self.classes)

  def __call__(self, params: PyTree, images: jax.Array, targets: jax.Array) -> jax.Array:
    """Scores (B, 64, 64, 3) pictures in [0, 1] against (B,) classes: (B,) float32 in [0, 1]."""
    probabilities = jax.nn.softmax(self.module.apply({'params': params}, images))
    return jnp.take_along_axis(probabilities, targets[:, None], axis=-1)[:, 0]


class TemplateJudge:
  """The reporting judge: nearest picture of the world in blurred pixel space.

  Pictures are averaged over 4 x 4 pixels; a generated one is compared at nine shifts of up to
  two pixels, so that small displacements are no mistake.
  """

  def __init__(self, pictures: np.ndarray):
    """Takes the world's pictures, (N, H, W, 3) uint8."""
    flat = _pool(jnp.asarray(pictures, jnp.float32) / 255).reshape(len(pictures), -1)
    self._templates = flat
    self._norms = jnp.sum(jnp.square(flat), axis=-1)

  def distances(self, images: jax.Array) -> jax.Array:
    """Mean squared distance, (B, H, W, 3) in [0, 1] -> (B, N), the best of the nine shifts."""
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=1.0)
    best = jnp.inf
    for dy in (0, 2, 4):
      for dx in (0, 2, 4):
        x = _pool(padded[:, dy : dy + height, dx : dx + width]).reshape(images.shape[0], -1)
        squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        distance = squared + self._norms - 2 * x @ self._templates.T
        best = jnp.minimum(best, distance / x.shape[-1])
    return best

  def __call__(self, images: jax.Array) -> jax.Array:
    """The class each picture (B, H, W, 3) in [0, 1] shows: (B,) int32."""
    return jnp.argmin(self.distances(images), axis=-1)


def _pool(images: jax.Array, size: int = 4) -> jax.Array:
  batch, height, width, channels = images.shape
  shape = (batch, height // size, size, width // size, size, channels)
  return images.reshape(shape).mean(axis=(2, 4))
