"""Weight table of transformers' T5EncoderModel and eru_jax.models.t5, and its files."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from eru_jax import sharding
from eru_jax.models.t5 import T5Config, T5Encoder
from eru_jax.weights.streaming import Stored
from eru_jax.weights.table import Row, linear, norm
from eru_jax.weights.tensor_files import TensorFiles

# One tensor with two names, of which a file may hold either or both.
_EMBEDDING, _TIED = 'shared.weight', 'encoder.embed_tokens.weight'
# A whole T5 has these too.
_IGNORED = ('decoder.', 'lm_head.')


def rows(config: T5Config) -> list[Row]:
  """All tensors of the encoder."""
  gated = config.feed_forward_proj == 'gated-gelu'
  torch, flax = 'encoder.block.{i}.layer', 'encoder/block'
  table = [
    Row(_EMBEDDING, 'shared/embedding'),
    Row(
      'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
      'encoder/relative_attention_bias',
    ),
  ]
  for name in 'qkvo':
    attention = f'{torch}.0.SelfAttention.{name}'
    table += linear(attention, f'{flax}/layer_0/SelfAttention/{name}', bias=False)
  for name in ('wi_0', 'wi_1', 'wo') if gated else ('wi', 'wo'):
    feed_forward = f'{torch}.1.DenseReluDense.{name}'
    table += linear(feed_forward, f'{flax}/layer_1/DenseReluDense/{name}', bias=False)
  for layer in range(2):
    table += norm(f'{torch}.{layer}.layer_norm', f'{flax}/layer_{layer}/layer_norm', bias=False)
  return table + norm('encoder.final_layer_norm', 'encoder/final_layer_norm', bias=False)


def counts(config: T5Config) -> Mapping[str, int]:
  return {'i': config.num_layers}


def boxed(config: T5Config) -> dict[str, Any]:
  """What the parameters must be like and their logical axes, without making them."""
  ids = jnp.zeros((1, 2), jnp.int32)
  return jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids)['params']


def shapes(config: T5Config) -> dict[str, Any]:
  """Shapes the parameters must have."""
  return sharding.unboxed(boxed(config))


def stored(path: str | os.PathLike, config: T5Config) -> Stored:
  """T5's encoder in its safetensors file or the index of its shards, to be read array by array.

  Raises:
    UserError: if a file is missing or damaged, naming it.
  """
  files = TensorFiles(path)
  names = {name: name for name in files.tensors if not name.startswith(_IGNORED)}
  tied = names.pop(_TIED, None)
  if tied is not None:
    names.setdefault(_EMBEDDING, tied)
  return Stored(files.renamed(names), rows(config), counts(config), shapes(config))
