"""Weight table of transformers' CLIPTextModel and eru_jax.models.clip, and its files."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from eru_jax import sharding
from eru_jax.models.clip import ClipTextConfig, ClipTextModel
from eru_jax.weights.streaming import Stored
from eru_jax.weights.table import Row, linear, norm
from eru_jax.weights.tensor_files import TensorFiles

# transformers 5 leaves this out of the names it writes; published files have it.
_PREFIX = 'text_model.'
# In some files, but no part of the encoder: a buffer, and a CLIPTextModelWithProjection's head.
_IGNORED = ('text_model.embeddings.position_ids', 'text_projection.weight')


def encoder_rows(torch: str, flax: str) -> list[Row]:
  """All tensors of the blocks of either tower; `torch` counts them."""
  table = []
  for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
    table += linear(f'{torch}.self_attn.{name}', f'{flax}/self_attn/{name}')
  for name in ('fc1', 'fc2'):
    table += linear(f'{torch}.mlp.{name}', f'{flax}/mlp/{name}')
  for name in ('layer_norm1', 'layer_norm2'):
    table += norm(f'{torch}.{name}', f'{flax}/{name}')
  return table


def rows(config: ClipTextConfig) -> list[Row]:
  """All tensors of the encoder, with the names of published files."""
  del config
  table = [
    Row(f'{_PREFIX}embeddings.{kind}_embedding.weight', f'embeddings/{kind}_embedding/embedding')
    for kind in ('token', 'position')
  ]
  table += encoder_rows(f'{_PREFIX}encoder.layers.{{i}}', 'encoder/layers')
  return table + norm(f'{_PREFIX}final_layer_norm', 'final_layer_norm')


def counts(config: ClipTextConfig) -> Mapping[str, int]:
  return {'i': config.num_hidden_layers}


def boxed(config: ClipTextConfig) -> dict[str, Any]:
  """What the parameters must be like and their logical axes, without making them."""
  ids = jnp.zeros((1, 2), jnp.int32)
  return jax.eval_shape(ClipTextModel(config).init, jax.random.key(0), ids)['params']


def shapes(config: ClipTextConfig) -> dict[str, Any]:
  """Shapes the parameters must have."""
  return sharding.unboxed(boxed(config))


def stored(path: str | os.PathLike, config: ClipTextConfig) -> Stored:
  """CLIP's text encoder in its safetensors file or the index of its shards, to be read array by
  array.

  Raises:
    UserError: if a file is missing or damaged, naming it.
  """
  files = TensorFiles(path)
  names = {}
  for name in files.tensors:
    full = name if name.startswith((_PREFIX, 'text_projection.')) else _PREFIX + name
    if full not in _IGNORED:
      names[full] = name
  return Stored(files.renamed(names), rows(config), counts(config), shapes(config))
