"""Picture files, as a model of a given size sees them."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from eru_jax.errors import UserError


def check_image(path: str | os.PathLike, where: str = '') -> None:
  """Looks at a picture's header alone.

  Raises:
    UserError: as `read_image`, if the header tells.
  """
  with _opened(path, where):
    pass


@contextlib.contextmanager
def _opened(path: str | os.PathLike, where: str) -> Iterator[Any]:
  """A picture that is read while it is open, whatever is wrong with it being one sentence."""
  from PIL import Image

  path, where = pathlib.Path(path).expanduser(), f'{where}: ' if where else ''
  try:
    with Image.open(path) as opened:
      yield opened
  except FileNotFoundError as error:
    raise UserError(f'{where}there is no picture {path}: check the path.') from error
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise UserError(f'{where}{path} is not a readable picture: {error}.') from error


def read_image(path: str | os.PathLike, height: int, width: int, where: str = '') -> np.ndarray:
  """A picture that covers a frame: scaled to its smaller side (Lanczos), the rest cut off evenly.

  Args:
    path: PNG, JPEG, WebP or whatever Pillow reads. Transparency becomes white.
    height: of the frame, in pixels.
    width: likewise.
    where: what names the file, for messages.

  Returns:
    (height, width, 3) uint8.

  Raises:
    UserError: if there is no such file, or it is no readable picture.
  """
  from PIL import Image, ImageOps

  with _opened(path, where) as opened:
    picture = ImageOps.exif_transpose(opened).convert('RGBA')
  white = Image.new('RGBA', picture.size, 'white')
  picture = Image.alpha_composite(white, picture).convert('RGB')
  return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
