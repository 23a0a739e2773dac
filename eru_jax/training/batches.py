"""Batches as global arrays: every process reads the rows that its own devices hold, and no others.

All processes draw the same row numbers (`data.pipeline`), so nothing has to be sent around.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eru_jax import sharding

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of a table that are read where they are needed.

  Attributes:
    take: rows (B,) -> arrays with the batch first.
    rows: (B,) of the whole batch.
  """

  take: Callable[[np.ndarray], PyTree]
  rows: np.ndarray


def on_mesh(batch: PyTree, mesh: Mesh) -> PyTree:
  """Splits a batch over the mesh's batch axes.

  Args:
    batch: numpy arrays (B, ...) that are the same in every process, and `Rows`. Where the devices
      do not divide B, all of them hold all of it.
    mesh: the devices of all processes.
  """

  def place(part: Any) -> PyTree:
    if isinstance(part, Rows):
      return _read(part, mesh)
    part = np.asarray(part)
    where = batch_sharding(mesh, len(part))
    return jax.make_array_from_callback(part.shape, where, part.__getitem__)

  return jax.tree.map(place, batch, is_leaf=lambda part: isinstance(part, Rows))


def batch_sharding(mesh: Mesh, size: int) -> NamedSharding:
  """How arrays with a batch of this size in front lie on the mesh."""
  axes = dict(sharding.RULES)['batch']
  split = size % math.prod(mesh.shape[axis] for axis in axes) == 0
  return NamedSharding(mesh, P(axes) if split else P())


def _read(part: Rows, mesh: Mesh) -> PyTree:
  size = len(part.rows)
  where = batch_sharding(mesh, size)
  spans = where.addressable_devices_indices_map((size,)).values()
  bounds = sorted({span.indices(size)[:2] for (span,) in spans})
  held = np.concatenate([np.arange(*bound) for bound in bounds])
  arrays = part.take(part.rows[held])

  def assemble(array: np.ndarray) -> jax.Array:
    def piece(index: tuple[slice, ...]) -> np.ndarray:
      first, last, _ = index[0].indices(size)
      at = int(np.searchsorted(held, first))
      return array[(slice(at, at + last - first), *index[1:])]

    return jax.make_array_from_callback((size, *array.shape[1:]), where, piece)

  return jax.tree.map(lambda x: assemble(np.asarray(x)), arrays)
