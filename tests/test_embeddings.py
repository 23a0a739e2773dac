"""The embedding cache: hits, damage, two encoders, a kill before the rename."""

import dataclasses
import io
import json
import logging
import resource

import ml_dtypes
import numpy as np
import pytest

from eru_jax.data import embeddings
from eru_jax.errors import UserError
from eru_jax.types import Conditioning


class FakeEncoder:
  """Counts what it encodes; a prompt's length decides its embedding."""

  def __init__(self, fingerprint='a' * 32):
    self.fingerprint = fingerprint
    self.asked = []

  def encode(self, prompts, warn=True):
    self.asked += list(prompts)
    length = np.array([min(len(p), 4) for p in prompts], int)
    mask = np.arange(4)[None] < length[:, None]
    tokens = np.where(mask, length[:, None], 0).astype(np.float32)[..., None]
    return Conditioning(tokens.repeat(2, axis=2), mask, length[:, None].astype(np.float32))

  def warn_if_cut(self, prompts, mask):
    pass


def test_what_is_cached_is_not_encoded_again(tmp_path):
  encoder = FakeEncoder()
  first = embeddings.EmbeddingCache(tmp_path, encoder).lookup(['ab', 'c', 'ab'])
  assert encoder.asked == ['ab', 'c']
  again = embeddings.EmbeddingCache(tmp_path, encoder).lookup(['c', 'ab', 'new one'])
  assert encoder.asked == ['ab', 'c', 'new one']
  for name in ('tokens', 'mask', 'pooled'):
    np.testing.assert_array_equal(getattr(first, name)[1], getattr(again, name)[0])
    np.testing.assert_array_equal(getattr(first, name)[2], getattr(again, name)[1])


def test_an_empty_prompt_is_named_by_its_own_index(tmp_path):
  encoder = FakeEncoder()
  cache = embeddings.EmbeddingCache(tmp_path, encoder)
  cache.lookup(['x', 'yy'])
  for bad in ('', '\u200b ', '\ud800', 3):
    with pytest.raises(UserError, match='^Prompt 3 '):
      cache.lookup(['x', 'yy', 'x', bad])
  with pytest.raises(UserError, match='single text'):
    cache.lookup('x')
  assert encoder.asked == ['x', 'yy']


def test_no_prompts_give_no_rows(tmp_path):
  out = embeddings.EmbeddingCache(tmp_path, FakeEncoder()).lookup([])
  assert out.tokens.shape == (0, 4, 2) and out.mask.shape == (0, 4)


def test_fingerprints_never_mix(tmp_path):
  embeddings.EmbeddingCache(tmp_path, FakeEncoder('a' * 32)).lookup(['x'])
  other = FakeEncoder('b' * 32)
  embeddings.EmbeddingCache(tmp_path, other).lookup(['x'])
  assert other.asked == ['x']


@pytest.mark.parametrize(
  'damage',
  [
    lambda data: data[: len(data) // 2],
    lambda data: b'',
  ],
  ids=['cut', 'empty'],
)
def test_a_damaged_file_is_encoded_again(tmp_path, caplog, damage):
  encoder = FakeEncoder()
  embeddings.EmbeddingCache(tmp_path, encoder).lookup(['x', 'yy'])
  (path,) = tmp_path.rglob('*.array_record')
  path.write_bytes(damage(path.read_bytes()))
  with caplog.at_level(logging.WARNING, logger='absl'):
    found = embeddings.EmbeddingCache(tmp_path, encoder).lookup(['yy'])
  assert encoder.asked == ['x', 'yy', 'yy'] and found.pooled[0, 0] == 2
  assert [path.name in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize('listed', [True, False])
def test_a_damaged_record_does_not_spoil_the_others(tmp_path, caplog, listed):
  encoder = FakeEncoder()
  embeddings.EmbeddingCache(tmp_path, encoder).lookup(['x', 'yy', 'zzz'])
  (path,) = tmp_path.rglob('*.array_record')
  data = bytearray(path.read_bytes())
  data[data.index(b'yy', 70)] ^= 1
  path.write_bytes(data)
  if not listed:  # as earlier versions left it
    path.with_suffix('.json').unlink()
  with caplog.at_level(logging.WARNING, logger='absl'):
    found = embeddings.EmbeddingCache(tmp_path, encoder).lookup(['zzz', 'yy', 'x'])
  assert encoder.asked == ['x', 'yy', 'zzz', 'yy']
  np.testing.assert_array_equal(found.pooled[:, 0], [3, 2, 1])
  assert [path.name in record.getMessage() for record in caplog.records] == [True]
  # It was encoded again for good.
  caplog.clear()
  embeddings.EmbeddingCache(tmp_path, encoder).lookup(['zzz', 'yy', 'x'])
  assert len(encoder.asked) == 4 and not caplog.records


@pytest.mark.parametrize(
  'keys', ['', '[]', '{}', '7', '[7]', '["00", "11"]', '["00", "11", "22", "33"]']
)
def test_a_damaged_list_of_keys_costs_an_encoding_at_most(tmp_path, keys):
  encoder = FakeEncoder()
  embeddings.EmbeddingCache(tmp_path, encoder).lookup(['x', 'yy'])
  (path,) = tmp_path.rglob('*.json')
  path.write_text(keys)
  found = embeddings.EmbeddingCache(tmp_path, encoder).lookup(['yy', 'x'])
  np.testing.assert_array_equal(found.pooled[:, 0], [2, 1])


def test_a_list_that_belongs_to_another_file_misleads_nobody(tmp_path, caplog):
  encoder = FakeEncoder()
  embeddings.EmbeddingCache(tmp_path, encoder).lookup(['x', 'yy'])
  (path,) = tmp_path.rglob('*.json')
  path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
  with caplog.at_level(logging.WARNING, logger='absl'):
    found = embeddings.EmbeddingCache(tmp_path, encoder).lookup(['yy', 'x'])
  np.testing.assert_array_equal(found.pooled[:, 0], [2, 1])
  assert len(caplog.records) == 1


def test_a_file_of_an_earlier_version_is_read(tmp_path):
  """Compressed, without a list of keys, each record with a mask by its length."""
  from array_record.python import array_record_module

  encoder = FakeEncoder()
  directory = tmp_path / encoder.fingerprint[:16]
  directory.mkdir()
  writer = array_record_module.ArrayRecordWriter(str(directory / 'a.array_record'), 'group_size:1')
  for prompt in ('x', 'yy'):
    buffer = io.BytesIO()
    np.savez(
      buffer,
      prompt=np.frombuffer(prompt.encode(), np.uint8),
      tokens=np.full((len(prompt), 2), len(prompt), np.float32),
      padded=np.int32(4),
      pooled=np.full(1, len(prompt), np.float32),
    )
    writer.write(buffer.getvalue())
  writer.close()
  found = embeddings.EmbeddingCache(tmp_path, encoder).lookup(['yy', 'x'])
  wanted = FakeEncoder().encode(['yy', 'x'])
  assert encoder.asked == []
  for name in ('tokens', 'mask', 'pooled'):
    np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


class UnmaskedEncoder(FakeEncoder):
  """As FLUX.1's: every token counts, and is as hard to keep as a number can be."""

  def __init__(self, dtype, pooled=True):
    super().__init__()
    self.dtype, self.pooled = np.dtype(dtype), pooled

  def encode(self, prompts, warn=True):
    self.asked += list(prompts)
    rows = []
    for prompt in prompts:
      rng = np.random.default_rng(list(prompt.encode()) or 0)
      tokens = rng.standard_normal((6, 5)).astype(self.dtype)
      tokens[-2:] = np.array([0.0, -0.0, np.inf, np.nan, 1e-40], self.dtype)
      rows.append((tokens, rng.standard_normal(3).astype(np.float32)))
    tokens, pooled = (np.stack(part) for part in zip(*rows, strict=True))
    return Conditioning(tokens, None, pooled if self.pooled else None)

  def null_conditioning(self):
    return self.encode([''])


@pytest.mark.parametrize('pooled', [True, False])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_unmasked_states_come_back_bit_for_bit(tmp_path, dtype, pooled):
  encoder = UnmaskedEncoder(dtype, pooled)
  prompts = ['x', 'yy', 'x', 'zzz']
  wanted = UnmaskedEncoder(dtype, pooled).encode(prompts)
  for _ in range(2):
    found = embeddings.EmbeddingCache(tmp_path, encoder).lookup(prompts)
    assert found.mask is None and found.tokens.dtype == dtype
    assert found.tokens.tobytes() == wanted.tokens.tobytes()
    assert (found.pooled.tobytes() == wanted.pooled.tobytes()) if pooled else found.pooled is None
  assert encoder.asked == ['x', 'yy', 'zzz']


def test_the_empty_prompt_is_cached_too(tmp_path):
  encoder = UnmaskedEncoder(np.float32)
  wanted = encoder.null_conditioning()
  for _ in range(2):
    found = embeddings.EmbeddingCache(tmp_path, encoder).null()
    assert found.tokens.tobytes() == wanted.tokens.tobytes() and found.tokens.shape == (1, 6, 5)
  assert encoder.asked == ['', '']  # once for `wanted`


def test_opening_a_cache_reads_no_embedding(tmp_path, monkeypatch):
  encoder = FakeEncoder()
  embeddings.EmbeddingCache(tmp_path, encoder).lookup(['x', 'yy', 'zzz'])
  unpacked = []
  unpack = embeddings._unpack
  monkeypatch.setattr(embeddings, '_unpack', lambda record: unpacked.append(1) or unpack(record))
  cache = embeddings.EmbeddingCache(tmp_path, encoder)
  assert not unpacked
  cache.lookup(['yy'])
  assert len(unpacked) == 1


def test_a_kill_before_the_rename_leaves_a_usable_cache(tmp_path, monkeypatch):
  encoder = FakeEncoder()

  def killed(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(embeddings.os, 'replace', killed)
  with pytest.raises(KeyboardInterrupt):
    embeddings.EmbeddingCache(tmp_path, encoder).lookup(['x'])
  monkeypatch.undo()
  assert embeddings.EmbeddingCache(tmp_path, encoder).lookup(['x']).pooled[0, 0] == 1


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
  def full(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(embeddings.os, 'replace', full)
  with pytest.raises(UserError, match='free some space'):
    embeddings.EmbeddingCache(tmp_path, FakeEncoder()).lookup(['x'])


def test_a_full_disk_in_the_middle_of_a_record_is_one_sentence(tmp_path):
  """Not simulated: the kernel stops the file at 20 kB."""
  encoder, prompts = FakeEncoder(), [f'{n} ' + 'x' * 500 for n in range(300)]
  cache = embeddings.EmbeddingCache(tmp_path, encoder)
  cache.lookup(['x'])
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  try:
    with pytest.raises(UserError, match='cannot be written .* free some space') as caught:
      cache.lookup(prompts)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(caught.value)
  assert [path.suffix for path in tmp_path.rglob('*.*') if path.suffix != '.json'] == [
    '.array_record'
  ]
  # What was there before is still there, and a second try succeeds.
  again = FakeEncoder()
  assert embeddings.EmbeddingCache(tmp_path, again).lookup(['x']).pooled[0, 0] == 1
  assert again.asked == [] and len(cache.lookup(prompts).pooled) == 300


# With a real encoder, tiny and random.


def write_encoder(directory, numbers, vocab_size=10):
  """A text encoder of ten word pieces, and a tokeniser that gives w0, w1 ... these numbers."""
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import tokenizers

  from eru_jax.models.minilm import BertConfig, MiniLM
  from eru_jax.weights import minilm as table
  from eru_jax.weights.safetensors_io import write_safetensors
  from eru_jax.weights.table import to_torch

  config = BertConfig(vocab_size, 8, 1, 2, 8, 8, 2)
  ids = jnp.zeros((1, 2), jnp.int32)
  shapes = jax.eval_shape(MiniLM(config).init, jax.random.key(0), ids, ids >= 0)['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), nn.unbox(shapes))
  tensors = to_torch(params, table.rows(config), table.counts(config))
  write_safetensors(directory / 'model.safetensors', tensors)
  (directory / 'config.json').write_text(json.dumps(dataclasses.asdict(config)))
  vocab = {f'w{index}': number for index, number in enumerate(numbers)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='w0'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(directory / 'tokenizer.json'))
  return directory


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
  from eru_jax.data.text_encoder import load_minilm

  return load_minilm(write_encoder(tmp_path_factory.mktemp('e'), range(10)), max_length=4)


def test_a_tokeniser_with_gaps_in_its_numbers_is_refused(tmp_path):
  """Three word pieces fit into ten embeddings; number 57 does not, and would read as NaN."""
  from eru_jax.data.text_encoder import load_minilm

  with pytest.raises(UserError, match='tokenizer.json numbers .* up to 57, but the model has 10'):
    load_minilm(write_encoder(tmp_path, [0, 3, 57]), max_length=4)
  last = load_minilm(write_encoder(tmp_path, [0, 3, 9]), max_length=4).encode(['w2 w1'])
  assert np.isfinite(last.tokens).all() and np.isfinite(last.pooled).all()


@pytest.mark.parametrize(
  ('prompts', 'words'),
  [
    ('w1', 'single text'),
    ([None], '^Prompt 0 is None, not a text'),
    (['w1', 3.5], '^Prompt 1 is 3.5, not a text'),
    ([b'w1'], "^Prompt 0 is b'w1', not a text"),
    ([['w1']], '^Prompt 0 is .* not a text'),
    (['w1', ''], '^Prompt 1 .* is empty'),
    (['\u2028\x00\t'], '^Prompt 0 .* is empty'),
    (['w1 \ud83d'], '^Prompt 0 .* half a surrogate pair'),
  ],
)
def test_odd_input_is_one_error_and_nothing_is_cached(encoder, prompts, words, tmp_path):
  for ask in (encoder.encode, embeddings.EmbeddingCache(tmp_path, encoder).lookup):
    with pytest.raises(UserError, match=words) as caught:
      ask(prompts)
    assert '\n' not in str(caught.value)
  assert not list(tmp_path.rglob('*.*'))


def test_empty_lists_and_huge_prompts(encoder, tmp_path, caplog):
  cache = embeddings.EmbeddingCache(tmp_path, encoder)
  for none in (cache.lookup([]), cache.lookup(()), encoder.encode([])):
    assert none.tokens.shape == (0, 4, 8) and none.mask.shape == (0, 4)
    assert none.pooled.shape == (0, 8)
  huge = 'w1 w2 w3 ' * 100_000
  with caplog.at_level(logging.WARNING, logger='absl'):
    out = cache.lookup([huge, 'w1 w2 w3 w3', 'w1', 'unheard of'])
  # The warning quotes its beginning only.
  (record,) = caplog.records
  assert 'longer than 4 tokens' in record.getMessage() and len(record.getMessage()) < 500
  np.testing.assert_array_equal(out.mask.sum(1), [4, 4, 1, 2])
  assert np.isfinite(out.tokens).all() and np.isfinite(out.pooled).all()
  stored = embeddings.EmbeddingCache(tmp_path, encoder).lookup([huge])
  np.testing.assert_array_equal(stored.tokens[0], out.tokens[0])


def test_every_use_of_an_over_long_prompt_is_warned_of_once(encoder, tmp_path, caplog):
  long, fits = 'w1 w2 w3 w4 w5', 'w1 w2 w3 w4'

  def warnings(prompts):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger='absl'):
      embeddings.EmbeddingCache(tmp_path, encoder).lookup(prompts)
    return [record.getMessage().split(' prompts')[0] for record in caplog.records]

  assert warnings([long, fits]) == ['1 of 2']  # encoded
  assert warnings([fits, long]) == ['1 of 2']  # both from the cache
  assert warnings([long + ' w6', 'w1', long]) == ['2 of 3']  # some of each
  assert warnings([fits, 'w1']) == []
