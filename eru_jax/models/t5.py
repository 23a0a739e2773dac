"""The encoder of T5, after transformers' T5EncoderModel, with its names.

Raffel et al., T5 (arXiv:1910.10683): pre-norm blocks without biases, whose attention knows where
tokens are only by a learnt bias on their distance; Shazeer (arXiv:2002.05202) for the gated
feed-forward part of version 1.1. FLUX.1 takes the states of all tokens, padding included.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from eru_jax.errors import UserError
from eru_jax.models.layers import Dense, RMSNorm, embedding, tap
from eru_jax.models.stack import stack_blocks

_FEED_FORWARD = ('gated-gelu', 'relu')


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Architecture of the encoder, with the keys of transformers' config.json.

  Defaults are those of T5 v1.1 XXL, which FLUX.1 uses.

  Attributes:
    vocab_size: rows of the embedding, which may be more than the tokeniser has tokens.
    d_model: size of a token state.
    d_kv: size of a head; heads x d_kv need not be d_model.
    d_ff: hidden size of the feed-forward part.
    num_layers: blocks.
    num_heads: heads.
    relative_attention_num_buckets: classes of distances, half of them for each direction.
    relative_attention_max_distance: from here on all distances are one class.
    layer_norm_epsilon: added to mean squares.
    feed_forward_proj: 'gated-gelu' (T5 v1.1; the tanh approximation) or 'relu' (T5).
  """

  vocab_size: int = 32128
  d_model: int = 4096
  d_kv: int = 64
  d_ff: int = 10240
  num_layers: int = 24
  num_heads: int = 64
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  feed_forward_proj: str = 'gated-gelu'

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and (type(value) is not int or value < 1):
        raise UserError(f'T5 config: {field.name} is {value!r}, but must be a positive integer.')
    epsilon, buckets = self.layer_norm_epsilon, self.relative_attention_num_buckets
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
      raise UserError(f'T5 config: layer_norm_epsilon is {epsilon!r}, but must be in (0, 1).')
    if self.feed_forward_proj not in _FEED_FORWARD:
      raise UserError(
        f'T5 config: feed_forward_proj is {self.feed_forward_proj!r}, but must be one of '
        f'{list(_FEED_FORWARD)}.'
      )
    # Each direction has as many exact buckets as logarithmic ones, which begin where those end.
    if buckets % 4 or self.relative_attention_max_distance <= buckets // 4:
      raise UserError(
        f'T5 config: relative_attention_num_buckets ({buckets}) must be a multiple of 4 and less '
        f'than 4 x relative_attention_max_distance ({self.relative_attention_max_distance}).'
      )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'T5Config':
    """Reads the config.json of a T5 model, whose decoder is left out.

    The many keys that say nothing of the encoder are passed over.

    Raises:
      UserError: for a missing or impossible size, another model type, or a feed-forward part that
        this port does not have.
    """
    if values.get('model_type', 't5') != 't5':
      raise UserError(
        f"T5 config: model_type is {values['model_type']!r}, but only 't5' is supported."
      )
    # What transformers assumes when config.json does not say, which early ones do not.
    assumed = {
      'relative_attention_num_buckets': 32,
      'relative_attention_max_distance': 128,
      'feed_forward_proj': 'relu',
    }
    sizes = [f.name for f in dataclasses.fields(cls) if f.type is int and f.name not in assumed]
    missing = [name for name in sizes if name not in values]
    if missing:
      raise UserError(
        f"T5 config: {', '.join(missing)} missing: give transformers' config.json unchanged."
      )
    kept = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
    return cls(**assumed | kept)


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
  """Which class the distance between two tokens belongs to.

  Short distances have a bucket each, longer ones share buckets that widen logarithmically.

  Args:
    length: L, tokens.
    num_buckets: of both directions together.
    max_distance: from here on all distances share the last bucket of their direction.

  Returns:
    (L, L) int32 in [0, num_buckets), by query and key.
  """
  distance = np.arange(length)[None] - np.arange(length)[:, None]
  half = num_buckets // 2
  exact = half // 2
  far = np.maximum(np.abs(distance), exact).astype(np.float32)
  # In float32, as the weights were trained: the quotient is whole at powers of two.
  steps = np.log(far / exact) / np.float32(math.log(max_distance / exact)) * (half - exact)
  far = np.minimum(exact + steps.astype(np.int32), half - 1)
  near = np.where(np.abs(distance) < exact, np.abs(distance), far)
  return (near + half * (distance > 0)).astype(np.int32)


class T5Attention(nn.Module):
  """Multi-head self-attention with a bias on its logits, which are not scaled."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
    cfg = self.config
    heads = (*x.shape[:2], cfg.num_heads, cfg.d_kv)
    width = cfg.num_heads * cfg.d_kv

    def project(name: str, **options: Any) -> jax.Array:
      dense = Dense(
        width, use_bias=False, axes=('embed', 'heads'), dtype=self.dtype, name=name, **options
      )
      return checkpoint_name(dense(x), 'qkv').reshape(heads)

    # As nothing scales the logits, queries start small.
    query = project('q', kernel_init=nn.initializers.normal((cfg.d_model * cfg.d_kv) ** -0.5))
    key, value = project('k'), project('v')
    out = jax.nn.dot_product_attention(
      query,
      key,
      value,
      bias=bias,
      mask=None if mask is None else mask[:, None, None, :],
      scale=1.0,
      implementation='xla',
    )
    out = checkpoint_name(out.reshape(*x.shape[:2], width), 'attn_output')
    return Dense(cfg.d_model, use_bias=False, axes=('heads', 'embed'), dtype=self.dtype, name='o')(
      out
    )


class T5LayerSelfAttention(nn.Module):
  """Attention with its norm and residual."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
    hidden = RMSNorm(self.config.layer_norm_epsilon, name='layer_norm')(x)
    return x + T5Attention(self.config, self.dtype, name='SelfAttention')(hidden, bias, mask)


class T5DenseReluDense(nn.Module):
  """The feed-forward part, gated or not; version 1.1 keeps the name though it has no ReLU.

  Its hidden values leave float16's range, not bfloat16's.
  """

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.config

    def widen(name: str) -> jax.Array:
      axes = ('embed', 'mlp')
      return Dense(cfg.d_ff, use_bias=False, axes=axes, dtype=self.dtype, name=name)(x)

    if cfg.feed_forward_proj == 'gated-gelu':
      hidden = nn.gelu(widen('wi_0'), approximate=True) * widen('wi_1')
    else:
      hidden = nn.relu(widen('wi'))
    return Dense(cfg.d_model, use_bias=False, axes=('mlp', 'embed'), dtype=self.dtype, name='wo')(
      hidden
    )


class T5LayerFF(nn.Module):
  """The feed-forward part with its norm and residual."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = RMSNorm(self.config.layer_norm_epsilon, name='layer_norm')(x)
    return x + T5DenseReluDense(self.config, self.dtype, name='DenseReluDense')(hidden)


class T5Block(nn.Module):
  """One block; returns (states, None), as `nn.scan` wants it."""

  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(
    self, x: jax.Array, bias: jax.Array, mask: jax.Array | None
  ) -> tuple[jax.Array, None]:
    x = T5LayerSelfAttention(self.config, self.dtype, name='layer_0')(x, bias, mask)
    x = T5LayerFF(self.config, self.dtype, name='layer_1')(x)
    x = nn.with_logical_constraint(x, ('batch', 'length', 'act_embed'))
    return tap(self, 'states', x), None


class T5Stack(nn.Module):
  """The blocks and the final norm. One table of biases, of the first block, serves them all."""

  config: T5Config
  dtype: Any
  scan: bool
  remat: str

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    cfg = self.config
    table = self.param(
      'relative_attention_bias',
      nn.with_logical_partitioning(nn.initializers.normal(cfg.d_model**-0.5), (None, None)),
      (cfg.relative_attention_num_buckets, cfg.num_heads),
    )
    buckets = relative_position_buckets(
      x.shape[1], cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance
    )
    bias = jnp.moveaxis(table.astype(jnp.float32)[buckets], -1, 0)[None]
    block = stack_blocks(T5Block, cfg.num_layers, inputs=2, scan=self.scan, remat=self.remat)
    x, _ = block(cfg, self.dtype, name='block')(x, bias, mask)
    return RMSNorm(cfg.layer_norm_epsilon, name='final_layer_norm')(x)


class T5Encoder(nn.Module):
  """transformers' T5EncoderModel.

  Attributes:
    config: the architecture.
    dtype: dtype of the computation, float32 or bfloat16; norms and softmax are float32 regardless.
    scan: run the blocks as one loop; False unrolls it. The parameters are the same.
    remat: one of `eru_jax.models.stack.REMAT_POLICIES`, what the backward pass keeps.
  """

  config: T5Config
  dtype: Any = jnp.float32
  scan: bool = True
  remat: str = 'none'

  @nn.compact
  def __call__(self, input_ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Encodes token ids.

    Args:
      input_ids: (B, L) int32, end of text included.
      mask: (B, L) bool, True where a token may be attended to. None attends to all of them,
        padding included, which is what FLUX.1 does.

    Returns:
      (B, L, d_model) states after the final norm, in `dtype`.

    Raises:
      UserError: for float16, whose range T5 leaves.
    """
    cfg, dtype = self.config, jnp.dtype(self.dtype)
    if dtype == jnp.float16:
      raise UserError('T5 overflows float16: compute it in bfloat16 or float32.')
    embed = embedding(cfg.vocab_size, cfg.d_model, 'vocab', 1.0, dtype, 'shared')
    stack = T5Stack(cfg, dtype, self.scan, self.remat, name='encoder')
    return stack(embed(input_ids), mask)
