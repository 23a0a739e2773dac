"""A cache of prompt embeddings on disk, keyed by encoder and text.

One ArrayRecord file holds the prompts of one call that were not cached before; it appears under
its final name only when it is whole, so a killed run leaves nothing half-written behind. Beside it
lies the list of its keys: an embedding of FLUX.1 takes megabytes, so records are read when asked
for, not when the cache is opened.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from absl import logging

from eru_jax.data.text_encoder import check_prompts
from eru_jax.errors import UserError
from eru_jax.files import replace_file, replacing
from eru_jax.types import Conditioning

# Of FLUX.1, half a gigabyte in float32.
_AT_ONCE = 64
# States of a transformer hardly compress, and trying takes longer than making them.
_WRITER = 'group_size:1,uncompressed'
_READER = 'readahead_buffer_size:0,max_parallelism:0'
# Appended to the name of an array in bfloat16, which NumPy's format does not know.
_BFLOAT16 = '.bfloat16'


class Encoder(Protocol):
  """What the cache asks of a text encoder."""

  @property
  def fingerprint(self) -> str: ...

  def encode(self, prompts: Sequence[str], warn: bool = True) -> Conditioning: ...

  def expect(self, prompts: Sequence[str]) -> None: ...

  def null_conditioning(self) -> Conditioning: ...

  def warn_if_cut(self, prompts: Sequence[str], mask: np.ndarray | None) -> None: ...


def _key(prompt: str) -> str:
  return hashlib.sha256(prompt.encode()).hexdigest()


def _pack(prompt: str, row: Conditioning) -> bytes:
  """One record: the text and, of its embedding, the real tokens only; all if nothing is masked."""
  arrays = {'tokens': row.tokens}
  if row.mask is not None:
    arrays['tokens'] = row.tokens[: int(row.mask.sum())]
    arrays['padded'] = np.int32(row.tokens.shape[0])
  if row.pooled is not None:
    arrays['pooled'] = row.pooled
  fields: dict[str, Any] = {'prompt': np.frombuffer(prompt.encode(), np.uint8)}
  for name, array in arrays.items():
    if array.dtype == ml_dtypes.bfloat16:
      fields[name + _BFLOAT16] = array.view(np.uint16)
    else:
      fields[name] = array
  buffer = io.BytesIO()
  np.savez(buffer, **fields)
  return buffer.getvalue()


def _unpack(record: bytes) -> tuple[str, Conditioning]:
  with np.load(io.BytesIO(record), allow_pickle=False) as data:
    arrays = {}
    for name in data.files:
      stored = data[name]
      half = name.endswith(_BFLOAT16)
      arrays[name.removesuffix(_BFLOAT16)] = stored.view(ml_dtypes.bfloat16) if half else stored
  tokens, mask = arrays['tokens'], None
  if 'padded' in arrays:
    short, padded = tokens, int(arrays['padded'])
    tokens = np.zeros((padded, short.shape[1]), short.dtype)
    tokens[: len(short)] = short
    mask = np.arange(padded) < len(short)
  return arrays['prompt'].tobytes().decode(), Conditioning(tokens, mask, arrays.get('pooled'))


def _records(path: pathlib.Path, positions: Sequence[int] | None = None) -> Iterator[Any]:
  """Yields (position, (prompt, embedding)) of records, or (position, error) of damaged ones.

  Args:
    path: an ArrayRecord file.
    positions: which records; None reads them all, and yields nothing if it finds none.
  """
  from array_record.python import array_record_module

  try:
    reader = array_record_module.ArrayRecordReader(str(path), _READER)
    count = reader.num_records()
  except Exception as error:  # a damaged cache costs time, never a run
    yield from ((position, error) for position in positions or ())
    return
  for position in range(count) if positions is None else positions:
    try:
      if position >= count:
        raise ValueError(f'record {position} of {count}')
      yield position, _unpack(reader.read([position])[0])
    except Exception as error:
      yield position, error
  with contextlib.suppress(Exception):  # of a file that has been read
    reader.close()


class EmbeddingCache:
  """Looks prompts up, encoding only those it has not seen."""

  def __init__(self, directory: str | os.PathLike, encoder: Encoder):
    """Opens the cache of one encoder; encoders with other fingerprints never mix with it."""
    self._encoder = encoder
    self._directory = pathlib.Path(directory) / encoder.fingerprint[:16]
    # Of each file, the keys of its records in their order; None where one is damaged.
    self._keys: dict[pathlib.Path, list[str | None]] = {}
    self._places: dict[str, tuple[pathlib.Path, int]] = {}
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(
        f'The embedding cache {self._directory} cannot be made ({error.strerror}): set '
        'ERU_JAX_CACHE to a writable directory.'
      ) from error
    for path in sorted(self._directory.glob('*.array_record')):
      self._open(path)

  def lookup(self, prompts: Sequence[str]) -> Conditioning:
    """Embeddings of prompts, in their order; warns once if any of them is too long.

    Args:
      prompts: N texts, repeats allowed; N may be 0.

    Returns:
      Conditioning of numpy arrays, N rows, bit for bit what the encoder returned.

    Raises:
      UserError: for an empty prompt, naming its index, or if the cache cannot be written.
    """
    check_prompts(prompts)  # here, because the encoder would count among the missing ones only
    if not prompts:
      return self._encoder.encode([])
    conditioning = self.read(prompts)
    # Here, because whoever uses a prompt is to know, not only who was the first to encode it.
    self._encoder.warn_if_cut(prompts, conditioning.mask)
    return conditioning

  def read(self, prompts: Sequence[str]) -> Conditioning:
    """`lookup` of N >= 1 prompts, one of which may be the empty one, without a warning."""
    rows = self._read(list(dict.fromkeys(prompts)))
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in rows]
    if '' in missing:
      rows |= self._store([''], self._encoder.null_conditioning())
      missing.remove('')
    if missing:
      rows |= self._store(missing, self._encoder.encode(missing, warn=False))
    found = [rows[prompt] for prompt in prompts]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)

  def fill(self, prompts: Sequence[str], at_once: int = _AT_ONCE) -> None:
    """Sees to it that prompts can be read without the encoder, and warns as `lookup` does.

    Args:
      prompts: N texts, repeats allowed.
      at_once: embeddings of so many are in memory together.

    Raises:
      UserError: as `lookup`.
    """
    check_prompts(prompts)
    missing = [p for p in dict.fromkeys(prompts) if _key(p) not in self._places]
    if missing:
      self._encoder.expect(missing)
    for start in range(0, len(missing), at_once):
      part = missing[start : start + at_once]
      self._store(part, self._encoder.encode(part, warn=False))
    self._encoder.warn_if_cut(prompts, None)

  def null(self) -> Conditioning:
    """The embedding of the empty prompt, batch size 1, without asking the encoder twice."""
    return self.read([''])

  def _open(self, path: pathlib.Path) -> None:
    """Learns the keys of a file from the list beside it, else from its records."""
    try:
      keys = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
      if not keys or not all(key is None or isinstance(key, str) for key in keys):
        raise ValueError
      self._add(path, keys)
      return
    except (OSError, ValueError, TypeError):  # an earlier version's, a killed run's, or damaged
      pass
    found = list(_records(path))
    errors = [what for _, what in found if isinstance(what, Exception)]
    keys = [None if isinstance(what, Exception) else _key(what[0]) for _, what in found]
    self._add(path, keys)
    if errors or not keys:
      self._report(path, errors[0] if errors else 'no records')
    else:
      self._write_keys(path)

  def _add(self, path: pathlib.Path, keys: list[str | None]) -> None:
    self._keys[path] = keys
    self._places |= {key: (path, i) for i, key in enumerate(keys) if key is not None}

  def _write_keys(self, path: pathlib.Path) -> None:
    with contextlib.suppress(UserError):  # without it the next start reads the records, that is all
      replace_file(path.with_suffix('.json'), json.dumps(self._keys[path]).encode())

  def _report(self, path: pathlib.Path, why: Any) -> None:
    """Says that records of a file are damaged; removes it if none of them is left."""
    logging.warning(
      'Embedding cache file %s is damaged (%r); its lost prompts are encoded again.', path, why
    )
    if any(key is not None for key in self._keys[path]):
      self._write_keys(path)
      return
    del self._keys[path]
    with contextlib.suppress(OSError):  # somebody else's directory, perhaps
      path.with_suffix('.json').unlink(missing_ok=True)
      path.unlink()

  def _read(self, prompts: Sequence[str]) -> dict[str, Conditioning]:
    """Embeddings of those prompts that are cached and whole."""
    wanted: dict[pathlib.Path, dict[int, str]] = {}
    for prompt in prompts:
      if (place := self._places.get(_key(prompt))) is not None:
        wanted.setdefault(place[0], {})[place[1]] = prompt
    rows: dict[str, Conditioning] = {}
    for path, by_position in wanted.items():
      problem: Any = None
      for position, what in _records(path, sorted(by_position)):
        prompt = by_position[position]
        if not isinstance(what, Exception) and what[0] == prompt:
          rows[prompt] = what[1]
          continue
        problem = what if isinstance(what, Exception) else 'another prompt'
        self._keys[path][position] = None
        del self._places[_key(prompt)]
      if problem is not None:
        self._report(path, problem)
    return rows

  def _store(self, prompts: Sequence[str], fresh: Conditioning) -> dict[str, Conditioning]:
    """Writes embeddings into a file of their own; returns them by prompt."""
    from array_record.python import array_record_module

    rows = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), fresh) for i in range(len(prompts))]
    name = hashlib.sha256('\n'.join(prompts).encode()).hexdigest()[:16]
    path = self._directory / f'{name}.array_record'
    try:
      with replacing(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER)
        for prompt, row in zip(prompts, rows, strict=True):
          writer.write(_pack(prompt, row))
        writer.close()
    except (OSError, RuntimeError, ValueError) as error:
      raise UserError(
        f'The embedding cache {self._directory} cannot be written ({error}): free some space, or '
        'set ERU_JAX_CACHE to another directory.'
      ) from error
    self._add(path, [_key(prompt) for prompt in prompts])
    self._write_keys(path)
    return dict(zip(prompts, rows, strict=True))
