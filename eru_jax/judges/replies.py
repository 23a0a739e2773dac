"""Reads what a model was asked to answer with; whatever is not exactly that is a bad reply.

Two forms count: one JSON object, alone or in one fenced block; and lines `name: number`, which some
published instructions ask for. A model's thoughts in front, <think>...</think>, are left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_OPEN, _CLOSE, _FENCE = '<think>', '</think>', '```'
# Characters of a line, which keeps the expression below quick.
_LONGEST_LINE = 200
_LINE = re.compile(r'[*_\s>-]*([A-Za-z][A-Za-z _-]*?)[*_\s]*[:=][*_\s]*(-?\d{1,9})[*_\s.]*')


class BadReply(ValueError):
  """A reply that is not what was asked for; the message says what is wrong with it."""


def without_thoughts(text: str) -> str:
  """What a reasoning model says after it has thought.

  Raises:
    BadReply: if it never stopped thinking.
  """
  text = text.strip()
  if not text.startswith(_OPEN):
    return text
  _, ended, text = text.partition(_CLOSE)
  if not ended:
    raise BadReply('it ends within the model’s thoughts')
  return text.strip()


def json_object(text: str) -> dict[str, Any]:
  """The JSON object that a reply is; names as `plain` has them.

  Raises:
    BadReply: if it is none, or has a name twice.
  """
  text = _unfenced(without_thoughts(text))
  try:
    value = json.loads(text, object_pairs_hook=_unique)
  except BadReply:
    raise
  except (ValueError, RecursionError) as error:
    raise BadReply('it is no JSON' if text else 'it is empty') from error
  if not isinstance(value, dict):
    raise BadReply('it is no JSON object')
  return value


def _unfenced(text: str) -> str:
  """What a fenced block holds, if the text is one."""
  before, *blocks = text.split(_FENCE)
  if not blocks:
    return text
  if len(blocks) != 2:
    raise BadReply('there are several fenced blocks, or half of one')
  if before.strip() or blocks[1].strip():
    raise BadReply('there is text around the fenced block')
  # Its first line may name the language.
  first, _, rest = blocks[0].partition('\n')
  return rest if not first.strip() or first.strip().isalpha() else blocks[0]


def plain(name: str) -> str:
  """A name as it is compared: 'Aesthetic Quality' is 'aesthetic_quality'."""
  return re.sub(r'[\s_-]+', '_', name.strip()).lower()


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for name, value in items:
    if plain(name) in found:
      raise BadReply(f'{plain(name)[:40]!r} is there twice')
    found[plain(name)] = value
  return found


def _lines(text: str) -> dict[str, int] | None:
  """A reply that is lines `name: number` and nothing else; None for any other."""
  lines = [line for line in text.splitlines() if line.strip()]
  if max(map(len, lines), default=0) > _LONGEST_LINE:
    return None
  found = []
  for line in lines:
    match = _LINE.fullmatch(line)
    if match is None:
      return None
    found.append((match[1], int(match[2])))
  return _unique(found) if found else None


def integers(
  text: str, wanted: Mapping[str, tuple[int, int]], also: Mapping[str, Sequence[str]]
) -> dict[str, int]:
  """The whole numbers of a reply.

  Args:
    text: the reply; it may say more than is wanted, such as reasons.
    wanted: name -> least and largest value.
    also: name -> other names that it may go by.

  Raises:
    BadReply: if one is missing, there twice, no whole number, or out of range.
  """
  found = _lines(without_thoughts(text))
  if found is None:
    found = json_object(text)
  values = {}
  for name, (low, high) in wanted.items():
    present = [key for key in (name, *also.get(name, ())) if key in found]
    if len(present) != 1:
      raise BadReply(f'{name!r} is {"there twice" if present else "missing"}')
    value = found[present[0]]
    # bool is an int, and 1.0 or "1" may be a sign of other confusion.
    if type(value) is not int:
      raise BadReply(f'{name!r} is no whole number')
    if not low <= value <= high:
      raise BadReply(f'{name!r} is not from {low} to {high}')
    values[name] = value
  return values
