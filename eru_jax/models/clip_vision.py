"""CLIP's vision tower, after transformers' CLIPVisionModelWithProjection, with its names.

Radford et al., CLIP (arXiv:2103.00020): a pre-norm transformer over patches whose class token
stands for the picture. The defaults are OpenCLIP's ViT-H/14 (Cherti et al., arXiv:2212.07143).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eru_jax.errors import UserError
from eru_jax.models.clip import ACTIVATIONS, CLIPEncoder, ClipTextConfig
from eru_jax.models.layers import Dense, LayerNorm, embedding

# What transformers assumes of the towers of a CLIPModel where its config.json does not say: files
# it writes leave out what is as usual, and the usual is ViT-B/32.
_USUAL = {
  'hidden_act': 'quick_gelu',
  'initializer_range': 0.02,
  'layer_norm_eps': 1e-5,
  'num_hidden_layers': 12,
}
_USUAL_TEXT = _USUAL | {
  'hidden_size': 512,
  'intermediate_size': 2048,
  'max_position_embeddings': 77,
  'num_attention_heads': 8,
  'vocab_size': 49408,
}
_USUAL_VISION = _USUAL | {
  'hidden_size': 768,
  'image_size': 224,
  'intermediate_size': 3072,
  'num_attention_heads': 12,
  'num_channels': 3,
  'patch_size': 32,
}
_USUAL_PROJECTION = 512


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
  """Architecture, with the keys of transformers' CLIPVisionConfig. Defaults are ViT-H/14's.

  Attributes:
    hidden_size: size of a patch state.
    intermediate_size: hidden size of the feed-forward part.
    projection_dim: size of the space that pictures share with texts.
    num_hidden_layers: blocks.
    num_attention_heads: heads; must divide `hidden_size`.
    num_channels: of a picture.
    image_size: its edge in pixels.
    patch_size: edge of a patch in pixels.
    hidden_act: 'quick_gelu' or 'gelu'.
    layer_norm_eps: added to variances.
    initializer_range: standard deviation of freshly initialised embeddings.
  """

  hidden_size: int = 1280
  intermediate_size: int = 5120
  projection_dim: int = 1024
  num_hidden_layers: int = 32
  num_attention_heads: int = 16
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 14
  hidden_act: str = 'gelu'
  layer_norm_eps: float = 1e-5
  initializer_range: float = 0.02

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
    if self.patch_size > self.image_size:
      raise UserError(
        f'CLIP config: patch_size ({self.patch_size}) must not exceed image_size '
        f'({self.image_size}).'
      )

  @property
  def num_patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class ClipConfig:
  """Both towers of a CLIPModel.

  Attributes:
    text: the text tower.
    vision: the vision tower; its `projection_dim` is also the text's.
  """

  text: ClipTextConfig
  vision: ClipVisionConfig = ClipVisionConfig()

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'ClipConfig':
    """Reads transformers' config.json of a CLIPModel.

    Raises:
      UserError: for another model type, an impossible size, or an activation that these ports do
        not have.
    """
    kind = values.get('model_type')
    if kind != 'clip':
      raise UserError(
        f"CLIP config: model_type is {kind!r}, but must be 'clip', a model with both towers: give "
        'the directory of a whole CLIPModel.'
      )
    text = {'model_type': 'clip_text_model'} | _tower(values, 'text_config', _USUAL_TEXT)
    vision = _tower(values, 'vision_config', _USUAL_VISION)
    vision['projection_dim'] = values.get('projection_dim', _USUAL_PROJECTION)
    known = [field.name for field in dataclasses.fields(ClipVisionConfig)]
    kept = {name: vision[name] for name in known if name in vision}
    return cls(ClipTextConfig.from_dict(text), ClipVisionConfig(**kept))


def _tower(values: Mapping[str, Any], name: str, usual: Mapping[str, Any]) -> dict[str, Any]:
  """The settings of a tower; some files repeat them under another key, which then counts."""
  found = dict(usual)
  for key in (name, f'{name}_dict'):
    own = values.get(key) or {}
    if not isinstance(own, Mapping):
      raise UserError(f'CLIP config: {key} is {own!r}, but must be a mapping: copy the file again.')
    found |= own
  return found


class CLIPVisionEmbeddings(nn.Module):
  """The class token and the patches, projected, with position embeddings."""

  config: ClipVisionConfig
  dtype: Any

  @nn.compact
  def __call__(self, pixel_values: jax.Array) -> jax.Array:
    cfg = self.config
    partitioned, normal = nn.with_logical_partitioning, nn.initializers.normal
    patch = (cfg.patch_size, cfg.patch_size)
    patches = nn.Conv(
      cfg.hidden_size,
      patch,
      strides=patch,
      padding='VALID',
      use_bias=False,
      dtype=self.dtype,
      kernel_init=partitioned(normal(cfg.initializer_range), (None, None, 'conv_in', 'conv_out')),
      name='patch_embedding',
    )(pixel_values)
    x = patches.reshape(patches.shape[0], cfg.num_patches, cfg.hidden_size)
    token = self.param(
      'class_embedding',
      partitioned(normal(cfg.hidden_size**-0.5), ('embed',)),
      (cfg.hidden_size,),
    )
    token = jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, cfg.hidden_size))
    x = jnp.concatenate([token, x], axis=1)
    embed = embedding(
      cfg.num_patches + 1,
      cfg.hidden_size,
      None,
      cfg.initializer_range,
      self.dtype,
      'position_embedding',
    )
    x = x + embed(jnp.arange(cfg.num_patches + 1)[None])
    return nn.with_logical_constraint(x, ('batch', 'length', 'act_embed'))


class ClipVisionModel(nn.Module):
  """transformers' CLIPVisionModelWithProjection.

  Attributes:
    config: the architecture.
    dtype: dtype of the computation; norms and softmax are float32 regardless.
    scan: run the blocks as one loop; False unrolls it. The parameters are the same.
    remat: one of `eru_jax.models.stack.REMAT_POLICIES`, what the backward pass keeps.
  """

  config: ClipVisionConfig
  dtype: Any = jnp.float32
  scan: bool = True
  remat: str = 'none'

  @nn.compact
  def __call__(self, pixel_values: jax.Array) -> jax.Array:
    """Encodes pictures.

    Args:
      pixel_values: (B, image_size, image_size, num_channels), normalised.

    Returns:
      (B, projection_dim) float32: the class token's state after the final norm, projected.

    Raises:
      UserError: if the pictures are of another size.
    """
    cfg = self.config
    if pixel_values.shape[1:] != (cfg.image_size, cfg.image_size, cfg.num_channels):
      raise UserError(
        f'This CLIP sees pictures of {cfg.image_size} x {cfg.image_size} pixels and '
        f'{cfg.num_channels} channels, got an array of shape {pixel_values.shape}.'
      )
    x = CLIPVisionEmbeddings(cfg, self.dtype, name='embeddings')(pixel_values)
    # The reference's spelling.
    x = LayerNorm(cfg.layer_norm_eps, affine=True, name='pre_layrnorm')(x)
    x = CLIPEncoder(cfg, self.dtype, self.scan, self.remat, causal=False, name='encoder')(x)
    pooled = LayerNorm(cfg.layer_norm_eps, affine=True, name='post_layernorm')(x[:, 0])
    project = Dense(
      cfg.projection_dim,
      use_bias=False,
      axes=('embed', None),
      dtype=self.dtype,
      name='visual_projection',
    )
    return project(pooled).astype(jnp.float32)
