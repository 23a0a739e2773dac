"""Picture files, as a model of a given size sees them."""

import os
import pathlib

import numpy as np

from eru_jax.errors import UserError


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

  path, where = pathlib.Path(path).expanduser(), f'{where}: ' if where else ''
  try:
    with Image.open(path) as opened:
      picture = ImageOps.exif_transpose(opened).convert('RGBA')
  except FileNotFoundError as error:
    raise UserError(f'{where}there is no picture {path}: check the path.') from error
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise UserError(f'{where}{path} is not a readable picture: {error}.') from error
  white = Image.new('RGBA', picture.size, 'white')
  picture = Image.alpha_composite(white, picture).convert('RGB')
  return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
