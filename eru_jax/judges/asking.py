"""Asks a model many questions at once: what is known is not asked again, what fails is reported.

A reply that is not what was asked for is sent back with the reason, twice. A question that then is
still open, or whose requests all failed, counts as unanswered and says why; the journal keeps what
it cost. Where nobody seems to be there, the rest is not even asked: see `patience`.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eru_jax.errors import UserError
from eru_jax.judges.chat import ChatClient, Denied, Unanswered, message
from eru_jax.judges.connection import Halt
from eru_jax.judges.journal import Journal
from eru_jax.judges.patience import Failure, Patience
from eru_jax.judges.pictures import pixel_hash, pixels, png
from eru_jax.judges.replies import BadReply, quoted, without_thoughts
from eru_jax.judges.summary import Answer, Spent, Summary, summarise

# How often a question is put, while its replies are bad.
ASKS = 3
# What an answer is looked up by.
KEY = ('judge', 'id', 'image', 'text')
_INTERRUPTED = 'interrupted'
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
  kept: Callable[[Answer], None] | None = None,
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
    kept: is called with each answer at once, from several threads, whatever becomes of the others;
      not with those that nobody was asked for as the asking had ended.

  Returns:
    An answer for each question, in their order, and what it came to.

  Raises:
    UserError: if the server would refuse every question, or does not answer any more, or a picture
      cannot be read. What was answered before stays in the journal, as on KeyboardInterrupt.
  """
  began, halt, judge = time.monotonic(), Halt(), identity_of(who)
  answers: list[Answer | None] = [None] * len(questions)
  pool = concurrent.futures.ThreadPoolExecutor(client.config.concurrency, 'judge')
  if journal is not None and not client.heard.is_set():
    if journal.holds(lambda row: row['judge'] == judge and 'reply' in row):
      client.heard.set()
  patience = Patience(client.heard.is_set(), client.config.concurrency)

  def answered(question: Question) -> tuple[Answer, Failure | None]:
    answer, failure = _answer(client, question, read, judge, journal, halt)
    if kept is not None and (answer.reason != _INTERRUPTED or answer.spent.requests):
      kept(answer)
    return answer, failure

  # As they come back, which `patience` counts on: `as_completed` begins with those that are done
  # already, in any order.
  finished: queue.SimpleQueue[concurrent.futures.Future] = queue.SimpleQueue()
  places = {}
  try:
    for place, question in enumerate(questions):
      future = pool.submit(answered, question)
      places[future] = place
      future.add_done_callback(finished.put)
    for done in range(1, len(questions) + 1):
      future = finished.get()
      answer, failure = future.result()
      answers[places[future]] = answer
      if failure is None:
        client.heard.set()
        patience.answered(answer.cached)
      elif patience.failed(failure):
        raise UserError(
          f'The {client.config.role} at {client.config.url} left {patience.row} questions in a '
          f'row unanswered, the last because: {answer.told()}. Mend that and run the same command '
          'again; what is answered is kept.'
        )
      if told is not None:
        told(done, len(questions))
    patience.ended()
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
) -> tuple[Answer, Failure | None]:
  """A question's answer, and how it failed if it did."""
  if halt.is_set():
    return Answer(question.id, None, _INTERRUPTED), Failure(_INTERRUPTED, 0.0, False)
  image = None if question.picture is None else pixels(question.picture)
  seen = '' if image is None else pixel_hash(image)
  key = (judge, question.id, seen, _digest(question.text))
  known = journal.get(key) if journal is not None else None
  answer = _recalled(question.id, known or {}, read)
  if answer is not None:
    return answer, None
  before, again = _tokens(known), bool(known) and known.get('failed') not in (None, _INTERRUPTED)
  picture = None if image is None else png(image)
  messages, began = [message(question.text, picture, client.config.detail)], time.monotonic()
  spent, reply, failure = Spent(), None, None
  for _ in range(ASKS):
    try:
      reply = client.complete(messages, halt)
    except Unanswered as error:
      spent, reason, said = spent.plus(error.requests), str(error), ''
      failure = Failure(error.kind, began, again)
      break
    except Denied as error:
      spent, reason, said = spent.plus(error.requests), error.reason, ''
      failure = Failure('denied', began, again, error)
      break
    spent = spent.plus(reply.requests, reply.prompt_tokens, reply.completion_tokens)
    try:
      value = read(reply.text)
    except BadReply as error:
      cut = ', cut off at max_tokens' if reply.cut else ''
      reason, said = f'bad reply, {ASKS} times: {error}{cut}', quoted(reply.text)
      failure = Failure('reply', began, again)
      # At temperature 0 the same question has the same answer, so it is told what was wrong.
      messages = [*messages[:1], *_again(reply.text, str(error))]
      continue
    failure, reason, said = None, '', ''
    break
  seconds = time.monotonic() - began
  worth = failure is None or failure.kind != _INTERRUPTED or any(spent.tokens)
  if journal is not None and worth:
    row = dict(zip(KEY, key, strict=True))
    row |= {'failed': reason} if failure else {'reply': without_thoughts(reply.text)}
    # All that was ever paid for it.
    paid = [sum(pair) for pair in zip(before.tokens, spent.tokens, strict=True)]
    row |= {'tokens': paid if before.metered and spent.metered else None}
    journal.add(row | {'seconds': round(seconds, 3), 'model': client.config.model})
  value = None if failure else value
  return Answer(question.id, value, reason, said, False, spent, before, seconds), failure


def _tokens(row: Mapping[str, Any] | None) -> Spent:
  """What a row of the journal says that was paid."""
  if row is None:
    return Spent()
  try:
    read, written = (int(count) for count in row['tokens'])
    return Spent(0, read, written)
  except (KeyError, TypeError, ValueError, OverflowError):
    return Spent(metered=False)


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
    value, seconds = read(row['reply']), float(row['seconds'])
  except (BadReply, KeyError, TypeError, ValueError, AttributeError, OverflowError):
    return None
  return Answer(name, value, '', '', True, Spent(), _tokens(row), seconds)
