"""Safetensors files read and written piece by piece, without trusting what their headers say.

The library's own lazy slices map the file into memory and keep every page that was touched: of a
2 GB file all of it is resident at the end. Here pieces are read where they are wanted, and no more
than one is held. https://huggingface.co/docs/safetensors describes the format: the length of the
header (8 bytes), the header (JSON: name -> dtype, shape, data_offsets), the tensors.
"""

import copy
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from eru_jax.errors import UserError, listed
from eru_jax.weights.casting import fill

# In the order in which the library sorts tensors of different types: it puts the wide ones first.
DTYPES = {
  'U64': np.uint64, 'I64': np.int64, 'F64': np.float64, 'C64': np.complex64, 'F32': np.float32,
  'U32': np.uint32, 'I32': np.int32, 'BF16': ml_dtypes.bfloat16, 'F16': np.float16,
  'U16': np.uint16, 'I16': np.int16, 'F8_E4M3': ml_dtypes.float8_e4m3fn,
  'F8_E5M2': ml_dtypes.float8_e5m2, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_,
}  # fmt: skip
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
# The library's own limit.
_MAX_HEADER = 100_000_000
# What is read at once where it has to be cast or cut.
CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies: `start` bytes into `path`."""

  shape: tuple[int, ...]
  dtype: np.dtype
  path: pathlib.Path
  start: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def header_tensors(header: bytes, path: pathlib.Path, size: int | None = None) -> dict[str, Tensor]:
  """The tensors that a header describes.

  Args:
    header: its bytes, the length in front not among them.
    path: the file.
    size: bytes of the whole file; None if there is none yet.

  Raises:
    ValueError: saying in what the header is wrong: syntax, dtypes, sizes, or offsets that overlap,
      leave gaps, or do not end where the file does.
  """

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
      raise ValueError('a name occurs twice in the header')
    return found

  try:
    entries = json.loads(header.decode(), object_pairs_hook=unique)
  except RecursionError as error:
    raise ValueError('the header is nested too deeply') from error
  if not isinstance(entries, dict):
    raise ValueError('the header is no JSON object')
  metadata = entries.pop('__metadata__', {})
  if not _is_metadata(metadata):
    raise ValueError('__metadata__ is no table of strings')
  base, end, found = 8 + len(header), 0, {}
  spans = sorted((*_span(name, entry), name) for name, entry in entries.items())
  for start, stop, name in spans:
    if start != end:
      raise ValueError(f'{name!r} begins at {start}, where {end} is free')
    dtype, shape = np.dtype(DTYPES[entries[name]['dtype']]), tuple(entries[name]['shape'])
    found[name] = Tensor(shape, dtype, path, base + start)
    if stop - start != found[name].nbytes:
      raise ValueError(f'{name!r} has {stop - start} bytes, but {found[name].nbytes} by its shape')
    end = stop
  if size is not None and base + end != size:
    raise ValueError(f'it has {size} bytes, but {base + end} by its header')
  return found


def _weight_map(index: Any) -> dict[str, str]:
  """Tensor -> shard, of the contents of an index.

  Raises:
    ValueError: if it is no such table.
  """
  where = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(where, dict):
    raise ValueError('it has no table weight_map')
  odd = [name for name, shard in where.items() if not isinstance(shard, str)]
  if odd:
    raise ValueError(f'weight_map has {where[odd[0]]!r} for {odd[0]!r}, which is no file name')
  return where


def _is_metadata(value: Any) -> bool:
  return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _span(name: str, entry: Any) -> tuple[int, int]:
  """First and last byte of an entry of a header."""

  def naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)

  if not isinstance(entry, dict) or entry.keys() != {'dtype', 'shape', 'data_offsets'}:
    raise ValueError(f'{name!r} has no dtype, shape and data_offsets, or more than these')
  if not isinstance(entry['dtype'], str) or entry['dtype'] not in DTYPES:
    raise ValueError(f'{name!r} has the dtype {entry["dtype"]!r}, which is not known')
  if not naturals(entry['shape']) or not naturals(entry['data_offsets']):
    raise ValueError(f'shape or data_offsets of {name!r} are no lists of natural numbers')
  # numpy counts in 64 bits, and 64 axes are its limit.
  if math.prod(entry['shape']) >= 1 << 56 or len(entry['shape']) > 16:
    raise ValueError(f'{name!r} has the shape {entry["shape"]}')
  if len(entry['data_offsets']) != 2 or entry['data_offsets'][0] > entry['data_offsets'][1]:
    raise ValueError(f'data_offsets of {name!r} are {entry["data_offsets"]}')
  return tuple(entry['data_offsets'])


def make_header(
  tensors: Mapping[str, tuple[Sequence[int], Any]], metadata: Mapping[str, str] | None = None
) -> bytes:
  """The header that the library would write.

  Args:
    tensors: name -> (shape, dtype).
    metadata: texts to keep with them.
  """
  codes = list(DTYPES)

  def key(name: str) -> tuple[int, str]:
    return codes.index(_CODES[np.dtype(tensors[name][1])]), name

  entries: dict[str, Any] = {'__metadata__': dict(metadata)} if metadata else {}
  end = 0
  for name in sorted(tensors, key=key):
    shape, dtype = tensors[name]
    start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
    code = _CODES[np.dtype(dtype)]
    entries[name] = {'dtype': code, 'shape': list(shape), 'data_offsets': [start, end]}
  data = json.dumps(entries, separators=(',', ':'), ensure_ascii=False).encode()
  return data + b' ' * (-len(data) % 8)


def _open(path: pathlib.Path) -> tuple[bytes, dict[str, Tensor]]:
  """Header and tensors of one file."""
  try:
    with open(path, 'rb') as file:
      size = os.fstat(file.fileno()).st_size
      length = int.from_bytes(file.read(8), 'little')
      if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError(f'{size} bytes do not hold its header')
      header = file.read(length)
    return header, header_tensors(header, path, size)
  except FileNotFoundError:
    raise UserError(f'There is no weights file {path}: {_instead(path)}.') from None
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error
  except ValueError as error:
    raise UserError(
      f'{path} is not a whole safetensors file ({error}): copy or download it again.'
    ) from error


def _instead(path: pathlib.Path) -> str:
  """What to do without a file, by what lies where it should be."""
  stem = path.name.partition('.')[0]
  beside = sorted(other.name for other in path.parent.glob('*')) if path.parent.is_dir() else []
  # As 'model.fp16.safetensors', which diffusers takes on request.
  variants = [n for n in beside if n.endswith('.safetensors') and n.startswith(f'{stem}.')]
  if variants:
    return f'{variants[0]} is there, a variant; rename it to {path.name} to use it'
  pickles = [n for n in beside if n.endswith(('.bin', '.pt', '.pth', '.ckpt'))]
  if pickles:
    return (
      f'{pickles[0]} is there, which may hold programs and is not read; save the model again '
      'with safe_serialization=True'
    )
  return 'copy or download it'


class TensorFiles:
  """The tensors of a .safetensors file, or of all shards of a .safetensors.index.json.

  Opening reads headers only.

  Attributes:
    path: what was opened: the file, or the index.
    tensors: name -> Tensor.
    headers: file name -> its header, to the byte.
    index: text of the index, or None.
  """

  def __init__(self, path: str | os.PathLike):
    """Opens the file; if it is absent but `<path>.index.json` is there, the shards of that.

    Raises:
      UserError: if a file is missing, cut off or corrupt, naming it.
    """
    path = pathlib.Path(path)
    index = path if path.name.endswith('.index.json') else path.with_name(f'{path.name}.index.json')
    self.path, self.index = path, None
    self.tensors: dict[str, Tensor] = {}
    self.headers: dict[str, bytes] = {}
    if path != index and (path.is_file() or not index.is_file()):
      self.headers[path.name], self.tensors = _open(path)
      return
    self.path = index
    try:
      self.index = index.read_text(encoding='utf-8')
      where = _weight_map(json.loads(self.index))
    except (OSError, ValueError, RecursionError) as error:
      raise UserError(
        f'{index} is not a readable safetensors index ({error}): copy or download it again.'
      ) from error
    for shard in sorted(set(where.values())):
      if pathlib.PurePath(shard).name != shard:
        raise UserError(
          f'{index} names a shard outside its own directory, {shard!r}: copy or download it again.'
        )
      self.headers[shard], tensors = _open(index.with_name(shard))
      twice = sorted(set(tensors) & set(self.tensors))
      if twice:
        raise UserError(
          f'{index}: {shard} holds tensors that another shard has too: copy or download all of '
          'them again.',
          listed({'twice': twice}),
        )
      self.tensors |= tensors
    lacking = sorted(set(where) - set(self.tensors))
    if lacking:
      raise UserError(
        f'{index} promises {len(lacking)} tensors that its shards do not hold: copy or download '
        'all of them again.',
        listed({'missing': lacking}),
      )

  def renamed(self, names: Mapping[str, str]) -> 'TensorFiles':
    """The same files with other tensors in them.

    Args:
      names: name that a tensor gets -> name that it has; those without one are left out.
    """
    view = copy.copy(self)
    view.tensors = {new: self.tensors[old] for new, old in names.items()}
    return view

  def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
    """Reads a part of a tensor; of the first axis, only what is wanted is touched.

    Args:
      name: the tensor.
      index: slices with start and stop, one for each of its axes.
      out: C-contiguous array of the part's shape, to whose dtype it is cast.

    Raises:
      UserError: if the file has become shorter or cannot be read any more, or a number is too large
        for the dtype.
    """
    tensor = self.tensors[name]
    first, *rest = index or (slice(0, 1),)
    inner = tensor.shape[1:]
    whole = out.dtype == tensor.dtype and all(
      (part.start, part.stop) == (0, size) for part, size in zip(rest, inner, strict=True)
    )
    out = out if out.ndim else out[None]
    row = math.prod(inner) * tensor.dtype.itemsize
    step = len(out) if whole else max(1, CHUNK // max(row, 1))
    for start in range(0, len(out), max(step, 1)):
      target = out[start : start + step]
      chunk = target if whole else np.empty((len(target), *inner), tensor.dtype)
      _read_exactly(tensor, (first.start + start) * row, chunk)
      if not whole:
        fill(target, chunk[(slice(None), *rest)], f'{tensor.path}: {name}')

  def read(self, name: str) -> np.ndarray:
    """A whole tensor.

    Raises:
      UserError: as `read_into`.
    """
    tensor = self.tensors[name]
    out = np.empty(tensor.shape, tensor.dtype)
    self.read_into(name, tuple(slice(0, size) for size in tensor.shape), out)
    return out


def _read_exactly(tensor: Tensor, offset: int, out: np.ndarray) -> None:
  """Fills a contiguous array from a place in a tensor."""
  data = memoryview(out.reshape(-1).view(np.uint8))
  try:
    with open(tensor.path, 'rb', buffering=0) as file:
      file.seek(tensor.start + offset)
      while data:
        count = file.readinto(data)
        if not count:
          raise UserError(f'{tensor.path} has become shorter while it was read: copy it again.')
        data = data[count:]
  except OSError as error:
    raise UserError(f'{tensor.path} cannot be read: {error.strerror or error}.') from error


class TensorWriter:
  """A safetensors file that is filled in any order.

  It is not atomic: whoever writes one renames it, or the directory around it, when all is done.
  """

  def __init__(self, path: pathlib.Path, header: bytes):
    """Makes the file, in its full size.

    Raises:
      UserError: if it cannot be written.
    """
    self.tensors = header_tensors(header, path)
    end = sum(tensor.nbytes for tensor in self.tensors.values())
    self._path, self._file, self._left = path, None, end
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      self._file = open(path, 'xb', buffering=0)
      self._file.write(len(header).to_bytes(8, 'little') + header)
      self._file.truncate(8 + len(header) + end)
    except OSError as error:
      self.close()
      raise self._failure(error) from error

  def _failure(self, error: OSError) -> UserError:
    return UserError(f'{self._path} cannot be written: {error.strerror or error}.')

  def write(self, name: str, first: int, rows: np.ndarray) -> None:
    """Writes rows of a tensor (or all of it), from row `first` on, cast to its dtype.

    Raises:
      UserError: if they cannot be written.
    """
    tensor = self.tensors[name]
    row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    rows = rows if rows.ndim else rows[None]
    # Small chunks of what has to be transposed: they and their lines of memory stay in the cache.
    step = max(1, (CHUNK if rows.flags.c_contiguous else CHUNK >> 5) // max(row, 1))
    try:
      self._file.seek(tensor.start + first * row)
      for start in range(0, len(rows), step):
        chunk = np.asarray(rows[start : start + step], tensor.dtype, order='C')
        data = memoryview(chunk.reshape(-1).view(np.uint8))
        while data:
          data = data[self._file.write(data) :]
        self._left -= chunk.nbytes
    except OSError as error:
      raise self._failure(error) from error

  def finish(self) -> None:
    """Sees to it that the bytes are on the disk.

    Raises:
      UserError: if they are not.
    """
    if self._left:
      raise AssertionError(f'{self._path}: {self._left} bytes were not written')
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      raise self._failure(error) from error
    self.close()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
