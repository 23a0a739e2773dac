"""CLIP's image processor in compiled code, bit for bit what transformers does with Pillow.

A CLIP has learnt from pictures of 8 bits that Pillow had made smaller. Its resize works on one axis
after the other, in whole numbers, and rounds to 8 bits after each; a resize in floating point is
off by one level wherever a value lies half-way between two. So the sums here are exact, too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eru_jax.errors import UserError

# Of a weight of Pillow's resize, behind the binary point.
_WEIGHT_BITS = 22
# A weight is summed up in two parts of half as many bits: a sum of either is exact in float32.
_HALF = 1 << _WEIGHT_BITS // 2
# Beyond, the part of the lower bits would not be.
_MAX_SHRINK = 14
_BICUBIC = 3
_STEPS = ('do_resize', 'do_center_crop', 'do_rescale', 'do_normalize')


def bicubic_weights(size: int, target: int) -> np.ndarray:
  """Weights of Pillow's bicubic resize along one axis, (target, size) int32, in units of 2^-22.

  The kernel is Keys' cubic with a = -1/2; to make a picture smaller it is widened by the same
  factor, which is what keeps edges from aliasing.
  """
  scale = size / target
  centres = (np.arange(target) + 0.5) * scale
  x = np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1.0)
  near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
  weights = np.where(x < 1, near, np.where(x < 2, far, 0))
  weights /= weights.sum(axis=1, keepdims=True)
  return np.round(weights * 2**_WEIGHT_BITS).astype(np.int32)


def _straight_through(exact: jax.Array, smooth: jax.Array) -> jax.Array:
  """The value of one with the gradient of the other, from which it differs by rounding only."""
  return smooth + jax.lax.stop_gradient(exact - smooth)


def _resize_axis(images: jax.Array, axis: int, weights: np.ndarray) -> jax.Array:
  """Applies weights along an axis of 8-bit values (B, H, W, C) float32, and rounds to 8 bits."""
  high = (weights + _HALF // 2) // _HALF
  parts = np.stack([high, weights - high * _HALF]).astype(np.float32)
  equation = 'pth,bhwc->pbtwc' if axis == 1 else 'ptw,bhwc->pbhtc'
  high, low = jnp.einsum(equation, parts, images, precision=jax.lax.Precision.HIGHEST)
  total = high.astype(jnp.int32) * _HALF + low.astype(jnp.int32)
  rounded = (total + (1 << _WEIGHT_BITS - 1)) >> _WEIGHT_BITS
  smooth = (high + low / _HALF) / _HALF
  return _straight_through(jnp.clip(rounded, 0, 255).astype(jnp.float32), smooth)


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
  """transformers' CLIPImageProcessor for pictures that are all of one size.

  Attributes:
    shortest_edge: pixels of the shorter edge after the resize.
    crop_size: edge of the square that is cut out of the middle.
    image_mean: of each channel.
    image_std: its standard deviation.
  """

  shortest_edge: int = 224
  crop_size: int = 224
  image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
  image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

  def __post_init__(self):
    sizes = (self.shortest_edge, self.crop_size)
    if not all(type(size) is int and size > 0 for size in sizes) or sizes[0] < sizes[1]:
      raise UserError(
        f'CLIP image processor: shortest_edge {self.shortest_edge!r} and crop_size '
        f'{self.crop_size!r} must be positive integers, the crop no larger than the edge.'
      )
    for name in ('image_mean', 'image_std'):
      values = getattr(self, name)
      if not isinstance(values, tuple) or not all(type(v) in (int, float) for v in values):
        raise UserError(f'CLIP image processor: {name} is {values!r}, but must be numbers.')
    if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
      raise UserError(
        'CLIP image processor: image_mean and image_std must have three numbers each, those of '
        'image_std positive.'
      )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'ImageProcessor':
    """Reads a preprocessor_config.json, of today's or the first layout.

    Raises:
      UserError: for a step left out, another interpolation, or a size that is not an edge.
    """
    skipped = [name for name in _STEPS if not values.get(name, True)]
    if skipped or values.get('resample', _BICUBIC) != _BICUBIC:
      what = f'{skipped[0]} is off' if skipped else f'resample is {values["resample"]!r}'
      raise UserError(
        f'CLIP image processor: {what}, but only the usual bicubic resize, crop, rescaling and '
        'normalisation are supported.'
      )
    if values.get('rescale_factor', 1 / 255) != 1 / 255:
      raise UserError(
        f'CLIP image processor: rescale_factor is {values["rescale_factor"]!r}, but must be 1/255.'
      )
    size, crop = values.get('size', cls.shortest_edge), values.get('crop_size', cls.crop_size)
    if isinstance(size, Mapping):
      size = size.get('shortest_edge') if set(size) == {'shortest_edge'} else dict(size)
    if isinstance(crop, Mapping):
      crop = crop.get('height') if crop.get('height') == crop.get('width') else dict(crop)
    lists = {
      name: tuple(values[name]) if isinstance(values[name], list) else values[name]
      for name in ('image_mean', 'image_std')
      if name in values
    }
    return cls(shortest_edge=size, crop_size=crop, **lists)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Rounds to 8 bits, resizes, crops and normalises; gradients pass as if nothing were rounded.

    Args:
      images: (B, H, W, 3) in [0, 1]; what lies outside is clipped.

    Returns:
      (B, crop_size, crop_size, 3) float32.

    Raises:
      UserError: if the pictures are no colour pictures, or too large to shrink exactly.
    """
    if images.ndim != 4 or images.shape[3] != 3:
      raise UserError(f'Expected pictures (B, H, W, 3), got an array of shape {images.shape}.')
    height, width = images.shape[1:3]
    shorter = min(height, width)
    if shorter > _MAX_SHRINK * self.shortest_edge:
      raise UserError(
        f'Pictures of {height} x {width} pixels are more than {_MAX_SHRINK} times too large for '
        f'CLIP ({self.shortest_edge}): make them smaller.'
      )
    x = images.astype(jnp.float32) * 255
    x = _straight_through(jnp.clip(jnp.round(x), 0, 255), x)
    # Pillow resizes columns first.
    for axis, size in ((2, width), (1, height)):
      target = int(self.shortest_edge * size / shorter)
      start = (target - self.crop_size) // 2
      kept = slice(start, start + self.crop_size)
      if size == target:
        x = jax.lax.slice_in_dim(x, kept.start, kept.stop, axis=axis)
      else:
        x = _resize_axis(x, axis, bicubic_weights(size, target)[kept])
    mean, std = (np.array(v, np.float32) for v in (self.image_mean, self.image_std))
    return (x / 255 - mean) / std
