"""Declarative tables between PyTorch's tensors and ours: one row a tensor, read both ways."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from eru_jax.errors import UserError, listed

PyTree = Any
Index = tuple[slice, ...]
# (tensor, index into it, where to put what is there)
ReadInto = Callable[[str, Index, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Row:
  """One kind of tensor, in both namings.

  Attributes:
    torch: the reference's name; {i} and {j} count repeated layers.
    flax: our path. Counters that it lacks are stacked on leading axes; those it has make one
      array each.
    op: 'copy'; 'linear' swaps the two axes of a matrix; 'pointwise' makes a matrix of a 1x1
      convolution; 'conv' turns OIHW into HWIO and back.
    ranges: (start, stop) along the first axis of the reference's tensor; one after the other they
      are our array. Several rows may share a tensor then, as query, key and value do where the
      reference has them fused. Empty: the whole tensor.
  """

  torch: str
  flax: str
  op: str = 'copy'
  ranges: tuple[tuple[int, int], ...] = ()


# For each axis of the reference's tensor, ours; axes of size 1 that we lack follow.
_AXES = {'linear': (1, 0), 'pointwise': (1, 0), 'conv': (3, 2, 0, 1)}
_EXTRA_AXES = {'pointwise': 2}
_RANKS = {'linear': 2, 'pointwise': 4, 'conv': 4}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One of our arrays, and the tensors it is made of.

  Attributes:
    row: the row of the table that it comes from.
    path: our path, counters filled in.
    parts: (name of a tensor, its position on the stacked axes).
    lead: sizes of the stacked axes.
  """

  row: Row
  path: str
  parts: tuple[tuple[str, tuple[int, ...]], ...]
  lead: tuple[int, ...]


def _used(template: str, counts: Mapping[str, int]) -> list[str]:
  return [name for name in counts if '{' + name + '}' in template]


def cells(rows: Sequence[Row], counts: Mapping[str, int]) -> list[Cell]:
  """All our arrays, in the table's order."""
  found = []
  for row in rows:
    stacked = [name for name in _used(row.torch, counts) if '{' + name + '}' not in row.flax]
    separate = _used(row.flax, counts)
    lead = tuple(counts[name] for name in stacked)
    for fixed in itertools.product(*(range(counts[name]) for name in separate)):
      known = dict(zip(separate, fixed, strict=True))
      parts = tuple(
        (row.torch.format(**known, **dict(zip(stacked, place, strict=True))), place)
        for place in itertools.product(*map(range, lead))
      )
      found.append(Cell(row, row.flax.format(**known), parts, lead))
  return found


def names(rows: Sequence[Row], counts: Mapping[str, int]) -> list[str]:
  """The reference's tensors, layer by layer: the order of its state_dict, if the rows have it."""
  found: dict[str, None] = {}
  for used, group in itertools.groupby(rows, key=lambda row: _used(row.torch, counts)):
    group = list(group)
    for place in itertools.product(*(range(counts[name]) for name in used)):
      known = dict(zip(used, place, strict=True))
      found |= dict.fromkeys(row.torch.format(**known) for row in group)
  return list(found)


def prefixed(rows: Sequence[Row], prefix: str) -> list[Row]:
  """The same table for tensors whose names begin with a prefix."""
  return [dataclasses.replace(row, torch=prefix + row.torch) for row in rows]


def _order(op: str, ndim: int) -> tuple[int, ...]:
  return _AXES.get(op, tuple(range(ndim)))


def _lengths(rows: Sequence[Row]) -> dict[str, int]:
  """First axis of tensors that rows take ranges of, by their names in the rows."""
  found: dict[str, int] = {}
  for row in rows:
    for _, stop in row.ranges:
      found[row.torch] = max(stop, found.get(row.torch, 0))
  return found


def _torch_shape(cell: Cell, shape: Sequence[int], lengths: Mapping[str, int]) -> tuple[int, ...]:
  """Shape of the reference's tensors, out of that of our array."""
  row, inner = cell.row, shape[len(cell.lead) :]
  first, *rest = [inner[axis] for axis in _order(row.op, len(inner))] or [None]
  if first is None:
    return ()
  return (lengths.get(row.torch, first), *rest, *[1] * _EXTRA_AXES.get(row.op, 0))


def torch_shapes(
  rows: Sequence[Row], counts: Mapping[str, int], shapes: PyTree
) -> dict[str, tuple[int, ...]]:
  """Shapes of the reference's tensors, in the order of `names`.

  Args:
    rows, counts: the table.
    shapes: nested dict of arrays or ShapeDtypeStructs, our parameters.
  """
  flat, lengths = traverse_util.flatten_dict(shapes, sep='/'), _lengths(rows)
  found = {}
  for cell in cells(rows, counts):
    shape = _torch_shape(cell, flat[cell.path].shape, lengths)
    found |= dict.fromkeys((name for name, _ in cell.parts), shape)
  return {name: found[name] for name in names(rows, counts)}


def check(
  found: Mapping[str, Any],
  rows: Sequence[Row],
  counts: Mapping[str, int],
  shapes: PyTree | None = None,
  cast: bool = False,
) -> None:
  """Compares tensors, or what a file's header says of them, with a table.

  Args:
    found: the reference's tensors by name; anything with `shape` and `dtype`.
    rows: the table.
    counts: how often each counter runs, e.g. {'i': 19}.
    shapes: nested dict of arrays or ShapeDtypeStructs that the result must match, or None.
    cast: whether the tensors will be cast to one dtype, so that theirs may differ.

  Raises:
    UserError: listing every missing, unexpected, wrong-shaped and wrong-typed tensor.
  """
  wanted = None if shapes is None else traverse_util.flatten_dict(shapes, sep='/')
  lengths, seen = _lengths(rows), set()
  problems: dict[str, dict[str, None]] = {
    kind: {} for kind in ('missing', 'unexpected', 'wrong shape', 'wrong dtype')
  }
  table = cells(rows, counts)
  for cell in table:
    present = [name for name, _ in cell.parts if name in found]
    seen.update(name for name, _ in cell.parts)
    problems['missing'] |= dict.fromkeys(name for name, _ in cell.parts if name not in found)
    if not present:
      continue
    first = found[present[0]]
    expected, rank = tuple(first.shape), _RANKS.get(cell.row.op, len(first.shape))
    if wanted is not None and cell.path in wanted:
      expected = _torch_shape(cell, tuple(wanted[cell.path].shape), lengths)
    elif cell.row.torch in lengths:
      expected = (lengths[cell.row.torch], *expected[1:])
    for name in present:
      shape, dtype = tuple(found[name].shape), np.dtype(found[name].dtype)
      if shape != expected:
        problems['wrong shape'][f'{name} {shape} instead of {expected}'] = None
      elif len(shape) != rank:
        problems['wrong shape'][f'{name} {shape} instead of {rank} axes'] = None
      if not _is_float(dtype):
        problems['wrong dtype'][f'{name} {dtype}, which is no floating point'] = None
      elif dtype != first.dtype and not cast:
        problems['wrong dtype'][f'{name} {dtype}, but {present[0]} {first.dtype}'] = None
  problems['unexpected'] = dict.fromkeys(sorted(set(found) - seen))
  paths = {cell.path for cell in table}
  if wanted is not None and not any(problems.values()) and set(wanted) != paths:
    problems['not in the table'] = dict.fromkeys(sorted(set(wanted) ^ paths))
  if any(problems.values()):
    raise UserError(
      'The weights do not fit this model: check that they and config.json belong together.',
      listed(problems),
    )


def _is_float(dtype: np.dtype) -> bool:
  # numpy files bfloat16 and the float8s under 'V', of which ml_dtypes alone has finfo.
  return dtype.kind == 'f' or (dtype.kind == 'V' and 'float' in dtype.name)


def _pieces(ranges: tuple[tuple[int, int], ...], start: int, stop: int) -> Iterator[tuple]:
  """(slice of ours counted from `start`, slice of the reference's) for start:stop of our axis."""
  before = 0
  for first, last in ranges or ((0, stop),):
    low, high = max(start, before), min(stop, before + last - first)
    if low < high:
      yield slice(low - start, high - start), slice(first + low - before, first + high - before)
    before += last - first


def gather(cell: Cell, index: Index, dtype: Any, read: ReadInto) -> np.ndarray:
  """A part of one of our arrays.

  Args:
    cell: the array.
    index: a slice of each of its axes, with start and stop.
    dtype: of the result.
    read: read(name, index, out) puts what is at an index of one of the reference's tensors into
      a C-contiguous array, cast to its dtype.

  Returns:
    That part, in general as a transposed view: nothing is moved but once, by `read`.
  """
  lead, inner = index[: len(cell.lead)], index[len(cell.lead) :]
  order, extra = _order(cell.row.op, len(inner)), _EXTRA_AXES.get(cell.row.op, 0)
  theirs = [inner[axis] for axis in order]
  shape = [part.stop - part.start for part in (*lead, *theirs)]
  out = np.empty(shape, dtype)
  for name, place in cell.parts:
    if not all(part.start <= at < part.stop for at, part in zip(place, lead, strict=True)):
      continue
    at = tuple(at - part.start for at, part in zip(place, lead, strict=True))
    whole = out[(*at, ..., *[None] * extra)]
    if not theirs:
      read(name, (), whole)
      continue
    first, *rest = theirs
    for mine, where in _pieces(cell.row.ranges, first.start, first.stop):
      read(name, (where, *rest, *[slice(0, 1)] * extra), whole[mine])
  depth = len(lead)
  back = [depth + axis for axis in np.argsort(order)]
  return out.transpose(*range(depth), *back)


def scatter(cell: Cell, value: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
  """The reference's tensors out of one of our arrays, the inverse of `gather`.

  Yields:
    (name, first row, rows): views of `value` in the reference's layout. A tensor comes in as many
    pieces as the table cuts it into.
  """
  order = _order(cell.row.op, value.ndim - len(cell.lead))
  extra = [None] * _EXTRA_AXES.get(cell.row.op, 0)
  for name, place in cell.parts:
    part = value[(*place, ...)].transpose(order)[(..., *extra)]
    start = 0
    for first, last in cell.row.ranges or ((0, part.shape[0] if part.ndim else 0),):
      yield name, first, part[start : start + last - first] if part.ndim else part
      start += last - first


def full(shape: Sequence[int]) -> Index:
  """The index of a whole array."""
  return tuple(slice(0, size) for size in shape)


def flax_shape(cell: Cell, found: Mapping[str, Any]) -> tuple[int, ...]:
  """Shape of one of our arrays, out of the tensors it is made of."""
  shape = tuple(found[cell.parts[0][0]].shape)
  if cell.row.ranges:
    shape = (sum(stop - start for start, stop in cell.row.ranges), *shape[1:])
  order = _order(cell.row.op, len(shape) - _EXTRA_AXES.get(cell.row.op, 0))
  return (*cell.lead, *(shape[axis] for axis in np.argsort(order)))


def to_flax(
  tensors: Mapping[str, np.ndarray],
  rows: Sequence[Row],
  counts: Mapping[str, int],
  shapes: PyTree | None = None,
) -> dict[str, Any]:
  """Nested parameters out of named tensors.

  Args:
    tensors: the reference's tensors by name.
    rows, counts: the table.
    shapes: nested dict of arrays or ShapeDtypeStructs that the result must match, or None.

  Returns:
    Nested dict of new arrays in the tensors' dtype.

  Raises:
    UserError: as `check`.
  """
  check(tensors, rows, counts, shapes)

  def read(name: str, index: Index, out: np.ndarray) -> None:
    out[...] = tensors[name][index]

  flat = {}
  for cell in cells(rows, counts):
    dtype = tensors[cell.parts[0][0]].dtype
    flat[cell.path] = gather(cell, full(flax_shape(cell, tensors)), dtype, read)
  return traverse_util.unflatten_dict(flat, sep='/')


def to_torch(
  params: Mapping[str, Any], rows: Sequence[Row], counts: Mapping[str, int]
) -> dict[str, np.ndarray]:
  """The exact inverse of `to_flax`: named, contiguous tensors.

  Raises:
    UserError: if parameters are missing from the tree or not in the table.
  """
  flat, lengths = traverse_util.flatten_dict(params, sep='/'), _lengths(rows)
  table = cells(rows, counts)
  missing = [cell.path for cell in table if cell.path not in flat]
  unknown = sorted(set(flat) - {cell.path for cell in table})
  if missing or unknown:
    raise UserError(
      'These parameters do not fit the weight table of this model: take those that belong to it.',
      listed({'missing': missing, 'unknown': unknown}),
    )
  tensors: dict[str, np.ndarray] = {}
  for cell in table:
    for name, first, part in scatter(cell, np.asarray(flat[cell.path])):
      if not cell.row.ranges:
        tensors[name] = np.asarray(part, order='C')
        continue
      if name not in tensors:
        tensors[name] = np.empty((lengths[cell.row.torch], *part.shape[1:]), part.dtype)
      tensors[name][first : first + len(part)] = part
  return tensors


def linear(
  torch: str, flax: str, bias: bool = True, ranges: tuple[tuple[int, int], ...] = ()
) -> list[Row]:
  """Rows of a linear layer, whose output channels are `ranges` of the reference's."""
  rows = [Row(f'{torch}.weight', f'{flax}/kernel', 'linear', ranges)]
  return [*rows, Row(f'{torch}.bias', f'{flax}/bias', 'copy', ranges)] if bias else rows


def conv(torch: str, flax: str) -> list[Row]:
  """Rows of a convolution."""
  return [
    Row(f'{torch}.weight', f'{flax}/kernel', 'conv'),
    Row(f'{torch}.bias', f'{flax}/bias'),
  ]


def pointwise(torch: str, flax: str) -> list[Row]:
  """Rows of a linear layer that the reference has as a 1x1 convolution."""
  return [
    Row(f'{torch}.weight', f'{flax}/kernel', 'pointwise'),
    Row(f'{torch}.bias', f'{flax}/bias'),
  ]


def norm(torch: str, flax: str, bias: bool = True) -> list[Row]:
  """Rows of a normalisation with scale and bias."""
  rows = [Row(f'{torch}.weight', f'{flax}/scale')]
  return [*rows, Row(f'{torch}.bias', f'{flax}/bias')] if bias else rows
