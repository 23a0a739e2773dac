"""What became of questions: each of them, and all together with what they cost."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from eru_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Answer:
  """What became of a question.

  Attributes:
    id: of the question.
    value: what was read from the reply; None if it is unanswered.
    reason: why it is unanswered; '' otherwise.
    cached: whether it had been answered before.
    requests: how many were sent this time.
    prompt_tokens, completion_tokens: of all replies to it, those that were known before included.
    seconds: from the request that was answered to its answer.
    metered: whether the server counted all tokens.
  """

  id: str
  value: Any
  reason: str = ''
  cached: bool = False
  requests: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0
  seconds: float = 0.0
  metered: bool = True


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
    cached_prompt_tokens, cached_completion_tokens: of what had been answered before.
    seconds: it took.
    cost: of this time's requests; None without prices, or if not all tokens were counted.
    cached_cost: of what had been answered before.
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
    for reason, count in sorted(self.reasons.items(), key=lambda item: -item[1]):
      text += f'\n  {count} not {verb}: {reason}'
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
  old = [answer for answer in answers if answer.cached]
  new = [answer for answer in answers if not answer.cached]

  def tokens(group: Sequence[Answer]) -> tuple[int, int]:
    return sum(a.prompt_tokens for a in group), sum(a.completion_tokens for a in group)

  def cost(group: Sequence[Answer]) -> float | None:
    if price is None or not all(answer.metered for answer in group):
      return None
    return sum(n * each for n, each in zip(tokens(group), price, strict=True)) / 1e6

  lost = [answer for answer in answers if answer.value is None]
  requests = sum(answer.requests for answer in new)
  asked = sum(answer.requests > 0 for answer in new)
  return Summary(
    len(answers) - len(lost),
    len(lost),
    dict(collections.Counter(answer.reason for answer in lost)),
    len(old),
    requests,
    requests - asked,
    *tokens(new),
    *tokens(old),
    seconds,
    cost(new),
    cost(old),
  )
