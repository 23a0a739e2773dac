"""Digests of files, of large ones without reading them again."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import time

from eru_jax.errors import UserError
from eru_jax.files import cache_directory, replace_file

# Smaller files are read whenever they are asked for.
_LARGE = 1 << 24
# A file that was written so many nanoseconds ago may be written again without a later time to show.
_SETTLED = 2 * 10**9


def file_digest(path: pathlib.Path) -> str:
  """Hex sha256 of a file.

  That of a large file is kept in the cache, and stands as long as the file has the same path, size
  and time of change.

  Raises:
    OSError: if it cannot be read.
  """
  # The hub's cache links to large files by their sha256.
  name = path.resolve().name
  if path.is_symlink() and re.fullmatch('[0-9a-f]{64}', name):
    return name
  status = path.stat()
  if status.st_size < _LARGE:
    return _read(path)
  key = {'path': str(path.resolve()), 'size': status.st_size, 'mtime_ns': status.st_mtime_ns}
  name = hashlib.sha256(os.fsencode(key['path'])).hexdigest()
  record = cache_directory() / 'digests' / f'{name}.json'
  with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # absent, or damaged
    known = json.loads(record.read_text(encoding='utf-8'))
    digest = known.pop('sha256')
    if known == key and re.fullmatch('[0-9a-f]{64}', digest):
      return digest
  began = time.time_ns()
  digest = _read(path)
  if status.st_mtime_ns < began - _SETTLED:
    with contextlib.suppress(UserError):  # the next start reads the file again, that is all
      replace_file(record, json.dumps({**key, 'sha256': digest}).encode())
  return digest


def _read(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
