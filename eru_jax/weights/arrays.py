"""Parameters as Orbax arrays: written group by group, restored straight into a mesh.

The only file besides `training/checkpoint.py` that names Orbax's API.
"""

import contextlib
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from eru_jax.errors import UserError, full_disk

# Arrays are written and read together until they come to this many bytes.
_GROUP = 1 << 28
# What is stored in one piece, so that a process that holds a shard reads little more than that.
_CHUNK = 1 << 26
# What Orbax raises when a file is missing, cut off or holds other bytes than it should.
_DAMAGE = (ValueError, KeyError, TypeError, EOFError, OSError)


def _context() -> ocp.Context:
  context = ocp.Context()
  context.array.saving.storage_options.chunk_byte_size = _CHUNK
  context.array.saving.use_compression = False
  context.pytree.loading.partial_load = True
  # Host arrays do not change while they are written: a copy would be one group more in memory.
  context.memory.deepcopy_host_arrays = False
  return context


def exists(directory: pathlib.Path) -> bool:
  """Whether parameters are stored there."""
  return directory.is_dir()


def _groups(items: Iterable[tuple[str, Any]], size: Any) -> Iterator[dict[str, Any]]:
  """Items of together at least `_GROUP` bytes, handed over before the next one is made."""
  group, total = {}, 0
  for path, item in items:
    group[path] = item
    total += size(item)
    del item
    if total >= _GROUP:
      yield group
      group, total = {}, 0
  if group:
    yield group


def save(directory: pathlib.Path, arrays: Iterable[tuple[str, Any]]) -> None:
  """Writes (path, array) one after the other; the directory appears when all are written.

  Raises:
    UserError: if they cannot be written.
  """
  try:
    with _context(), _quiet():
      for group in _groups(arrays, lambda array: array.nbytes):
        ocp.partial.save(directory, traverse_util.unflatten_dict(group, sep='/'))
        group.clear()
      ocp.partial.finalize(directory)
  except UserError:
    raise
  except Exception as error:
    reason = full_disk(error)
    if reason is None:
      raise
    raise UserError(f'{directory} cannot be written: {reason}.') from error


def specs(directory: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of the stored arrays, by path.

  Raises:
    UserError: if the directory is damaged.
  """
  return {
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in _leaves(directory).items()
  }


def _leaves(directory: pathlib.Path) -> dict[str, Any]:
  """Orbax's descriptions of the stored arrays, by path."""
  with _reading(directory):
    tree = ocp.metadata(directory).metadata
    if not isinstance(tree, dict):
      raise ValueError('what it holds is not described')
    leaves = traverse_util.flatten_dict(tree, sep='/')
    for path, leaf in leaves.items():
      if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
        raise ValueError(f'{path} is no array')
    return leaves


def load(
  directory: pathlib.Path, shardings: Mapping[str, jax.sharding.Sharding] | None = None
) -> Iterator[tuple[str, Any]]:
  """Yields (path, array).

  Args:
    directory: where they are stored.
    shardings: path -> where an array goes; None keeps them on the host, as numpy arrays.

  Raises:
    UserError: if a file is damaged or missing.
  """
  leaves = _leaves(directory)
  if shardings is not None:
    leaves = {
      path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
      for path, leaf in leaves.items()
    }

  def size(leaf: Any) -> int:
    return int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize

  for group in _groups(leaves.items(), size):
    with _reading(directory), _context():
      found = ocp.load(directory, traverse_util.unflatten_dict(group, sep='/'))
      jax.block_until_ready(found)
    yield from traverse_util.flatten_dict(found, sep='/').items()


@contextlib.contextmanager
def _reading(directory: pathlib.Path) -> Iterator[None]:
  try:
    with _quiet():
      yield
  except UserError:
    raise
  except _DAMAGE as error:
    reason = str(error).strip().partition('\n')[0][:200] or type(error).__name__
    raise UserError(f'{directory} is damaged ({reason}): convert the model again.') from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences Orbax's threads, which print the traceback of what they also raise."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.CRITICAL + 1)
  try:
    yield
  finally:
    logger.setLevel(level)
