"""Weight table of transformers' CLIPModel, both towers and what joins them, and its loader."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.models.clip_vision import ClipConfig, ClipVisionModel
from eru_jax.weights import clip as text_table
from eru_jax.weights.safetensors_io import read_safetensors
from eru_jax.weights.table import Row, linear, norm, to_flax

# Buffers that older files hold.
_IGNORED = ('text_model.embeddings.position_ids', 'vision_model.embeddings.position_ids')


def rows(config: ClipConfig) -> list[Row]:
  """All tensors of the model, with the names of published files."""
  table = [Row(r.torch, f'text_model/{r.flax}', r.op) for r in text_table.rows(config.text)]
  torch, flax = 'vision_model.embeddings', 'vision_model/embeddings'
  table += [
    Row(f'{torch}.class_embedding', f'{flax}/class_embedding'),
    Row(f'{torch}.patch_embedding.weight', f'{flax}/patch_embedding/kernel', 'conv'),
    Row(f'{torch}.position_embedding.weight', f'{flax}/position_embedding/embedding'),
  ]
  table += text_table.encoder_rows('vision_model.encoder.layers.{j}', 'vision_model/encoder/layers')
  for name in ('pre_layrnorm', 'post_layernorm'):
    table += norm(f'vision_model.{name}', f'vision_model/{name}')
  table += linear('visual_projection', 'vision_model/visual_projection', bias=False)
  table += linear('text_projection', 'text_projection', bias=False)
  return [*table, Row('logit_scale', 'logit_scale')]


def counts(config: ClipConfig) -> Mapping[str, int]:
  return {'i': config.text.num_hidden_layers, 'j': config.vision.num_hidden_layers}


def boxed_vision(config: ClipConfig) -> dict[str, Any]:
  """Shapes and logical axes of the vision tower's parameters, without making them."""
  vision = config.vision
  shape = (1, vision.image_size, vision.image_size, vision.num_channels)
  init = ClipVisionModel(vision).init
  return jax.eval_shape(init, jax.random.key(0), jnp.zeros(shape))['params']


def shapes(config: ClipConfig) -> dict[str, Any]:
  """Shapes the parameters must have, without making them."""
  projection = (config.text.hidden_size, config.vision.projection_dim)
  return {
    'text_model': text_table.shapes(config.text),
    'vision_model': sharding.unboxed(boxed_vision(config)),
    'text_projection': {'kernel': jax.ShapeDtypeStruct(projection, jnp.float32)},
    'logit_scale': jax.ShapeDtypeStruct((), jnp.float32),
  }


def load(path: str | os.PathLike, config: ClipConfig) -> dict[str, Any]:
  """Parameters of a CLIPModel out of its safetensors file or the index of its shards.

  Returns:
    Nested dict of numpy arrays in the file's dtype: `text_model`, `text_projection`,
    `vision_model` (its projection included) and `logit_scale`.

  Raises:
    UserError: naming the file, if it is damaged or of another architecture.
  """
  tensors = read_safetensors(path)
  kept = {name: value for name, value in tensors.items() if name not in _IGNORED}
  try:
    return to_flax(kept, rows(config), counts(config), shapes(config))
  except UserError as error:
    raise error.at(path) from error
