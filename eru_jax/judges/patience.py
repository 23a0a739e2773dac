"""When asking ends early: where nobody seems to be there, the rest of the questions is in vain.

A few pictures that a judge does not mark are no reason: they stay unscored, and all others are
asked about. What counts are failures in a row that look like the server's, not like the picture's.
"""

import dataclasses
import math
import time

from eru_jax.judges.chat import Denied

# Failures in a row, as they come back, after which nobody seems to be answering.
GIVE_UP = 16


@dataclasses.dataclass(frozen=True)
class Failure:
  """A question that came to nothing.

  Attributes:
    kind: as of `chat.Unanswered`, or 'denied', or 'reply' for bad ones.
    began: when it was first sent, of `time.monotonic`.
    again: whether it had come to nothing before, in another run.
    denied: what was denied, if so.
  """

  kind: str
  began: float
  again: bool
  denied: Denied | None = None


class Patience:
  """Watches what comes back.

  Of a server from which no answer could be used so far, every failure counts. Of another one those
  count that a bad picture does not explain: no connection, a server that is busy or out of order,
  and what is denied, each of them only if nothing was answered since it was sent. Whatever had
  come to nothing in another run counts only if there is no connection.
  """

  def __init__(self, heard: bool, at_once: int):
    """Begins.

    Args:
      heard: whether an answer of this server was of use before.
      at_once: requests at a time.
    """
    self._heard, self._at_once = heard, min(at_once, GIVE_UP)
    self._answered, self._row = -math.inf, 0
    self._denied: Denied | None = None

  def answered(self, cached: bool) -> None:
    """An answer came back, or was there."""
    self._heard, self._row, self._denied = True, 0, None
    if not cached:
      self._answered = time.monotonic()

  def failed(self, failure: Failure) -> bool:
    """A question came back without an answer; whether it is the last that is waited for.

    Raises:
      Denied: if the server denies it, and is not known to allow any.
    """
    known = failure.again and failure.kind != 'lost'
    if self._heard:
      if failure.kind in ('reply', 'refused'):
        self._row = 0
      elif not known and failure.began >= self._answered:
        self._row += 1
      return self._row >= GIVE_UP
    self._denied = self._denied or failure.denied
    self._row += 0 if known else 1
    # Whoever was asked at the same time may show that it was this one question's fault.
    if self._denied and self._row >= self._at_once:
      raise self._denied
    return self._row >= GIVE_UP

  def ended(self) -> None:
    """All came back.

    Raises:
      Denied: as `failed`.
    """
    if self._denied:
      raise self._denied

  @property
  def row(self) -> int:
    return self._row
