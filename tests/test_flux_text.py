"""FLUX.1's text encoders against diffusers' FluxPipeline, from prompts to Conditioning."""

import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import pathlib
import shutil
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_flux
from oracle import relative_error

from eru_jax import sharding
from eru_jax.data import embeddings, flux_text
from eru_jax.data.digests import file_digest
from eru_jax.data.flux_text import load_flux_text
from eru_jax.errors import UserError
from eru_jax.training.config import ModelConfig
from eru_jax.training.experiment import open_text
from eru_jax.weights.safetensors_io import read_safetensors, write_safetensors
from eru_jax.weights.tiny_models import write_tiny_flux

TOLERANCE = 1e-5
# bfloat16 keeps 8 bits, and both round at other places.
BFLOAT16_TOLERANCE = 3e-2
# Tokens of T5 in most tests: every other number would be compiled anew.
LENGTH = 16
# Too long for CLIP's 77 tokens; for T5's 512 as well; in writing systems of all kinds.
LONG = 'the very ' * 60 + 'long prompt'
PROMPTS = [
  'a red apple',
  'The fruit that keeps the doctor away, 8k, "award-winning"  photo!!',
  LONG,
  'flag of Côte d’Ivoire, naïve façade, ﬁne ﬂow, Ω ≈ 3,14',
  'a 東京 tower 🍎 👩‍🔬 Привет, мир',
  'tabs\tand\nlines, e\u0301 and é, zero\u200bwidth',
  '<|endoftext|> in the </s> middle <extra_id_0> <pad>',
  "don't stop -- it's 5:30 p.m. (GMT+2) #1 @home $5",
  LONG * 5,
]
real = pytest.mark.skipif(tiny_flux.vocabularies() is None, reason=tiny_flux.REASON)


@pytest.fixture(scope='module')
def pipeline_and_directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp('flux') / 'snapshot'
  return tiny_flux.write_snapshot(directory), directory


@pytest.fixture(scope='module')
def pipeline(pipeline_and_directory):
  return pipeline_and_directory[0]


@pytest.fixture(scope='module')
def directory(pipeline_and_directory):
  return pipeline_and_directory[1]


@pytest.fixture(scope='module', autouse=True)
def tokenizers_once(directory):
  """Tokenisers of the snapshot that no test changes are read once; their vocabularies are large."""
  load = flux_text._load_tokenizer
  cached = functools.cache(load)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      flux_text,
      '_load_tokenizer',
      lambda folder, *rest: (cached if folder.parent == directory else load)(folder, *rest),
    )
    yield


@pytest.fixture
def copy(directory, tmp_path):
  """A snapshot that the test may damage."""
  return shutil.copytree(directory, tmp_path / 'copy')


def _pipeline_ids(pipeline, monkeypatch, prompts, length):
  """The token ids that diffusers gives its encoders."""
  seen = []
  for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
    forward = encoder.forward

    def spy(ids, *args, forward=forward, **options):
      assert options.get('attention_mask') is None and not args
      seen.append(ids.numpy())
      return forward(ids, **options)

    monkeypatch.setattr(encoder, 'forward', spy)
  pipeline._get_clip_prompt_embeds(prompts)
  pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=length)
  return seen


@pytest.mark.parametrize('length', [64, 512])
def test_token_ids_are_those_of_diffusers(pipeline, directory, monkeypatch, length):
  clip, t5 = load_flux_text(directory, max_length=length).tokenize(PROMPTS)
  wanted_clip, wanted_t5 = _pipeline_ids(pipeline, monkeypatch, PROMPTS, length)
  assert clip.shape == (len(PROMPTS), 77) and t5.shape == (len(PROMPTS), length)
  np.testing.assert_array_equal(clip, wanted_clip)
  np.testing.assert_array_equal(t5, wanted_t5)


@real
def test_the_files_flux_is_published_with_give_the_same_ids(directory, copy):
  """transformers saves one tokenizer.json; the published folders hold the older files."""
  source = tiny_flux.vocabularies()
  for ours, theirs in (('tokenizer', 'tokenizer_1'), ('tokenizer_2', 'tokenizer_2')):
    shutil.rmtree(copy / ours)
    shutil.copytree(source / theirs, copy / ours)
  assert sorted(os.listdir(copy / 'tokenizer')) == [
    'merges.txt', 'special_tokens_map.json', 'tokenizer_config.json', 'vocab.json'
  ]  # fmt: skip
  ids = load_flux_text(copy).tokenize(PROMPTS)
  for ours, wanted in zip(ids, load_flux_text(directory).tokenize(PROMPTS), strict=True):
    np.testing.assert_array_equal(ours, wanted)
  clip, t5 = (half[0].tolist() for half in ids)
  assert clip[:6] == [49406, 320, 736, 3055, 49407, 49407] and t5[:6] == [3, 9, 1131, 8947, 1, 0]


@pytest.mark.parametrize('length, prompts', [(LENGTH, PROMPTS), (512, PROMPTS[:3])])
def test_conditioning_equals_that_of_diffusers(pipeline, directory, length, prompts):
  torch = pytest.importorskip('torch')
  ours = load_flux_text(directory, max_length=length).encode(prompts, warn=False)
  with torch.no_grad():
    tokens, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=length)
  assert ours.mask is None and ours.tokens.dtype == ours.pooled.dtype == np.float32
  assert relative_error(ours.tokens, tokens.numpy()) <= TOLERANCE
  assert relative_error(ours.pooled, pooled.numpy()) <= TOLERANCE
  for index in range(len(prompts)):
    assert relative_error(ours.pooled[index], pooled[index].numpy()) <= TOLERANCE


def test_the_empty_prompt_is_that_of_diffusers(pipeline, directory):
  torch = pytest.importorskip('torch')
  ours = load_flux_text(directory, max_length=LENGTH).null_conditioning()
  with torch.no_grad():
    tokens, pooled, _ = pipeline.encode_prompt([''], max_sequence_length=LENGTH)
  assert relative_error(ours.tokens, tokens.numpy()) <= TOLERANCE
  assert relative_error(ours.pooled, pooled.numpy()) <= TOLERANCE


def test_bfloat16_is_kept_and_near(directory, tmp_path):
  wanted = load_flux_text(directory, max_length=LENGTH).encode(PROMPTS[:2])
  encoder = load_flux_text(directory, max_length=LENGTH, dtype='bfloat16')
  ours = encoder.encode(PROMPTS[:2])
  assert ours.tokens.dtype == ml_dtypes.bfloat16 and ours.pooled.dtype == np.float32
  assert relative_error(ours.tokens, wanted.tokens) <= BFLOAT16_TOLERANCE
  assert relative_error(ours.pooled, wanted.pooled) <= BFLOAT16_TOLERANCE
  for half in (encoder.clip, encoder.t5):
    assert {x.dtype for x in jax.tree.leaves(half.parameters())} == {np.dtype('bfloat16')}
  # Bit for bit through the cache, written and read.
  for _ in range(2):
    cached = embeddings.EmbeddingCache(tmp_path, encoder).lookup(PROMPTS[:2])
    assert cached.tokens.tobytes() == ours.tokens.tobytes() and cached.mask is None
    assert cached.pooled.tobytes() == ours.pooled.tobytes()


def test_an_embedding_does_not_depend_on_its_batch(directory):
  encoder = load_flux_text(directory, max_length=LENGTH)
  prompts = [f'{n} red apples' for n in range(flux_text.CLIP_BATCH + 2)]  # the last one padded
  many = encoder.encode(prompts)
  assert len(set(map(bytes, many.pooled))) == len(prompts)
  for index in (0, len(prompts) - 1):
    one = encoder.encode([prompts[index]])
    np.testing.assert_allclose(many.tokens[index], one.tokens[0], atol=1e-5)
    np.testing.assert_allclose(many.pooled[index], one.pooled[0], atol=1e-5)


def test_one_program_serves_every_number_of_prompts(directory):
  encoder = load_flux_text(directory, max_length=LENGTH)
  encoder.encode(['a'])
  apply = sharding.compiled_whole(flux_text.encode, encoder.t5.mesh, (0,))
  before = apply._cache_size()
  encoder.encode(['b', 'c', 'd', 'e', 'f'])
  encoder.null_conditioning()
  assert apply._cache_size() == before > 0


class _Spy:
  """Notes which parameters are read, and that none of the earlier ones are left."""

  def __init__(self, monkeypatch):
    self.read, self.alive = [], []
    parameters = flux_text._Half.parameters

    def spied(half):
      self.read.append((half.folder.name, sum(ref() is not None for ref in self.alive)))
      params = parameters(half)
      self.alive += map(weakref.ref, jax.tree.leaves(params))
      return params

    monkeypatch.setattr(flux_text._Half, 'parameters', spied)


def test_one_encoder_at_a_time_is_resident(directory, monkeypatch):
  spy = _Spy(monkeypatch)
  encoder = load_flux_text(directory, max_length=LENGTH)
  none = encoder.encode([])
  assert none.tokens.shape == (0, LENGTH, 32) and none.pooled.shape == (0, 24) and none.mask is None
  assert spy.read == []
  encoder.encode(['a'])
  assert spy.read == [('text_encoder', 0), ('text_encoder_2', 0)]
  encoder.encode(['b'])
  assert spy.read == [('text_encoder', 0), ('text_encoder_2', 0)] * 2
  assert not any(ref() is not None for ref in spy.alive)


def test_expected_prompts_need_each_encoder_once_and_alone(directory, monkeypatch):
  spy = _Spy(monkeypatch)
  encoder = load_flux_text(directory, max_length=LENGTH, keep_resident=True)
  encoder.expect(['a', 'b'])
  first, second = encoder.encode(['a']), encoder.encode(['b', 'a'])
  encoder.null_conditioning()
  assert spy.read == [('text_encoder', 0), ('text_encoder_2', 0)]
  np.testing.assert_array_equal(first.tokens[0], second.tokens[1])
  np.testing.assert_array_equal(first.pooled[0], second.pooled[1])
  encoder.release()
  assert not any(ref() is not None for ref in spy.alive)
  unexpected = load_flux_text(directory, max_length=LENGTH).encode(['b', 'a'])
  np.testing.assert_array_equal(second.pooled, unexpected.pooled)


def test_long_prompts_are_cut_with_one_warning(directory, caplog):
  encoder = load_flux_text(directory, max_length=512)
  with caplog.at_level(logging.WARNING):
    encoder.warn_if_cut([LONG, 'short', LONG * 5])
    encoder.warn_if_cut(['short'])
  (record,) = caplog.records
  cut = 1 if tiny_flux.vocabularies() else 2  # single characters fill T5 sooner
  message = record.getMessage()
  assert message.startswith('2 of 3 prompts are longer than the 77 tokens of CLIP, ')
  assert f' {cut} than the 512 of T5' in message
  assert repr(LONG[:200]) in message and len(message) < 500


def test_encode_warns_unless_told_not_to(directory, caplog):
  encoder = load_flux_text(directory, max_length=LENGTH)
  with caplog.at_level(logging.WARNING):
    cut = encoder.encode([LONG])
    assert len(caplog.records) == 1
    encoder.encode([LONG], warn=False)
  assert len(caplog.records) == 1 and cut.tokens.shape == (1, LENGTH, 32)


def test_fingerprints_tell_everything_apart(directory, copy):
  first = load_flux_text(directory, max_length=LENGTH).fingerprint
  others = [
    load_flux_text(directory, max_length=LENGTH + 1).fingerprint,
    load_flux_text(directory, max_length=LENGTH, dtype='bfloat16').fingerprint,
  ]
  encoder = load_flux_text(str(copy), max_length=LENGTH)

  def fingerprint():
    return dataclasses.replace(encoder).fingerprint  # each computes it once

  assert fingerprint() == first
  for name in (
    'tokenizer/tokenizer_config.json',
    'tokenizer_2/tokenizer.json',
    'text_encoder/config.json',
  ):
    (copy / name).write_text((copy / name).read_text() + '\n')
    others.append(fingerprint())
  for folder in ('text_encoder', 'text_encoder_2'):
    path = copy / folder / 'model.safetensors'
    tensors = read_safetensors(path)
    next(iter(tensors.values())).ravel()[0] += 1
    write_safetensors(path, tensors)
    others.append(fingerprint())
  assert len({first, *others}) == len(others) + 1


def test_the_hubs_links_name_their_content(directory, copy):
  wanted = load_flux_text(directory).fingerprint
  for folder in ('text_encoder', 'text_encoder_2'):
    path = copy / folder / 'model.safetensors'
    blob = copy / file_digest(path)
    path.rename(blob)
    path.symlink_to(blob)
  assert load_flux_text(copy).fingerprint == wanted


def test_sharded_weights_are_read(directory, copy):
  folder = copy / 'text_encoder_2'
  tensors = read_safetensors(folder / 'model.safetensors')
  names = sorted(tensors)
  parts = {
    'model-00001-of-00002.safetensors': names[: len(names) // 2],
    'model-00002-of-00002.safetensors': names[len(names) // 2 :],
  }
  for file, part in parts.items():
    write_safetensors(folder / file, {name: tensors[name] for name in part})
  weight_map = {name: file for file, part in parts.items() for name in part}
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
  (folder / 'model.safetensors').unlink()
  encoder = load_flux_text(copy, max_length=LENGTH)
  whole = load_flux_text(directory, max_length=LENGTH)
  np.testing.assert_array_equal(encoder.encode(['a']).tokens, whole.encode(['a']).tokens)
  first = encoder.fingerprint
  file = folder / 'model-00002-of-00002.safetensors'
  write_safetensors(file, {name: 2 * tensors[name] for name in parts[file.name]})
  assert dataclasses.replace(encoder).fingerprint != first
  index.write_text(json.dumps({'weight_map': {'a': ['b'], 'c': '../d'}}))
  broken = dataclasses.replace(encoder)
  assert broken.fingerprint != first
  with pytest.raises(UserError, match='model.safetensors.index.json'):
    broken.encode(['a'])


def _remove(*names):
  def change(root):
    for name in names:
      (root / name).unlink()

  return change


def _config(folder, **values):
  def change(root):
    path = root / folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | values))

  return change


def _text(name, content):
  return lambda root: (root / name).write_text(content)


@pytest.mark.parametrize(
  'change, message',
  [
    (_remove('text_encoder/config.json'), 'There is no .*text_encoder/config.json: give a FLUX.1'),
    (_remove('text_encoder_2/model.safetensors'), 'text_encoder_2 holds neither'),
    (_remove('tokenizer/tokenizer.json'), 'tokenizer is no CLIPTokenizer: it lacks tokenizer.json'),
    (_remove('tokenizer_2/tokenizer.json'), 'no T5TokenizerFast: it lacks .* or spiece.model'),
    (_text('tokenizer/tokenizer.json', '{'), 'tokenizer holds no CLIPTokenizer'),
    (_text('tokenizer_2/tokenizer.json', '[]'), 'tokenizer_2 holds no T5TokenizerFast'),
    (_text('text_encoder_2/config.json', '[]'), 'no JSON object'),
    (_text('text_encoder_2/config.json', '\x00'), 'config.json cannot be read'),
    (_config('text_encoder', vocab_size=100), 'tokenizer numbers tokens up to .* has 100 of them'),
    (_config('text_encoder_2', vocab_size=9), 'tokenizer_2 numbers tokens up to'),
    (_config('text_encoder_2', feed_forward_proj='gated-silu'), 'T5 config: feed_forward_proj'),
  ],
)
def test_a_damaged_snapshot_is_refused_when_opened(copy, change, message):
  change(copy)
  with pytest.raises(UserError, match=message) as caught:
    load_flux_text(copy)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'change, message',
  [
    (_text('text_encoder/model.safetensors', 'x'), 'text_encoder/model.safetensors is not a whole'),
    (
      _config('text_encoder_2', d_ff=8),
      '(?s)text_encoder_2/model.safetensors: The weights do not fit this model.*wrong shape',
    ),
    (
      _config('text_encoder', num_hidden_layers=1),
      'text_encoder/model.safetensors: .*\n  unexpected',
    ),
  ],
)
def test_damaged_weights_are_refused_when_read(copy, change, message):
  change(copy)
  encoder = load_flux_text(copy, max_length=LENGTH)
  with pytest.raises(UserError, match=message):
    encoder.encode(['a'])


@pytest.mark.parametrize('length', [0, 513, 8.0, True])
def test_impossible_lengths_are_refused(directory, length):
  with pytest.raises(UserError, match='max_length is'):
    load_flux_text(directory, max_length=length)


def test_encoders_of_another_model_are_refused_before_they_are_read(tmp_path, monkeypatch):
  path = tmp_path / 'flux'
  write_tiny_flux(path)
  _config('transformer', joint_attention_dim=48)(path)
  monkeypatch.setattr(flux_text._Half, 'parameters', None)
  settings = ModelConfig(source=str(path), text_encoder='flux', text_length=LENGTH)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  with pytest.raises(
    UserError, match='flux: the backbone takes token states of 48 .* makes 32 and 24'
  ):
    open_text(settings, ['a'], mesh)


def test_other_dtypes_are_refused(directory):
  with pytest.raises(UserError, match='float32 or bfloat16, not float16'):
    load_flux_text(directory, dtype='float16')


@pytest.mark.parametrize('bad', ['', ' \n', None, '\ud83d'])
def test_odd_prompts_are_refused_by_index(directory, bad):
  with pytest.raises(UserError, match='^Prompt 1 '):
    load_flux_text(directory, max_length=LENGTH).encode(['fine', bad])


def test_small_vocabularies_stand_in_where_the_real_ones_are_absent(tmp_path, monkeypatch):
  monkeypatch.setattr(tiny_flux, 'vocabularies', lambda: None)
  pipeline = tiny_flux.write_snapshot(tmp_path / 'flux', guidance=False, seed=1)
  assert not pipeline.transformer.config.guidance_embeds
  encoder = load_flux_text(tmp_path / 'flux', max_length=LENGTH)
  wanted = _pipeline_ids(pipeline, monkeypatch, ['a red apple'], LENGTH)
  for ours, theirs in zip(encoder.tokenize(['a red apple']), wanted, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_the_pinned_list_names_what_the_tests_look_for():
  pinned = pathlib.Path(__file__).parent.parent / 'launch' / 'requirements-test.txt'
  assert '\ndiffsynth==' in pinned.read_text()
  assert 'requirements-test.txt' in tiny_flux.REASON
  if tiny_flux.vocabularies() is not None:
    version = importlib.metadata.version('diffsynth')
    assert f'\ndiffsynth=={version} ' in pinned.read_text()
