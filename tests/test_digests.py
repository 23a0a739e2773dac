"""Digests of large files are kept, and never those of other bytes."""

import hashlib
import os
import types

import pytest

from eru_jax.data import digests


@pytest.fixture
def read(monkeypatch, tmp_path):
  """The files that are read for their digests; all files are large."""
  monkeypatch.setenv('ERU_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(digests, '_LARGE', 1)
  found, original = [], digests._read
  monkeypatch.setattr(digests, '_read', lambda path: found.append(path.name) or original(path))
  return found


def write(path, data, seconds):
  """Writes a file whose time of change is so many seconds after the epoch."""
  path.write_bytes(data)
  os.utime(path, (seconds, seconds))
  return hashlib.sha256(data).hexdigest()


def test_a_large_file_is_read_once_until_it_changes(read, tmp_path):
  path = tmp_path / 'a'
  for data, seconds in ((b'one', 100), (b'two', 101), (b'three', 101)):
    wanted = write(path, data, seconds)
    assert [digests.file_digest(path) for _ in range(3)] == 3 * [wanted]
  assert read == 3 * ['a']
  # By another name it is another file.
  digests.file_digest(path.rename(tmp_path / 'b'))
  assert read == ['a', 'a', 'a', 'b']


def test_what_was_written_just_now_may_change_unseen(read, tmp_path, monkeypatch):
  path = tmp_path / 'a'
  path.write_bytes(b'one')
  written = path.stat().st_mtime_ns
  now = types.SimpleNamespace(time_ns=lambda: written + 10**9)
  monkeypatch.setattr(digests, 'time', now)
  for _ in range(2):
    digests.file_digest(path)
  assert read == ['a', 'a']
  now.time_ns = lambda: written + 3 * 10**9
  for _ in range(2):
    digests.file_digest(path)
  assert read == ['a', 'a', 'a']


@pytest.mark.parametrize('content', ['', '[]', '{"sha256": 1}', '{"sha256": "x"}'])
def test_damaged_records_are_made_anew(read, content, tmp_path):
  wanted = write(tmp_path / 'a', b'one', 100)
  digests.file_digest(tmp_path / 'a')
  (record,) = (tmp_path / 'cache' / 'digests').iterdir()
  record.write_text(content)
  assert [digests.file_digest(tmp_path / 'a') for _ in range(2)] == [wanted, wanted]
  assert read == ['a', 'a']


def test_small_files_and_linked_ones_leave_no_record(read, tmp_path, monkeypatch):
  wanted = write(tmp_path / 'a', b'one', 100)
  # As the hub's cache has them, whatever they hold.
  (tmp_path / ('0' * 64)).write_bytes(b'two')
  (tmp_path / 'link').symlink_to(tmp_path / ('0' * 64))
  monkeypatch.setattr(digests, '_LARGE', 4)
  assert digests.file_digest(tmp_path / 'a') == wanted
  assert digests.file_digest(tmp_path / 'link') == '0' * 64 and read == ['a']
  assert not (tmp_path / 'cache').exists()
