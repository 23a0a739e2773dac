"""Reads `--config=FILE.py[:ARGUMENT]` and the overrides `--config.KEY.KEY=VALUE`.

A config file is Python with a function `get_config([argument])` that returns a ConfigDict or a
dict. It names only what differs from the defaults, and so any key of the schema may be
overridden, whether the file has it or not; what is no key is noticed when the schema is applied.
"""

import ast
import pathlib
import runpy
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from eru_jax.errors import UserError


def options(
  argument: str,
  flags: Sequence[str] = (),
  values: Mapping[str, int | None] | None = None,
  contrary: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
  """Reads the argument of a config file, such as 'int8,res=512'.

  Args:
    argument: words and NAME=INTEGER, joined by commas; '' for none.
    flags: words that may be there.
    values: names that may be given an integer, with their defaults.
    contrary: pairs of words of which only one may be there.

  Returns:
    Word -> whether it is there, and name -> integer.

  Raises:
    UserError: for anything else, listing what there is, or for contrary words.
  """
  found: dict[str, Any] = {**dict.fromkeys(flags, False), **(values or {})}
  for part in filter(None, argument.split(',')):
    name, given, text = part.partition('=')
    if name in flags and not given:
      found[name] = True
    elif values and name in values and text.isdecimal():
      found[name] = int(text)
    else:
      known = [*flags, *(f'{name}=INTEGER' for name in values or ())]
      raise UserError(f'{part!r} is no argument of this config; there are {", ".join(known)}.')
  for one, other in contrary:
    if found[one] and found[other]:
      raise UserError(f'{one!r} and {other!r} contradict each other: give one of them.')
  return found


def load_config(spec: str, overrides: Mapping[str, str]) -> dict[str, Any]:
  """The values of a config file, overridden.

  Args:
    spec: 'FILE.py', or 'FILE.py:ARGUMENT' to call get_config(ARGUMENT).
    overrides: dotted key -> value as it was typed: a Python literal, true, false, or else text.

  Raises:
    UserError: if the file cannot be run, or an override goes through a value that has no keys.
  """
  path, argument = _split(spec)
  try:
    config = runpy.run_path(str(path))['get_config'](*argument)
  except KeyError as error:
    if error.args != ('get_config',):
      raise _failure(path, error) from error
    raise UserError(f'The config file {path} has no function get_config().') from error
  except OSError as error:
    if error.filename != str(path):
      raise _failure(path, error) from error
    raise UserError(f'The config file {path} cannot be read: {error.strerror}.') from error
  except UserError as error:
    raise error.at(f'The config file {path}') from error
  except Exception as error:
    raise _failure(path, error) from error
  values = _plain(config)
  if not isinstance(values, dict):
    raise UserError(f'The config file {path}: get_config() must return a ConfigDict or a dict.')
  for key, text in overrides.items():
    _override(values, key, text)
  return values


def _split(spec: str) -> tuple[pathlib.Path, tuple[str, ...]]:
  path = pathlib.Path(spec)
  argument: tuple[str, ...] = ()
  if not path.is_file() and ':' in spec:
    name, _, text = spec.partition(':')
    path, argument = pathlib.Path(name), (text,)
  if not path.is_file():
    what = 'is a directory' if path.is_dir() else 'does not exist'
    raise UserError(f'The config file {path} {what}: give --config=FILE.py.')
  return path, argument


def _failure(path: pathlib.Path, error: Exception) -> UserError:
  """What went wrong in a config file, and in which of its lines."""
  lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
  if isinstance(error, SyntaxError) and error.filename == str(path):
    lines, reason = [error.lineno], error.msg
  else:
    reason = f'{type(error).__name__}: {error}'
  where = f', line {lines[-1]}' if lines else ''
  return UserError(f'The config file {path}{where} cannot be run: {reason}.')


def _plain(config: Any) -> Any:
  """Nested dicts instead of ConfigDicts, so that overrides may add keys and change types."""
  if hasattr(config, 'to_dict'):
    config = config.to_dict()
  if isinstance(config, Mapping):
    return {key: _plain(value) for key, value in config.items()}
  if isinstance(config, (list, tuple)):
    return type(config)(map(_plain, config))
  return config


def _override(values: dict[str, Any], key: str, text: str) -> None:
  *sections, name = key.split('.')
  place: Any = values
  for depth, section in enumerate(sections, start=1):
    if isinstance(place, list):
      place = place[_position(place, section, key, sections[: depth - 1])]
    else:
      # A tuple's entries cannot be replaced, a list's can.
      found = place.get(section, {})
      place[section] = list(found) if isinstance(found, tuple) else found
      place = place[section]
    if not isinstance(place, (dict, list)):
      where = '.'.join(sections[:depth])
      raise UserError(
        f'--config.{key}: `{where}` is {place!r} and has no keys to override: override '
        f'--config.{where} itself.'
      )
  if isinstance(place, list):
    place[_position(place, name, key, sections)] = _literal(text)
  else:
    place[name] = _literal(text)


def _position(entries: list[Any], name: str, key: str, sections: Sequence[str]) -> int:
  if not name.isdecimal() or int(name) >= len(entries):
    where = '.'.join(sections)
    raise UserError(
      f'--config.{key}: `{where}` is a list of {len(entries)}, and {name!r} is no place in it: '
      f'count from 0, or override --config.{where} itself.'
    )
  return int(name)


def _literal(text: str) -> Any:
  if text in ('true', 'false'):
    return text == 'true'
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text
