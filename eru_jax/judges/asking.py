"""Asks a model many questions at once: what is known is not asked again, what fails is reported.

A reply that is not what was asked for is sent back with the reason, twice. A question that then is
still open, or whose requests all failed, counts as unanswered and says why. Where nearly nothing is
answered, the rest is not even asked.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eru_jax.errors import UserError
from eru_jax.judges.chat import ChatClient, Unanswered, message
from eru_jax.judges.connection import Halt
from eru_jax.judges.journal import Journal
from eru_jax.judges.pictures import pixel_hash, pixels, png
from eru_jax.judges.replies import BadReply, without_thoughts
from eru_jax.judges.summary import Answer, Summary, summarise

# How often a question is put, while its replies are bad.
ASKS = 3
# Questions in a row, as they come back, after which nobody seems to be answering.
GIVE_UP = 16
# What an answer is looked up by.
KEY = ('judge', 'id', 'image', 'text')
# Characters of a bad reply that the model is shown again.
_RECALLED = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
  """A question.

  Attributes:
    id: what it is about, such as a prompt's id.
    text: the question.
    picture: pixels (H, W, 3) uint8, or a file of a picture, or None.
  """

  id: str
  text: str
  picture: Any = None


def identity_of(values: Mapping[str, Any]) -> str:
  """A short name of what answers depend on."""
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def ask(
  client: ChatClient,
  questions: Sequence[Question],
  read: Callable[[str], Any],
  who: Mapping[str, Any],
  journal: Journal | None = None,
  price: tuple[float, float] | None = None,
  told: Callable[[int, int], None] | None = None,
) -> tuple[list[Answer], Summary]:
  """Asks all questions.

  Args:
    client: whom.
    questions: what.
    read: reply -> value; raises BadReply.
    who: what answers depend on beside the question, JSON data; answers of another one do not count.
    journal: where answers are looked up, and kept as they come; its key is KEY.
    price: of a million tokens, see `parse_price`.
    told: is called with how many are done, and how many there are.

  Returns:
    An answer for each question, in their order, and what it came to.

  Raises:
    UserError: if the server would refuse every question, or does not answer any more, or a picture
      cannot be read. What was answered before stays in the journal, as on KeyboardInterrupt.
  """
  began, halt, judge = time.monotonic(), Halt(), identity_of(who)
  answers: list[Answer | None] = [None] * len(questions)
  pool = concurrent.futures.ThreadPoolExecutor(client.config.concurrency, 'judge')
  failed = 0
  try:
    places = {
      pool.submit(_answer, client, question, read, judge, journal, halt): place
      for place, question in enumerate(questions)
    }
    for done, future in enumerate(concurrent.futures.as_completed(places), start=1):
      answer = answers[places[future]] = future.result()
      failed = 0 if answer.value is not None else failed + 1
      if failed >= GIVE_UP:
        raise UserError(
          f'The {client.config.role} at {client.config.url} left {failed} questions in a '
          f'row unanswered, the last because: {answer.reason}. Mend that and run the same command '
          'again; what is answered is kept.'
        )
      if told is not None:
        told(done, len(questions))
  finally:
    # Nothing is in flight any more, unless this is left by an exception.
    halt.now()
    pool.shutdown(cancel_futures=True)
  return answers, summarise(answers, time.monotonic() - began, price)


def _answer(
  client: ChatClient,
  question: Question,
  read: Callable[[str], Any],
  judge: str,
  journal: Journal | None,
  halt: Halt,
) -> Answer:
  if halt.is_set():
    return Answer(question.id, None, 'interrupted')
  image = None if question.picture is None else pixels(question.picture)
  seen = '' if image is None else pixel_hash(image)
  key = (judge, question.id, seen, _digest(question.text))
  known = journal.get(key) if journal is not None else None
  if known is not None:
    answer = _recalled(question.id, known, read)
    if answer is not None:
      return answer
  picture = None if image is None else png(image)
  messages = [message(question.text, picture, client.config.detail)]
  requests, read_tokens, written_tokens, metered, reason = 0, 0, 0, True, ''
  for _ in range(ASKS):
    try:
      reply = client.complete(messages, halt)
    except Unanswered as error:
      requests += error.requests
      reason = str(error)
      break
    requests += reply.requests
    metered = metered and None not in (reply.prompt_tokens, reply.completion_tokens)
    read_tokens += reply.prompt_tokens or 0
    written_tokens += reply.completion_tokens or 0
    try:
      value = read(reply.text)
    except BadReply as error:
      cut = ', cut off at max_tokens' if reply.cut else ''
      reason = f'bad reply, {ASKS} times: {error}{cut}'
      # At temperature 0 the same question has the same answer, so it is told what was wrong.
      messages = [*messages[:1], *_again(reply.text, str(error))]
      continue
    if journal is not None:
      row = dict(zip(KEY, key, strict=True)) | {'reply': without_thoughts(reply.text)}
      row |= {'tokens': [read_tokens, written_tokens] if metered else None}
      journal.add(row | {'seconds': round(reply.seconds, 3), 'model': client.config.model})
    spent = (requests, read_tokens, written_tokens, reply.seconds, metered)
    return Answer(question.id, value, '', False, *spent)
  return Answer(question.id, None, reason, False, requests, read_tokens, written_tokens, 0, metered)


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]


def _again(text: str, error: str) -> list[dict[str, Any]]:
  """What a model is told of its bad reply."""
  said = {'role': 'assistant', 'content': text[:_RECALLED] or '(nothing)'}
  asked = f'This reply cannot be used: {error}. Answer again, in exactly the form asked for.'
  return [said, message(asked)]


def _recalled(name: str, row: Mapping[str, Any], read: Callable[[str], Any]) -> Answer | None:
  """The answer that a row of the journal holds; None if it is not one."""
  try:
    value = read(row['reply'])
    seconds, tokens = float(row['seconds']), row['tokens']
    counts = (0, 0) if tokens is None else tuple(int(count) for count in tokens)
    return Answer(name, value, '', True, 0, counts[0], counts[1], seconds, tokens is not None)
  except (BadReply, KeyError, TypeError, ValueError, OverflowError, IndexError):
    return None
