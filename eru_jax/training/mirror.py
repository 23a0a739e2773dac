"""Workdirs on an object store, such as gs://bucket/runs/one.

Such stores know no appending, no renaming of directories, and no half of a file. So checkpoints go
there through Orbax, which knows how, and all else, which is small, is written to a local directory
first: files that have changed are copied before every checkpoint and at the end.
"""

import hashlib
import pathlib
import shutil
from typing import Any

import jax

from eru_jax.errors import UserError
from eru_jax.files import as_path, cache_directory

_ELSEWHERE = 'checkpoints'


class Workdir:
  """The directory of a run.

  Attributes:
    place: as the user named it, absolute: a pathlib.Path, or an epath.Path of an object store.
    local: where small files are read and written; `place` itself unless that is an object store.
  """

  def __init__(self, workdir: str):
    self.place: Any = as_path(workdir)
    self.local: pathlib.Path = self.place
    self._copied: dict[str, tuple[int, int]] = {}
    self._remote = not isinstance(self.place, pathlib.Path)
    if self._remote:
      name = hashlib.sha256(str(self.place).encode()).hexdigest()[:16]
      self.local = cache_directory() / 'workdirs' / f'{name}-{jax.process_index()}'

  def pull(self) -> None:
    """Makes the local directory what the object store holds.

    Raises:
      UserError: if that cannot be read.
    """
    if not self._remote:
      return
    shutil.rmtree(self.local, ignore_errors=True)
    self.local.mkdir(parents=True)
    try:
      if self.place.exists():
        self._pull(self.place, self.local)
    except Exception as error:  # each store has its own
      raise self._unreachable(error) from error

  def _pull(self, source: Any, target: pathlib.Path) -> None:
    for path in source.iterdir():
      if path.name == _ELSEWHERE and source == self.place:
        continue
      if path.is_dir():
        (target / path.name).mkdir()
        self._pull(path, target / path.name)
      else:
        copy = target / path.name
        copy.write_bytes(path.read_bytes())
        self._copied[str(copy)] = _state(copy)

  def push(self) -> None:
    """Copies to the object store what has changed since.

    Raises:
      UserError: if that cannot be written.
    """
    if not self._remote:
      return
    try:
      for path in sorted(self.local.rglob('*')):
        state = _state(path)
        if path.is_dir() or path.suffix == '.tmp' or self._copied.get(str(path)) == state:
          continue
        target = self.place / path.relative_to(self.local).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        self._copied[str(path)] = state
    except Exception as error:
      raise self._unreachable(error) from error

  def _unreachable(self, error: Exception) -> UserError:
    reason = ' '.join(str(error).split()) or type(error).__name__
    return UserError(
      f'{self.place} cannot be reached ({reason[:300]}): check its name and the rights to it, and '
      'that the package for it is installed (gcsfs for gs://, s3fs for s3://).'
    )


def _state(path: pathlib.Path) -> tuple[int, int]:
  found = path.stat()
  return found.st_mtime_ns, found.st_size
