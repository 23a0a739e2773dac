"""What became of questions: each of them, and all together with what they cost."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from eru_jax.errors import UserError

# Reasons that people are told, the most common ones.
_REASONS = 8


@dataclasses.dataclass(frozen=True)
class Spent:
  """What was paid for a question.

  Attributes:
    requests: that were sent.
    prompt_tokens, completion_tokens: of all replies.
    metered: whether the server counted all tokens.
  """

  requests: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0
  metered: bool = True

  @property
  def tokens(self) -> tuple[int, int]:
    return self.prompt_tokens, self.completion_tokens

  def plus(self, requests: int, read: int | None = 0, written: int | None = 0) -> 'Spent':
    """With more requests and tokens; None for what was not counted."""
    return Spent(
      self.requests + requests,
      self.prompt_tokens + (read or 0),
      self.completion_tokens + (written or 0),
      self.metered and None not in (read, written),
    )


@dataclasses.dataclass(frozen=True)
class Answer:
  """What became of a question.

  Attributes:
    id: of the question.
    value: what was read from the reply; None if it is unanswered.
    reason: why it is unanswered; '' otherwise.
    said: the beginning of the last bad reply, for people; mostly ''.
    cached: whether it had been answered before.
    spent: on it this time.
    before: tokens spent on it at other times, also while it stayed unanswered.
    seconds: from its first request of the time it was answered to the answer, waits included.
  """

  id: str
  value: Any
  reason: str = ''
  said: str = ''
  cached: bool = False
  spent: Spent = Spent()
  before: Spent = Spent()
  seconds: float = 0.0

  def told(self) -> str:
    """Why it is unanswered, with what was said."""
    return f'{self.reason} (it says: {self.said})' if self.said else self.reason

  @property
  def metered(self) -> bool:
    return self.spent.metered and self.before.metered

  @property
  def tokens(self) -> tuple[int, int]:
    """Of all replies to it, read and written."""
    now, then = self.spent, self.before
    return now.prompt_tokens + then.prompt_tokens, now.completion_tokens + then.completion_tokens


@dataclasses.dataclass(frozen=True)
class Summary:
  """What asking came to.

  Attributes:
    answered, unanswered: questions.
    reasons: why -> how many were left unanswered.
    cached: those of the answered that had been answered before.
    requests: that were sent.
    retries: those of them that repeated another one.
    prompt_tokens, completion_tokens: of this time's requests.
    cached_prompt_tokens, cached_completion_tokens: spent on these questions before.
    seconds: it took.
    cost: of this time's requests; None without prices, or if not all tokens were counted.
    cached_cost: of what was spent on these questions before.
  """

  answered: int
  unanswered: int
  reasons: Mapping[str, int]
  cached: int
  requests: int
  retries: int
  prompt_tokens: int
  completion_tokens: int
  cached_prompt_tokens: int
  cached_completion_tokens: int
  seconds: float
  cost: float | None
  cached_cost: float | None

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def describe(self, verb: str = 'answered') -> str:
    """Lines for people; `verb` says what happens to a question that is answered."""
    total = self.answered + self.unanswered
    text = f'{self.answered} of {total} {verb}'
    if self.cached:
      text += f', {self.cached} of them before'
    text += f'; {self.requests} requests ({self.retries} repeated) in {self.seconds:.0f} s, '
    text += f'{self.prompt_tokens} + {self.completion_tokens} tokens'
    if self.cost is not None:
      text += f', cost {self.cost:.4g}'
    if self.cost is not None and self.cached_cost:
      text += f' and {self.cached_cost:.4g} before'
    # A server may word each of its refusals anew.
    common = collections.Counter(self.reasons).most_common(_REASONS)
    for reason, count in common:
      text += f'\n  {count} not {verb}: {reason}'
    if len(common) < len(self.reasons):
      text += f'\n  {self.unanswered - sum(dict(common).values())} not {verb} for other reasons'
    return text


def total(parts: Sequence[Summary]) -> Summary:
  """Several as one; its costs are None if one of theirs is."""

  def added(name: str) -> Any:
    values = [getattr(part, name) for part in parts]
    return None if None in values else sum(values)

  names = [field.name for field in dataclasses.fields(Summary) if field.name != 'reasons']
  reasons = sum((collections.Counter(part.reasons) for part in parts), collections.Counter())
  return Summary(reasons=dict(reasons), **{name: added(name) for name in names})


def parse_price(text: str) -> tuple[float, float]:
  """Prices of a million tokens that are read and written, from 'IN,OUT'.

  Raises:
    UserError: if it is anything else.
  """
  try:
    prices = tuple(float(part) for part in text.split(','))
  except ValueError:
    prices = ()
  if len(prices) != 2 or not all(0 <= price < 1e6 for price in prices):
    raise UserError(
      f'The price {text!r} must be two numbers IN,OUT: what a million tokens of prompts and of '
      'replies cost, such as 2.5,10.'
    )
  return prices


def summarise(
  answers: Sequence[Answer], seconds: float, price: tuple[float, float] | None = None
) -> Summary:
  """Counts what became of questions."""

  def tokens(parts: Sequence[Spent]) -> tuple[int, int]:
    return sum(one.prompt_tokens for one in parts), sum(one.completion_tokens for one in parts)

  def cost(parts: Sequence[Spent]) -> float | None:
    if price is None or not all(one.metered for one in parts):
      return None
    return sum(n * each for n, each in zip(tokens(parts), price, strict=True)) / 1e6

  new, old = [answer.spent for answer in answers], [answer.before for answer in answers]
  lost = [answer for answer in answers if answer.value is None]
  requests = sum(one.requests for one in new)
  return Summary(
    len(answers) - len(lost),
    len(lost),
    dict(collections.Counter(answer.reason for answer in lost)),
    sum(answer.cached for answer in answers),
    requests,
    requests - sum(one.requests > 0 for one in new),
    *tokens(new),
    *tokens(old),
    seconds,
    cost(new),
    cost(old),
  )
