"""Judges pictures: a verdict for each, in order, and what it came to."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eru_jax.errors import UserError
from eru_jax.judges.asking import KEY, Question, ask, identity_of
from eru_jax.judges.chat import ChatClient
from eru_jax.judges.journal import Journal
from eru_jax.judges.protocols import Protocol
from eru_jax.judges.summary import Answer, Summary


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
  """A picture to be judged.

  Attributes:
    id: of its prompt.
    picture: (H, W, 3) uint8, or a file.
    values: what the protocol's placeholders stand for: `prompt`, `explanation` and so on.
  """

  id: str
  picture: np.ndarray | str | os.PathLike
  values: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a judge says of a picture.

  Attributes:
    id: of its prompt.
    marks: as the protocol has them; None if the picture is unscored, which is not a score of zero.
    score: from 0 to 1, or None.
    reason: why it is unscored; '' otherwise.
    words: what the judge says beside the marks, for people; often ''.
    cached: whether it had been judged before.
  """

  id: str
  marks: Mapping[str, int] | None
  score: float | None
  reason: str = ''
  words: str = ''
  cached: bool = False

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def judge_identity(client: ChatClient, protocol: Protocol) -> dict[str, Any]:
  """What verdicts depend on: the model's name and how it is asked, not where it runs."""
  return {**client.config.identity(), **protocol.identity()}


def judge_name(client: ChatClient, protocol: Protocol) -> str:
  """That in short, as journals have it."""
  return identity_of(judge_identity(client, protocol))


def open_journal(path: str | os.PathLike) -> Journal:
  """The journal of verdicts in a file.

  Raises:
    UserError: if it cannot be read.
  """
  return Journal(path, KEY)


def check_judge(client: ChatClient, protocol: Protocol) -> None:
  """Has one grey picture judged, before hours of other work.

  Raises:
    UserError: if the judge cannot: it is not there, refuses the key, or sees no pictures.
  """
  grey = 'a square of one shade of grey'
  values = {'prompt': 'a grey square', 'explanation': grey}
  values |= {'scene': f'1 if there is {grey}', 'reality': f'3 if all of it is {grey}'}
  item = Item('check', np.full((64, 64, 3), 128, np.uint8), values)
  (verdict,), _ = judge_pictures(client, protocol, [item])
  if verdict.score is None:
    raise UserError(
      f'The judge {client.config.model!r} at {client.config.url} could not judge a picture '
      f'({verdict.reason}): see that it runs, sees pictures and answers as asked.'
    )


def judge_pictures(
  client: ChatClient,
  protocol: Protocol,
  items: Sequence[Item],
  journal: Journal | None = None,
  price: tuple[float, float] | None = None,
  told: Callable[[int, int], None] | None = None,
  kept: Callable[[Answer], None] | None = None,
) -> tuple[list[Verdict], Summary]:
  """Judges pictures, those that this judge has not seen yet, several at a time.

  Args:
    client: the judge.
    protocol: what it is asked.
    items: the pictures.
    journal: where verdicts are looked up, and kept as they come, see `open_journal`. Of unscored
      pictures only the cost is kept: they are asked about again the next time.
    price: of a million tokens, see `summary.parse_price`.
    told, kept: as of `asking.ask`.

  Returns:
    A verdict for each item, in their order, and what it came to.

  Raises:
    UserError: if an item lacks a value or its picture, the server would refuse every request or
      does not answer any more. What is in the journal stays, as on KeyboardInterrupt.
  """
  questions = [Question(item.id, protocol.ask(item.values), item.picture) for item in items]
  who = judge_identity(client, protocol)

  def read(reply: str) -> tuple[dict[str, int], str]:
    return protocol.read(reply), protocol.words(reply)

  answers, summary = ask(client, questions, read, who, journal, price, told, kept)
  verdicts = []
  for answer in answers:
    marks, words = answer.value or (None, '')
    score = None if marks is None else protocol.score(marks)
    verdicts.append(Verdict(answer.id, marks, score, answer.told(), words, answer.cached))
  return verdicts, summary
