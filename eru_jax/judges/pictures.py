"""Pictures as judges get them: 8-bit RGB as PNG, known by the hash of their pixels."""

import hashlib
import io
import os

import numpy as np

from eru_jax.errors import UserError


def pixels(picture: np.ndarray | str | os.PathLike) -> np.ndarray:
  """The pixels of a picture file, or of an array: (H, W, 3) uint8.

  Raises:
    UserError: if the file cannot be read as a picture, or the array is none.
  """
  from PIL import Image

  if isinstance(picture, str | os.PathLike):
    try:
      with Image.open(picture) as image:
        picture = np.asarray(image.convert('RGB'))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
      why = getattr(error, 'strerror', None) or 'it is no whole picture'
      raise UserError(f'The picture {picture} cannot be read: {why}.') from error
  if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8 or not picture.size:
    raise UserError(
      f'A picture must be (H, W, 3) uint8 and not empty, but this is {picture.shape} '
      f'{picture.dtype}.'
    )
  return np.ascontiguousarray(picture)


def pixel_hash(image: np.ndarray) -> str:
  """Hex sha256 of size and pixels (H, W, 3) uint8: the same whatever file they came from."""
  digest = hashlib.sha256(f'{image.shape[0]}x{image.shape[1]}:'.encode())
  digest.update(image)
  return digest.hexdigest()


def png(image: np.ndarray) -> bytes:
  """Encodes (H, W, 3) uint8, losslessly."""
  from PIL import Image

  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format='PNG')
  return buffer.getvalue()
