"""CLIP's image processor in compiled code against transformers', which works with Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_clip import image_processor

from eru_jax.errors import UserError
from eru_jax.rewards.image_processing import ImageProcessor

# Last bits of the normalisation; one level of 8 bits would be 1.4e-2.
ROUNDING = 1e-6


def _pictures(height, width):
  """Noise, and a smooth picture whose values lie half-way between two levels more often."""
  noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
  y, x = np.mgrid[:height, :width]
  smooth = [120 * np.sin(x / 17 + y / 9) + 127, 127 * np.sin(x * y / 5000) + 127, y * 255 / height]
  return np.stack([noise, np.stack(smooth, axis=-1).round()]).astype(np.uint8)


SIZES = [
  (224, 224), (512, 512), (64, 64), (1024, 1024), (300, 500), (517, 333), (224, 301), (100, 180),
]  # fmt: skip


@pytest.mark.parametrize('height,width', SIZES)
def test_every_level_is_that_of_pillow(height, width):
  pictures = _pictures(height, width)
  theirs = np.stack(image_processor()(list(pictures), return_tensors='np')['pixel_values'])
  ours = jax.jit(ImageProcessor())((pictures / 255).astype(np.float32))
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), rtol=0, atol=ROUNDING)


def test_pictures_are_rounded_to_8_bits_as_sciscore_rounds_them():
  pictures = np.random.default_rng(0).uniform(-0.1, 1.1, (1, 30, 30, 3)).astype(np.float32)
  theirs = image_processor(size={'shortest_edge': 20}, crop_size=dict(height=16, width=16))(
    list((pictures * 255).round().clip(0, 255).astype(np.uint8)), return_tensors='np'
  )
  ours = ImageProcessor(20, 16)(jnp.asarray(pictures))
  theirs = np.stack(theirs['pixel_values']).transpose(0, 2, 3, 1)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROUNDING)


def test_gradients_are_those_of_the_resize_without_rounding():
  processor = ImageProcessor(8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
  key = jax.random.key(0)
  pictures = jax.random.uniform(key, (1, 20, 24, 3), minval=0.3, maxval=0.7)
  change, weight = (
    jax.random.normal(k, s)
    for k, s in zip(jax.random.split(key), (pictures.shape, (8, 8, 3)), strict=True)
  )
  slope = jnp.sum(jax.grad(lambda x: jnp.sum(weight * processor(x)))(pictures) * change)

  def smooth(x):
    x = jax.image.resize(x, (1, 8, 9, 3), 'bicubic', precision='highest')
    return jnp.sum(weight * x[:, :, :8])

  np.testing.assert_allclose(slope, jnp.sum(jax.grad(smooth)(pictures) * change), rtol=1e-4)


def test_both_layouts_of_the_config_are_read():
  first = {'size': 224, 'crop_size': 224, 'resample': 3, 'do_resize': True, 'do_normalize': True}
  assert ImageProcessor.from_dict(first) == ImageProcessor() == ImageProcessor.from_dict({})
  today = image_processor(size={'shortest_edge': 40}, crop_size=dict(height=32, width=32)).to_dict()
  assert ImageProcessor.from_dict(today) == ImageProcessor(40, 32)


@pytest.mark.parametrize(
  'values, message',
  [
    ({'do_center_crop': False}, 'do_center_crop is off'),
    ({'resample': 2}, 'resample is 2'),
    ({'rescale_factor': 1.0}, 'rescale_factor'),
    ({'size': {'height': 224, 'width': 224}}, 'shortest_edge'),
    ({'size': 200}, 'no larger than the edge'),
    ({'size': 'large'}, 'positive integers'),
    ({'crop_size': {'height': 200, 'width': 224}}, 'crop_size'),
    ({'crop_size': {}}, 'crop_size'),
    ({'image_mean': 0.5}, 'image_mean'),
    ({'image_mean': [0.5]}, 'three numbers'),
    ({'image_std': [1, 1, 0]}, 'positive'),
    ({'image_std': ['a', 1, 1]}, 'image_std'),
  ],
)
def test_other_processors_are_refused(values, message):
  with pytest.raises(UserError, match=f'^CLIP image processor: .*{message}'):
    ImageProcessor.from_dict(values)


@pytest.mark.parametrize('shape', [(224, 224, 3), (1, 224, 224, 1), (1, 3, 224, 224)])
def test_what_is_no_colour_picture_is_refused(shape):
  with pytest.raises(UserError, match=r'pictures \(B, H, W, 3\)'):
    ImageProcessor()(jnp.zeros(shape))


def test_a_picture_too_large_for_exact_sums_is_refused():
  with pytest.raises(UserError, match='14 times too large'):
    jax.eval_shape(ImageProcessor(), jax.ShapeDtypeStruct((1, 4000, 3200, 3), jnp.float32))
