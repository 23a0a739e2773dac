"""The convolutional variational autoencoder of FLUX.1 (diffusers' `AutoencoderKL`).

Submodules carry diffusers' names, with `down_blocks.0` written `down_blocks_0`. Activations are
(B, H, W, C), where diffusers uses (B, C, H, W). Normalisation and softmax run in float32.
Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eru_jax.errors import UserError
from eru_jax.models.layers import Dense

# Keys of diffusers' config.json that leave an untiled float32 computation as it is.
_HARMLESS_KEYS = frozenset({'sample_size', 'force_upcast'})
# Keys of which we implement one value only.
_FIXED_KEYS = {
  '_class_name': ('AutoencoderKL',),
  'act_fn': ('silu', 'swish'),
  'latents_mean': (None,),
  'latents_std': (None,),
}
_BLOCK_TYPE_KEYS = {
  'down_block_types': 'DownEncoderBlock2D',
  'up_block_types': 'UpDecoderBlock2D',
}
_POSITIVE_INTEGERS = (
  'in_channels', 'out_channels', 'latent_channels',
  'layers_per_block', 'norm_num_groups', 'patch_size',
)  # fmt: skip
_BOOLEANS = ('use_quant_conv', 'use_post_quant_conv', 'mid_block_add_attention')


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
  """Shape of an `AutoencoderKL`; names and defaults are those of diffusers.

  Attributes:
    in_channels: channels of the encoded image.
    out_channels: channels of the decoded image.
    latent_channels: channels of the latents.
    block_out_channels: width of each level; every level but the last halves the resolution.
    layers_per_block: residual blocks a level of the encoder; the decoder has one more.
    norm_num_groups: groups of every GroupNorm.
    scaling_factor: about 1 / standard deviation of the latents, see `scale_latents`.
    shift_factor: about their mean.
    use_quant_conv: whether a 1x1 convolution follows the encoder.
    use_post_quant_conv: whether a 1x1 convolution precedes the decoder.
    mid_block_add_attention: whether the middle blocks hold self-attention.
    patch_size: edge of the square of pixels folded into channels in front of the network (ours,
      not diffusers'; 1 for FLUX.1). Convolutions over few channels at full resolution are what
      a CPU does worst; in_channels and out_channels count the folded channels.

  Raises:
    UserError: for a value of the wrong type or out of range.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  shift_factor: float = 0.0
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True
  patch_size: int = 1

  def __post_init__(self):
    def fail(name: str, want: str):
      value = getattr(self, name)
      raise UserError(f'Autoencoder config: `{name}` is {value!r}; it must be {want}.')

    for name in _POSITIVE_INTEGERS:
      if not _is_positive_int(getattr(self, name)):
        fail(name, 'a positive integer')
    for name in _BOOLEANS:
      if not isinstance(getattr(self, name), bool):
        fail(name, 'true or false')
    for name in ('scaling_factor', 'shift_factor'):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(name, 'a number')
    if self.scaling_factor <= 0:
      fail('scaling_factor', 'positive')
    widths = self.block_out_channels
    if not isinstance(widths, tuple) or not widths or not all(map(_is_positive_int, widths)):
      fail('block_out_channels', 'a non-empty tuple of positive integers')
    if any(width % self.norm_num_groups for width in widths):
      fail('block_out_channels', f'multiples of norm_num_groups = {self.norm_num_groups}')
    for name in ('in_channels', 'out_channels'):
      if getattr(self, name) % self.patch_size**2:
        fail(name, f'a multiple of patch_size^2 = {self.patch_size**2}')

  @property
  def downscale(self) -> int:
    """Image pixels per latent pixel along each side: 8 for FLUX.1."""
    return self.patch_size * 2 ** (len(self.block_out_channels) - 1)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'AutoencoderConfig':
    """Reads the contents of diffusers' `vae/config.json`.

    Keys that do not change the computation are ignored: `sample_size`, `force_upcast` and
    diffusers' own records, which begin with an underscore.

    Raises:
      UserError: for a key or a value this implementation does not support.
    """
    values = dict(values)
    own = {}
    for field in dataclasses.fields(cls):
      if field.name in values:
        own[field.name] = values.pop(field.name)
    if isinstance(own.get('block_out_channels'), list):
      own['block_out_channels'] = tuple(own['block_out_channels'])
    if own.get('shift_factor', 0.0) is None:
      own['shift_factor'] = 0.0
    config = cls(**own)
    for key, value in values.items():
      if key in _FIXED_KEYS:
        supported = value in _FIXED_KEYS[key]
      elif key in _BLOCK_TYPE_KEYS:
        expected = [_BLOCK_TYPE_KEYS[key]] * len(config.block_out_channels)
        supported = isinstance(value, (list, tuple)) and list(value) == expected
      else:
        supported = key in _HARMLESS_KEYS or key.startswith('_')
      if not supported:
        raise UserError(
          f'Autoencoder config: `{key}` = {value!r} is not supported; '
          'only the AutoencoderKL of FLUX.1 and Stable Diffusion can be loaded.'
        )
    return config

  def to_dict(self) -> dict[str, Any]:
    """The contents of a `vae/config.json` that diffusers and `from_dict` read back."""
    result = dict(_class_name='AutoencoderKL', act_fn='silu', **dataclasses.asdict(self))
    result['block_out_channels'] = list(self.block_out_channels)
    if self.patch_size == 1:
      del result['patch_size']
    for key, block_type in _BLOCK_TYPE_KEYS.items():
      result[key] = [block_type] * len(self.block_out_channels)
    return result


def _is_positive_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


# As published with FLUX.1-dev and FLUX.1-schnell.
FLUX = AutoencoderConfig(
  latent_channels=16,
  block_out_channels=(128, 256, 512, 512),
  layers_per_block=2,
  scaling_factor=0.3611,
  shift_factor=0.1159,
  use_quant_conv=False,
  use_post_quant_conv=False,
)

# The same network at laptop size for 64 px pictures, again f8 with 16 channels. Scaling and
# shift are neutral here: they belong to trained weights and are measured after training.
EMOJI = AutoencoderConfig(
  in_channels=48,
  out_channels=48,
  latent_channels=16,
  block_out_channels=(64, 128),
  layers_per_block=1,
  patch_size=4,
  norm_num_groups=8,
  scaling_factor=1.0,
  use_quant_conv=False,
  use_post_quant_conv=False,
)


def _conv(features: int, name: str, dtype: Any, kernel: int = 3, strides: int = 1) -> nn.Conv:
  """A convolution; stride 2 pads below and to the right only, as the reference does."""
  pad = (0, 1) if strides == 2 else (kernel // 2, kernel // 2)
  return nn.Conv(
    features,
    (kernel, kernel),
    strides=strides,
    padding=(pad, pad),
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(
      nn.initializers.lecun_normal(), (None, None, 'conv_in', 'conv_out')
    ),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('conv_out',)),
    name=name,
  )


class GroupNorm(nn.Module):
  """Group normalisation of (B, H, W, C) in float32, epsilon 1e-6, returned in the input's dtype.

  Attributes:
    groups: number of groups the channels are split into.
  """

  groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, _, _, channels = x.shape
    partitioned = nn.with_logical_partitioning
    scale = self.param('scale', partitioned(nn.initializers.ones, ('norm',)), (channels,))
    bias = self.param('bias', partitioned(nn.initializers.zeros, ('norm',)), (channels,))
    y = x.astype(jnp.float32)

    def group_mean(per_channel: jax.Array) -> jax.Array:
      # Pixels are summed channel by channel, groups joined after: several times as fast on CPU
      # as one reduction over a (pixels, groups, channels) view.
      sums = per_channel.reshape(batch, self.groups, -1).mean(axis=-1, keepdims=True)
      return jnp.broadcast_to(sums, (batch, self.groups, channels // self.groups)).reshape(
        batch, 1, 1, channels
      )

    mean = group_mean(jnp.mean(y, axis=(1, 2)))
    # Two passes: E[x^2] - E[x]^2 loses the digits that parity with the reference needs.
    variance = group_mean(jnp.mean(jnp.square(y - mean), axis=(1, 2)))
    y = (y - mean) * (jax.lax.rsqrt(variance + 1e-6) * scale) + bias
    return y.astype(x.dtype)


def _by_examples(x: jax.Array) -> jax.Array:
  """Splits pictures (B, H, W, C) over a mesh by examples and in no other way.

  Left to itself, the partitioner may split rows of pixels, as tokens are along `sequence`, and XLA
  then convolves wrongly (seen in jaxlib 0.10.2).
  """
  return nn.with_logical_constraint(x, ('batch', None, None, None))


class ResnetBlock2D(nn.Module):
  """Two normalised 3x3 convolutions beside a skip connection.

  Attributes:
    features: output channels; a 1x1 `conv_shortcut` appears where the input has others.
    groups: groups of the norms.
    dtype: dtype of the convolutions.
  """

  features: int
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.silu(GroupNorm(self.groups, name='norm1')(x))
    y = _conv(self.features, 'conv1', self.dtype)(y)
    y = nn.silu(GroupNorm(self.groups, name='norm2')(y))
    y = _conv(self.features, 'conv2', self.dtype)(y)
    if x.shape[-1] != self.features:
      x = _conv(self.features, 'conv_shortcut', self.dtype, kernel=1)(x)
    return _by_examples(x + y)


class Attention(nn.Module):
  """Self-attention with one head over all pixels, beside a skip connection."""

  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape

    def dense(name: str) -> Dense:
      return Dense(channels, axes=('conv_in', 'conv_out'), dtype=self.dtype, name=name)

    y = GroupNorm(self.groups, name='group_norm')(x).reshape(batch, height * width, channels)
    query, key, value = (dense(name)(y) for name in ('to_q', 'to_k', 'to_v'))
    scores = jnp.einsum('bqc,bkc->bqk', query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * channels**-0.5, axis=-1).astype(self.dtype)
    y = dense('to_out_0')(jnp.einsum('bqk,bkc->bqc', weights, value))
    return x + y.reshape(x.shape)


class MidBlock2D(nn.Module):
  """Residual block, optional attention, residual block, at the lowest resolution."""

  groups: int
  add_attention: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    x = ResnetBlock2D(channels, self.groups, self.dtype, name='resnets_0')(x)
    if self.add_attention:
      x = Attention(self.groups, self.dtype, name='attentions_0')(x)
    return ResnetBlock2D(channels, self.groups, self.dtype, name='resnets_1')(x)


class Resample2D(nn.Module):
  """Halves (`factor` 1/2: strided conv) or doubles (nearest neighbour, then conv) each side."""

  up: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    if not self.up:
      return _by_examples(_conv(channels, 'conv', self.dtype, strides=2)(x))
    batch, height, width, _ = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    x = _by_examples(x.reshape(batch, 2 * height, 2 * width, channels))
    return _by_examples(_conv(channels, 'conv', self.dtype)(x))


class Level(nn.Module):
  """The residual blocks of one resolution, then the step to the next one.

  Attributes:
    features: channels.
    layers: residual blocks.
    resample: 'downsamplers_0', 'upsamplers_0' or None for no resampling.
    groups: groups of the norms.
    dtype: dtype of the convolutions.
  """

  features: int
  layers: int
  resample: str | None
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for j in range(self.layers):
      x = ResnetBlock2D(self.features, self.groups, self.dtype, name=f'resnets_{j}')(x)
    if self.resample is not None:
      up = self.resample == 'upsamplers_0'
      x = Resample2D(up, self.dtype, name=self.resample)(x)
    return x


class Encoder(nn.Module):
  """(B, H, W, in_channels) to (B, H/f, W/f, 2 latent_channels)."""

  config: AutoencoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    groups, widths = c.norm_num_groups, c.block_out_channels
    x = _conv(widths[0], 'conv_in', self.dtype)(x)
    for i, width in enumerate(widths):
      resample = 'downsamplers_0' if i < len(widths) - 1 else None
      block = Level(
        width, c.layers_per_block, resample, groups, self.dtype, name=f'down_blocks_{i}'
      )
      x = block(x)
    x = MidBlock2D(groups, c.mid_block_add_attention, self.dtype, name='mid_block')(x)
    x = nn.silu(GroupNorm(groups, name='conv_norm_out')(x))
    return _conv(2 * c.latent_channels, 'conv_out', self.dtype)(x)


class Decoder(nn.Module):
  """(B, H/f, W/f, latent_channels) to (B, H, W, out_channels)."""

  config: AutoencoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    groups, widths = c.norm_num_groups, c.block_out_channels[::-1]
    x = _conv(widths[0], 'conv_in', self.dtype)(x)
    x = MidBlock2D(groups, c.mid_block_add_attention, self.dtype, name='mid_block')(x)
    for i, width in enumerate(widths):
      resample = 'upsamplers_0' if i < len(widths) - 1 else None
      block = Level(
        width, c.layers_per_block + 1, resample, groups, self.dtype, name=f'up_blocks_{i}'
      )
      x = block(x)
    x = nn.silu(GroupNorm(groups, name='conv_norm_out')(x))
    return _conv(c.out_channels, 'conv_out', self.dtype)(x)


def _fold(x: jax.Array, size: int) -> jax.Array:
  """(B, H, W, C) -> (B, H/size, W/size, size^2 C)."""
  if size == 1:
    return x
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // size, size, width // size, size, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // size, width // size, -1)


def _unfold(x: jax.Array, size: int) -> jax.Array:
  """The inverse of `_fold`."""
  if size == 1:
    return x
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height, width, size, size, channels // size**2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * size, width * size, -1)


class AutoencoderKL(nn.Module):
  """Encoder and decoder; use `apply(..., method='encode')` and `method='decode'`.

  Attributes:
    config: the network's shape.
    dtype: dtype of the convolutions and projections; parameters are float32.
  """

  config: AutoencoderConfig = FLUX
  dtype: Any = jnp.float32

  def setup(self):
    c = self.config
    self.encoder = Encoder(c, self.dtype)
    self.decoder = Decoder(c, self.dtype)
    # A name of None takes the attribute's, as setup requires.
    if c.use_quant_conv:
      self.quant_conv = _conv(2 * c.latent_channels, None, self.dtype, kernel=1)
    if c.use_post_quant_conv:
      self.post_quant_conv = _conv(c.latent_channels, None, self.dtype, kernel=1)

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The posterior q(z | image), a diagonal Gaussian.

    Args:
      images: (B, H, W, C) in [-1, 1], C = in_channels / patch_size^2; H and W multiples of
        `config.downscale`.

    Returns:
      Mean and log-variance, both (B, H/f, W/f, latent_channels) float32; the log-variance is
      clipped to [-30, 20] as in the reference. Neither is scaled, see `scale_latents`.
    """
    patches = _fold(images.astype(self.dtype), self.config.patch_size)
    moments = _by_examples(self.encoder(_by_examples(patches)))
    if self.config.use_quant_conv:
      moments = self.quant_conv(moments)
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, z: jax.Array) -> jax.Array:
    """Images from unscaled latents.

    Args:
      z: (B, h, w, latent_channels), after `unscale_latents` if they come from a diffusion model.

    Returns:
      (B, f h, f w, out_channels / patch_size^2) float32, about [-1, 1] but not clipped.
    """
    z = _by_examples(z.astype(self.dtype))
    if self.config.use_post_quant_conv:
      z = self.post_quant_conv(z)
    images = _by_examples(self.decoder(z)).astype(jnp.float32)
    return _unfold(images, self.config.patch_size)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Reconstruction from the posterior's mean, shaped like `images`; touches every parameter."""
    return self.decode(self.encode(images)[0])


def scale_latents(z: jax.Array, config: AutoencoderConfig) -> jax.Array:
  """Autoencoder latents to what the diffusion model sees: (z - shift) * scale."""
  return (z - config.shift_factor) * config.scaling_factor


def unscale_latents(z: jax.Array, config: AutoencoderConfig) -> jax.Array:
  """The inverse of `scale_latents`."""
  return z / config.scaling_factor + config.shift_factor


def pack_latents(z: jax.Array) -> jax.Array:
  """Folds 2x2 patches into channels, as FLUX's transformer eats them.

  Args:
    z: (B, h, w, C), h and w even.

  Returns:
    (B, (h/2)(w/2), 4C), patches row by row; channel c of the pixel (dy, dx) of its patch is
    channel 4c + 2dy + dx, the order of diffusers' FluxPipeline.

  Raises:
    UserError: if h or w is odd.
  """
  batch, height, width, channels = z.shape
  _check_even(height, width)
  z = z.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
  return z.reshape(batch, (height // 2) * (width // 2), 4 * channels)


def unpack_latents(x: jax.Array, height: int, width: int) -> jax.Array:
  """The inverse of `pack_latents`.

  Args:
    x: (B, (height/2)(width/2), 4C).
    height: latent pixels down, even (image height / 8 for FLUX.1).
    width: latent pixels across, even.

  Returns:
    (B, height, width, C).

  Raises:
    UserError: if the sizes are odd or do not match x.
  """
  batch, tokens, channels = x.shape
  _check_even(height, width)
  if tokens * 4 != height * width or channels % 4:
    raise UserError(
      f'Packed latents of shape {x.shape} do not unfold to {height}x{width} latent pixels; '
      f'expected (B, {height * width // 4}, 4C).'
    )
  x = x.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(batch, height, width, channels // 4)


def _check_even(height: int, width: int):
  if height % 2 or width % 2:
    raise UserError(
      f'Latents of {height}x{width} pixels cannot be folded 2x2; choose an image size '
      'whose latents have even sides (multiples of 16 pixels for FLUX.1).'
    )
