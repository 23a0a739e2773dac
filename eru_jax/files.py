"""Files that are never seen half-written."""

import contextlib
import os
import pathlib

from eru_jax.errors import UserError


def replace_file(path: str | os.PathLike, data: bytes) -> None:
  """Writes a file so that, whenever the process dies, the old or the new content is there whole.

  Raises:
    UserError: if it cannot be written.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
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
