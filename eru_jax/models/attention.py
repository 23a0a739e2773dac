"""Multi-head attention: one function, the backend picks the kernel."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
from absl import logging

from eru_jax.errors import UserError

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn')
# What cuDNN's fused attention takes on every GPU that has it.
_HEAD_MULTIPLE, _HEAD_MAXIMUM, _COMPUTE_CAPABILITY = 8, 128, (8, 0)


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
  implementation: str = 'auto',
) -> jax.Array:
  """Full (bidirectional) scaled dot-product attention, softmax in float32.

  Args:
    query: (B, L, H, D).
    key: (B, S, H, D).
    value: (B, S, H, D).
    mask: (B, S) bool, True where a key may be attended to, or None for all of them. Of an example
      without any, XLA returns the mean of all values and cuDNN zeros.
    implementation: 'xla' anywhere; 'cudnn' on NVIDIA GPUs in bfloat16 or float16; 'auto' picks
      cuDNN there and XLA everywhere else, with one warning where cuDNN lacks the shape or the GPU.

  Returns:
    (B, L, H, D) in the query's dtype.

  Raises:
    UserError: if the implementation is unknown.
  """
  if implementation not in IMPLEMENTATIONS:
    raise UserError(
      f'Unknown attention implementation {implementation!r}: choose one of {IMPLEMENTATIONS}.'
    )
  if implementation == 'auto':
    implementation = _choose(query)
  if implementation == 'cudnn':
    return _cudnn(query, key, value, mask)
  if mask is not None:
    mask = mask[:, None, None, :]
  return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation='xla')


def _choose(query: jax.Array) -> str:
  if query.dtype.itemsize != 2 or jax.default_backend() != 'gpu':
    return 'xla'
  head_dim, capability = query.shape[-1], _compute_capability()
  obstacle = None
  if capability is None:
    obstacle = 'the GPU is not one of NVIDIA'
  elif capability < _COMPUTE_CAPABILITY:
    found, needed = ('.'.join(map(str, pair)) for pair in (capability, _COMPUTE_CAPABILITY))
    obstacle = f'the GPU has compute capability {found}, below {needed}'
  elif head_dim % _HEAD_MULTIPLE or head_dim > _HEAD_MAXIMUM:
    obstacle = (
      f'heads have {head_dim} channels, not a multiple of {_HEAD_MULTIPLE} up to {_HEAD_MAXIMUM}'
    )
  if obstacle is None:
    return 'cudnn'
  _warn(obstacle)
  return 'xla'


def _compute_capability() -> tuple[int, ...] | None:
  """Of the first GPU; None if it is not NVIDIA's."""
  backend = jax.extend.backend.get_backend()
  if 'cuda' not in backend.platform_version:
    return None
  return tuple(int(part) for part in backend.local_devices()[0].compute_capability.split('.'))


@functools.cache
def _warn(obstacle: str) -> None:
  logging.warning(
    "Attention runs without cuDNN, since %s: XLA's is slower and keeps every score in memory.",
    obstacle,
  )


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
  lengths = None
  if mask is not None:
    # cuDNN takes a mask only as a bias on every score, (B, 1, L, S) and differentiated in vain, but
    # lengths for nothing. The order of the keys is free: those that count go first.
    order = jnp.argsort(~mask, axis=1, stable=True)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
    counts = jnp.arange(mask.shape[1]) < lengths[:, None]

    def arranged(x):
      x = jax.vmap(lambda rows, kept: rows.at[kept].get(unique_indices=True))(x, order)
      # A zero's gradient is zero, whatever the kernel leaves behind the last key.
      return jnp.where(counts[:, :, None, None], x, 0)

    key, value = arranged(key), arranged(value)
    lengths = jnp.maximum(lengths, 1)
  return jax.nn.dot_product_attention(
    query, key, value, key_value_seq_lengths=lengths, implementation='cudnn'
  )
