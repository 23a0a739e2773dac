"""Where every array over a megabyte of a FLUX.1-sized run lies, by shape alone."""

import functools
import math
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from eru_jax import sharding
from eru_jax.models import lora, registry
from eru_jax.models.clip import ClipTextConfig
from eru_jax.models.clip_vision import ClipConfig
from eru_jax.models.t5 import T5Config
from eru_jax.training.state import OptimizerConfig, init_state
from eru_jax.weights import clip as clip_weights
from eru_jax.weights import clip_model as clip_model_weights
from eru_jax.weights import layouts
from eru_jax.weights import t5 as t5_weights

MEGABYTE = 2**20
# Kernels (stacked or not) by what their channels are; adapters; embeddings. Biases are apart.
COLUMNS, ROWS = P('fsdp', 'tensor'), P('tensor', 'fsdp')
EXPECTED = {
  'backbone': {
    r'blocks/(attn/(to_[qkv]|add_[qkv]_proj)|ff(_context)?/net_0_proj|proj_mlp|norm.*)/': COLUMNS,
    r'blocks/(attn/to_(out_0|add_out)|ff(_context)?/net_2|proj_out)/': ROWS,
    r'^(context|x)_embedder/': P(None, 'fsdp'),
    r'^(time_text_embed/.*/linear_1|norm_out/linear)/': COLUMNS,
    r'^time_text_embed/.*/linear_2/': ROWS,
  },
  'adapter': {r'/a$': P('fsdp', None), r'/b$': P(None, 'fsdp')},
  't5': {
    r'Attention/[qkv]/|/wi': COLUMNS,
    r'Attention/o/|/wo/': ROWS,
    r'shared|embed': ROWS,
  },
  'clip': {
    r'/(q|k|v)_proj/|/fc1/': COLUMNS,
    r'/out_proj/|/fc2/': ROWS,
    r'token_embedding': ROWS,
  },
}


def _abstract(**sizes):
  sizes = {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1} | sizes
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * 4)


MESHES = {
  'fsdp = 8': _abstract(fsdp=8),
  'fsdp = 4, tensor = 2': _abstract(fsdp=4, tensor=2),
  'data = 2, fsdp = 2, tensor = 2': _abstract(data=2, fsdp=2, tensor=2),
  'fsdp = 256': _abstract(fsdp=256),
}


@functools.cache
def _boxed(part):
  family = registry.family('flux')
  if part == 't5':
    return t5_weights.boxed(T5Config())
  if part == 'clip':
    return clip_weights.boxed(ClipTextConfig())
  backbone = layouts.backbone(family).boxed(family.config())
  if part == 'backbone':
    return backbone
  rules = (lora.LoraRule('attn|ff|proj|norm', 64, 128.0),)
  return jax.eval_shape(lambda: lora.init(jax.random.key(0), backbone, rules))


def _large(tree, shardings):
  """Path, bytes in bfloat16, spec and share of a device, of every array over a megabyte."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(shardings)
  for (path, sharding_), array in zip(leaves, jax.tree.leaves(tree), strict=True):
    size = 2 * math.prod(array.shape)
    if size > MEGABYTE:
      where = jax.tree_util.keystr(path, simple=True, separator='/')
      yield where, array.shape, sharding_.spec, math.prod(sharding_.shard_shape(array.shape))


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('part', EXPECTED)
def test_every_large_array_lies_as_the_rules_say(part, mesh):
  mesh, seen = MESHES[mesh], set()
  boxed = _boxed(part)
  tree = sharding.unboxed(boxed)
  for path, shape, spec, size in _large(tree, sharding.logical_shardings(boxed, mesh)):
    found = [key for key in EXPECTED[part] if re.search(key, path)]
    assert len(found) == 1, (path, found)
    expected = EXPECTED[part][found[0]]
    if path.endswith('/bias'):
      expected = P(expected[1])
    # Layers are stacked on an axis of their own.
    lead = (None,) * (len(shape) - len(expected))
    assert spec == P(*lead, *expected), path
    ways = math.prod(mesh.shape[axis] for axis in expected if axis)
    assert size * ways == math.prod(shape), path
    seen.add(found[0])
  assert len(seen) > len(EXPECTED[part]) / 2


@pytest.mark.parametrize('part', ['backbone', 'adapter'])
def test_averages_and_moments_lie_as_the_parameters_do(part):
  mesh, boxed = MESHES['fsdp = 8'], _boxed(part)
  params, layout = sharding.unboxed(boxed), sharding.logical_shardings(boxed, MESHES['fsdp = 8'])
  optimizer = OptimizerConfig().build(10)
  state = jax.eval_shape(lambda p: init_state(p, optimizer, behaviour=True), params)
  layout = sharding.shardings_like(state, params, layout, mesh)
  large = [(path, share) for path, shape, _, share in _large(state, layout)]
  # Parameters, average, two moments and the rollouts' policy.
  assert len(large) == 5 * len(list(_large(params, sharding.logical_shardings(boxed, mesh))))
  whole = sum(math.prod(x.shape) for x in jax.tree.leaves(state))
  here = sum(
    math.prod(s.shard_shape(x.shape))
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True)
  )
  # Biases and norms are all that a device holds more of than its eighth.
  assert whole / here > 7.9


def test_the_reward_is_split_as_well():
  config = ClipConfig.from_dict(
    {
      'model_type': 'clip',
      'projection_dim': 1024,
      'text_config': {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16},
      'vision_config': {
        'hidden_size': 1280,
        'intermediate_size': 5120,
        'num_hidden_layers': 32,
        'num_attention_heads': 16,
        'patch_size': 14,
      },
    }
  )
  boxed, mesh = clip_model_weights.boxed_vision(config), MESHES['fsdp = 8']
  large = list(_large(sharding.unboxed(boxed), sharding.logical_shardings(boxed, mesh)))
  kept = [path for path, shape, _, size in large if size * 8 != math.prod(shape)]
  assert len(large) > 6 and not kept, kept
