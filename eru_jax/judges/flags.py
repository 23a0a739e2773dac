"""The flags of a model that is asked over HTTP: --judge=URL, --judge_model=NAME and so on."""

import dataclasses
from typing import Any

from absl import flags

from eru_jax.errors import UserError
from eru_jax.judges.chat import ChatClient
from eru_jax.judges.service import Service
from eru_jax.judges.settings import SHARED_KEY, ChatConfig, key_name
from eru_jax.judges.summary import parse_price


@dataclasses.dataclass(frozen=True)
class ChatFlags:
  """Flags that `define_chat` has made; read them once flags are parsed."""

  name: str
  _holders: dict[str, flags.FlagHolder]

  def value(self, option: str = '') -> Any:
    """Of --judge with '', else of --judge_OPTION."""
    return self._holders[option].value

  def client(self) -> ChatClient | None:
    """The client that the flags describe; None if they name none.

    Raises:
      UserError: if they do not go together, or a value is wrong.
    """
    if not self.value():
      given = [option for option, holder in self._holders.items() if option and holder.present]
      if given:
        raise UserError(
          f'--{self.name}_{given[0]} is given, but no --{self.name}=URL: give that too, or leave '
          'it out.'
        )
      return None
    if not self.value('model'):
      raise UserError(f'--{self.name} is given, but no --{self.name}_model=NAME.')
    options = ('model', 'timeout', 'concurrency', 'max_tokens', 'detail', 'extra')
    values = {option: self.value(option) for option in options}
    config = ChatConfig(self.value(), role=self.name, **values)
    return ChatClient(config)

  def service(self) -> Service | None:
    """That with its instructions and prices; None if the flags name none.

    Raises:
      UserError: as `client` and `price`.
    """
    client = self.client()
    return client and Service(client, self.value('prompt') or '', self.price())

  def price(self) -> tuple[float, float] | None:
    """Of a million tokens, read and written.

    Raises:
      UserError: if it is no pair of numbers.
    """
    return parse_price(self.value('price')) if self.value('price') else None


def define_chat(name: str, what: str) -> ChatFlags:
  """Defines --NAME=URL and its companions.

  Args:
    name: 'judge', for one.
    what: what the model does there, for --help: 'judges pictures'.
  """
  usual = ChatConfig('http://localhost', 'any')
  text, number = flags.DEFINE_string, flags.DEFINE_integer
  holders = {
    '': text(
      name, None, f'Base URL of an OpenAI-compatible server that {what}, such as '
      f'http://127.0.0.1:8000/v1. Its key, if it needs one, is ${key_name(name)}, or else '
      f'${SHARED_KEY}.'
    ),
    'model': text(f'{name}_model', None, 'Name of the model there.'),
    'prompt': text(f'{name}_prompt', None, 'File of instructions to use in place of ours, with '
                   'the same {placeholders}.'),
    'price': text(f'{name}_price', None, 'IN,OUT: cost of a million tokens, read and written.'),
    'timeout': flags.DEFINE_float(f'{name}_timeout', usual.timeout, 'Seconds a request may take.'),
    'concurrency': number(f'{name}_concurrency', usual.concurrency, 'Requests at a time.'),
    'max_tokens': number(f'{name}_max_tokens', usual.max_tokens, 'Longest reply, thoughts '
                         'included.'),
    'detail': text(f'{name}_detail', usual.detail, "Of pictures: 'auto', 'low' or 'high'."),
    'extra': text(f'{name}_extra', usual.extra, 'JSON object of more fields for each request; null '
                  'leaves one out.'),
  }  # fmt: skip
  return ChatFlags(name, holders)
