"""`gallery.html`: every picture of an evaluation, to look through; one file, no network.

Scores and prompts are data in the page, pictures are data of each question that the script takes
out when they come near the screen. What others wrote (prompts, explanations, a judge's words) is
escaped as JSON here and put in as text there, and the page's policy lets no other script run than
its own, and nothing be loaded from anywhere.
"""

import base64
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eru_jax.evaluating.drawing import Picture, directory_of
from eru_jax.evaluating.gallery_summary import summary, title_of
from eru_jax.files import replace_file
from eru_jax.training.pictures import png_bytes
from eru_jax.training.report_scores import text

if TYPE_CHECKING:
  from eru_jax.evaluating.evaluator import Evaluated

_HERE = pathlib.Path(__file__).parent
# Pixels of a picture's longer edge in the page, the largest that keeps all pictures under a size.
_EDGES = (512, 384, 256, 192, 128, 96)
_LARGEST = 48 << 20
_BYTES_PER_PIXEL = 0.2
# Smaller pictures are kept as they are, and shown with their pixels.
_SMALL = 96
_KINDS = {'0': 'data:image/webp;base64,', '1': 'data:image/png;base64,'}


def write_gallery(evaluated: 'Evaluated', result: Mapping[str, Any]) -> pathlib.Path:
  """Writes gallery.html and returns its path.

  Raises:
    UserError: if it cannot be written.
  """
  path = evaluated.output / 'gallery.html'
  replace_file(path, page(evaluated, result).encode('utf-8', errors='replace'))
  return path


def page(evaluated: 'Evaluated', result: Mapping[str, Any]) -> str:
  """The page as HTML."""
  columns = [
    (model, condition)
    for condition in evaluated.conditions
    for model, pictures in evaluated.pictures.items()
    if any(picture.condition == condition for picture in pictures)
  ]
  count = sum(map(len, evaluated.pictures.values()))
  edge = next((e for e in _EDGES if count * e * e * _BYTES_PER_PIXEL < _LARGEST), _EDGES[-1])
  pictures = _pictures(evaluated, columns)
  small = all(max(_size(path)) <= _SMALL for path in _examples(evaluated))
  data = _data(evaluated, columns, small)
  blocks = [
    f'<script type="application/json" id="pictures-{row}">'
    f'{_json(_embedded(evaluated, row, mine, edge))}</script>\n'
    for row, mine in enumerate(pictures)
  ]
  style, script = (
    (_HERE / f'gallery.{kind}').read_text(encoding='utf-8') for kind in ('css', 'js')
  )
  policy = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
    f'style-src {_source(style)}; script-src {_source(script)}'
  )
  title = f'{evaluated.benchmark.title}: {", ".join(map(title_of, evaluated.pictures))}'
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{text(policy)}">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{text(evaluated.benchmark.title)}</h1>{summary(evaluated, result)}</header>
<main>
<h2 id="all">Pictures</h2>
{_tools(evaluated, columns)}
<ol class="questions" id="questions" tabindex="-1" aria-label="Prompts and their pictures"></ol>
<p class="nothing" id="nothing" hidden>No prompt is like that: take back a filter.</p>
<div id="end"></div>
<noscript><p>This page shows its pictures with a script of its own; turn scripts on for it.</p>
</noscript>
</main>
<dialog id="picture" aria-label="One picture, enlarged">
<div class="sheet"><div class="stage"><img id="large" alt=""></div>
<div class="facts"><div class="buttons"><button type="button" id="previous">← Before</button>
<button type="button" id="next">After →</button>
<button type="button" id="close">Close</button></div>
<p class="quiet"><kbd>←</kbd> <kbd>→</kbd> other models in its place, <kbd>↑</kbd> <kbd>↓</kbd>
other prompts, <kbd>Esc</kbd> back</p><div id="facts"></div></div></div>
</dialog>
<footer>Written by eru_jax. This file is complete in itself: it can be sent and archived.</footer>
<script type="application/json" id="data">{_json(data)}</script>
{''.join(blocks)}<script>{script}</script>
</body>
</html>
"""


def _source(content: str) -> str:
  """What the page's policy calls its own style or script."""
  digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
  return f"'sha256-{digest}'"


def _json(value: Any) -> str:
  """JSON that no browser can take for HTML, whatever texts are in it."""
  found = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))
  for character in '<>&\u2028\u2029':
    found = found.replace(character, f'\\u{ord(character):04x}')
  return found


def _data(
  evaluated: 'Evaluated', columns: Sequence[tuple[str, str]], small: bool
) -> dict[str, Any]:
  """What the script knows of models and questions, without pictures."""
  values, protocol = evaluated.values(), evaluated.protocol
  depth = max((array.shape[1] for found in values.values() for array in found.values()), default=1)
  says: dict[tuple[str, int, str, int], str] = {}
  for model, pictures in evaluated.pictures.items():
    for index, picture in enumerate(pictures):
      said = evaluated.said(model, index)
      if said:
        says[model, picture.row, picture.condition, picture.k] = said
  questions = []
  for row, question in enumerate(evaluated.questions):
    numbers, told = [], []
    for model, condition in columns:
      asked = condition in question.prompts
      mine = values[model][condition][row] if asked else ()
      numbers.append([_number(value) for value in mine] if asked else None)
      told.append([says.get((model, row, condition, k)) for k in range(len(mine))])
    questions.append(
      {
        'id': question.id, 'category': question.category, 'subcategory': question.subcategory,
        'split': question.split, 'prompts': dict(question.prompts),
        'explanation': question.explanation, 'values': numbers,
        'says': told if says else [None] * len(columns),
        'target': bool(evaluated.scorer and evaluated.scorer.targets),
      }
    )  # fmt: skip
  return {
    'columns': [{'model': title_of(model), 'condition': condition} for model, condition in columns],
    'conditions': list(evaluated.conditions),
    'questions': questions,
    'images': depth,
    'scored': protocol is not None,
    'binary': bool(protocol and protocol.proportion),
    'percent': bool(protocol and protocol.percent),
    'digits': protocol.digits if protocol else 0,
    'span': _span(evaluated, values),
    'kinds': _KINDS,
    'small': small,
  }


def _number(value: float) -> float | None:
  return float(f'{value:.6g}') if np.isfinite(value) else None


def _span(evaluated: 'Evaluated', values: Mapping[str, Mapping[str, np.ndarray]]) -> list[float]:
  """The least and the greatest value of the bars: the protocol's, or what most pictures have."""
  low, high = evaluated.protocol.span if evaluated.protocol else (0, 1)
  arrays = [array.ravel() for found in values.values() for array in found.values()]
  there = np.concatenate(arrays) if arrays else np.zeros(0)
  there = there[np.isfinite(there)]
  if len(there):
    low = float(np.quantile(there, 0.02)) if low is None else low
    high = float(np.quantile(there, 0.98)) if high is None else high
  return [float(low or 0), float(1 if high is None else high)]


def _pictures(
  evaluated: 'Evaluated', columns: Sequence[tuple[str, str]]
) -> list[list[list[tuple[str, Picture]]]]:
  """For each question and column, its pictures with their models."""
  at = {column: index for index, column in enumerate(columns)}
  found: list[list[list[tuple[str, Picture]]]] = [
    [[] for _ in columns] for _ in evaluated.questions
  ]
  for model, pictures in evaluated.pictures.items():
    for picture in pictures:
      found[picture.row][at[model, picture.condition]].append((model, picture))
  return found


def _examples(evaluated: 'Evaluated') -> list[pathlib.Path]:
  """A picture of each model."""
  return [
    directory_of(evaluated.output, model) / pictures[0].file
    for model, pictures in evaluated.pictures.items()
    if pictures
  ]


def _size(path: pathlib.Path) -> tuple[int, int]:
  from PIL import Image

  with Image.open(path) as opened:
    return opened.size


def _embedded(
  evaluated: 'Evaluated', row: int, pictures: Sequence[Sequence[tuple[str, Picture]]], edge: int
) -> dict[str, Any]:
  """Pictures and files of a question, by column and number."""
  paths = [
    [directory_of(evaluated.output, model) / picture.file for model, picture in column]
    for column in pictures
  ]
  targets = evaluated.scorer.targets if evaluated.scorer else None
  return {
    'shown': [[_encoded(path, edge) for path in column] for column in paths],
    'files': [
      [os.path.relpath(path, evaluated.output).replace(os.sep, '/') for path in column]
      for column in paths
    ],
    'target': _plain(targets(evaluated.questions[row])) if targets else None,
  }


def _plain(image: np.ndarray) -> str:
  return '1' + base64.b64encode(png_bytes(image)).decode()


def _encoded(path: pathlib.Path, edge: int) -> str:
  """A picture as the key of its kind and base64."""
  from PIL import Image

  if max(_size(path)) <= _SMALL:
    return '1' + base64.b64encode(path.read_bytes()).decode()
  with Image.open(path) as opened:
    picture = opened.convert('RGB')
  picture.thumbnail((edge, edge), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  picture.save(buffer, 'WEBP', quality=82)
  return '0' + base64.b64encode(buffer.getvalue()).decode()


def _tools(evaluated: 'Evaluated', columns: Sequence[tuple[str, str]]) -> str:
  """Filters, order, and which columns are shown."""
  questions, scored = evaluated.questions, evaluated.protocol is not None
  parts = [
    '<label class="search">Search<input type="search" id="search" autocomplete="off" '
    'placeholder="words of a prompt, an explanation, an id"></label>'
  ]
  for name, attribute in (('Set', 'split'), ('Category', 'category'), ('Kind', 'subcategory')):
    found = [getattr(question, attribute) for question in questions]
    names = [one for one in dict.fromkeys(found) if one]
    if len(names) > 1:
      options = [('', f'All {len(names)}')]
      options += [(one, f'{one} ({found.count(one)})') for one in names]
      parts.append(_select(attribute, name, options))
  labels = [f'{title_of(model)}, {condition}' for model, condition in columns]
  implicit = [index for index, (_, condition) in enumerate(columns) if condition == 'implicit']
  chosen = str(implicit[-1] if implicit else 0)
  orders = [('order', 'As in the benchmark')]
  if scored:
    orders = [
      ('worst', 'Worst first'), ('best', 'Best first'), ('gain', 'Most gained first'),
      ('loss', 'Most lost first'), *orders,
    ]  # fmt: skip
    shown = [
      ('', 'All'), ('gained', 'Gained over the first model'), ('lost', 'Lost against it'),
      ('unscored', 'With unscored pictures'),
    ]  # fmt: skip
    parts.append(_select('show', 'Show', shown))
  parts.append(_select('sort', 'Order', orders))
  by = [(str(index), label) for index, label in enumerate(labels)]
  parts.append(_select('by', 'Ranked by', by, chosen, hidden=not scored))
  depth = 1 + max((p.k for found in evaluated.pictures.values() for p in found), default=0)
  if depth > 1:
    parts.append(_select('k', 'Picture', [(str(k), f'{k + 1} of {depth}') for k in range(depth)]))
  parts.append('<button type="button" id="reset">Reset</button>')
  first = next(iter(evaluated.pictures), None)
  boxes = []
  for index, ((model, condition), label) in enumerate(zip(columns, labels, strict=True)):
    usual = condition == 'implicit' or (model == first and condition != 'superficial')
    checked = ' checked' if usual or not implicit else ''
    boxes.append(f'<label><input type="checkbox" value="{index}"{checked}>{text(label)}</label>')
  return (
    f'<div class="tools" id="tools"><div class="controls">{"".join(parts)}</div>'
    f'<fieldset class="columns" id="columns"><legend>Columns</legend>{"".join(boxes)}</fieldset>'
    '<p class="counted"><span id="count" role="status"></span> · <kbd>j</kbd> <kbd>k</kbd> next '
    'and previous prompt, <kbd>/</kbd> search, <kbd>Enter</kbd> on a picture enlarges it</p></div>'
  )


def _select(
  name: str, label: str, options: Sequence[tuple[str, str]], chosen: str = '', hidden: bool = False
) -> str:
  inner = ''.join(
    f'<option value="{text(value)}"{" selected" if value == chosen else ""}>{text(shown)}</option>'
    for value, shown in options
  )
  hiding = ' hidden' if hidden else ''
  return f'<label{hiding}>{text(label)}<select id="{name}">{inner}</select></label>'
