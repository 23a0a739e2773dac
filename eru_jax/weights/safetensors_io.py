"""Safetensors files: read whole or sharded, written so that nothing earlier is ever lost."""

import json
import os
import pathlib
from collections.abc import Mapping

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors.numpy needs)
import numpy as np
import safetensors
import safetensors.numpy

from eru_jax.errors import UserError
from eru_jax.files import replace_file


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads a .safetensors file, or all shards of a .safetensors.index.json.

  Args:
    path: the file; if it is absent but `<path>.index.json` is there, the shards of that.

  Returns:
    Name -> array, bfloat16 included.

  Raises:
    UserError: if a file is missing, truncated or corrupt, naming it.
  """
  path = pathlib.Path(path)
  index = path if path.name.endswith('.index.json') else path.with_name(f'{path.name}.index.json')
  if path != index and (path.is_file() or not index.is_file()):
    return _read_one(path)
  try:
    shards = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    names = sorted(set(shards.values()))
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f'{index} is not a readable safetensors index: {error}.') from error
  tensors: dict[str, np.ndarray] = {}
  for name in names:
    if not isinstance(name, str) or pathlib.PurePath(name).name != name:
      raise UserError(f'{index} names a shard outside its own directory: {name!r}.')
    tensors |= _read_one(index.with_name(name))
  lacking = sorted(set(shards) - set(tensors))
  if lacking:
    raise UserError(f'{index} promises {lacking[0]!r} (and {len(lacking) - 1} more), not found.')
  return tensors


def _read_one(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except FileNotFoundError:
    raise UserError(f'There is no weights file {path}.') from None
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error
  except (AttributeError, TypeError) as error:
    # So safetensors says that numpy lacks a dtype, for example the 8-bit ones.
    raise UserError(f'{path} holds numbers of a type that cannot be read ({error}).') from error
  except (safetensors.SafetensorError, ValueError, KeyError) as error:
    raise UserError(
      f'{path} is not a whole safetensors file ({error}): copy or download it again.'
    ) from error


def write_safetensors(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a file atomically: until it is whole, what was there before stays.

  Raises:
    UserError: if it cannot be written, for example because the disk is full.
  """
  # Not np.ascontiguousarray, which would give scalars an axis.
  contiguous = {name: np.asarray(value, order='C') for name, value in tensors.items()}
  data = safetensors.numpy.save(contiguous, dict(metadata) if metadata else None)
  replace_file(path, data)
