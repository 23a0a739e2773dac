"""Weight table of transformers' BertModel and eru_jax.models.minilm, and its loader."""

import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eru_jax.models.minilm import BertConfig, MiniLM
from eru_jax.weights.safetensors_io import read_safetensors
from eru_jax.weights.table import Row, linear, norm, to_flax

# In the file, but no part of the encoder: sentence embeddings are means, not the pooler's.
_IGNORED = ('pooler.', 'embeddings.position_ids')


def rows(config: BertConfig) -> list[Row]:
  """All tensors of the encoder."""
  del config
  table = [
    Row(f'embeddings.{kind}_embeddings.weight', f'embeddings/{kind}_embeddings/embedding')
    for kind in ('word', 'position', 'token_type')
  ]
  table += norm('embeddings.LayerNorm', 'embeddings/LayerNorm')
  torch, flax = 'encoder.layer.{i}', 'encoder/layer'
  for name in ('query', 'key', 'value'):
    table += linear(f'{torch}.attention.self.{name}', f'{flax}/attention/self/{name}')
  for name in ('attention/output', 'output'):
    dotted = name.replace('/', '.')
    table += linear(f'{torch}.{dotted}.dense', f'{flax}/{name}/dense')
    table += norm(f'{torch}.{dotted}.LayerNorm', f'{flax}/{name}/LayerNorm')
  table += linear(f'{torch}.intermediate.dense', f'{flax}/intermediate/dense')
  return table


def counts(config: BertConfig) -> Mapping[str, int]:
  return {'i': config.num_hidden_layers}


def load(path: str | os.PathLike, config: BertConfig) -> dict[str, Any]:
  """Parameters of MiniLM out of a BertModel's safetensors file.

  Raises:
    UserError: if the file is damaged or of another architecture.
  """
  tensors = read_safetensors(path)
  kept = {name: value for name, value in tensors.items() if not name.startswith(_IGNORED)}

  def init():
    ids = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(MiniLM(config).init(jax.random.key(0), ids, ids > 0)['params'])

  return to_flax(kept, rows(config), counts(config), jax.eval_shape(init))
