"""Declarative tables between PyTorch's tensors and ours: one row a tensor, read both ways."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from eru_jax.errors import UserError

PyTree = Any
# Names of each kind a message lists before it only counts.
_LISTED = 10


@dataclasses.dataclass(frozen=True)
class Row:
  """One kind of tensor, in both namings.

  Attributes:
    torch: the reference's name; {i} and {j} count repeated layers.
    flax: our path. Counters that it lacks are stacked on leading axes; those it has make one
      array each.
    op: 'copy'; 'linear' swaps the two axes of a matrix; 'conv' turns OIHW into HWIO and back.
  """

  torch: str
  flax: str
  op: str = 'copy'


_TO_FLAX = {
  'copy': lambda x: x,
  'linear': lambda x: np.swapaxes(x, -1, -2),
  'conv': lambda x: np.transpose(x, (2, 3, 1, 0)),
}
_TO_TORCH = {
  'copy': lambda x: x,
  'linear': lambda x: np.swapaxes(x, -1, -2),
  'conv': lambda x: np.transpose(x, (3, 2, 0, 1)),
}


def _used(template: str, counts: Mapping[str, int]) -> list[str]:
  return [name for name in counts if '{' + name + '}' in template]


def _cells(row: Row, counts: Mapping[str, int]) -> Iterator[tuple[str, list[tuple[str, tuple]]]]:
  """Yields (flax path, [(torch name, position on the stacked axes)]) of a row."""
  stacked = [name for name in _used(row.torch, counts) if '{' + name + '}' not in row.flax]
  separate = [name for name in _used(row.flax, counts)]
  for fixed in itertools.product(*(range(counts[name]) for name in separate)):
    known = dict(zip(separate, fixed, strict=True))
    parts = [
      (row.torch.format(**known, **dict(zip(stacked, place, strict=True))), place)
      for place in itertools.product(*(range(counts[name]) for name in stacked))
    ]
    yield row.flax.format(**known), parts


def _listing(kind: str, names: Sequence[str]) -> str:
  more = f' and {len(names) - _LISTED} more' if len(names) > _LISTED else ''
  return f'{kind}: {", ".join(names[:_LISTED])}{more}'


def to_flax(
  tensors: Mapping[str, np.ndarray],
  rows: Sequence[Row],
  counts: Mapping[str, int],
  shapes: PyTree | None = None,
) -> dict[str, Any]:
  """Nested parameters out of named tensors.

  Args:
    tensors: the reference's tensors by name.
    rows: the table.
    counts: how often each counter runs, e.g. {'i': 19}.
    shapes: nested dict of arrays or ShapeDtypeStructs that the result must match, or None.

  Returns:
    Nested dict of arrays in the tensors' dtype.

  Raises:
    UserError: listing every missing, unexpected and wrong-shaped tensor.
  """
  wanted = None if shapes is None else traverse_util.flatten_dict(shapes, sep='/')
  flat, missing, wrong, seen = {}, [], [], set()
  for row in rows:
    for path, parts in _cells(row, counts):
      names = [name for name, _ in parts]
      seen.update(names)
      absent = [name for name in names if name not in tensors]
      missing += absent
      if absent:
        continue
      values = [tensors[name] for name in names]
      pairs = zip(names, values, strict=True)
      odd = [f'{name} {value.shape}' for name, value in pairs if value.shape != values[0].shape]
      if odd or values[0].ndim != {'linear': 2, 'conv': 4}.get(row.op, values[0].ndim):
        wrong += odd or [f'{names[0]} {values[0].shape}']
        continue
      values = [_TO_FLAX[row.op](value) for value in values]
      places = parts[-1][1]
      lead = tuple(last + 1 for last in places)
      flat[path] = np.stack(values).reshape(*lead, *values[0].shape) if lead else values[0]
      if wanted is not None and path in wanted and wanted[path].shape != flat[path].shape:
        wrong.append(f'{names[0]} {tensors[names[0]].shape}, for {path} {wanted[path].shape}')
  problems = []
  unexpected = sorted(set(tensors) - seen)
  for kind, names in (('missing', missing), ('unexpected', unexpected), ('wrong shape', wrong)):
    if names:
      problems.append(_listing(kind, names))
  if wanted is not None and not missing and set(wanted) != set(flat) and not wrong:
    problems.append(_listing('not in the table', sorted(set(wanted) ^ set(flat))))
  if problems:
    raise UserError(
      f'The weights do not fit this model ({"; ".join(problems)}): check that weights and '
      'config.json belong together.'
    )
  return traverse_util.unflatten_dict(flat, sep='/')


def to_torch(
  params: Mapping[str, Any], rows: Sequence[Row], counts: Mapping[str, int]
) -> dict[str, np.ndarray]:
  """The exact inverse of `to_flax`: named, contiguous tensors.

  Raises:
    UserError: if parameters are missing from the tree or not in the table.
  """
  flat = dict(traverse_util.flatten_dict(params, sep='/'))
  tensors, missing = {}, []
  for row in rows:
    for path, parts in _cells(row, counts):
      if path not in flat:
        missing.append(path)
        continue
      value = np.asarray(flat.pop(path))
      for name, place in parts:
        tensors[name] = np.asarray(_TO_TORCH[row.op](value[place]), order='C')
  if missing or flat:
    parts = [_listing(k, v) for k, v in (('missing', missing), ('unknown', sorted(flat))) if v]
    raise UserError(f'These parameters do not fit the weight table ({"; ".join(parts)}).')
  return tensors


def linear(torch: str, flax: str, bias: bool = True) -> list[Row]:
  """Rows of a linear layer."""
  rows = [Row(f'{torch}.weight', f'{flax}/kernel', 'linear')]
  return [*rows, Row(f'{torch}.bias', f'{flax}/bias')] if bias else rows


def conv(torch: str, flax: str) -> list[Row]:
  """Rows of a convolution."""
  return [
    Row(f'{torch}.weight', f'{flax}/kernel', 'conv'),
    Row(f'{torch}.bias', f'{flax}/bias'),
  ]


def norm(torch: str, flax: str, bias: bool = True) -> list[Row]:
  """Rows of a normalisation with scale and bias."""
  rows = [Row(f'{torch}.weight', f'{flax}/scale')]
  return [*rows, Row(f'{torch}.bias', f'{flax}/bias')] if bias else rows
