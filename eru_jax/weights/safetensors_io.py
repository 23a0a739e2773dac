"""Small safetensors files: read whole, written so that nothing earlier is ever lost."""

import os
from collections.abc import Mapping

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors.numpy needs)
import numpy as np
import safetensors.numpy

from eru_jax.files import replace_file
from eru_jax.weights.tensor_files import TensorFiles


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads a .safetensors file, or all shards of a .safetensors.index.json.

  Args:
    path: the file; if it is absent but `<path>.index.json` is there, the shards of that.

  Returns:
    Name -> array, bfloat16 included.

  Raises:
    UserError: if a file is missing, truncated or corrupt, naming it.
  """
  files = TensorFiles(path)
  return {name: files.read(name) for name in files.tensors}


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
