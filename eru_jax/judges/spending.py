"""What asking has come to over all starts of a run: on disk with every answer, killed or not.

What is asked again, because a killed run repeats the steps since its checkpoint or because it had
stayed unanswered, is counted again: it was paid again. What a journal answers costs nothing.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

from eru_jax.errors import UserError
from eru_jax.judges.summary import Answer, Spent, Summary, summarise, total

# Different reasons that are kept; a server may word each of its refusals anew.
_REASONS = 50
_OTHER = 'other reasons'
# Counts of a summary that add up over starts. What answers of the journal had cost does not: it is
# in the numbers of those who paid it.
_COUNTS = (
  'answered', 'unanswered', 'cached', 'requests', 'retries', 'prompt_tokens', 'completion_tokens',
  'seconds',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Spending:
  """What asking has come to.

  Attributes:
    summary: of all questions; without what was paid for answers of the journal, and without cost.
    unmetered: questions of whose replies the server has not counted all tokens.
  """

  summary: Summary = summarise([], 0.0)
  unmetered: int = 0

  def plus(self, other: 'Spending') -> 'Spending':
    both = total([self.summary, other.summary])
    common = collections.Counter(both.reasons).most_common()
    reasons = dict(common[:_REASONS])
    if rest := sum(count for _, count in common[_REASONS:]):
      reasons[_OTHER] = reasons.get(_OTHER, 0) + rest
    return Spending(dataclasses.replace(both, reasons=reasons), self.unmetered + other.unmetered)

  def priced(self, price: tuple[float, float] | None) -> Summary:
    """With what all of it costs at a price; None without one, or if not all tokens were counted."""
    if price is None or self.unmetered:
      return self.summary
    tokens = self.summary.prompt_tokens, self.summary.completion_tokens
    cost = sum(n * each for n, each in zip(tokens, price, strict=True)) / 1e6
    return dataclasses.replace(self.summary, cost=cost)

  def to_json(self) -> dict[str, Any]:
    """Counts by name, and how often each reason left a question unanswered."""
    counts = {name: getattr(self.summary, name) for name in _COUNTS}
    return {**counts, 'unmetered': self.unmetered, 'reasons': dict(self.summary.reasons)}

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> 'Spending':
    """From what `to_json` tells, or as much of it as is not zero.

    Raises:
      AttributeError, OverflowError, TypeError, ValueError: where it is something else.
    """
    counts = {name: int(values.get(name, 0)) for name in (*_COUNTS, 'unmetered')}
    counts['seconds'] = float(values.get('seconds', 0))
    reasons = {str(reason): int(n) for reason, n in dict(values.get('reasons', {})).items()}
    if min(counts.values()) < 0 or not math.isfinite(counts['seconds']):
      raise ValueError(f'no counts: {counts}')
    unmetered = counts.pop('unmetered')
    return cls(dataclasses.replace(cls().summary, reasons=reasons, **counts), unmetered)


def read_spending(path: str | os.PathLike) -> Spending:
  """What a ledger holds; nothing if there is no file. Lines that cannot be read are left out.

  Raises:
    UserError: if it cannot be read.
  """
  try:
    lines = pathlib.Path(path).read_bytes().split(b'\n')
  except FileNotFoundError:
    return Spending()
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error
  found = Spending()
  for line in lines:
    try:
      found = found.plus(Spending.from_json(json.loads(line)))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
      continue  # empty, or torn by a kill
  return found


class Ledger:
  """A file of what was spent, to which a line is added for each answer and each time of asking.

  Nothing in it is ever replaced, so that a process that is thought dead loses no line either.
  """

  def __init__(self, path: str | os.PathLike):
    """Goes on with what is there.

    Raises:
      UserError: if it cannot be read.
    """
    self.path, self._lock, self._file = pathlib.Path(path), threading.Lock(), None
    read_spending(self.path)

  def add(self, answer: Answer) -> None:
    """Counts an answer; it is on disk when this returns. Any thread may call it.

    Raises:
      UserError: if it cannot be written.
    """
    summary = summarise([dataclasses.replace(answer, before=Spent())], 0.0)
    self._append(Spending(summary, int(not answer.spent.metered)))

  def settle(self, seconds: float) -> None:
    """Adds the time that asking took.

    Raises:
      UserError: if it cannot be written.
    """
    self._append(Spending(dataclasses.replace(Spending().summary, seconds=seconds)))

  def _append(self, spent: Spending) -> None:
    with self._lock:
      try:
        if self._file is None:
          self.path.parent.mkdir(parents=True, exist_ok=True)
          # On a line of its own, whatever a kill has left.
          self._file = open(self.path, 'ab', buffering=0)
          self._file.write(b'\n')
        self._file.write(_line(spent))
      except OSError as error:
        raise UserError(f'{self.path} cannot be written: {error.strerror or error}.') from error


def _line(spent: Spending) -> bytes:
  values = {name: value for name, value in spent.to_json().items() if value}
  return json.dumps(values).encode() + b'\n'
