"""How config dataclasses check their own values."""

from collections.abc import Iterable
from typing import Any

from eru_jax.errors import UserError


def require(config: Any, **rules: tuple[bool, str]) -> None:
  """Raises UserError for the first field whose rule (valid, wanted) is not met."""
  for name, (valid, wanted) in rules.items():
    if not valid:
      owner = type(config).__name__.removesuffix('Config')
      value = getattr(config, name)
      raise UserError(f'{owner} config: `{name}` is {value!r} but must be {wanted}.')


def one_of(value: str, names: Iterable[str]) -> tuple[bool, str]:
  """The rule that a value is among names."""
  names = tuple(names)
  return value in names, f'one of {", ".join(names)}'
