"""CLIP's text encoder against transformers' CLIPTextModel on random weights."""

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
from eru_jax.models.clip import ClipTextConfig, ClipTextModel
from eru_jax.weights import clip as table
from eru_jax.weights import streaming
from eru_jax.weights.safetensors_io import write_safetensors
from eru_jax.weights.table import to_flax, to_torch

TOLERANCE = 1e-5
# bfloat16 keeps 8 bits: 4e-3 a rounding, and a block rounds a handful of times.
BFLOAT16_TOLERANCE = 2e-2
# openai/clip-vit-large-patch14's text encoder, as shipped with FLUX.1.
LARGE_PARAMETERS = 123_060_480
SIZES = dict(
  vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
  max_position_embeddings=16,
)  # fmt: skip
EOS = 49


def _published(state):
  return {f'text_model.{name.removeprefix("text_model.")}': x for name, x in state.items()}


def _pair(eos_token_id=2, seed=0, **changed):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = transformers.CLIPTextConfig(
    **SIZES | changed, eos_token_id=eos_token_id, attn_implementation='eager'
  )
  oracle = randomise(transformers.CLIPTextModel(config), seed)
  ours = ClipTextConfig.from_dict(config.to_dict())
  state = _published(tensors(oracle))
  params = jax.tree.map(jnp.asarray, to_flax(state, table.rows(ours), table.counts(ours)))
  return torch, oracle, ours, params


def _ids(shape, padded, seed=0):
  """Prompts that end with the highest token; the padded ones repeat it, as CLIP's tokeniser."""
  ids = np.random.default_rng(seed).integers(1, EOS, shape)
  ids[:, -1] = EOS
  if padded:
    ids[0, shape[1] // 2 :] = EOS
  return ids


CASES = [
  # layers, heads, shape, padded, activation, eos_token_id, options
  (2, 3, (2, 7), True, 'quick_gelu', 2, {}),
  (1, 2, (3, 5), False, 'gelu', 2, {}),
  (3, 4, (1, 16), True, 'quick_gelu', EOS, {'scan': False}),
  (2, 3, (2, 1), False, 'gelu', EOS, {'remat': 'full'}),
]


@pytest.mark.parametrize('layers,heads,shape,padded,act,eos,options', CASES)
def test_forward_and_all_gradients_equal_transformers(
  layers, heads, shape, padded, act, eos, options
):
  torch, oracle, config, params = _pair(
    eos, num_hidden_layers=layers, num_attention_heads=heads, hidden_act=act
  )
  ids, rng = _ids(shape, padded), np.random.default_rng(1)
  weight = rng.standard_normal((*shape, 24)).astype(np.float32)
  weight_pooled = rng.standard_normal((shape[0], 24)).astype(np.float32)
  model = ClipTextModel(config, **options)

  def loss(params):
    states, pooled = model.apply({'params': params}, jnp.asarray(ids))
    return jnp.sum(weight * states) + jnp.sum(weight_pooled * pooled), (states, pooled)

  ours, (states, pooled) = jax.jit(jax.grad(loss, has_aux=True))(params)
  out = oracle(torch.from_numpy(ids))
  theirs = (torch.from_numpy(weight) * out.last_hidden_state).sum()
  (theirs + (torch.from_numpy(weight_pooled) * out.pooler_output).sum()).backward()
  assert relative_error(states, out.last_hidden_state.detach().numpy()) <= TOLERANCE
  assert relative_error(pooled, out.pooler_output.detach().numpy()) <= TOLERANCE
  theirs = _published(gradients(oracle))
  mapped = to_torch(ours, table.rows(config), table.counts(config))
  assert set(mapped) == set(theirs)
  flat = [np.concatenate([g[name].ravel() for name in sorted(theirs)]) for g in (mapped, theirs)]
  assert relative_error(*flat) <= TOLERANCE


@pytest.mark.parametrize(
  'eos, row, end',
  [
    (2, [5, 9, 40, 3, 40], 2),  # by mistake: the first of the highest
    (2, [5, 2, 40, 2, 2], 2),
    (7, [5, 9, 7, 40, 7], 2),  # the first end of text
    (7, [5, 9, 40, 3, 1], 0),  # none
  ],
)
def test_the_pooled_state_is_that_at_the_end_of_text(eos, row, end):
  torch, oracle, config, params = _pair(eos)
  states, pooled = ClipTextModel(config).apply({'params': params}, jnp.array([row]))
  np.testing.assert_array_equal(pooled[0], states[0, end])
  with torch.no_grad():
    assert relative_error(pooled, oracle(torch.tensor([row])).pooler_output.numpy()) <= TOLERANCE


def test_a_token_does_not_see_what_follows():
  _, _, config, params = _pair()
  ids = _ids((1, 8), padded=False)
  states, _ = ClipTextModel(config).apply({'params': params}, ids)
  ids[0, 5:] = 1
  other, _ = ClipTextModel(config).apply({'params': params}, ids)
  np.testing.assert_allclose(other[:, :5], states[:, :5], atol=1e-6)
  assert relative_error(other[:, 5:], states[:, 5:]) > 0.1


@pytest.mark.parametrize('remat', ['none', 'names'])
def test_scanned_and_unrolled_agree(remat):
  _, _, config, params = _pair()
  ids = _ids((2, 7), padded=True)

  def grads(**options):
    model = ClipTextModel(config, **options)
    grad = jax.jit(jax.grad(lambda p: model.apply({'params': p}, ids)[1].sum()))(params)
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grad)])

  assert relative_error(grads(remat=remat, scan=False), grads()) <= TOLERANCE


def test_bfloat16_stays_near_and_pools_in_float32():
  _, _, config, params = _pair(num_hidden_layers=3)
  ids = _ids((2, 7), padded=True)
  states, pooled = ClipTextModel(config, dtype=jnp.bfloat16).apply({'params': params}, ids)
  wanted, wanted_pooled = ClipTextModel(config).apply({'params': params}, ids)
  assert states.dtype == jnp.bfloat16 and pooled.dtype == jnp.float32
  assert relative_error(states, wanted) <= BFLOAT16_TOLERANCE
  assert relative_error(pooled, wanted_pooled) <= BFLOAT16_TOLERANCE


def test_the_published_size_has_the_published_count():
  leaves = jax.tree.leaves(table.shapes(ClipTextConfig()))
  assert sum(leaf.size for leaf in leaves) == LARGE_PARAMETERS


def test_every_parameter_has_axes_that_the_rules_know():
  ids = jnp.zeros((1, 2), jnp.int32)
  boxed = jax.eval_shape(ClipTextModel(ClipTextConfig()).init, jax.random.key(0), ids)['params']
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  shardings = sharding.logical_shardings(boxed, mesh)['encoder']['layers']
  assert shardings['mlp']['fc1']['kernel'].spec == P(None, 'fsdp', 'tensor')
  assert shardings['self_attn']['out_proj']['kernel'].spec == P(None, 'tensor', 'fsdp')
  assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in _boxes(boxed))


def _boxes(tree):
  return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nn.LogicallyPartitioned))


@pytest.mark.parametrize('prefix', ['', 'text_model.'])
def test_files_load_and_their_tensors_come_back(tmp_path, prefix):
  _, oracle, config, params = _pair()
  state = {k.removeprefix('text_model.'): v for k, v in tensors(oracle).items()}
  stored = {prefix + name: value for name, value in state.items()}
  stored[f'{prefix}embeddings.position_ids'] = np.arange(16)[None]
  stored['text_projection.weight'] = np.zeros((24, 24), np.float32)
  write_safetensors(tmp_path / 'model.safetensors', stored)
  loaded = streaming.load(table.stored(tmp_path / 'model.safetensors', config))
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  back = to_torch(loaded, table.rows(config), table.counts(config))
  assert set(back) == {f'text_model.{name}' for name in state}
  for name, value in state.items():
    np.testing.assert_array_equal(back[f'text_model.{name}'], value)


def test_a_file_of_another_architecture_is_refused(tmp_path):
  _, oracle, config, _ = _pair()
  write_safetensors(tmp_path / 'model.safetensors', tensors(oracle))
  path = tmp_path / 'model.safetensors'
  for sizes, message in (
    ({'num_hidden_layers': 3}, r'missing: text_model.encoder.layers.2'),
    ({'num_hidden_layers': 1}, r'unexpected: text_model.encoder.layers.1'),
    ({'intermediate_size': 8}, r'wrong shape: text_model.encoder.layers.0.mlp.fc1'),
  ):
    with pytest.raises(UserError, match=message):
      table.stored(path, dataclasses.replace(config, **sizes)).check()


def test_config_json_is_read_with_transformers_defaults():
  transformers = pytest.importorskip('transformers')
  values = transformers.CLIPTextConfig(**SIZES, eos_token_id=2).to_dict()
  config = ClipTextConfig.from_dict(values)
  assert (config.hidden_size, config.eos_token_id, config.layer_norm_eps) == (24, 2, 1e-5)
  assert ClipTextConfig.from_dict(SIZES) == ClipTextConfig(**SIZES, eos_token_id=49407)
  assert ClipTextConfig().eos_token_id == 2


@pytest.mark.parametrize(
  'changed, message',
  [
    ({'hidden_act': 'relu'}, 'hidden_act'),
    ({'hidden_act': ['gelu']}, 'hidden_act'),
    ({'num_attention_heads': 5}, 'must divide'),
    ({'num_hidden_layers': 0}, 'num_hidden_layers is 0'),
    ({'hidden_size': 24.0}, 'hidden_size is 24.0'),
    ({'eos_token_id': [2, 3]}, 'eos_token_id'),
    ({'layer_norm_eps': 'x'}, 'layer_norm_eps'),
    ({'model_type': 'clip_vision_model'}, 'model_type'),
  ],
)
def test_other_architectures_are_refused(changed, message):
  with pytest.raises(UserError, match=f'^CLIP config: {message}|^CLIP config: .* {message}'):
    ClipTextConfig.from_dict(SIZES | changed)


def test_a_config_without_its_sizes_is_refused():
  with pytest.raises(UserError, match='vocab_size, hidden_size.* missing'):
    ClipTextConfig.from_dict({'model_type': 'clip_text_model'})


def test_too_long_a_sequence_and_an_unknown_policy_are_refused():
  ids = jnp.zeros((1, 5), jnp.int32)
  config = ClipTextConfig(**SIZES | {'max_position_embeddings': 4})
  with pytest.raises(UserError, match='longer than the 4 positions'):
    ClipTextModel(config).init(jax.random.key(0), ids)
  with pytest.raises(UserError, match="Unknown remat policy 'some'"):
    ClipTextModel(ClipTextConfig(**SIZES), remat='some').init(jax.random.key(0), ids)
