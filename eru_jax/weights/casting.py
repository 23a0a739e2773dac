"""Casts of tensors that lose precision, and never a number."""

import ml_dtypes
import numpy as np

from eru_jax.errors import UserError


def fill(target: np.ndarray, values: np.ndarray, where: str) -> None:
  """Casts values into an array of their shape.

  Args:
    target: where to put them.
    values: they.
    where: what an error calls them.

  Raises:
    UserError: if a finite one would become infinite.
  """
  with np.errstate(over='ignore'):
    target[...] = values
  if _largest(target.dtype) >= _largest(values.dtype):
    return
  lost = ~np.isfinite(target) & np.isfinite(values)
  if lost.any():
    raise UserError(
      f'{where} holds {float(values[lost][0]):g}, which is too large for {target.dtype.name} (at '
      f'most {_largest(target.dtype):g}): choose another dtype.'
    )


def _largest(dtype: np.dtype) -> float:
  """The largest finite number of a floating type; of another, none is too large."""
  try:
    return float(ml_dtypes.finfo(dtype).max)
  except ValueError:
    return 0.0
