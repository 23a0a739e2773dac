"""Files that are never seen half-written."""

import contextlib
import os
import pathlib
import secrets
import tempfile
from typing import Any

from eru_jax.errors import UserError


def replace_file(path: str | os.PathLike, data: bytes) -> None:
  """Writes a file so that, whenever the process dies, the old or the new content is there whole.

  Raises:
    UserError: if it cannot be written.
  """
  path = pathlib.Path(path)
  temporary = temporary_name(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise UserError(f'{path} cannot be written: {error.strerror or error}.') from error


def temporary_name(path: pathlib.Path) -> pathlib.Path:
  """A name beside the path's that no other process uses, not even of another host."""
  return path.with_name(f'{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp')


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
