"""What has been answered, on disk: a JSON object a line, only ever added to.

A process that is killed leaves at most one torn line, which is skipped; the next one starts on a
line of its own. Several processes may add to one file, each line being written at once.
"""

import json
import os
import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from eru_jax.errors import UserError

Key = tuple[str, ...]


class Journal:
  """Answers by key; of several with one key the last counts."""

  def __init__(self, path: str | os.PathLike, key: tuple[str, ...]):
    """Reads what is there.

    Args:
      path: the file; it need not exist.
      key: names of the values, texts all of them, by which rows are looked up.

    Raises:
      UserError: if it cannot be read.
    """
    self.path, self._names = pathlib.Path(path), key
    self._lock, self._file = threading.Lock(), None
    self._rows: dict[Key, Mapping[str, Any]] = {}
    try:
      lines = self.path.read_bytes().split(b'\n')
    except FileNotFoundError:
      lines = [b'']
    except OSError as error:
      raise UserError(f'{self.path} cannot be read: {error.strerror or error}.') from error
    damaged = 0
    for line in lines:
      row = _parse(line) if line.strip() else {}
      found = tuple(row.get(name) for name in key) if row is not None else ()
      if row is None:
        damaged += 1
      elif all(isinstance(value, str) for value in found):
        self._rows[found] = row
    # The last line of a killed process is no damage.
    damaged -= bool(lines[-1].strip()) and _parse(lines[-1]) is None
    if damaged:
      logging.warning('%s: %d lines are no JSON objects and are left out.', self.path, damaged)

  def __len__(self) -> int:
    return len(self._rows)

  def get(self, key: Key) -> Mapping[str, Any] | None:
    with self._lock:
      return self._rows.get(key)

  def holds(self, wanted: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Whether there is a row of some kind."""
    with self._lock:
      return any(map(wanted, self._rows.values()))

  def add(self, row: Mapping[str, Any]) -> None:
    """Writes a row; it is there when this returns, whatever happens to the process.

    Raises:
      UserError: if it cannot be written.
    """
    key = tuple(row[name] for name in self._names)
    line = json.dumps(row, ensure_ascii=True).encode() + b'\n'
    with self._lock:
      try:
        if self._file is None:
          self._file = self._opened()
        written = os.write(self._file, line)
      except OSError as error:
        raise UserError(f'{self.path} cannot be written: {error.strerror or error}.') from error
      if written < len(line):
        raise UserError(f'{self.path} cannot be written: the disk is full.')
      self._rows[key] = row

  def _opened(self) -> int:
    self.path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, 'O_CLOEXEC', 0)
    file = os.open(self.path, flags, 0o644)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b'\n':
      os.write(file, b'\n')
    return file

  def close(self) -> None:
    with self._lock:
      if self._file is not None:
        os.close(self._file)
        self._file = None

  def __enter__(self) -> 'Journal':
    return self

  def __exit__(self, *unused) -> None:
    self.close()


def _parse(line: bytes) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return row if isinstance(row, dict) else None
