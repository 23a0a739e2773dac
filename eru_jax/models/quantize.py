"""Int8 storage of frozen kernels, one scale per output channel."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

PyTree = Any


def quantize_kernel(kernel: Any, axis: int = -2, xp: Any = jnp) -> tuple[Any, Any]:
  """Rounds a kernel to int8, symmetrically; an all-zero column keeps scale 1.

  Args:
    kernel: (..., in, out), or with `in` on another axis.
    axis: where `in` is.
    xp: jnp, or np for arrays that are to stay on the host.

  Returns:
    int8 of the kernel's shape, and the float32 scale of every column, without that axis.
  """
  kernel = kernel.astype(np.float32)
  largest = xp.max(xp.abs(kernel), axis=axis)
  # Products, which numpy and XLA round alike: XLA makes such of some quotients, but not of all.
  scale = xp.where(largest > 0, largest * np.float32(1 / 127), np.float32(1))
  return xp.round(kernel * xp.expand_dims(1 / scale, axis)).astype(np.int8), scale


def is_quantised(path: str, shape: tuple[int, ...], pattern: str) -> bool:
  """Whether `quantize` stores the parameter at a path as int8."""
  layer, _, leaf = path.rpartition('/')
  return leaf == 'kernel' and len(shape) in (2, 3) and re.search(pattern, layer) is not None


def quantize(params: PyTree, pattern: str = '.*') -> PyTree:
  """Stores matching Dense kernels as int8 beside a float32 `kernel_scale`.

  `Dense` multiplies by the scale after the product, so the int8 matrix is never expanded in
  memory by us.

  Args:
    params: parameters of a backbone, kernels (..., in, out).
    pattern: regular expression, searched in the layer's path.

  Returns:
    The parameters; matched layers hold an int8 `kernel` and `kernel_scale` (..., out).
  """
  out = {}
  for path, value in traverse_util.flatten_dict(params, sep='/').items():
    if is_quantised(path, value.shape, pattern):
      out[path], out[f'{path}_scale'] = quantize_kernel(value)
    else:
      out[path] = value
  return traverse_util.unflatten_dict(out, sep='/')
