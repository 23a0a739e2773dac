"""CLIP's text encoder, after transformers' CLIPTextModel, with its names.

Radford et al., CLIP (arXiv:2103.00020): a causal pre-norm transformer whose state at the
end-of-text token stands for the whole prompt. FLUX.1 takes that pooled state and nothing else.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from eru_jax.errors import UserError
from eru_jax.models.attention import attention
from eru_jax.models.layers import Dense, LayerNorm, embedding, tap
from eru_jax.models.stack import stack_blocks

ACTIVATIONS = {
  'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
  'gelu': lambda x: nn.gelu(x, approximate=False),
}
# What early configs name as end-of-text token, though their tokeniser's is the highest number.
_LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
  """Architecture, with the keys of transformers' config.json. Defaults are FLUX.1's CLIP-L.

  Attributes:
    vocab_size: tokens.
    hidden_size: size of a token state.
    intermediate_size: hidden size of the feed-forward part.
    num_hidden_layers: blocks.
    num_attention_heads: heads; must divide `hidden_size`.
    max_position_embeddings: longest sequence.
    hidden_act: 'quick_gelu' or 'gelu'.
    layer_norm_eps: added to variances.
    initializer_range: standard deviation of freshly initialised weights.
    eos_token_id: the token whose state is the pooled one, where it first occurs; 2, which is what
      early configs say by mistake, stands for the highest number in a sequence.
  """

  vocab_size: int = 49408
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  max_position_embeddings: int = 77
  hidden_act: str = 'quick_gelu'
  layer_norm_eps: float = 1e-5
  initializer_range: float = 0.02
  eos_token_id: int = _LEGACY_EOS

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and (type(value) is not int or value < 1):
        raise UserError(f'CLIP config: {field.name} is {value!r}, but must be a positive integer.')
      if field.type is float and (type(value) not in (int, float) or not 0 < value < 1):
        raise UserError(f'CLIP config: {field.name} is {value!r}, but must be between 0 and 1.')
    if self.hidden_act not in list(ACTIVATIONS):  # a list, because anything may stand in a file
      raise UserError(
        f'CLIP config: hidden_act is {self.hidden_act!r}, but must be one of {list(ACTIVATIONS)}.'
      )
    if self.hidden_size % self.num_attention_heads:
      raise UserError(
        f'CLIP config: num_attention_heads ({self.num_attention_heads}) must divide hidden_size '
        f'({self.hidden_size}).'
      )

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'ClipTextConfig':
    """Reads the config.json of a CLIPTextModel or CLIPTextModelWithProjection.

    The many keys that say nothing of the architecture are passed over.

    Raises:
      UserError: for a missing or impossible size, another model type, or an activation that this
        port does not have.
    """
    kind = values.get('model_type', 'clip_text_model')
    if kind != 'clip_text_model':
      raise UserError(
        f"CLIP config: model_type is {kind!r}, but only 'clip_text_model' is supported."
      )
    sizes = [f.name for f in dataclasses.fields(cls) if f.type is int and f.name != 'eos_token_id']
    missing = [name for name in sizes if name not in values]
    if missing:
      raise UserError(
        f"CLIP config: {', '.join(missing)} missing: give transformers' config.json unchanged."
      )
    kept = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
    # What transformers assumes when config.json does not say.
    return cls(**{'eos_token_id': 49407} | kept)


class CLIPTextEmbeddings(nn.Module):
  """Token and position embeddings, summed."""

  config: ClipTextConfig
  dtype: Any

  @nn.compact
  def __call__(self, input_ids: jax.Array) -> jax.Array:
    cfg, size = self.config, self.config.hidden_size
    std, dtype = cfg.initializer_range, self.dtype
    words = embedding(cfg.vocab_size, size, 'vocab', std, dtype, 'token_embedding')
    places = embedding(cfg.max_position_embeddings, size, None, std, dtype, 'position_embedding')
    return words(input_ids) + places(jnp.arange(input_ids.shape[1])[None])


class CLIPAttention(nn.Module):
  """Multi-head self-attention, causal in the text tower, softmax in float32."""

  config: Any
  dtype: Any
  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.config
    heads = (*x.shape[:2], cfg.num_attention_heads, -1)
    query, key, value = (
      checkpoint_name(
        Dense(cfg.hidden_size, axes=('embed', 'heads'), dtype=self.dtype, name=name)(x), 'qkv'
      ).reshape(heads)
      for name in ('q_proj', 'k_proj', 'v_proj')
    )
    if self.causal:
      out = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation='xla')
      out = checkpoint_name(out, 'attn_output')
    else:
      out = attention(query, key, value)
    out = out.reshape(x.shape)
    return Dense(cfg.hidden_size, axes=('heads', 'embed'), dtype=self.dtype, name='out_proj')(out)


class CLIPMLP(nn.Module):
  """The feed-forward part."""

  config: Any
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.config
    x = Dense(cfg.intermediate_size, axes=('embed', 'mlp'), dtype=self.dtype, name='fc1')(x)
    x = ACTIVATIONS[cfg.hidden_act](x)
    return Dense(cfg.hidden_size, axes=('mlp', 'embed'), dtype=self.dtype, name='fc2')(x)


class CLIPEncoderLayer(nn.Module):
  """One block; returns (states, None), as `nn.scan` wants it."""

  config: Any
  dtype: Any
  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    cfg = self.config
    hidden = LayerNorm(cfg.layer_norm_eps, affine=True, name='layer_norm1')(x)
    x = x + CLIPAttention(cfg, self.dtype, self.causal, name='self_attn')(hidden)
    hidden = LayerNorm(cfg.layer_norm_eps, affine=True, name='layer_norm2')(x)
    x = x + CLIPMLP(cfg, self.dtype, name='mlp')(hidden)
    x = nn.with_logical_constraint(x, ('batch', 'length', 'act_embed'))
    return tap(self, 'states', x), None


class CLIPEncoder(nn.Module):
  """The stack of blocks, the same in both towers but for what a token may attend to.

  Attributes:
    config: ClipTextConfig or ClipVisionConfig.
    dtype, scan, remat: as of the tower.
    causal: whether a token sees only itself and those before it.
  """

  config: Any
  dtype: Any
  scan: bool
  remat: str
  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    length = self.config.num_hidden_layers
    layers = stack_blocks(CLIPEncoderLayer, length, inputs=0, scan=self.scan, remat=self.remat)
    return layers(self.config, self.dtype, self.causal, name='layers')(x)[0]


class ClipTextModel(nn.Module):
  """transformers' CLIPTextModel.

  Attributes:
    config: the architecture.
    dtype: dtype of the computation; norms and softmax are float32 regardless.
    scan: run the blocks as one loop; False unrolls it. The parameters are the same.
    remat: one of `eru_jax.models.stack.REMAT_POLICIES`, what the backward pass keeps.
  """

  config: ClipTextConfig
  dtype: Any = jnp.float32
  scan: bool = True
  remat: str = 'none'

  @nn.compact
  def __call__(self, input_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes token ids.

    Args:
      input_ids: (B, L) int32, start and end of text included. Nothing needs to be masked: what
        pads a prompt comes after it.

    Returns:
      (B, L, hidden_size) states after the final norm, in `dtype`, and (B, hidden_size) float32,
      those at the end-of-text token (at the first token if there is none).

    Raises:
      UserError: if L exceeds the position embeddings.
    """
    cfg = self.config
    if input_ids.shape[1] > cfg.max_position_embeddings:
      raise UserError(
        f'A sequence of {input_ids.shape[1]} tokens is longer than the '
        f'{cfg.max_position_embeddings} positions of this CLIP: shorten it.'
      )
    x = CLIPTextEmbeddings(cfg, self.dtype, name='embeddings')(input_ids)
    x = CLIPEncoder(cfg, self.dtype, self.scan, self.remat, causal=True, name='encoder')(x)
    x = LayerNorm(cfg.layer_norm_eps, affine=True, name='final_layer_norm')(x)
    legacy = cfg.eos_token_id == _LEGACY_EOS
    marks = input_ids if legacy else input_ids == cfg.eos_token_id
    end = jnp.argmax(marks, axis=1)[:, None, None]
    pooled = jnp.take_along_axis(x, end, axis=1)[:, 0]
    return x, pooled.astype(jnp.float32)
