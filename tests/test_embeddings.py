"""The embedding cache: hits, damage, two encoders, a kill before the rename."""

import logging

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

  def encode(self, prompts):
    self.asked += list(prompts)
    length = np.array([min(len(p), 4) for p in prompts], int)
    mask = np.arange(4)[None] < length[:, None]
    tokens = np.where(mask, length[:, None], 0).astype(np.float32)[..., None]
    return Conditioning(tokens.repeat(2, axis=2), mask, length[:, None].astype(np.float32))


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
    lambda data: data[:70] + bytes([data[70] ^ 1]) + data[71:],
  ],
  ids=['cut', 'empty', 'bit flip'],
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
