"""Parameters as Orbax arrays: written group by group, restored straight into a mesh.

The only file besides `training/checkpoint.py` that names Orbax's API.
"""

import contextlib
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from eru_jax.errors import UserError, full_disk
from eru_jax.files import replace_file
from eru_jax.weights.snapshot import read_json

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
  """Writes (path, array) one after the other; the directory appears when all are written, and the
  file of their checksums beside it.

  Raises:
    UserError: if they cannot be written.
  """
  directory = directory.absolute()  # Orbax describes nothing that is named from elsewhere.
  sums: dict[str, int] = {}

  def summed() -> Iterator[tuple[str, Any]]:
    for path, array in arrays:
      sums[path] = _checksum(array)
      yield path, array
      del array  # before the next one is made

  try:
    with _context(), _quiet():
      for group in _groups(summed(), lambda array: array.nbytes):
        ocp.partial.save(directory, traverse_util.unflatten_dict(group, sep='/'))
        group.clear()
      ocp.partial.finalize(directory)
    replace_file(_sums_path(directory), json.dumps(sums, indent=1).encode())
  except UserError:
    raise
  except Exception as error:
    reason = full_disk(error)
    if reason is None:
      raise
    raise UserError(f'{directory} cannot be written: {reason}.') from error


def _sums_path(directory: pathlib.Path) -> pathlib.Path:
  return directory.with_name(f'{directory.name}.json')


def _checksum(array: np.ndarray | jax.Array) -> int:
  """The sum of an array's words as natural numbers, modulo 2^32.

  It knows no order, so that devices add up what each of them holds, and strides do not matter.
  """
  if isinstance(array, jax.Array):
    return int(jax.device_get(_device_sum(array)))
  words = array.view(f'uint{8 * array.itemsize}')
  if words.itemsize > 4:
    words = (words & 0xFFFFFFFF) + (words >> 32)
  return int(words.sum(dtype=np.uint64)) % (1 << 32)


@jax.jit
def _device_sum(array: jax.Array) -> jax.Array:
  words = jax.lax.bitcast_convert_type(array, jnp.dtype(f'uint{8 * array.dtype.itemsize}'))
  return jnp.sum(words, dtype=jnp.uint32)


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
  directory = directory.absolute()
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
    UserError: if a file is damaged or missing, or holds other bytes than were written.
  """
  directory = directory.absolute()
  leaves = _leaves(directory)
  # Earlier versions did not write them.
  sums = read_json(_sums_path(directory)) if _sums_path(directory).exists() else None
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
      found = traverse_util.flatten_dict(found, sep='/')
      for path, array in found.items() if sums is not None else ():
        # An array of 64 bits is of 32 on a device.
        if array.dtype == group[path].dtype and sums.get(path) != _checksum(array):
          raise ValueError(f'the bytes of {path} have changed')
    yield from found.items()


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
