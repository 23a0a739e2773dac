"""The FLUX.1 backbone (MMDiT), after diffusers' FluxTransformer2DModel, with its names.

Black Forest Labs, FLUX.1 (2024): double-stream blocks, in which text and image keep their own
weights and meet in attention, then single-stream blocks over the joint sequence. Both are
modulated by adaLN from the timestep, the pooled text and, in guidance-distilled checkpoints, the
guidance scale.

Blocks are stacked on a leading axis and run under `nn.scan`; the same stacked parameters serve
`scan=False`, which unrolls the loop (longer compile, sometimes a faster step).
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from eru_jax.errors import UserError
from eru_jax.models import attention_layout
from eru_jax.models.attention import attention
from eru_jax.models.layers import Dense, LayerNorm, RMSNorm, feature, sinusoidal_embedding, tap
from eru_jax.models.stack import stack_blocks
from eru_jax.types import Conditioning

# The reference feeds 1000 t and 1000 guidance to its sinusoids, and does so exactly once.
_TIME_FACTOR = 1000.0
_TIME_CHANNELS = 256
_ROPE_THETA = 10_000.0

_zeros = nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class FluxConfig:
  """Architecture, with the keys of diffusers' config.json. Defaults are FLUX.1-dev's.

  Attributes:
    in_channels: channels of a packed latent token (4 x latent channels).
    num_layers: double-stream blocks.
    num_single_layers: single-stream blocks.
    attention_head_dim: size of a head; must equal the sum of `axes_dims_rope`.
    num_attention_heads: heads; width is heads x head dim.
    joint_attention_dim: size of a text token state.
    pooled_projection_dim: size of the pooled text vector.
    guidance_embeds: whether the model is guidance-distilled (FLUX.1-dev: yes, -schnell: no).
    axes_dims_rope: rotary channels of the (unused, row, column) axes.
  """

  in_channels: int = 64
  num_layers: int = 19
  num_single_layers: int = 38
  attention_head_dim: int = 128
  num_attention_heads: int = 24
  joint_attention_dim: int = 4096
  pooled_projection_dim: int = 768
  guidance_embeds: bool = True
  axes_dims_rope: tuple[int, ...] = (16, 56, 56)

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and (type(value) is not int or value < 1):
        raise UserError(f'FLUX config: {field.name} is {value!r}, but must be a positive integer.')
    if not isinstance(self.guidance_embeds, bool):
      raise UserError(
        f'FLUX config: guidance_embeds is {self.guidance_embeds!r}, but must be true or false.'
      )
    dims = self.axes_dims_rope
    # Positions have three coordinates, and a rotation turns two channels.
    if not (
      isinstance(dims, tuple)
      and len(dims) == 3
      and all(type(size) is int and size > 0 and size % 2 == 0 for size in dims)
    ):
      raise UserError(
        f'FLUX config: axes_dims_rope is {dims!r}, but must be a list of three positive even '
        'integers.'
      )
    if sum(self.axes_dims_rope) != self.attention_head_dim:
      raise UserError(
        f'FLUX config: axes_dims_rope {self.axes_dims_rope} must sum to attention_head_dim '
        f'({self.attention_head_dim}).'
      )

  @property
  def width(self) -> int:
    return self.num_attention_heads * self.attention_head_dim

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'FluxConfig':
    """Reads diffusers' config.json.

    Raises:
      UserError: for an unknown key that is no record of diffusers' own (those begin with an
        underscore), and for a patch size or an output width this port does not have.
    """
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
      if key not in (*known, 'patch_size', 'out_channels') and not key.startswith('_'):
        near = difflib.get_close_matches(key, known, 1)
        hint = f'did you mean `{near[0]}`?' if near else f'known: {", ".join(known)}.'
        raise UserError(f'FLUX config: unknown key `{key}`; {hint}')
    in_channels = values.get('in_channels', 64)
    if values.get('patch_size', 1) != 1 or values.get('out_channels') not in (None, in_channels):
      raise UserError('FLUX config: patch_size must be 1 and out_channels equal in_channels.')
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
    return cls(**kept)

  def to_dict(self) -> dict[str, Any]:
    """The diffusers config.json of this architecture."""
    values = dataclasses.asdict(self)
    values['axes_dims_rope'] = list(self.axes_dims_rope)
    return {'_class_name': 'FluxTransformer2DModel', 'patch_size': 1, **values}


def image_ids(height: int, width: int) -> np.ndarray:
  """Positions of packed image tokens, row by row.

  Args:
    height: rows of the packed grid (latent height / 2).
    width: columns of the packed grid.

  Returns:
    (height * width, 3) int32: (0, row, column).
  """
  ids = np.zeros((height, width, 3), np.int32)
  ids[..., 1] = np.arange(height)[:, None]
  ids[..., 2] = np.arange(width)[None]
  return ids.reshape(-1, 3)


def rotary_table(ids: jax.Array, axes_dims: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the rotary embedding, each (L, sum(axes_dims) / 2) float32."""
  angles = []
  for axis, dim in enumerate(axes_dims):
    frequencies = (1.0 / _ROPE_THETA ** (np.arange(0, dim, 2) / dim)).astype(np.float32)
    angles.append(ids[:, axis, None].astype(jnp.float32) * frequencies)
  angles = jnp.concatenate(angles, axis=-1)
  return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates neighbouring channel pairs of x (B, L, H, D) in float32."""
  cos, sin = (jnp.repeat(part, 2, axis=-1)[None, :, None, :] for part in table)
  x32 = x.astype(jnp.float32)
  # Neighbours change places by a flip: gradients of two slices would each be padded and added.
  swapped = jnp.flip(x32.reshape(*x.shape[:-1], -1, 2), axis=-1).reshape(x.shape)
  sign = np.tile(np.array([-1, 1], np.float32), x.shape[-1] // 2)
  return (x32 * cos + swapped * (sign * sin)).astype(x.dtype)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  return x * (1 + scale[:, None]) + shift[:, None]


class MLPEmbedding(nn.Module):
  """Two linear layers with a SiLU between: embeds a sinusoid or the pooled text."""

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Dense(self.width, axes=('embed', 'mlp'), dtype=self.dtype, name='linear_1')(x)
    x = nn.silu(x)
    return Dense(self.width, axes=('mlp', 'embed'), dtype=self.dtype, name='linear_2')(x)


class TimeTextEmbed(nn.Module):
  """The modulation vector of timestep, guidance scale and pooled text."""

  config: FluxConfig
  dtype: Any

  @nn.compact
  def __call__(self, t: jax.Array, guidance: jax.Array | None, pooled: jax.Array) -> jax.Array:
    width = self.config.width
    sinusoid = sinusoidal_embedding(_TIME_FACTOR * t, _TIME_CHANNELS)
    vector = MLPEmbedding(width, self.dtype, name='timestep_embedder')(sinusoid)
    if self.config.guidance_embeds:
      sinusoid = sinusoidal_embedding(_TIME_FACTOR * guidance, _TIME_CHANNELS)
      vector = vector + MLPEmbedding(width, self.dtype, name='guidance_embedder')(sinusoid)
    return vector + MLPEmbedding(width, self.dtype, name='text_embedder')(pooled)


class Modulation(nn.Module):
  """adaLN parameters out of the modulation vector; zero at initialisation (DiT's adaLN-Zero)."""

  parts: int
  width: int
  dtype: Any

  @nn.compact
  def __call__(self, vector: jax.Array) -> list[jax.Array]:
    dense = Dense(
      self.parts * self.width,
      axes=('embed', 'mlp'),
      dtype=self.dtype,
      kernel_init=_zeros,
      name='linear',
    )
    return jnp.split(dense(nn.silu(vector)), self.parts, axis=-1)


class FeedForward(nn.Module):
  """Linear, tanh-approximated GELU, linear; hidden size 4 x width."""

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Dense(4 * self.width, axes=('embed', 'mlp'), dtype=self.dtype, name='net_0_proj')(x)
    x = nn.gelu(x, approximate=True)
    return Dense(self.width, axes=('mlp', 'embed'), dtype=self.dtype, name='net_2')(x)


class JointAttention(nn.Module):
  """Attention over one joint sequence, with RMS-normalised queries and keys.

  In double-stream blocks the text has projections of its own (`add_*`) and goes first in the
  sequence; in single-stream blocks `context` is None and the output is not projected.
  """

  config: FluxConfig
  dtype: Any
  implementation: str

  def _heads(
    self, x: jax.Array, names: tuple[str, str, str], norms: tuple[str, str]
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    cfg = self.config
    query, key, value = (
      Dense(cfg.width, axes=('embed', 'heads'), dtype=self.dtype, name=name)(x) for name in names
    )
    shape = (*x.shape[:-1], cfg.num_attention_heads, cfg.attention_head_dim)
    query = RMSNorm(name=norms[0])(query.reshape(shape))
    key = RMSNorm(name=norms[1])(key.reshape(shape))
    return attention_layout.place(query, key, value.reshape(shape))

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    context: jax.Array | None,
    rotary: tuple[jax.Array, jax.Array],
    mask: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Maps image tokens x (B, S, W) and text tokens (B, L, W) | None to the same shapes."""
    qkv = self._heads(x, ('to_q', 'to_k', 'to_v'), ('norm_q', 'norm_k'))
    if context is not None:
      names = ('add_q_proj', 'add_k_proj', 'add_v_proj')
      added = self._heads(context, names, ('norm_added_q', 'norm_added_k'))
      qkv = tuple(jnp.concatenate([a, b], axis=1) for a, b in zip(added, qkv, strict=True))
    query, key, value = qkv
    query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
    query, key, value = (checkpoint_name(part, 'qkv') for part in (query, key, value))
    out = attention(query, key, value, mask, self.implementation)
    out = out.reshape(*out.shape[:2], self.config.width)
    if context is None:
      return out, None
    length = context.shape[1]
    project = {
      name: Dense(self.config.width, axes=('heads', 'embed'), dtype=self.dtype, name=name)
      for name in ('to_out_0', 'to_add_out')
    }
    return project['to_out_0'](out[:, length:]), project['to_add_out'](out[:, :length])


class DoubleStreamBlock(nn.Module):
  """diffusers' FluxTransformerBlock: text and image streams that meet in attention."""

  config: FluxConfig
  dtype: Any
  implementation: str

  @nn.compact
  def __call__(
    self,
    carry: tuple[jax.Array, jax.Array],
    vector: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    mask: jax.Array | None,
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    x, context = carry
    width, dtype = self.config.width, self.dtype
    norm = LayerNorm()

    modulation = Modulation(6, width, dtype, name='norm1')(vector)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    modulation = Modulation(6, width, dtype, name='norm1_context')(vector)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = modulation

    attn = JointAttention(self.config, dtype, self.implementation, name='attn')
    out, c_out = attn(
      _modulate(norm(x), shift, scale), _modulate(norm(context), c_shift, c_scale), rotary, mask
    )

    x = x + gate[:, None] * out
    hidden = _modulate(norm(x), shift_mlp, scale_mlp)
    x = x + gate_mlp[:, None] * FeedForward(width, dtype, name='ff')(hidden)

    context = context + c_gate[:, None] * c_out
    hidden = _modulate(norm(context), c_shift_mlp, c_scale_mlp)
    context = context + c_gate_mlp[:, None] * FeedForward(width, dtype, name='ff_context')(hidden)

    x = nn.with_logical_constraint(x, ('batch', 'length', 'act_embed'))
    context = nn.with_logical_constraint(context, ('batch', 'length', 'act_embed'))
    x, context = tap(self, 'image', x), tap(self, 'text', context)
    feature(self, 'image', x)
    feature(self, 'text', context, None if mask is None else mask[:, : context.shape[1]])
    return (x, context), None


class SingleStreamBlock(nn.Module):
  """diffusers' FluxSingleTransformerBlock: attention and MLP in parallel on the joint sequence.

  The first `text_length` tokens of the sequence are text.
  """

  config: FluxConfig
  dtype: Any
  implementation: str
  text_length: int

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    vector: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    mask: jax.Array | None,
  ) -> tuple[jax.Array, None]:
    width, dtype = self.config.width, self.dtype
    shift, scale, gate = Modulation(3, width, dtype, name='norm')(vector)
    hidden = _modulate(LayerNorm()(x), shift, scale)
    mlp = Dense(4 * width, axes=('embed', 'mlp'), dtype=dtype, name='proj_mlp')(hidden)
    mlp = nn.gelu(mlp, approximate=True)
    attn = JointAttention(self.config, dtype, self.implementation, name='attn')
    out, _ = attn(hidden, None, rotary, mask)
    out = jnp.concatenate([out, mlp], axis=-1)
    out = Dense(width, axes=('mlp', 'embed'), dtype=dtype, name='proj_out')(out)
    x = nn.with_logical_constraint(x + gate[:, None] * out, ('batch', 'length', 'act_embed'))
    x = tap(self, 'joint', x)
    length = self.text_length
    feature(self, 'image', x[:, length:])
    feature(self, 'text', x[:, :length], None if mask is None else mask[:, :length])
    return x, None


class FluxTransformer(nn.Module):
  """FLUX.1's velocity network.

  Attributes:
    config: the architecture.
    dtype: dtype of the computation (norms, rotary tables and time embeddings stay float32).
    scan: run each stack of blocks as one loop; False unrolls it. The parameters are the same.
    remat: one of `eru_jax.models.stack.REMAT_POLICIES`, what the backward pass keeps.
    attention: implementation for `eru_jax.models.attention.attention`.
  """

  config: FluxConfig
  dtype: Any = jnp.float32
  scan: bool = True
  remat: str = 'none'
  attention: str = 'auto'

  def _stack(self, block: type[nn.Module], length: int, name: str, **fields: Any) -> nn.Module:
    stack = stack_blocks(block, length, inputs=3, scan=self.scan, remat=self.remat)
    return stack(self.config, self.dtype, self.attention, name=name, **fields)

  @nn.compact
  def __call__(
    self,
    x_t: jax.Array,
    t: jax.Array,
    conditioning: Conditioning,
    ids: jax.Array,
    guidance: jax.Array | None = None,
  ) -> jax.Array:
    """Predicts the velocity.

    Args:
      x_t: (B, S, in_channels) packed latents.
      t: (B,) float32 in [0, 1], 1 = noise.
      conditioning: text states (B, L, joint_attention_dim), optional mask (B, L), pooled text
        (B, pooled_projection_dim).
      ids: (S, 3) positions of the image tokens, `image_ids(...)`. Text tokens sit at 0.
      guidance: (B,) float32 guidance scale; required if config.guidance_embeds, else ignored.

    Returns:
      (B, S, in_channels) velocity in the model's dtype.

    Raises:
      UserError: if pooled text or guidance is missing where the model needs it.
    """
    cfg, dtype = self.config, self.dtype
    if conditioning.pooled is None:
      raise UserError('FLUX needs a pooled text vector: Conditioning.pooled is None.')
    if cfg.guidance_embeds and guidance is None:
      raise UserError('This FLUX model is guidance-distilled: give it a guidance scale.')

    x = Dense(cfg.width, axes=(None, 'embed'), dtype=dtype, name='x_embedder')(x_t)
    vector = TimeTextEmbed(cfg, dtype, name='time_text_embed')(t, guidance, conditioning.pooled)
    embed_text = Dense(cfg.width, axes=(None, 'embed'), dtype=dtype, name='context_embedder')
    context = embed_text(conditioning.tokens)

    length = context.shape[1]
    ids = jnp.concatenate([jnp.zeros((length, ids.shape[1]), jnp.int32), jnp.asarray(ids)])
    rotary = rotary_table(ids, cfg.axes_dims_rope)
    mask = conditioning.mask
    if mask is not None:
      mask = jnp.concatenate([mask, jnp.ones(x.shape[:2], bool)], axis=1)

    double = self._stack(DoubleStreamBlock, cfg.num_layers, 'transformer_blocks')
    (x, context), _ = double((x, context), vector, rotary, mask)
    joint = jnp.concatenate([context, x], axis=1)
    single = self._stack(
      SingleStreamBlock, cfg.num_single_layers, 'single_transformer_blocks', text_length=length
    )
    joint, _ = single(joint, vector, rotary, mask)
    x = joint[:, length:]

    # The reference's final adaLN splits as (scale, shift), the blocks' as (shift, scale, ...).
    scale, shift = Modulation(2, cfg.width, dtype, name='norm_out')(vector)
    x = _modulate(LayerNorm()(x), shift, scale)
    return Dense(
      cfg.in_channels, axes=('embed', None), dtype=dtype, kernel_init=_zeros, name='proj_out'
    )(x)
