"""Knowledge pairs, and the JSON Lines prompt files users keep them in.

A prompt file holds one JSON object a line, in UTF-8:

  {"implicit": "the fruit that keeps the doctor away", "explicit": "red apple"}

`implicit` and `explicit` are required; `category`, `split`, `id`, `subject_span` and `image` are
optional. Blank lines are skipped. Everything else is an error that names its line.
"""

import collections
import dataclasses
import difflib
import json
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from absl import logging

from eru_jax.errors import UserError
from eru_jax.files import replace_file

# Prompts that name what they show; those of every other split mean it.
EXPLICIT_SPLITS = ('explicit', 'unrelated')
_REQUIRED = ('implicit', 'explicit')
_OPTIONAL = ('category', 'split', 'id', 'subject_span', 'image')
# Control characters, invisible formatting, separators.
_BLANK = frozenset(['Cc', 'Cf', 'Zl', 'Zp', 'Zs'])


@dataclasses.dataclass(frozen=True)
class KnowledgePair:
  """One fact, two ways of asking for its picture.

  Attributes:
    implicit: the prompt that asks through knowledge, 'the fruit that keeps the doctor away'.
    explicit: its anchor, the prompt that says what to draw, 'red apple'.
    category: kind of knowledge, 'animals-and-nature'; for people and their scripts, as nothing
      is trained or measured by it.
    split: 'train', or the name of an evaluation set.
    id: unique within a file.
    subject_span: [start, end) characters of the implicit prompt that hold its subject.
    image: path of a picture that answers the prompt.
  """

  implicit: str
  explicit: str
  category: str | None = None
  split: str = 'train'
  id: str = ''
  subject_span: tuple[int, int] | None = None
  image: str | None = None


def normalise(prompt: str) -> str:
  """The form in which two prompts count as the same: folded case, single spaces."""
  return ' '.join(prompt.casefold().split())


def without_article(prompt: str) -> str:
  """The normal form of a prompt without 'a', 'an' or 'the' in front: what it names."""
  return normalise(prompt).removeprefix('a ').removeprefix('an ').removeprefix('the ')


def is_blank(text: str) -> bool:
  """Whether a text says nothing: white space, control characters, invisible formatting."""
  return all(unicodedata.category(character) in _BLANK for character in text)


def by_split(pairs: Iterable[KnowledgePair]) -> dict[str, list[KnowledgePair]]:
  """Groups pairs by split, in order of appearance."""
  groups = collections.defaultdict(list)
  for pair in pairs:
    groups[pair.split].append(pair)
  return dict(groups)


def fact_of(pair: KnowledgePair) -> str:
  """The fact a pair belongs to: its id, as far as the first '/' if there is one."""
  return pair.id.partition('/')[0]


def folds(pairs: Iterable[KnowledgePair], kind: Literal['category', 'fact']) -> list[str]:
  """Every value that `hold_out` takes of one kind, in order of appearance.

  One run a fold, with `data.leave_out` set to it, is leave-one-out over kinds of knowledge or over
  facts. Facts that split 'fact' holds anyway are folds too: leaving one out changes no training
  prompt, so all of these can share a run.
  """
  asked = [pair for pair in pairs if pair.split not in EXPLICIT_SPLITS]
  found = [pair.category if kind == 'category' else fact_of(pair) for pair in asked]
  return list(dict.fromkeys(name for name in found if name))


def hold_out(pairs: Sequence[KnowledgePair], what: str, source: str) -> list[KnowledgePair]:
  """Leaves a kind of knowledge or one fact out of training, to be asked about instead.

  Args:
    pairs: of all splits.
    what: a category; or else a fact as `fact_of` names it, or a pair's id.
    source: what an error calls the pairs.

  Returns:
    The pairs in order. Split 'fact' is every implicit prompt that is left out, whichever split it
    was in, and no other. Whatever else has one of their answers, or one of their prompts with
    another answer, is gone, so that nothing of them is trained.

  Raises:
    UserError: if nothing matches, naming the categories and the nearest ids, or if nothing is left
      to train on.
  """
  asked = [pair for pair in pairs if pair.split not in EXPLICIT_SPLITS]
  out = [pair for pair in asked if pair.category == what] or [
    pair for pair in asked if what in (fact_of(pair), pair.id)
  ]
  if not out:
    ids = {pair.id if '/' in what else fact_of(pair) for pair in asked}
    near = difflib.get_close_matches(what, sorted(ids), 3, cutoff=0)
    raise UserError(
      f'{source}: leave_out is {what!r}, which is no category '
      f'({", ".join(sorted(folds(pairs, "category"))) or "the pairs have none"}) '
      f'and no id (the nearest: {", ".join(near)}).'
    )
  chosen = set(out)
  answers = {without_article(pair.explicit) for pair in out}
  prompts = {normalise(pair.implicit) for pair in out}
  kept = []
  for pair in pairs:
    known = without_article(pair.explicit) in answers or normalise(pair.implicit) in prompts
    if pair in chosen:
      kept.append(dataclasses.replace(pair, split='fact'))
    elif pair.split != 'fact' and not known:
      kept.append(pair)
  if all(pair.split != 'train' for pair in kept):
    raise UserError(
      f'{source}: without {what!r} no pair of split "train" is left, so there is nothing to learn '
      'from: leave out less.'
    )
  return kept


def read_prompt_file(path: str | os.PathLike) -> list[KnowledgePair]:
  """Reads a JSON Lines file of knowledge pairs.

  Args:
    path: file of JSON objects, one a line; see the module docstring.

  Returns:
    The pairs in file order; a missing `id` becomes `<file stem>:<line>`. If one implicit prompt has
    several anchors, a warning says so.

  Raises:
    UserError: for a file that cannot be read, a line that is no valid pair, an id that occurs
      twice, or an implicit prompt that occurs in two splits; it names the file and the line.
  """
  return _parse(_read_text(pathlib.Path(path)), pathlib.Path(path))


def _parse(text: str, path: pathlib.Path) -> list[KnowledgePair]:
  pairs: list[KnowledgePair] = []
  lines_of_id: dict[str, int] = {}
  first_use: dict[str, tuple[int, str]] = {}
  anchors: dict[str, str] = {}
  torn: list[tuple[int, KnowledgePair]] = []
  # Split at newlines only: str.splitlines would also cut at U+2028, which JSON text may hold.
  for number, line in enumerate(text.split('\n'), start=1):
    if not line.strip():
      continue
    where = f'{path}, line {number}'
    pair = _parse_line(line, where, default_id=f'{path.stem}:{number}')
    if pair.id in lines_of_id:
      raise UserError(
        f'{where}: the id {pair.id!r} is already that of line {lines_of_id[pair.id]}: '
        'give each pair its own.'
      )
    lines_of_id[pair.id] = number
    line_before, split_before = first_use.setdefault(normalise(pair.implicit), (number, pair.split))
    if split_before != pair.split:
      raise UserError(
        f'{where}: the implicit prompt {pair.implicit!r} of split {pair.split!r} is also on line '
        f'{line_before} in split {split_before!r}: keep it in one split, or the evaluation '
        'measures what was trained.'
      )
    anchor = anchors.setdefault(normalise(pair.implicit), pair.explicit)
    if without_article(anchor) != without_article(pair.explicit):
      torn.append((number, pair))
    pairs.append(pair)
  if torn:
    number, pair = torn[0]
    logging.warning(
      '%s: %d lines give an implicit prompt of another line a different anchor, so that a model '
      'learns to draw now the one, now the other; the first is line %d: %r is %r and %r.',
      path, len(torn), number, pair.implicit, anchors[normalise(pair.implicit)], pair.explicit,
    )  # fmt: skip
  if not pairs:
    raise UserError(
      f'{path} holds no prompts: write one JSON object a line, such as '
      '{"implicit": "what a caterpillar becomes", "explicit": "butterfly"}.'
    )
  return pairs


def write_prompt_file(path: str | os.PathLike, pairs: Sequence[KnowledgePair]) -> None:
  """Writes pairs as JSON Lines that `read_prompt_file` reads back equal, atomically.

  Args:
    path: file to write or replace; its directory is made if needed.
    pairs: fields that are None (and an empty id) are left out.

  Raises:
    UserError: if the file cannot be written, or would be refused when read again.
  """
  path = pathlib.Path(path)
  lines = []
  for pair in pairs:
    row = {key: value for key, value in dataclasses.asdict(pair).items() if value is not None}
    if not pair.id:
      del row['id']
    lines.append(json.dumps(row, ensure_ascii=False) + '\n')
  text = ''.join(lines)
  try:
    _parse(text, path)
  except UserError as error:
    raise UserError(f'Not written, as it could not be read again: {error}') from error
  replace_file(path, text.encode())


def read_lines(path: str | os.PathLike) -> list[str]:
  """Prompts of a text file, one a line; blank lines are skipped.

  Raises:
    UserError: if it cannot be read or holds no prompt.
  """
  path = pathlib.Path(path).expanduser()
  # At newlines only, as prompt files are read.
  prompts = [line.strip() for line in _read_text(path).split('\n') if line.strip()]
  if not prompts:
    raise UserError(f'The prompt file {path} holds no prompts: write one a line.')
  return prompts


def _read_text(path: pathlib.Path) -> str:
  try:
    data = path.read_bytes()
  except FileNotFoundError as error:
    raise UserError(f'There is no prompt file {path}: check the path.') from error
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise UserError(f'{path}, line {line}: not UTF-8 text: save the file as UTF-8.') from error


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
  row = dict(items)
  if len(row) != len(items):
    names = [name for name, _ in items]
    twice = next(name for name in names if names.count(name) > 1)
    raise UserError(f'the key {twice!r} occurs twice')
  return row


def _parse_line(line: str, where: str, default_id: str) -> KnowledgePair:
  try:
    row = json.loads(line, object_pairs_hook=_unique_keys)
  except UserError as error:
    raise UserError(f'{where}: {error}: keep one of them.') from error
  except json.JSONDecodeError as error:
    if line.lstrip().startswith('['):
      raise UserError(_array_message(where)) from error
    raise UserError(
      f'{where}: malformed JSON ({error.msg} at column {error.colno}): '
      'write one complete JSON object a line.'
    ) from error
  except (RecursionError, ValueError) as error:
    raise UserError(
      f'{where}: JSON that is nested too deeply or holds a huge number: write a flat object.'
    ) from error
  if isinstance(row, list):
    raise UserError(_array_message(where))
  if not isinstance(row, dict):
    raise UserError(f'{where}: expected a JSON object with {_known_keys()}, got {line.strip()}.')
  unknown = sorted(set(row) - set(_REQUIRED + _OPTIONAL))
  if unknown:
    raise UserError(f'{where}: unknown key {unknown[0]!r}: the known keys are {_known_keys()}.')
  row = {key: value for key, value in row.items() if value is not None}
  for key in _REQUIRED:
    if key not in row:
      raise UserError(f'{where}: the field {key!r} is missing: every pair needs one.')
  span = row.pop('subject_span', None)
  for key, value in row.items():
    _check_text(key, value, where)
  row.setdefault('id', default_id)
  return KnowledgePair(**row, subject_span=_parse_span(span, row['implicit'], where))


def _known_keys() -> str:
  return f'{", ".join(_REQUIRED)} (required), {", ".join(_OPTIONAL)}'


def _array_message(where: str) -> str:
  return (
    f'{where}: this is a JSON array, but a prompt file is JSON Lines: one object a line, '
    'with no brackets or commas around them.'
  )


def _check_text(key: str, value: Any, where: str) -> None:
  if not isinstance(value, str):
    raise UserError(f'{where}: the field {key!r} is {value!r}: it must be a string.')
  if is_blank(value):
    raise UserError(f'{where}: the field {key!r} is empty: fill it in or remove it.')
  try:
    value.encode('utf-8')
  except UnicodeEncodeError as error:
    raise UserError(
      f'{where}: the field {key!r} holds half a surrogate pair: mend its \\u escapes.'
    ) from error


def _parse_span(span: Any, implicit: str, where: str) -> tuple[int, int] | None:
  if span is None:
    return None
  valid = isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
  if not valid or not 0 <= span[0] < span[1] <= len(implicit):
    raise UserError(
      f"{where}: the field 'subject_span' is {span!r}: it must be [start, end], characters of "
      f'the implicit prompt, 0 <= start < end <= {len(implicit)}.'
    )
  return span[0], span[1]
