"""Int8 storage of frozen kernels, one scale per output channel."""

import re
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

PyTree = Any


def quantize(params: PyTree, pattern: str = '.*') -> PyTree:
  """Stores matching Dense kernels as int8 beside a float32 `kernel_scale`.

  `Dense` multiplies by the scale after the product, so the int8 matrix is never expanded in
  memory by us. Symmetric rounding; an all-zero column keeps scale 1.

  Args:
    params: parameters of a backbone, kernels (..., in, out).
    pattern: regular expression, searched in the layer's path.

  Returns:
    The parameters; matched layers hold an int8 `kernel` and `kernel_scale` (..., out).
  """
  out = {}
  for path, value in traverse_util.flatten_dict(params, sep='/').items():
    layer, _, leaf = path.rpartition('/')
    if leaf == 'kernel' and value.ndim in (2, 3) and re.search(pattern, layer):
      largest = jnp.max(jnp.abs(value.astype(jnp.float32)), axis=-2)
      scale = jnp.where(largest > 0, largest / 127, 1.0)
      out[path] = jnp.round(value / scale[..., None, :]).astype(jnp.int8)
      out[f'{layer}/kernel_scale'] = scale
    else:
      out[path] = value
  return traverse_util.unflatten_dict(out, sep='/')
