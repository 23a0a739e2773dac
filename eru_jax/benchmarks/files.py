"""Rows of the files that benchmarks come as: JSON lists, JSON Lines, parquet.

They are a stranger's: whatever is wrong with one is a sentence that names the file and the row.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from eru_jax.data.pairs import is_blank
from eru_jax.errors import UserError

SUFFIXES = ('.json', '.jsonl', '.parquet')
# Characters of a stranger's value that an error quotes.
_QUOTED = 80


def data_directory(data: str | None, name: str, hub: str) -> pathlib.Path:
  """The directory that --data names.

  Args:
    data: the flag.
    name: the benchmark.
    hub: how its files are had, a command or an address.

  Raises:
    UserError: if it is not given, or not there; it says how to get the files.
  """
  if data is None:
    raise UserError(f'--benchmark={name} needs --data=DIR with its files: {hub}.')
  path = pathlib.Path(data).expanduser()
  if path.exists():
    return path
  raise UserError(f'--data={data}: there is no such directory; {hub}.')


def read_rows(
  path: str | os.PathLike, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Rows of a file in order.

  Args:
    path: .json (a list of objects, or one object a line), .jsonl or .parquet.
    columns: of parquet, the columns to read if they are there; pictures among the others would be
      gigabytes.

  Yields:
    (what names the row in an error, the row).

  Raises:
    UserError: if the file cannot be read or has no row, or a row is no object.
  """
  path, empty = pathlib.Path(path), True
  for found in _rows(path, columns):
    empty = False
    yield found
  if empty:
    raise UserError(f'{path} has no rows: get the file again, or take it away.')


def _rows(
  path: pathlib.Path, columns: Sequence[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
  if path.suffix.lower() == '.parquet':
    yield from _parquet_rows(path, columns)
    return
  text = _read_text(path)
  if text.lstrip().startswith('['):
    for number, row in enumerate(_parse(text, str(path)), start=1):
      yield _checked(row, f'{path}, row {number}')
    return
  # At newlines only: JSON text may hold U+2028.
  for number, line in enumerate(text.split('\n'), start=1):
    if line.strip():
      where = f'{path}, line {number}'
      yield _checked(_parse(line, where), where)


def text_of(row: dict[str, Any], key: str, where: str) -> str:
  """A text that a row must have, without space around it."""
  value = row.get(key)
  if not isinstance(value, str) or is_blank(value):
    raise UserError(f'{where}: {key!r} is {_quote(value)}, but must be a text.')
  try:
    value.encode('utf-8')
  except UnicodeEncodeError as error:
    raise UserError(f'{where}: {key!r} holds half a surrogate pair: mend its \\u escapes.') from (
      error
    )
  return value.strip()


def texts_of(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
  """One text, or a list of one or more."""
  value = row.get(key)
  if not isinstance(value, (list, tuple)):
    return (text_of(row, key, where),)
  if not value:
    raise UserError(f'{where}: {key!r} is an empty list, but must have a text.')
  return tuple(text_of({key: text}, key, where) for text in value)


def optional_text(row: dict[str, Any], key: str, where: str) -> str:
  """A text that a row may have, or ''; what is not a text is told as JSON."""
  value = row.get(key)
  if value is None or value == '':
    return ''
  if isinstance(value, (list, dict)):
    try:
      return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
      raise UserError(f'{where}: {key!r} is {_quote(value)}, but must be a text.') from error
  return text_of(row, key, where)


def integer_of(row: dict[str, Any], key: str, where: str, low: int, high: int) -> int:
  """A whole number that a row must have, within bounds."""
  value = row.get(key)
  if type(value) is not int or not low <= value <= high:
    raise UserError(
      f'{where}: {key!r} is {_quote(value)}, but must be a whole number from {low} to {high}.'
    )
  return value


def _quote(value: Any) -> str:
  shown = 'missing' if value is None else repr(value)
  return shown if len(shown) <= _QUOTED else f'{shown[:_QUOTED]}...'


def _read_text(path: pathlib.Path) -> str:
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise UserError(f'{path}, line {line}: not UTF-8 text: download the file again.') from error


def _parse(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    line = f', line {error.lineno}' if ', line ' not in where else ''
    raise UserError(
      f'{where}{line}: malformed JSON ({error.msg} at column {error.colno}): download the file '
      'again.'
    ) from error
  except (RecursionError, ValueError) as error:
    raise UserError(
      f'{where}: JSON that is nested too deeply or holds a huge number: download the file again.'
    ) from error


def _checked(row: Any, where: str) -> tuple[str, dict[str, Any]]:
  if not isinstance(row, dict):
    raise UserError(f'{where}: {_quote(row)} is no JSON object with the fields of a question.')
  return where, row


def _parquet_rows(
  path: pathlib.Path, columns: Sequence[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:  # it comes with tensorflow-datasets, but is none of our own
    raise UserError(
      f'{path} is parquet, which needs pyarrow: `pip install pyarrow`, or store the rows as JSON '
      'Lines (.jsonl).'
    ) from error
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      names = file.schema_arrow.names
      wanted = names if columns is None else [name for name in columns if name in names]
      number = 0
      for batch in file.iter_batches(columns=wanted):
        for row in batch.to_pylist():
          number += 1
          yield f'{path}, row {number}', row
  except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
    reason = str(error).strip().partition('\n')[0]
    raise UserError(
      f'{path} is no readable parquet file ({reason[:200]}): download it again.'
    ) from error
