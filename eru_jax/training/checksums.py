"""Checksums of arrays that do not depend on how they are spread over devices and processes.

A checksum is a sum over elements, modulo 2^64, of the element's bits times an odd number that its
place in the whole array determines. So every process adds up what it holds, and a checkpoint that
four processes have written can be checked by one.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any
# Fractional part of the golden ratio, in 64 bits: neighbours get very different numbers.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
# Elements at a time, so that everything stays in the processor's cache.
_AT_ONCE = 1 << 16


def checksums(tree: PyTree) -> dict[str, str]:
  """The checksum of every leaf by its path, 16 hexadecimal digits, the same in every process.

  Every process must call it. Leaves that are no jax.Array must be the same everywhere.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  sums = np.array([_held(leaf) for _, leaf in leaves], np.uint64)
  if jax.process_count() > 1:
    # In halves, because JAX has no integers of 64 bits unless it is asked for them.
    parts = multihost_utils.process_allgather(sums.view(np.uint32))
    sums = parts.view(np.uint64).sum(axis=0, dtype=np.uint64)
  return {
    jax.tree_util.keystr(path): f'{total:016x}'
    for (path, _), total in zip(leaves, sums.tolist(), strict=True)
  }


def _held(leaf: Any) -> int:
  """What this process contributes; of several copies of a part, one counts."""
  if not isinstance(leaf, jax.Array):
    array = np.asarray(leaf)
    return _part(array, (0,) * array.ndim, array.shape) if jax.process_index() == 0 else 0
  total = 0
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      starts = tuple(part.start or 0 for part in shard.index)
      total += _part(np.asarray(shard.data), starts, leaf.shape)
  return total % 2**64


def _part(data: np.ndarray, starts: tuple[int, ...], shape: tuple[int, ...]) -> int:
  """The contribution of the part of an array of some shape that begins at `starts`."""
  if not data.size:
    return 0
  strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  # The last axes lie in one piece in the whole array, up to the first that is not whole here.
  columns, axis = 1, len(shape)
  while axis > 0 and (axis == len(shape) or data.shape[axis] == shape[axis]):
    axis -= 1
    columns *= data.shape[axis]
  places = np.array([sum(map(math.prod, zip(starts, strides, strict=True)))], np.uint64)
  for size, stride in zip(data.shape[:axis], strides, strict=False):
    places = np.add.outer(places, np.arange(size, dtype=np.uint64) * np.uint64(stride)).ravel()
  rows = len(places)
  bits = np.ascontiguousarray(data).view(f'u{data.dtype.itemsize}').reshape(rows, columns)
  wide, total = min(columns, _AT_ONCE), 0
  high = max(1, _AT_ONCE // wide)
  for left in range(0, columns, wide):
    across = np.arange(left, min(left + wide, columns), dtype=np.uint64)
    for top in range(0, rows, high):
      place = places[top : top + high, None] + across
      weight = place * _SPREAD
      weight ^= weight >> np.uint64(29)
      weight |= np.uint64(1)
      weight *= bits[top : top + high, left : left + wide]
      total += int(weight.sum(dtype=np.uint64))
  return total % 2**64
