"""Latents of a list of pictures on disk: encoded once, then read row by row."""

import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from eru_jax.errors import UserError
from eru_jax.files import replacing

_GROUP = 'group_size:1'


class LatentFile:
  """Packed latents of N pictures in one ArrayRecord file; of which only asked rows are in memory.

  A file appears under its name when it is whole.
  """

  def __init__(self, path: str | os.PathLike, shape: tuple[int, int]):
    """Opens a file of latents of a shape (S, C).

    Raises:
      UserError: if it cannot be read.
    """
    from array_record.python import array_record_module

    self._path, self._shape = pathlib.Path(path), shape
    try:
      self._reader = array_record_module.ArrayRecordReader(str(path))
    except (OSError, RuntimeError, ValueError) as error:
      raise self._damaged(error) from error

  def _damaged(self, error: Exception) -> UserError:
    return UserError(f'The latents in {self._path} cannot be read ({error}): delete the file.')

  def __len__(self) -> int:
    return self._reader.num_records()

  def take(self, rows: Sequence[int]) -> np.ndarray:
    """Latents (len(rows), S, C) float32.

    Raises:
      UserError: if the file is damaged.
    """
    try:
      records = self._reader.read([int(row) for row in rows])
      return np.stack([np.frombuffer(x, np.float32).reshape(self._shape) for x in records])
    except (OSError, RuntimeError, ValueError, IndexError) as error:
      raise self._damaged(error) from error


def write_latents(path: str | os.PathLike, latents: Iterable[np.ndarray]) -> None:
  """Writes latents (S, C) float32, one a picture, in their order.

  Raises:
    UserError: if the file cannot be written.
  """
  from array_record.python import array_record_module

  path = pathlib.Path(path)
  try:
    with replacing(path) as temporary:
      writer = array_record_module.ArrayRecordWriter(str(temporary), _GROUP)
      for one in latents:
        writer.write(np.asarray(one, np.float32).tobytes())
      writer.close()
  except (OSError, RuntimeError) as error:
    raise UserError(
      f'The latents {path} cannot be written ({error}): free some space, or set ERU_JAX_CACHE to '
      'another directory.'
    ) from error
