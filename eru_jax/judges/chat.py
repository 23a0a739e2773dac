"""A client of chat completions, the interface that OpenAI, vLLM, SGLang and llama.cpp share.

One request is a POST of JSON to <url>/chat/completions. What passes by itself (429, 5xx, time-outs,
dropped connections, replies that are no JSON) is tried again, later each time; what does not (a
wrong key, model or address) is a UserError at once: where that may be one picture's fault alone, it
is a Denied. No request takes longer than its time-out, and no answer more memory than its limit,
whatever the server sends.
"""

import base64
import copy
import dataclasses
import email.utils
import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from eru_jax.errors import UserError
from eru_jax.judges.connection import Halt, Lost, post
from eru_jax.judges.replies import quoted
from eru_jax.judges.settings import PATH, ChatConfig, find_key, key_name

# A server that asks for more patience than this is not waited for.
_LONGEST_RETRY_AFTER = 300.0
# Passing by themselves, beside all 5xx: time-outs, conflicts, too early, too many.
_PASSING = (408, 409, 425, 429)
_FATAL = {
  401: 'set {key} to a valid key',
  402: 'the account has no credit left: top it up, or use another model',
  403: 'this key may not use the model {model!r}: use another key or model',
  404: (
    'check the address, which usually ends in /v1, and the model {model!r}: '
    '{url}/models lists what there is'
  ),
  405: 'check the address, which usually ends in /v1',
}
# Those of them with which some servers refuse one picture, such as by moderation.
_DENIED = (403, 404)


class Unanswered(Exception):
  """A request that came to nothing, though others may not; the message says why.

  Attributes:
    requests: how many were sent.
    kind: 'lost' if no connection came about, 'busy' if something passing went wrong at the server,
      'refused' if it does not want these very messages, or 'interrupted'.
  """

  def __init__(self, reason: str, requests: int, kind: str):
    self.requests, self.kind = requests, kind
    super().__init__(reason)


class Denied(UserError):
  """What refuses every request, or only this one, as nobody else's answers tell.

  Attributes:
    reason: what the server says.
    requests: how many were sent.
  """

  def __init__(self, text: str, reason: str, requests: int):
    self.reason, self.requests = reason, requests
    super().__init__(text)


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a model said.

  Attributes:
    text: its words.
    cut: whether they end where max_tokens does.
    prompt_tokens, completion_tokens: as the server counted; None where it does not.
    requests: how many were sent until one was.
  """

  text: str
  cut: bool
  prompt_tokens: int | None
  completion_tokens: int | None
  requests: int


def message(text: str, png: bytes | None = None, detail: str = 'auto') -> dict[str, Any]:
  """What a user says, with a picture if there is one, which goes as a data URL."""
  if png is None:
    return {'role': 'user', 'content': text}
  picture = {'url': 'data:image/png;base64,' + base64.b64encode(png).decode()}
  if detail != 'auto':
    picture['detail'] = detail
  parts = [{'type': 'text', 'text': text}, {'type': 'image_url', 'image_url': picture}]
  return {'role': 'user', 'content': parts}


class ChatClient:
  """Sends requests; any number of threads may use one.

  Attributes:
    config: to whom, and how.
    heard: set once an answer could be used; of all copies together.
  """

  def __init__(self, config: ChatConfig, environment: Mapping[str, str] = os.environ):
    """Takes the key from the environment, see `settings.find_key`.

    Raises:
      UserError: if it is none.
    """
    self.config, self.heard = config, threading.Event()
    self._key = find_key(config.url, environment, config.role)
    self._random = random.Random()
    self._not_before = 0.0

  def impatient(self, attempts: int) -> 'ChatClient':
    """The same, which sends a request so often at most."""
    other = copy.copy(self)
    other.config = dataclasses.replace(self.config, attempts=min(attempts, self.config.attempts))
    return other

  def complete(self, messages: Sequence[Mapping[str, Any]], halt: Halt | None = None) -> Reply:
    """Sends messages until they are answered.

    Args:
      messages: as the interface has them, see `message`.
      halt: ends the wait from another thread.

    Raises:
      Unanswered: if no attempt was answered, or the server refuses these very messages.
      Denied: if it refuses these, and maybe any.
      UserError: if it would refuse any.
    """
    config, halt = self.config, halt or Halt()
    fields = {
      'model': config.model,
      'messages': messages,
      'temperature': config.temperature,
      'max_tokens': config.max_tokens,
      **config.extra_fields(),
    }
    kept = {name: value for name, value in fields.items() if value is not None}
    body, headers = json.dumps(kept).encode(), {'Content-Type': 'application/json'}
    if self._key:
      headers['Authorization'] = f'Bearer {self._key}'
    reason, kind = '', ''
    for attempt in range(config.attempts):
      # Where one was told to wait, all do.
      if halt.wait(self._not_before - time.monotonic()):
        raise Unanswered('interrupted', attempt, 'interrupted')
      wanted, kind = 0.0, 'busy'
      try:
        status, found, data = post(config.url + PATH, body, headers, config.timeout, halt)
        if status == 200:
          reply = _reply(data, attempt + 1)
          if reply is not None:
            return reply
          reason = 'what came back is no chat completion'
          reason += f': {self._quoted(data)}' if _error(data).get('message') else ''
        else:
          reason = f'HTTP {status}: {self._quoted(data)}'
          self._check_passing(status, data, reason, attempt + 1)
        wanted = _retry_after(found)
      except Lost as error:
        reason, kind = str(error), 'busy' if error.connected else 'lost'
      if halt.is_set():
        raise Unanswered('interrupted', attempt + 1, 'interrupted')
      if wanted > _LONGEST_RETRY_AFTER:
        raise Unanswered(f'{reason}; the server asks to wait {wanted:.0f} s', attempt + 1, kind)
      self._not_before = max(self._not_before, time.monotonic() + wanted if wanted else 0.0)
      longest = min(config.first_wait * 2**attempt, config.longest_wait)
      if attempt + 1 < config.attempts:
        halt.wait(max(wanted, longest * self._random.uniform(0.5, 1)))
    raise Unanswered(f'{reason} ({config.attempts} attempts)', config.attempts, kind)

  def _check_passing(self, status: int, data: bytes, reason: str, requests: int) -> None:
    """Raises what a status means, unless it may pass."""
    config = self.config
    what = _FATAL.get(status)
    if 300 <= status < 400:
      what = 'this address leads to another one, and keys are not passed on: give that one'
    elif status == 429 and _error(data).get('code') == 'insufficient_quota':
      what = _FATAL[402]
    if what is not None:
      what = what.format(key=key_name(config.role), model=config.model, url=config.url)
      text = f'The {config.role} at {config.url} answers {reason.rstrip(".")}: {what}.'
      if status in _DENIED:
        raise Denied(text, f'refused with {reason}', requests)
      raise UserError(text)
    if status < 500 and status not in _PASSING:
      raise Unanswered(f'refused with {reason}', requests, 'refused')

  def _quoted(self, data: bytes) -> str:
    """What a server says of an error, in short, on one line, without the key."""
    said = str(_error(data).get('message') or data.decode('utf-8', 'replace'))
    return quoted(said.replace(self._key, '***') if self._key else said) or 'no explanation'


def _retry_after(headers: Mapping[str, str]) -> float:
  """Seconds that a server asks to wait, a number or a date; 0 if it does not."""
  value = (headers.get('Retry-After') or '').strip()
  if re.fullmatch(r'\d{1,9}(\.\d{1,9})?', value):
    return float(value)
  try:
    date = email.utils.parsedate_to_datetime(value)
    return max(0.0, date.timestamp() - time.time())
  except (ValueError, TypeError, OverflowError):
    return 0.0


def _object(data: bytes) -> dict[str, Any]:
  """A JSON object, or an empty one for anything else."""
  try:
    value = json.loads(data)
  except (ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def _error(data: bytes) -> dict[str, Any]:
  """`message` and `code` of an error, as the servers lay them out."""
  value = _object(data)
  inner = value.get('error', value)
  if isinstance(inner, dict):
    return {'message': inner.get('detail'), **inner}
  return {'message': inner}


def _reply(data: bytes, requests: int) -> Reply | None:
  """Reads a chat completion; None for anything else."""
  value = _object(data)
  try:
    choice = value['choices'][0]
    text = choice['message']['content']
    if isinstance(text, list):
      text = ''.join(part['text'] for part in text if part.get('type') == 'text')
    # A model that thinks until its tokens are used up says nothing.
    text = '' if text is None else text
    cut = choice.get('finish_reason') == 'length'
    if not isinstance(text, str):
      return None
  except (KeyError, IndexError, TypeError, AttributeError):
    return None
  usage = value.get('usage')
  usage = usage if isinstance(usage, dict) else {}

  def tokens(name: str) -> int | None:
    count = usage.get(name)
    return count if type(count) is int and 0 <= count < 2**53 else None

  counts = tokens('prompt_tokens'), tokens('completion_tokens')
  return Reply(text, cut, *counts, requests)
