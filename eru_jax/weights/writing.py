"""Safetensors files of a model, written array by array from disk or from the devices."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from eru_jax.weights import table
from eru_jax.weights.layouts import Component
from eru_jax.weights.source_record import Files
from eru_jax.weights.tensor_files import TensorWriter, make_header

PyTree = Any
# Where diffusers' save_pretrained begins a new file.
SHARD_BYTES = 10 * 10**9


class Part(Protocol):
  """One component of a model: `sources.Weights`, or `Held`."""

  @property
  def component(self) -> Component: ...

  @property
  def config(self) -> Any: ...

  def tensors(self, layout: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]: ...

  def arrays(self) -> Iterator[tuple[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Held:
  """A component whose parameters are in memory.

  Attributes:
    component: the component.
    config: its architecture.
    params: nested dict of arrays, on the host or on a mesh.
    dtype: what they are stored in; None keeps that of each.
  """

  component: Component
  config: Any
  params: PyTree
  dtype: Any

  def tensors(self, layout: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """(shape, dtype) of the reference's tensors, as `sources.Weights.tensors`."""
    flat = traverse_util.flatten_dict(self.params, sep='/')
    dtypes = {path: self._dtype(array) for path, array in flat.items()}
    return self.component.tensors(self.config, layout, dtypes)

  def _dtype(self, array: Any) -> np.dtype:
    return np.dtype(array.dtype if self.dtype is None else self.dtype)

  def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array on the host), of which nothing else keeps a copy."""
    for path, array in traverse_util.flatten_dict(self.params, sep='/').items():
      dtype = self._dtype(array)
      if isinstance(array, jax.Array):
        # Cast where it lies. A jax.Array keeps what was once read of it, so another one is read.
        array = jnp.copy(array) if array.dtype == dtype else array.astype(dtype)
      yield path, np.asarray(array)


def new_files(parts: Sequence[Part], layout: str, shard_bytes: int = SHARD_BYTES) -> Files:
  """Files as the authors of a layout would write them.

  Args:
    parts: the components.
    layout: one of theirs.
    shard_bytes: size at which files in diffusers' layout are split.

  Raises:
    UserError: if arrays of different dtypes would share a tensor.
  """
  headers: dict[str, dict[str, tuple[tuple[int, ...], Any]]] = {}
  indices = {}
  for part in parts:
    file = part.component.layouts[layout].file
    tensors = part.tensors(layout)
    shards = [list(tensors)]
    if layout == 'diffusers':
      shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
      headers.setdefault(file, {}).update(tensors)
      continue
    stem, kind = file.rsplit('.', 1)
    paths = [f'{stem}-{i + 1:05d}-of-{len(shards):05d}.{kind}' for i in range(len(shards))]
    for path, names in zip(paths, shards, strict=True):
      headers[path] = {name: tensors[name] for name in names}
    indices[f'{file}.index.json'] = _index(dict(zip(paths, shards, strict=True)), tensors)
  return Files(
    {part.component.folder: layout for part in parts},
    {path: make_header(tensors, {'format': 'pt'}) for path, tensors in headers.items()},
    indices,
  )


def _bytes(tensor: tuple[tuple[int, ...], Any]) -> int:
  return math.prod(tensor[0]) * np.dtype(tensor[1]).itemsize


def _shards(tensors: Mapping[str, tuple], limit: int) -> list[list[str]]:
  """Names by file, split where diffusers splits: a file ends before the tensor that would make it
  too large, and a tensor that is too large by itself has its own."""
  shards, current, total = [], [], 0
  for name, tensor in tensors.items():
    size = _bytes(tensor)
    if size > limit:
      shards.append([name])
      continue
    if total + size > limit:
      shards.append(current)
      current, total = [], 0
    current.append(name)
    total += size
  return [*shards, current] if current else shards


def _index(shards: Mapping[str, Sequence[str]], tensors: Mapping[str, tuple]) -> str:
  """Text of diffusers' index of a sharded model."""
  where = {name: pathlib.PurePath(path).name for path, names in shards.items() for name in names}
  total = sum(_bytes(tensors[name]) for name in where)
  values = {'metadata': {'total_size': total}, 'weight_map': where}
  return json.dumps(values, indent=2, sort_keys=True) + '\n'


def write(directory: pathlib.Path, layout: str, parts: Sequence[Part], files: Files) -> None:
  """Fills files with the parts' tensors; the host holds one array at a time.

  Args:
    directory: where; what is there already is not overwritten.
    layout: of the files.
    parts: the components.
    files: what to write.

  Raises:
    UserError: if a file cannot be written.
    OSError: likewise, for an index.
  """
  writers = []
  try:
    for path, header in files.headers.items():
      writers.append(TensorWriter(directory / path, header))
    where = {name: writer for writer in writers for name in writer.tensors}
    for part in parts:
      rows = part.component.layouts[layout].rows(part.config)
      cells = {cell.path: cell for cell in table.cells(rows, part.component.counts(part.config))}
      for path, array in part.arrays():
        for name, first, piece in table.scatter(cells[path], array):
          where[name].write(name, first, piece)
        del array, piece  # Before the next one is made.
    for writer in writers:
      writer.finish()
  finally:
    for writer in writers:
      writer.close()
  for path, text in files.indices.items():
    (directory / path).write_text(text, encoding='utf-8')
