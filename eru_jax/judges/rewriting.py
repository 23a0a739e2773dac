"""The rival at inference: a language model says explicitly what a prompt means, the base draws it.

Nothing is trained; every prompt costs a request, whose seconds and tokens are reported beside the
scores. The instructions are ours, and the model is not told the answer: it must know it.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eru_jax.judges.asking import Question, ask
from eru_jax.judges.chat import ChatClient
from eru_jax.judges.journal import Journal
from eru_jax.judges.protocols import fill, read_instructions
from eru_jax.judges.replies import BadReply, json_object
from eru_jax.judges.summary import Summary

FIELDS = ('prompt',)
_VERSION = 1
_LARGEST = 2000  # characters of a rewritten prompt

_INSTRUCTIONS = """\
A text-to-image model draws what a prompt names, but not what it only implies. Rewrite the prompt \
below so that it names, in plain words, what has to be seen: who or what it is, its state, its \
parts, the place, the time, and what nature or custom make of it. Keep everything that the prompt \
says, add nothing that it does not imply, and stay under 80 words.

Prompt: {prompt}

Answer with one JSON object and nothing else:
{"rewrite": "the prompt in explicit words"}
"""


@dataclasses.dataclass(frozen=True)
class Rewrite:
  """A prompt in other words.

  Attributes:
    prompt: as it was.
    text: as it is to be drawn; None if the model did not answer.
    reason: why it did not; '' otherwise.
    cached: whether it had been rewritten before.
    seconds: that it took, then or now, with repeated requests and the waits between them.
    prompt_tokens, completion_tokens: of all replies to it, then and now.
    metered: whether the server counted all of these.
  """

  prompt: str
  text: str | None
  reason: str
  cached: bool
  seconds: float
  prompt_tokens: int
  completion_tokens: int
  metered: bool = True

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def read_rewrite(reply: str) -> str:
  """The rewritten prompt of a reply, on one line.

  Raises:
    BadReply: if there is none, or it is far too long for a prompt.
  """
  text = json_object(reply).get('rewrite')
  if not isinstance(text, str):
    raise BadReply("'rewrite' is missing, or no text")
  text = ' '.join(text.split())
  if not text or not text.isprintable() or len(text) > _LARGEST:
    raise BadReply(f"'rewrite' must be a text of at most {_LARGEST} characters")
  return text


def rewrite_prompts(
  client: ChatClient,
  prompts: Sequence[str],
  journal: Journal | None = None,
  instructions: str | os.PathLike = '',
  price: tuple[float, float] | None = None,
  told: Callable[[int, int], None] | None = None,
) -> tuple[list[Rewrite], Summary]:
  """Rewrites prompts, those that this model has not rewritten yet, several at a time.

  Args:
    client: the model.
    prompts: different ones or not.
    journal: where rewrites are looked up, and kept as they come, see `verdicts.open_journal`.
    instructions: file to use in place of ours, with {prompt}; '' for ours.
    price: of a million tokens, see `summary.parse_price`.
    told: is called with how many are done, and how many there are.

  Returns:
    A rewrite for each prompt, in their order, and what it came to: it counts a prompt that is there
    several times once.

  Raises:
    UserError: as `asking.ask`, or if the file of instructions is none.
  """
  text = read_instructions(instructions, FIELDS) if instructions else _INSTRUCTIONS
  unique = list(dict.fromkeys(prompts))
  questions = [Question(prompt, fill(text, FIELDS, {'prompt': prompt})) for prompt in unique]
  # The whole text of each question is in its key.
  who = {**client.config.identity(), 'protocol': 'rewriting', 'version': _VERSION}
  answers, summary = ask(client, questions, read_rewrite, who, journal, price, told)
  found = {
    answer.id: Rewrite(
      answer.id,
      answer.value,
      answer.told(),
      answer.cached,
      answer.seconds,
      *answer.tokens,
      answer.metered,
    )
    for answer in answers
  }
  return [found[prompt] for prompt in prompts], summary


def latency(rewrites: Sequence[Rewrite]) -> Mapping[str, float]:
  """What a rewrite costs on average: {'seconds', 'prompt_tokens', 'completion_tokens'}."""
  done = [rewrite for rewrite in rewrites if rewrite.text is not None]
  names = ('seconds', 'prompt_tokens', 'completion_tokens')
  return {name: sum(getattr(one, name) for one in done) / max(1, len(done)) for name in names}
