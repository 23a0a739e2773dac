"""Files that are never seen half-written."""

import contextlib
import os
import pathlib
import secrets
import tempfile
from collections.abc import Iterator
from typing import Any

from eru_jax.errors import UserError

# Temporary files that have not got their names yet, and which process writes them: a fork inherits
# what is its parent's.
_unfinished: dict[pathlib.Path, int] = {}


def replace_file(path: str | os.PathLike, data: bytes) -> None:
  """Writes a file so that, whenever the process dies, the old or the new content is there whole.

  Raises:
    UserError: if it cannot be written.
  """
  path = pathlib.Path(path)
  try:
    with replacing(path) as temporary, open(temporary, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}.') from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a file that is written in the block its name when the block is over.

  An exception, Ctrl-C among them, removes it; a kill leaves it behind under its temporary name.

  Args:
    path: where the file is to be; its directory is made.

  Yields:
    Where to write: beside it, under a name that no other process uses, not even of another host.

  Raises:
    OSError: if it cannot be renamed.
  """
  temporary = path.with_name(f'{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp')
  _unfinished[temporary] = os.getpid()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    _unfinished.pop(temporary, None)


def remove_unfinished() -> None:
  """Removes what `replacing` has not renamed yet; for a process that ends without unwinding."""
  for temporary, process in list(_unfinished.items()):
    if process == os.getpid():
      with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def as_path(path: str | os.PathLike) -> Any:
  """An absolute pathlib.Path, or an epath.Path of an object store, such as gs://bucket/runs."""
  if '://' in str(path):
    from etils import epath

    return epath.Path(path)
  return pathlib.Path(path).expanduser().absolute()


def cache_directory() -> pathlib.Path:
  """Where datasets, embeddings, latents and programs are shared between runs.

  $ERU_JAX_CACHE, or ~/.cache/eru_jax.
  """
  return pathlib.Path(os.environ.get('ERU_JAX_CACHE', pathlib.Path.home() / '.cache' / 'eru_jax'))


def check_directory(path: str | os.PathLike) -> None:
  """Finds out, before the work is done, whether files can be written below a directory.

  Args:
    path: the directory; it need not exist, and is not made.

  Raises:
    UserError: if they cannot.
  """
  path = pathlib.Path(path).absolute()
  try:
    existing = next(place for place in (path, *path.parents) if place.exists())
    with tempfile.TemporaryFile(dir=existing):
      pass
  except OSError as error:
    raise UserError(
      f'Nothing can be written to {path}: {error.strerror or error}. Choose another directory.'
    ) from error
