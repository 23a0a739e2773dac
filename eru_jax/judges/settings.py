"""Which model is asked over HTTP, and how; its key, which is never written anywhere."""

import dataclasses
import ipaddress
import json
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from eru_jax.errors import UserError

# Whose key is looked at where there is none of one's own.
SHARED_KEY = 'OPENAI_API_KEY'
DETAILS = ('auto', 'low', 'high')
PATH = '/chat/completions'
# Names of the longest reply among the fields of a request.
_LIMITS = ('max_tokens', 'max_completion_tokens')


@dataclasses.dataclass(frozen=True)
class ChatConfig:
  """Which model answers, and how it is asked. The key is not here: it is never written anywhere.

  Attributes:
    url: base address, such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1.
    model: the model's name there.
    timeout: seconds that one request may take in all.
    attempts: how often a request is sent before it counts as unanswered.
    concurrency: requests in flight at a time.
    temperature: of the model's choice of words.
    max_tokens: longest reply, a reasoning model's thoughts included.
    detail: how closely pictures are looked at, 'auto', 'low' or 'high'.
    extra: JSON object of more fields for the request; null leaves a field out, as in
      {"max_tokens": null, "max_completion_tokens": 4096}.
    first_wait: seconds before the second attempt; the wait doubles with each.
    longest_wait: and ends here.
    role: what errors call it, its flags begin with, and its key: 'judge', $ERU_JAX_JUDGE_KEY.
  """

  url: str
  model: str
  timeout: float = 120.0
  attempts: int = 6
  concurrency: int = 8
  temperature: float = 0.0
  max_tokens: int = 2048
  detail: str = 'auto'
  extra: str = ''
  first_wait: float = 1.0
  longest_wait: float = 60.0
  role: str = 'judge'

  def __post_init__(self):
    object.__setattr__(self, 'url', _base_url(self.url, self.role))
    if not self.model.strip():
      raise UserError(
        f'The {self.role} at {self.url} needs the name of a model: give --{self.role}_model.'
      )
    rules = {
      'timeout': (self.timeout > 0, 'positive'),
      'attempts': (self.attempts >= 1, 'at least 1'),
      'concurrency': (1 <= self.concurrency <= 256, 'from 1 to 256'),
      'temperature': (self.temperature >= 0, 'zero or more'),
      'max_tokens': (self.max_tokens >= 1, 'at least 1'),
      'detail': (self.detail in DETAILS, f'one of {", ".join(DETAILS)}'),
      'first_wait': (0 < self.first_wait <= self.longest_wait, 'positive, at most longest_wait'),
    }
    for name, (valid, wanted) in rules.items():
      if not valid:
        value = getattr(self, name)
        raise UserError(f'The {self.role}’s {name} is {value!r} but must be {wanted}.')
    self.extra_fields()

  def extra_fields(self) -> dict[str, Any]:
    """`extra` as data.

    Raises:
      UserError: if it is no JSON object, or takes the place of what is asked.
    """
    try:
      fields = json.loads(self.extra or '{}')
    except (ValueError, RecursionError):
      fields = None
    if not isinstance(fields, dict) or fields.keys() & {'model', 'messages', 'stream', 'n'}:
      raise UserError(
        f'The {self.role}’s extra fields are {self.extra!r} but must be a JSON object without '
        'model, messages, stream and n.'
      )
    return fields

  def identity(self) -> dict[str, Any]:
    """What answers depend on: not where the model runs, how long one waits, or when it is cut off.

    A reply that is cut off is no answer, so another limit changes none.
    """
    extra = {name: value for name, value in self.extra_fields().items() if name not in _LIMITS}
    return {name: getattr(self, name) for name in ('model', 'temperature', 'detail')} | {
      'extra': extra
    }


def key_name(role: str) -> str:
  """The environment variable of a key: 'judge' -> 'ERU_JAX_JUDGE_KEY'."""
  return f'ERU_JAX_{role.upper()}_KEY'


def _base_url(url: str, role: str) -> str:
  """The address without what is added to it.

  Raises:
    UserError: if it is no http or https address, or holds what would be written to files.
  """
  try:
    parts = urllib.parse.urlsplit(url)
    parts.port  # noqa: B018  reading it checks it
  except ValueError as error:
    raise UserError(f'The {role}’s address {url!r} is no URL ({error}).') from error
  if parts.scheme not in ('http', 'https') or not parts.hostname or re.search(r'[^!-~]', url):
    raise UserError(
      f'The {role}’s address {url!r} is no http:// or https:// URL: give the base address of an '
      'OpenAI-compatible server, such as http://127.0.0.1:8000/v1.'
    )
  if parts.username is not None or parts.query or parts.fragment:
    # Not quoted: what is there may be secret.
    raise UserError(
      f'The {role}’s address at {parts.hostname} must have no user, password, ? or #: give a key '
      f'as {key_name(role)} in the environment.'
    )
  return url.rstrip('/').removesuffix(PATH).rstrip('/')


def find_key(url: str, environment: Mapping[str, str], role: str = 'judge') -> str:
  """The key for a server, '' if there is none.

  That of its role, or else $OPENAI_API_KEY, which was not meant for this server, and so goes over
  https or to this machine only. A judge's key never goes to a rewriter, nor the other way round.

  Raises:
    UserError: if it holds what no header may.
  """
  own, shared = (environment.get(name, '').strip() for name in (key_name(role), SHARED_KEY))
  key = own or (shared if url.startswith('https:') or is_local(url) else '')
  if not re.fullmatch('[!-~]*', key):
    name = key_name(role) if own else SHARED_KEY
    raise UserError(f'{name} holds characters that no key has: set it to the key alone.')
  return key


def is_local(url: str) -> bool:
  """Whether an address is this very machine."""
  host = urllib.parse.urlsplit(url).hostname
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'
