"""Pictures for people: captioned grids, PNG files."""

import io
import os
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eru_jax.errors import UserError
from eru_jax.files import replace_file

if TYPE_CHECKING:
  from PIL import Image, ImageFont

_GAP = 8  # pixels between pictures
_MIN_FONT_SIZE = 12  # captions of large pictures are larger
_MIN_CAPTION_WIDTH = 112
_MAX_CAPTION_LINES = 4
_PUNCTUATION = '’‘“”°'  # what Pillow's own font has beyond ASCII
_PAPER, _INK = (255, 255, 255), (45, 48, 55)


def enlargement(image: np.ndarray) -> int:
  """By how much a picture (H, W, 3) is enlarged for people to see it."""
  return max(1, 128 // max(image.shape[:2]))


def image_grid(
  images: np.ndarray, columns: int, labels: Sequence[str] | None = None, scale: int = 1
) -> 'Image.Image':
  """Lays pictures out row by row on white.

  Args:
    images: (N, H, W, 3) uint8, N >= 1.
    columns: pictures in a row.
    labels: N captions, written under the pictures; long ones are wrapped, then cut.
    scale: whole-number enlargement; each pixel becomes a block of scale x scale.

  Returns:
    A Pillow RGB picture; `save_png` writes it.

  Raises:
    UserError: if the arguments do not fit these shapes.
  """
  from PIL import Image, ImageDraw, ImageFont

  images = _checked(images)
  if columns < 1 or scale < 1:
    raise UserError(f'image_grid got columns={columns}, scale={scale}: both must be 1 or more.')
  if labels is not None and len(labels) != len(images):
    raise UserError(f'image_grid got {len(labels)} labels for {len(images)} pictures.')
  columns = min(columns, len(images))
  height, width = images.shape[1] * scale, images.shape[2] * scale
  cell_width = width if labels is None else max(width, _MIN_CAPTION_WIDTH)
  font_size = max(_MIN_FONT_SIZE, cell_width // 24)
  line_height = font_size * 5 // 4
  captions = []
  if labels is not None:
    font = ImageFont.load_default(font_size)
    captions = [_wrap(label, font, cell_width) for label in labels]
  heights = []
  for first in range(0, len(images), columns):
    # A row is as high as its longest caption.
    lines = max((len(c) for c in captions[first : first + columns]), default=0)
    heights.append(height + _GAP + (lines * line_height + _GAP if lines else 0))
  tops = np.cumsum([_GAP, *heights])
  grid = Image.new('RGB', (_GAP + columns * (cell_width + _GAP), int(tops[-1])), _PAPER)
  draw = ImageDraw.Draw(grid)
  for index, image in enumerate(images):
    left = _GAP + (index % columns) * (cell_width + _GAP)
    top = int(tops[index // columns])
    enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
    grid.paste(enlarged, (left + (cell_width - width) // 2, top))
    for number, line in enumerate(captions[index] if captions else ()):
      place = (left + cell_width / 2, top + height + _GAP // 2 + number * line_height)
      draw.text(place, line, font=font, fill=_INK, anchor='ma')
  return grid


def png_bytes(picture: 'Image.Image | np.ndarray') -> bytes:
  """Encodes a Pillow picture or a (H, W, 3) uint8 array as PNG."""
  from PIL import Image

  if not isinstance(picture, Image.Image):
    picture = Image.fromarray(_checked(np.asarray(picture)[None])[0])
  buffer = io.BytesIO()
  picture.save(buffer, format='PNG', optimize=True)
  return buffer.getvalue()


def save_png(path: str | os.PathLike, picture: 'Image.Image | np.ndarray') -> None:
  """Writes a Pillow picture or a (H, W, 3) uint8 array as a PNG file, atomically.

  Raises:
    UserError: if the file cannot be written, or the array is no picture.
  """
  replace_file(path, png_bytes(picture))


def _checked(images: np.ndarray) -> np.ndarray:
  images = np.asarray(images)
  if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
    raise UserError(
      f'Pictures must be (N, H, W, 3) uint8 and not empty, but these are {images.shape} '
      f'{images.dtype}.'
    )
  return np.ascontiguousarray(images)


def _drawable(text: str) -> str:
  """The text in letters that Pillow's own font has: accents are dropped, other letters are '?'."""
  text = ' '.join(text.split()).replace('–', '-').replace('—', '-')
  text = unicodedata.normalize('NFKD', text)
  text = ''.join(c for c in text if not unicodedata.combining(c))
  return ''.join(c if ' ' <= c <= '~' or c in _PUNCTUATION else '?' for c in text)


def _wrap(text: str, font: 'ImageFont.FreeTypeFont', width: int) -> list[str]:
  """Breaks a caption between words, or within one that is too long, and cuts it at the end."""
  lines = ['']
  for word in _drawable(text).split(' '):
    joined = f'{lines[-1]} {word}'.strip()
    if font.getlength(joined) <= width:
      lines[-1] = joined
      continue
    if lines[-1]:
      lines.append('')
    for letter in word:
      if lines[-1] and font.getlength(lines[-1] + letter) > width:
        lines.append('')
      lines[-1] += letter
  if len(lines) > _MAX_CAPTION_LINES:
    last = lines[_MAX_CAPTION_LINES - 1]
    while last and font.getlength(last + '...') > width:
      last = last[:-1]
    lines = lines[: _MAX_CAPTION_LINES - 1] + [last + '...']
  return lines
