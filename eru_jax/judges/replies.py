"""Reads what a model was asked to answer with; whatever could mean two things is a bad reply.

Two forms count: one JSON object, alone or in the one fenced block of a text; and lines
`name: number`, which some published instructions ask for. A number may be `2`, `"2"` or, where 2 is
the largest, `2/2`. A model's thoughts in front, up to the last </think>, are left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_OPEN, _CLOSE, _FENCE = '<think>', '</think>', '```'
# Characters of a line, which keeps the expression below quick.
_LONGEST_LINE = 200
_NUMBER = r'(-?[0-9]{1,9}(?:\s*/\s*[0-9]{1,9})?)'
_LINE = re.compile(rf'[*_\s>-]*([A-Za-z][A-Za-z _-]*?)[*_\s]*[:=][*_\s]*{_NUMBER}[*_\s.]*')
# What models call the words that they say beside their marks.
_WORDS = ('reason', 'reasoning', 'explanation', 'description')


class BadReply(ValueError):
  """A reply that is not what was asked for; the message says what is wrong with it."""


def without_thoughts(text: str) -> str:
  """What a reasoning model says after it has thought.

  They need not begin with <think>, which some chat templates put at the end of the prompt.

  Raises:
    BadReply: if it never stopped thinking.
  """
  _, ended, said = text.rpartition(_CLOSE)
  if not ended and said.lstrip().startswith(_OPEN):
    raise BadReply('it ends within the model’s thoughts')
  return said.strip()


def quoted(text: str, length: int = 200) -> str:
  """Untrusted words for people, on one line: cut, and without what no terminal should see."""
  # What is cut off is not looked at.
  words = ' '.join(text[: 4 * length].split())
  words = ''.join(character if character.isprintable() else '?' for character in words)
  return words if len(words) <= length else words[: length - 1] + '…'


def json_object(text: str) -> dict[str, Any]:
  """The JSON object that a reply is, or holds in its one fenced block; names as `plain` has them.

  Raises:
    BadReply: if it is none, or has a name twice.
  """
  return _object(*_unfenced(without_thoughts(text)))


def _object(text: str, around: str) -> dict[str, Any]:
  if '{' in around:
    raise BadReply('there is more than text around the fenced block')
  try:
    value = json.loads(text, object_pairs_hook=_unique)
  except BadReply:
    raise
  except (ValueError, RecursionError) as error:
    raise BadReply('it is no JSON' if text else 'it is empty') from error
  if not isinstance(value, dict):
    raise BadReply('it is no JSON object')
  return value


def _unfenced(text: str) -> tuple[str, str]:
  """What a fenced block holds and what is around it; without a block, the text and nothing."""
  before, *blocks = text.split(_FENCE)
  if not blocks:
    return text, ''
  if len(blocks) != 2:
    raise BadReply('there are several fenced blocks, or half of one')
  # Its first line may name the language.
  first, _, rest = blocks[0].partition('\n')
  inside = rest if not first.strip() or first.strip().isalpha() else blocks[0]
  return inside, f'{before}\n{blocks[1]}'


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


def _lines(text: str) -> dict[str, str] | None:
  """A reply that is lines `name: number` and nothing else; None for any other."""
  lines = [line for line in text.splitlines() if line.strip()]
  if max(map(len, lines), default=0) > _LONGEST_LINE:
    return None
  found = []
  for line in lines:
    match = _LINE.fullmatch(line)
    if match is None:
      return None
    found.append((match[1], match[2]))
  return _unique(found) if found else None


def words(text: str) -> str:
  """What a reply that can be read says beside its numbers, such as a reason; '' for nothing."""
  try:
    found = json_object(text)
  except BadReply:  # lines
    return ''
  said = [found.get(name) for name in _WORDS]
  return next((one for one in said if isinstance(one, str) and one.strip()), '')


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
  text, around = without_thoughts(text), ''
  found: Mapping[str, Any] | None = _lines(text)
  if found is None:
    text, around = _unfenced(text)
    found = _object(text, around)
  values = {}
  for name, (low, high) in wanted.items():
    names = (name, *also.get(name, ()))
    present = [key for key in names if key in found]
    if len(present) != 1:
      raise BadReply(f'{name!r} is {"there twice" if present else "missing"}')
    value = _whole(name, found[present[0]], high)
    if not low <= value <= high:
      raise BadReply(f'{name!r} is not from {low} to {high}')
    if any(other != value for other in _told(names, around)):
      raise BadReply(f'{name!r} is another around the fenced block')
    values[name] = value
  return values


def _whole(name: str, value: Any, high: int) -> int:
  """A number from 2, '2' or, where 2 is the largest, '2/2'."""
  short = isinstance(value, str) and len(value) <= _LONGEST_LINE
  match = re.fullmatch(rf'\s*{_NUMBER}\s*', value) if short else None
  if match is not None:
    number, _, largest = match[1].partition('/')
    if largest and int(largest) != high:
      raise BadReply(f'{name!r} is out of {int(largest)}, not out of {high}')
    return int(number)
  # bool is an int, and 1.0 may be a sign of other confusion.
  if type(value) is not int:
    raise BadReply(f'{name!r} is no whole number')
  return value


def _told(names: Sequence[str], prose: str) -> list[int]:
  """The numbers that a text gives for one of some names, as in `Realism: 1` or `realism is 1`."""
  either = '|'.join(re.escape(name).replace('_', r'[\s_-]') for name in names)
  between = r'[\W_]{0,6}(?:(?:is|of|score|mark)\b)?[\W_]{0,6}'
  found = re.finditer(rf'\b(?:{either}){between}([0-9]{{1,9}})', prose, re.IGNORECASE)
  return [int(match[1]) for match in found]
