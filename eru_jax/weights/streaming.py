"""Weights from safetensors files straight into arrays, one stacked group of layers at a time.

On the host there is never more than one of our arrays (a stack of one kind of kernel over all
blocks: at most 3.6 GB of FLUX.1's 24) beside what was asked for, and of that only the part that
this process's devices hold.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from eru_jax.errors import UserError
from eru_jax.models.quantize import is_quantised, quantize_kernel
from eru_jax.weights import table
from eru_jax.weights.table import Cell, Index, Row
from eru_jax.weights.tensor_files import CHUNK, TensorFiles

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Stored:
  """Tensors in files, and the table that makes our parameters of them.

  Attributes:
    files: the files.
    rows, counts: the table.
    shapes: nested dict of ShapeDtypeStructs, the parameters wanted.
    cast: dtype to cast to on the way; None keeps that of the files.
    int8: regular expression; kernels of layers whose path it is found in become int8 beside a
      `kernel_scale`, as `models.quantize.quantize` makes them. None: no kernel.
    prefix: of all names of the model; tensors with other names are none of its.
  """

  files: TensorFiles
  rows: Sequence[Row]
  counts: Mapping[str, int]
  shapes: PyTree
  cast: Any = None
  int8: str | None = None
  prefix: str = ''

  def check(self) -> None:
    """Compares the files' headers with the table.

    Raises:
      UserError: naming the file and every tensor that is missing, too many, of another shape or
        dtype.
    """
    found = {
      name: tensor for name, tensor in self.files.tensors.items() if name.startswith(self.prefix)
    }
    try:
      table.check(found, self.rows, self.counts, self.shapes, cast=self.cast is not None)
    except UserError as error:
      raise error.at(self.files.path) from error

  def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the arrays that `arrays` yields, by path and in its order.

    Raises:
      UserError: as `check`.
    """
    return {path: spec for path, spec, _, _ in self._plan()}

  def arrays(
    self, shardings: Mapping[str, jax.sharding.Sharding] | None = None
  ) -> Iterator[tuple[str, Any]]:
    """Yields (path, array), having checked all headers before it reads the first tensor.

    Args:
      shardings: path -> where an array goes; None keeps them on the host, as numpy arrays.
        The scales of an int8 kernel follow the kernel.

    Raises:
      UserError: as `check`, or if a file becomes unreadable meanwhile.
    """
    for path, spec, cell, read in self._plan():
      if shardings is None:
        yield path, table.gather(cell, table.full(spec.shape), spec.dtype, read)
      else:
        sharding = sharding_of(path, len(spec.shape), shardings)
        yield path, _placed(cell, spec, sharding, read)

  def _plan(self) -> Iterator[tuple[str, jax.ShapeDtypeStruct, Cell, table.ReadInto]]:
    """(path, what it is, its cell, how its tensors are read) of every array."""
    self.check()
    shapes = traverse_util.flatten_dict(self.shapes, sep='/')
    for cell in table.cells(self.rows, self.counts):
      path, shape = cell.path, tuple(shapes[cell.path].shape)
      if self.int8 is None or not is_quantised(path, shape, self.int8):
        dtype = self.cast or self.files.tensors[cell.parts[0][0]].dtype
        yield path, jax.ShapeDtypeStruct(shape, dtype), cell, self.files.read_into
        continue
      reader = _Int8Reader(self.files)
      yield path, jax.ShapeDtypeStruct(shape, np.int8), cell, reader.kernel
      path, row = f'{path}_scale', dataclasses.replace(cell.row, op='copy')
      scale = dataclasses.replace(cell, row=row, path=path)
      spec = jax.ShapeDtypeStruct((*shape[:-2], shape[-1]), np.float32)
      yield path, spec, scale, reader.scale


def narrowed(stored: Stored, dtype: Any) -> Stored:
  """The same, cast to a dtype on the way if any of the tensors is wider than that."""
  wider = any(x.dtype.itemsize > np.dtype(dtype).itemsize for x in stored.files.tensors.values())
  return dataclasses.replace(stored, cast=dtype) if wider else stored


class _Int8Reader:
  """Reads kernels as int8: rows of the reference's matrix are output channels, so that any of them
  can be rounded alone, from whole rows only."""

  def __init__(self, files: TensorFiles):
    self._files = files
    self._scales: dict[tuple[str, int, int], np.ndarray] = {}

  def _rounded(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    size = self._files.tensors[name].shape[1]
    values = np.empty((stop - start, size), np.float32)
    self._files.read_into(name, (slice(start, stop), slice(0, size)), values)
    kernel, scale = quantize_kernel(values, axis=1, xp=np)
    self._scales[name, start, stop] = scale
    return kernel, scale

  def _chunks(self, name: str, rows: slice) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // (4 * max(1, self._files.tensors[name].shape[1])))
    for start in range(rows.start, rows.stop, step):
      yield start, min(start + step, rows.stop)

  def kernel(self, name: str, index: Index, out: np.ndarray) -> None:
    rows, columns = index
    for start, stop in self._chunks(name, rows):
      out[start - rows.start : stop - rows.start] = self._rounded(name, start, stop)[0][:, columns]

  def scale(self, name: str, index: Index, out: np.ndarray) -> None:
    """The scales, found when the kernel was read where the same rows were wanted of that."""
    (rows,) = index
    for start, stop in self._chunks(name, rows):
      known = self._scales.get((name, start, stop))
      scale = self._rounded(name, start, stop)[1] if known is None else known
      out[start - rows.start : stop - rows.start] = scale


def sharding_of(
  path: str, ndim: int, shardings: Mapping[str, jax.sharding.Sharding]
) -> jax.sharding.Sharding:
  """Where a parameter goes; scales (..., out) go where their int8 kernel (..., in, out) does."""
  if path in shardings:
    return shardings[path]
  kernel = shardings[path.removesuffix('_scale')]
  if not isinstance(kernel, NamedSharding):
    return kernel
  *lead, _, out = (*kernel.spec, *[None] * (ndim + 1 - len(kernel.spec)))
  return NamedSharding(kernel.mesh, P(*lead, out))


def _placed(
  cell: Cell, spec: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, read: table.ReadInto
) -> jax.Array:
  """One array on the devices; the host's copy is gone when this returns."""
  parts: dict[tuple, np.ndarray] = {}

  def part(index: tuple[slice, ...]) -> np.ndarray:
    bounds = tuple(i.indices(size)[:2] for i, size in zip(index, spec.shape, strict=True))
    if bounds not in parts:  # Several devices may hold the same part.
      whole = tuple(slice(*bound) for bound in bounds)
      parts[bounds] = table.gather(cell, whole, spec.dtype, read)
    return parts[bounds]

  array = jax.make_array_from_callback(spec.shape, sharding, part)
  # Transfers are asynchronous, and what they leave behind on the host goes with the next one: not
  # waiting for both, the next array would be read beside this one.
  jax.block_until_ready(array)
  parts.clear()
  jax.device_put(np.zeros(()))
  return array


def load(
  stored: Stored, shardings: Mapping[str, jax.sharding.Sharding] | None = None
) -> dict[str, Any]:
  """All parameters, as a nested dict.

  Args:
    stored: the tensors.
    shardings: as of `Stored.arrays`.

  Raises:
    UserError: as `Stored.arrays`.
  """
  return traverse_util.unflatten_dict(dict(stored.arrays(shardings)), sep='/')
