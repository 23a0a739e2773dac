"""The report's pictures: a table of prompts by models, each picture marked right or wrong."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eru_jax.training.pictures import png_bytes
from eru_jax.training.report_scores import SPLITS, rates, text

_ROWS_SHOWN = 8  # of a split; the others are folded away
_MAX_EDGE = 256  # pixels; larger pictures are embedded smaller


@dataclasses.dataclass(frozen=True)
class GalleryRow:
  """One prompt and the pictures made for it, all from the same noise.

  Attributes:
    prompt: the implicit prompt.
    anchor: its explicit prompt, or '' if it has none.
    split: a key of summary's stages, such as 'wording'.
    target: (H, W, 3) uint8, the right answer's picture, or None.
    pictures: (column title, (H, W, 3) uint8, whether the judge says right), left to right; None
      where no judge was asked.
  """

  prompt: str
  anchor: str
  split: str
  target: np.ndarray | None
  pictures: Sequence[tuple[str, np.ndarray, bool | None]]


def gallery(members: Sequence[GalleryRow], stages: Mapping[str, Any]) -> str:
  """The pictures grouped by split, the most telling split first, as HTML; '' if there are none.

  Args:
    members: rows in the order to show them within their splits.
    stages: summary.json's stages, for the accuracies above the pictures.
  """
  # What matters most comes first; explicit prompts only show where the journey starts.
  order = [*(split for split in SPLITS if split != 'explicit'), 'explicit']
  rows: dict[str, list[GalleryRow]] = {split: [] for split in order}
  for row in members:
    rows.setdefault(row.split, []).append(row)
  parts = []
  for split, shown in rows.items():
    if shown:
      heading, meaning = SPLITS.get(split, (split, ''))
      parts.append(f'<h3>{text(heading)}</h3><p class="meaning">{text(meaning)}</p>')
      parts.append(rates(stages, split))
      parts.append(_gallery_table(shown[:_ROWS_SHOWN], heading))
      if shown[_ROWS_SHOWN:]:
        table = _gallery_table(shown[_ROWS_SHOWN:], f'{heading}, continued')
        count = len(shown) - _ROWS_SHOWN
        parts.append(f'<details><summary>{count} more</summary>{table}</details>')
  if not parts:
    return ''
  judged = any(correct is not None for row in members for _, _, correct in row.pictures)
  key = (
    ' The judge says <span class="key right">✓ right</span> or <span class="key wrong">✗ '
    'wrong</span>.'
  )
  return f'<p>All pictures of a row start from the same noise.{key * judged}</p>{"".join(parts)}'


def _gallery_table(rows: Sequence[GalleryRow], heading: str) -> str:
  titles = list(dict.fromkeys(title for row in rows for title, _, _ in row.pictures))
  target = any(row.target is not None for row in rows)
  columns = ['Prompt', *(['Target'] if target else []), *titles]
  head = ''.join(f'<th scope="col">{text(column)}</th>' for column in columns)
  body = []
  for row in rows:
    anchor = ''
    if row.anchor and row.anchor != row.prompt:
      anchor = f'<span class="anchor"><span>means</span> {text(row.anchor)}</span>'
    cells = [f'<th scope="row">{text(row.prompt)}{anchor}</th>']
    if target:
      cells.append(_picture_cell('Target', row.target, None, row.anchor or row.prompt, 'target '))
    pictures = {title: (image, correct) for title, image, correct in row.pictures}
    for title in titles:
      image, correct = pictures.get(title, (None, None))
      cells.append(_picture_cell(title, image, correct, row.prompt))
    body.append(f'<tr>{"".join(cells)}</tr>')
  return (
    f'<table class="gallery"><caption>{text(heading)}</caption><thead><tr>{head}</tr></thead>'
    f'<tbody>{"".join(body)}</tbody></table>'
  )


def _picture_cell(
  title: str, image: np.ndarray | None, correct: bool | None, prompt: str, kind: str = ''
) -> str:
  label = f'data-label="{text(title)}"'
  if image is None:
    return f'<td class="{kind}none" {label}>–</td>'
  verdict, mark = {
    None: ('', ''),
    True: ('right', '<span class="mark" aria-hidden="true">✓</span>'),
    False: ('wrong', '<span class="mark" aria-hidden="true">✗</span>'),
  }[None if correct is None else bool(correct)]
  alt = f'{title}: {prompt}' + (f' (judged {verdict})' if verdict else '')
  return (
    f'<td class="{kind}{verdict}" {label}><span class="picture"><img src="{_data_uri(image)}" '
    f'alt="{text(alt)}" loading="lazy">{mark}</span></td>'
  )


def _data_uri(image: np.ndarray) -> str:
  picture = np.asarray(image)
  if picture.ndim == 3 and picture.dtype == np.uint8 and max(picture.shape[:2]) > _MAX_EDGE:
    from PIL import Image

    picture = Image.fromarray(picture)
    picture.thumbnail((_MAX_EDGE, _MAX_EDGE), Image.Resampling.LANCZOS)
  return 'data:image/png;base64,' + base64.b64encode(png_bytes(picture)).decode()
