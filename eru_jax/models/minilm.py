"""The BERT encoder behind all-MiniLM-L6-v2, after transformers' BertModel, with its names.

Devlin et al., BERT (arXiv:1810.04805); Wang et al., MiniLM (arXiv:2002.10957); Reimers and
Gurevych, Sentence-BERT (arXiv:1908.10084), for the pooling. A frozen text encoder here: there is
no dropout and no pooler, which sentence-transformers does not use either.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eru_jax.errors import UserError
from eru_jax.models.attention import attention
from eru_jax.models.layers import Dense, LayerNorm, embedding, tap
from eru_jax.models.stack import stack_blocks
from eru_jax.types import Conditioning

# What transformers assumes when config.json does not say.
_SUPPORTED = {'model_type': 'bert', 'hidden_act': 'gelu', 'position_embedding_type': 'absolute'}


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Architecture, with the keys of transformers' config.json. Defaults are all-MiniLM-L6-v2's.

  Attributes:
    vocab_size: word pieces.
    hidden_size: size of a token state.
    num_hidden_layers: encoder layers.
    num_attention_heads: heads; must divide `hidden_size`.
    intermediate_size: hidden size of the feed-forward part.
    max_position_embeddings: longest sequence.
    type_vocab_size: segments; a prompt is always segment 0.
    layer_norm_eps: added to variances.
    initializer_range: standard deviation of freshly initialised weights.
  """

  vocab_size: int = 30522
  hidden_size: int = 384
  num_hidden_layers: int = 6
  num_attention_heads: int = 12
  intermediate_size: int = 1536
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  initializer_range: float = 0.02

  def __post_init__(self):
    if self.hidden_size % self.num_attention_heads:
      raise UserError(
        f'BERT config: num_attention_heads ({self.num_attention_heads}) must divide hidden_size '
        f'({self.hidden_size}).'
      )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'BertConfig':
    """Reads transformers' config.json.

    Raises:
      UserError: for a missing size, or an activation, a position embedding or a model type that
        this port does not have.
    """
    for name, supported in _SUPPORTED.items():
      if values.get(name, supported) != supported:
        raise UserError(
          f'BERT config: {name} is {values[name]!r}, but only {supported!r} is supported.'
        )
    fields = dataclasses.fields(cls)
    missing = [f.name for f in fields if f.type is int and f.name not in values]
    if missing:
      raise UserError(
        f"BERT config: {', '.join(missing)} missing: give transformers' config.json unchanged."
      )
    return cls(**{f.name: values[f.name] for f in fields if f.name in values})


def _dense(config: BertConfig, features: int, axes: tuple[str, str], dtype: Any, name: str):
  init = nn.initializers.normal(config.initializer_range)
  return Dense(features, axes=axes, dtype=dtype, kernel_init=init, name=name)


def _layer_norm(config: BertConfig) -> LayerNorm:
  return LayerNorm(epsilon=config.layer_norm_eps, affine=True, name='LayerNorm')


class BertEmbeddings(nn.Module):
  """Word, position and segment embeddings, summed and normalised."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, input_ids: jax.Array) -> jax.Array:
    cfg = self.config

    def embed(rows: int, axis: str | None, name: str) -> nn.Embed:
      return embedding(rows, cfg.hidden_size, axis, cfg.initializer_range, self.dtype, name)

    x = embed(cfg.vocab_size, 'vocab', 'word_embeddings')(input_ids)
    positions = jnp.arange(input_ids.shape[1])[None]
    x = x + embed(cfg.type_vocab_size, None, 'token_type_embeddings')(jnp.zeros_like(positions))
    x = x + embed(cfg.max_position_embeddings, None, 'position_embeddings')(positions)
    return _layer_norm(cfg)(x)


class BertSelfAttention(nn.Module):
  """Multi-head self-attention without its output projection."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    cfg = self.config
    heads = (*x.shape[:2], cfg.num_attention_heads, -1)
    query, key, value = (
      _dense(cfg, cfg.hidden_size, ('embed', 'heads'), self.dtype, name)(x).reshape(heads)
      for name in ('query', 'key', 'value')
    )
    return attention(query, key, value, mask).reshape(x.shape)


class BertOutput(nn.Module):
  """Projects back to the residual stream, adds it, normalises (post-norm).

  transformers' BertSelfOutput (after attention) and BertOutput (after the feed-forward part).
  """

  config: BertConfig
  dtype: Any
  axis: str

  @nn.compact
  def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
    dense = _dense(self.config, self.config.hidden_size, (self.axis, 'embed'), self.dtype, 'dense')
    return _layer_norm(self.config)(dense(x) + residual)


class BertAttention(nn.Module):
  """Self-attention and its output projection, residual included."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    out = BertSelfAttention(self.config, self.dtype, name='self')(x, mask)
    return BertOutput(self.config, self.dtype, 'heads', name='output')(out, x)


class BertIntermediate(nn.Module):
  """First half of the feed-forward part, with the exact GELU."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size = self.config.intermediate_size
    x = _dense(self.config, size, ('embed', 'mlp'), self.dtype, 'dense')(x)
    return nn.gelu(x, approximate=False)


class BertLayer(nn.Module):
  """One encoder layer; returns (states, None), as `nn.scan` wants it."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
    x = BertAttention(self.config, self.dtype, name='attention')(x, mask)
    hidden = BertIntermediate(self.config, self.dtype, name='intermediate')(x)
    x = BertOutput(self.config, self.dtype, 'mlp', name='output')(hidden, x)
    return tap(self, 'states', x), None


class BertEncoder(nn.Module):
  """The stack of layers, scanned over parameters stacked on axis 0."""

  config: BertConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    length = self.config.num_hidden_layers
    layers = stack_blocks(BertLayer, length, inputs=1, scan=True, remat='none')
    return layers(self.config, self.dtype, name='layer')(x, mask)[0]


class MiniLM(nn.Module):
  """transformers' BertModel without the pooler.

  Attributes:
    config: the architecture.
    dtype: dtype of the computation; norms and softmax are float32 regardless.
  """

  config: BertConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, input_ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Encodes token ids.

    Args:
      input_ids: (B, L) int32, [CLS] and [SEP] included.
      mask: (B, L) bool, True where a token is real. What the model says at padding means nothing.

    Returns:
      (B, L, hidden_size) states of the last layer, in `dtype`.

    Raises:
      UserError: if L exceeds the position embeddings.
    """
    if input_ids.shape[1] > self.config.max_position_embeddings:
      raise UserError(
        f'A sequence of {input_ids.shape[1]} tokens is longer than the '
        f'{self.config.max_position_embeddings} positions of this BERT: shorten it.'
      )
    x = BertEmbeddings(self.config, self.dtype, name='embeddings')(input_ids)
    return BertEncoder(self.config, self.dtype, name='encoder')(x, mask)


def conditioning_from_hidden(hidden: jax.Array, mask: jax.Array) -> Conditioning:
  """Token states and the sentence embedding out of the encoder's last layer.

  The embedding is sentence-transformers' recipe for all-MiniLM-L6-v2: the mean over real tokens,
  scaled to length 1. States at padding are set to zero, so that they carry nothing even into a
  backbone that attends to them.

  Args:
    hidden: (B, L, D).
    mask: (B, L) bool. A row without any real token gets a zero embedding.

  Returns:
    Conditioning with tokens (B, L, D), mask and pooled (B, D), both float32.
  """
  tokens = jnp.where(mask[..., None], hidden.astype(jnp.float32), 0.0)
  count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
  mean = jnp.sum(tokens, axis=1) / count
  square = jnp.sum(jnp.square(mean), axis=-1, keepdims=True)
  pooled = mean * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
  return Conditioning(tokens=tokens, mask=mask, pooled=pooled)


def sentence_conditioning(conditioning: Conditioning) -> Conditioning:
  """A prompt reduced to its sentence vector, which is what a sentence encoder is trained to make.

  Wordings of one meaning lie near each other in this space; their token states do not.

  Args:
    conditioning: of `conditioning_from_hidden`, arrays of jax or numpy.

  Returns:
    Conditioning whose pooled vector (B, D) and only token (B, 1, D) are the sentence embedding,
    scaled from length 1 to values of variance 1, which backbones expect; no mask.
  """
  pooled = conditioning.pooled * conditioning.pooled.shape[-1] ** 0.5
  return Conditioning(tokens=pooled[:, None], mask=None, pooled=pooled)
