"""T5's encoder against transformers' T5EncoderModel on random weights."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracle import gradients, randomise, relative_error, tensors

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.models.t5 import T5Config, T5Encoder, relative_position_buckets
from eru_jax.weights import streaming
from eru_jax.weights import t5 as table
from eru_jax.weights.safetensors_io import write_safetensors
from eru_jax.weights.table import to_flax, to_torch

TOLERANCE = 1e-5
# bfloat16 keeps 8 bits: 4e-3 a rounding, and a block rounds a handful of times.
BFLOAT16_TOLERANCE = 3e-2
# google/t5-v1_1-xxl's encoder, FLUX.1's text_encoder_2.
XXL_PARAMETERS = 4_762_310_656
SIZES = dict(
  vocab_size=50, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=3,
  relative_attention_num_buckets=8, relative_attention_max_distance=12,
  feed_forward_proj='gated-gelu',
)  # fmt: skip


def _pair(seed=0, **changed):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = transformers.T5Config(
    **SIZES | changed, tie_word_embeddings=False, attn_implementation='eager'
  )
  oracle = randomise(transformers.T5EncoderModel(config), seed)
  ours = T5Config.from_dict(config.to_dict())
  params = jax.tree.map(jnp.asarray, to_flax(_state(oracle), table.rows(ours), table.counts(ours)))
  return torch, oracle, ours, params


def _state(oracle):
  """Its tensors, the tied one once."""
  return {k: v for k, v in tensors(oracle).items() if k != 'encoder.embed_tokens.weight'}


def _ids(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 50, shape)


CASES = [
  # layers, heads, shape, padded, feed-forward part, options
  (2, 3, (2, 7), True, 'gated-gelu', {}),
  (1, 2, (3, 5), False, 'relu', {}),
  (3, 4, (1, 33), True, 'gated-gelu', {'scan': False}),
  (2, 5, (2, 1), False, 'gated-gelu', {'remat': 'names'}),
]


@pytest.mark.parametrize('layers,heads,shape,padded,feed_forward,options', CASES)
def test_forward_and_all_gradients_equal_transformers(
  layers, heads, shape, padded, feed_forward, options
):
  torch, oracle, config, params = _pair(
    num_layers=layers, num_heads=heads, feed_forward_proj=feed_forward
  )
  ids, rng, mask = _ids(shape), np.random.default_rng(1), None
  weight = rng.standard_normal((*shape, 24)).astype(np.float32)
  if padded:
    mask = np.ones(shape, bool)
    mask[0, shape[1] // 2 :] = False
    weight *= mask[..., None]
  model = T5Encoder(config, **options)

  def loss(params):
    states = model.apply({'params': params}, jnp.asarray(ids), mask)
    return jnp.sum(weight * states), states

  ours, states = jax.jit(jax.grad(loss, has_aux=True))(params)
  theirs = None if mask is None else torch.from_numpy(mask.astype(np.int64))
  out = oracle(torch.from_numpy(ids), attention_mask=theirs).last_hidden_state
  (torch.from_numpy(weight) * out).sum().backward()
  real = np.ones(shape, bool) if mask is None else mask
  assert relative_error(np.asarray(states)[real], out.detach().numpy()[real]) <= TOLERANCE
  theirs = gradients(oracle)
  mapped = to_torch(ours, table.rows(config), table.counts(config))
  assert set(mapped) == set(theirs)
  flat = [np.concatenate([g[name].ravel() for name in sorted(theirs)]) for g in (mapped, theirs)]
  assert relative_error(*flat) <= TOLERANCE


def test_without_a_mask_padding_is_attended_to():
  torch, oracle, config, params = _pair()
  ids = _ids((2, 9))
  ids[:, 5:] = 0
  states = T5Encoder(config).apply({'params': params}, ids)
  with torch.no_grad():
    theirs = oracle(torch.from_numpy(ids)).last_hidden_state.numpy()
  assert relative_error(states, theirs) <= TOLERANCE
  masked = T5Encoder(config).apply({'params': params}, ids, ids != 0)
  assert relative_error(masked[:, :5], states[:, :5]) > 0.05


@pytest.mark.parametrize(
  'length, buckets, distance', [(512, 32, 128), (1100, 32, 128), (300, 8, 12), (300, 64, 100)]
)
def test_buckets_are_those_of_transformers(length, buckets, distance):
  torch = pytest.importorskip('torch')
  modeling = pytest.importorskip('transformers.models.t5.modeling_t5')
  relative = torch.arange(length)[None] - torch.arange(length)[:, None]
  theirs = modeling.T5Attention._relative_position_bucket(relative, True, buckets, distance)
  ours = relative_position_buckets(length, buckets, distance)
  np.testing.assert_array_equal(ours, theirs.numpy())
  assert len(np.unique(ours)) == buckets - 1  # the bucket of distance 0 to the right stays empty


@pytest.mark.parametrize('remat', ['none', 'names'])
def test_scanned_and_unrolled_agree(remat):
  _, _, config, params = _pair()
  ids = _ids((2, 7))

  def grads(**options):
    model = T5Encoder(config, **options)
    grad = jax.jit(jax.grad(lambda p: (model.apply({'params': p}, ids)[:, 0] ** 3).sum()))(params)
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grad)])

  assert relative_error(grads(remat=remat, scan=False), grads()) <= TOLERANCE


def test_bfloat16_stays_near():
  _, _, config, params = _pair(num_layers=3)
  ids = _ids((2, 7))
  states = T5Encoder(config, dtype=jnp.bfloat16).apply({'params': params}, ids)
  assert states.dtype == jnp.bfloat16
  wanted = T5Encoder(config).apply({'params': params}, ids)
  assert relative_error(states, wanted) <= BFLOAT16_TOLERANCE


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_values_beyond_float16_do_no_harm(dtype):
  """T5-XXL's hidden values are of this size; in float16 they would be infinite."""
  torch, oracle, config, params = _pair(num_layers=3)
  with torch.no_grad():
    for block in oracle.encoder.block:
      for name in ('wi_0', 'wi_1'):
        getattr(block.layer[1].DenseReluDense, name).weight.mul_(1e3)
  params = to_flax(_state(oracle), table.rows(config), table.counts(config))
  ids = _ids((2, 7))
  model = T5Encoder(config, dtype=dtype)
  _, taken = model.apply({'params': params}, ids, mutable=['intermediates'])
  peak = np.abs(taken['intermediates']['encoder']['block']['states'].astype(jnp.float32)).max()
  assert peak > np.finfo(np.float16).max
  with torch.no_grad():
    wanted = oracle(torch.from_numpy(ids)).last_hidden_state.numpy()
  tolerance = TOLERANCE if dtype == jnp.float32 else BFLOAT16_TOLERANCE
  assert relative_error(model.apply({'params': params}, ids), wanted) <= tolerance


def test_float16_is_refused():
  with pytest.raises(UserError, match='overflows float16'):
    T5Encoder(T5Config(**SIZES), dtype='float16').init(jax.random.key(0), _ids((1, 2)))


def test_the_published_size_has_the_published_count():
  leaves = jax.tree.leaves(table.shapes(T5Config()))
  assert sum(leaf.size for leaf in leaves) == XXL_PARAMETERS


def test_every_parameter_has_axes_that_the_rules_know():
  ids = jnp.zeros((1, 2), jnp.int32)
  boxed = jax.eval_shape(T5Encoder(T5Config()).init, jax.random.key(0), ids)['params']
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  shardings = sharding.logical_shardings(boxed, mesh)
  block = shardings['encoder']['block']
  assert block['layer_1']['DenseReluDense']['wi_0']['kernel'].spec == P(None, 'fsdp', 'tensor')
  assert block['layer_0']['SelfAttention']['o']['kernel'].spec == P(None, 'tensor', 'fsdp')
  assert shardings['shared']['embedding'].spec == P('tensor', 'fsdp')
  boxes = jax.tree.leaves(boxed, is_leaf=lambda node: isinstance(node, nn.LogicallyPartitioned))
  assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in boxes)


@pytest.mark.parametrize('names', ['shared', 'tied', 'both'])
@pytest.mark.parametrize('feed_forward', ['gated-gelu', 'relu'])
def test_files_load_and_their_tensors_come_back(tmp_path, names, feed_forward):
  _, oracle, config, params = _pair(feed_forward_proj=feed_forward)
  state = _state(oracle)
  stored = state | {'decoder.final_layer_norm.weight': np.ones(24, np.float32)}
  if names != 'shared':
    stored['encoder.embed_tokens.weight'] = stored['shared.weight'].copy()
  if names == 'tied':
    del stored['shared.weight']
  write_safetensors(tmp_path / 'model.safetensors', stored)
  loaded = streaming.load(table.stored(tmp_path / 'model.safetensors', config))
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  back = to_torch(loaded, table.rows(config), table.counts(config))
  assert set(back) == set(state)
  for name, value in state.items():
    np.testing.assert_array_equal(back[name], value)


def test_a_file_of_another_architecture_is_refused(tmp_path):
  _, oracle, config, _ = _pair()
  write_safetensors(tmp_path / 'model.safetensors', tensors(oracle))
  other = dataclasses.replace(config, feed_forward_proj='relu', d_kv=4)
  with pytest.raises(UserError, match='do not fit this model') as caught:
    table.stored(tmp_path / 'model.safetensors', other).check()
  for kind, name in (
    ('missing', '.wi.weight'),
    ('unexpected', '.wi_0.weight'),
    ('wrong shape', ''),
  ):
    assert any(x.startswith(kind) and name in x for x in caught.value.details), kind


def test_config_json_is_read_with_transformers_defaults():
  transformers = pytest.importorskip('transformers')
  values = transformers.T5Config(**SIZES).to_dict()
  assert T5Config.from_dict(values) == T5Config(**SIZES)
  # As t5-small's: neither the feed-forward part nor the largest distance.
  early = {k: SIZES[k] for k in ('vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_layers')}
  config = T5Config.from_dict(early | {'num_heads': 3, 'model_type': 't5'})
  assert (config.feed_forward_proj, config.relative_attention_max_distance) == ('relu', 128)


@pytest.mark.parametrize(
  'changed, message',
  [
    ({'feed_forward_proj': 'gated-silu'}, 'feed_forward_proj'),
    ({'feed_forward_proj': None}, 'feed_forward_proj'),
    ({'num_layers': 0}, 'num_layers is 0'),
    ({'d_model': True}, 'd_model is True'),
    ({'layer_norm_epsilon': '0'}, 'layer_norm_epsilon'),
    ({'relative_attention_num_buckets': 6}, 'relative_attention_num_buckets'),
    ({'relative_attention_max_distance': 2}, 'relative_attention_num_buckets'),
    ({'model_type': 'umt5'}, 'model_type'),
  ],
)
def test_other_architectures_are_refused(changed, message):
  with pytest.raises(UserError, match=f'^T5 config: {message}'):
    T5Config.from_dict(SIZES | changed)


def test_a_config_without_its_sizes_and_an_unknown_policy_are_refused():
  with pytest.raises(UserError, match='vocab_size, d_model.* missing'):
    T5Config.from_dict({'model_type': 't5'})
  with pytest.raises(UserError, match="Unknown remat policy 'some'"):
    T5Encoder(T5Config(**SIZES), remat='some').init(jax.random.key(0), _ids((1, 2)))
