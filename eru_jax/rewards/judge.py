"""A judge over HTTP as the reward of NO-RL, asked between rollouts and updates.

Pictures come to the host, a vision-language model marks them (`eru_jax.judges`), and their scores
go back. A picture that the judge leaves unscored teaches nothing: it is masked, not wrong. Verdicts
are kept in the cache, so a run that goes on from a checkpoint sees the very scores it saw before.
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from eru_jax import distributed
from eru_jax.data.emoji_knowledge import PairTable
from eru_jax.data.pairs import KnowledgePair
from eru_jax.errors import UserError
from eru_jax.files import cache_directory
from eru_jax.judges import verdicts
from eru_jax.judges.chat import ChatClient
from eru_jax.judges.protocols import PROTOCOLS, Protocol, protocol
from eru_jax.judges.settings import ChatConfig
from eru_jax.judges.spending import Ledger, Spending, read_spending
from eru_jax.judges.summary import parse_price
from eru_jax.judges.verdicts import Item, judge_name, judge_pictures, open_journal
from eru_jax.rewards.base import HostReward

# Those that need no more than a knowledge pair has.
_FIELDS = {'prompt', 'explanation'}
NAMES = tuple(name for name, found in PROTOCOLS.items() if _FIELDS.issuperset(found.fields))
# File in a run's directory of what its judge was asked and cost.
LEDGER = 'judge_spent.jsonl'
# Pictures over which the share of unscored ones is taken, at least.
_WINDOW = 64


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
  """The judge that `no_rl.reward='judge'` asks, see `judges.settings.ChatConfig`.

  Attributes:
    url: base address of an OpenAI-compatible server.
    model: name of a vision-language model there.
    protocol: what it is asked, 'wise' or 'wise_verified'. The pair's explicit prompt is the
      explanation.
    instructions: '' or a file of instructions to use in place of ours.
    timeout: seconds that one request may take.
    attempts: how often a request is sent before its picture is unscored.
    concurrency: requests at a time.
    max_tokens: longest reply.
    extra: JSON object of more fields for each request.
    max_unscored: the largest share of unscored pictures, of the last 64 or of an iteration's if
      those are more, with which a run goes on.
    price: 'IN,OUT', cost of a million tokens, read and written; '' if unknown.
  """

  url: str = ''
  model: str = ''
  protocol: str = 'wise'
  instructions: str = ''
  timeout: float = 60.0
  attempts: int = 4
  concurrency: int = 8
  max_tokens: int = 2048
  extra: str = ''
  max_unscored: float = 0.25
  price: str = ''

  def __post_init__(self):
    if self.protocol not in NAMES:
      raise UserError(
        f'Judge config: `protocol` is {self.protocol!r} but must be one of {", ".join(NAMES)}.'
      )
    if not 0 <= self.max_unscored < 1:
      raise UserError(
        f'Judge config: `max_unscored` is {self.max_unscored!r} but must be in [0, 1).'
      )
    if self.price:
      parse_price(self.price)
    if self.url:
      self.chat()

  def chat(self) -> ChatConfig:
    """How the judge is asked.

    Raises:
      UserError: if a value is wrong.
    """
    names = ('url', 'model', 'timeout', 'attempts', 'concurrency', 'max_tokens', 'extra')
    return ChatConfig(**{name: getattr(self, name) for name in names})

  def opened(self) -> tuple[ChatClient, Protocol]:
    """The judge and what it is asked.

    Raises:
      UserError: if the key or the file of instructions is none.
    """
    return ChatClient(self.chat()), protocol(self.protocol, self.instructions)


def check_judge(config: JudgeConfig) -> None:
  """Has one grey picture judged, before hours of other stages.

  Raises:
    UserError: if the judge cannot.
  """
  verdicts.check_judge(*config.opened())


class JudgeReward:
  """Scores pictures, from 0 to 1, by asking a judge."""

  def __init__(
    self,
    config: JudgeConfig,
    pairs: Sequence[KnowledgePair],
    directory: pathlib.Path | None = None,
  ):
    """Opens the judge; of several processes, process 0 alone asks it.

    Args:
      config: which, and how.
      pairs: all that pictures may be drawn of.
      directory: where LEDGER is kept; None keeps none.

    Raises:
      UserError: as `JudgeConfig.opened`.
    """
    self._config = config
    self._pairs = list(dict.fromkeys(pairs))
    self._rows = {pair: row for row, pair in enumerate(self._pairs)}
    self._client, self._protocol = config.opened()
    self._directory = directory
    self._journal, self._ledger = None, None
    self._unscored: collections.deque[bool] = collections.deque()

  def targets(self, table: PairTable) -> np.ndarray:
    """Rows (N,) int32 of a table's pairs among all of them."""
    return np.array([self._rows[pair] for pair in table.pairs], np.int32)

  def score(
    self, images: np.ndarray, targets: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Judges pictures; every process must call it.

    Args:
      images: (N, H, W, 3) uint8, or a jax.Array of several processes.
      targets: (N,), rows of their pairs.

    Returns:
      Scores (N,) float32 in [0, 1], 0 where there is none; whether there is one, (N,) float32; and
      'judge_tokens', () float32: read and written for these pictures, whether now or before.

    Raises:
      UserError: if too many of the last pictures are unscored, or the judge answers nothing.
    """
    main = distributed.is_main()
    images, targets = distributed.to_host((images, targets), keep=main)
    found, tokens = distributed.agreed(lambda: self._judged(images, targets))
    known = np.array([score is not None for score in found], np.float32)
    score = np.array([score or 0.0 for score in found], np.float32)
    return score, known, {'judge_tokens': np.float32(tokens)}

  def _judged(self, images: np.ndarray, targets: np.ndarray) -> tuple[list[float | None], int]:
    if self._journal is None:
      name = judge_name(self._client, self._protocol)
      self._journal = open_journal(cache_directory() / 'judge' / f'{name}.jsonl')
      self._ledger = self._directory and Ledger(self._directory / LEDGER)
    items = []
    for image, row in zip(images, targets, strict=True):
      pair = self._pairs[row]
      values = {'prompt': pair.implicit, 'explanation': pair.explicit}
      items.append(Item(pair.id or pair.implicit, image, values))
    ledger = self._ledger
    found, summary = judge_pictures(
      self._client, self._protocol, items, self._journal, kept=ledger and ledger.add
    )
    if ledger is not None:
      ledger.settle(summary.seconds)
    if summary.unanswered:
      logging.warning('The judge: %s', summary.describe('scored'))
    self._check_scored([verdict.score is None for verdict in found], summary.reasons)
    tokens = summary.prompt_tokens + summary.completion_tokens
    tokens += summary.cached_prompt_tokens + summary.cached_completion_tokens
    return [verdict.score for verdict in found], tokens

  def _check_scored(self, unscored: Sequence[bool], reasons: dict[str, int]) -> None:
    window, limit = max(_WINDOW, len(unscored)), self._config.max_unscored
    self._unscored.extend(unscored)
    while len(self._unscored) > window:
      self._unscored.popleft()
    lost = sum(self._unscored)
    # Of a whole window, so that a few at the very beginning are not too many.
    if lost > limit * window:
      raise UserError(
        f'no_rl: the judge {self._config.model!r} at {self._config.url} left {lost} of the last '
        f'{len(self._unscored)} pictures unscored, more than no_rl.judge.max_unscored = {limit:g} '
        f'allows ({json.dumps(max(reasons, key=reasons.get), ensure_ascii=False)}): mend it and '
        'run the same command again to continue.'
      )


def judge_reward(
  config: JudgeConfig, pairs: Sequence[KnowledgePair], directory: pathlib.Path | None = None
) -> HostReward:
  """The reward that `no_rl.reward='judge'` names.

  Raises:
    UserError: as `JudgeReward`.
  """
  reward = JudgeReward(config, pairs, directory)
  return HostReward(reward.score, reward.targets)


def judge_spending(config: JudgeConfig, directory: pathlib.Path) -> dict[str, Any]:
  """Who judged, and what that has come to over all starts of a run, as JSON data.

  Steps that a run repeated count as often as their pictures were asked about: all of it was paid.

  Returns:
    {'model', 'url', 'price': [IN, OUT] or None, 'total': as of `Spending`, with its 'cost' at that
    price, None without one or if not all tokens were counted}.

  Raises:
    UserError: if what was kept cannot be read.
  """
  spent = read_spending(directory / LEDGER)
  price = parse_price(config.price) if config.price else None
  return {
    'model': config.model,
    'url': config.chat().url,
    'price': list(price) if price else None,
    'total': {**spent.to_json(), 'cost': spent.priced(price).cost},
  }


def describe_spending(told: dict[str, Any]) -> str:
  """That for people: a line, and one for each common reason of a picture without a score."""
  spent, price = Spending.from_json(told['total']), told['price']
  text = spent.priced(price).describe('scored')
  if spent.unmetered:
    text += f'\n  the tokens of {spent.unmetered} were not all counted'
  return f'judge {told["model"]} at {told["url"]}, repeated steps included: {text}'
