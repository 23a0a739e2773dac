"""Multi-head attention: one function, the backend picks the kernel."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name

from eru_jax.errors import UserError
from eru_jax.models import attention_layout
from eru_jax.models.splash import splash

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn', 'splash')
# What cuDNN's fused attention takes on every GPU that has it; the first holds for TPUs, too.
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
      without any, XLA returns the mean of all values, cuDNN zeros and splash something finite.
    implementation: 'xla' anywhere; 'cudnn' on NVIDIA GPUs in bfloat16 or float16; 'splash' on TPUs.
      'auto' picks cuDNN and splash there in 16 bits, and XLA everywhere else (float32 products
      stay exact with it), with one warning where a kernel lacks the shape or the GPU. What the
      program runs on is told by the mesh in context, which may be of machines that are not here.

  On a mesh, examples are split over `data` and `fsdp`, heads over `tensor`, and what `sequence`
  splits as `attention_layout` says.

  Returns:
    (B, L, H, D) in the query's dtype. Checkpointing knows it as 'attn_output', but for cuDNN's,
    which it knows by its primitive (`stack.REMAT_POLICIES`): by both it would be kept twice.

  Raises:
    UserError: if the implementation is unknown.
  """
  if implementation not in IMPLEMENTATIONS:
    raise UserError(
      f'Unknown attention implementation {implementation!r}: choose one of {IMPLEMENTATIONS}.'
    )
  if implementation == 'auto':
    implementation = _choose(query)
  query, key, value = attention_layout.place(query, key, value)
  if implementation == 'splash':
    return splash(query, key, value, mask)
  if implementation == 'cudnn':
    return _cudnn(query, key, value, mask)
  if mask is not None:
    mask = mask[:, None, None, :]
  out = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation='xla')
  return checkpoint_name(out, 'attn_output')


def _platform() -> str:
  """'cpu', 'gpu' or 'tpu': of the mesh in context, else of this process."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return jax.default_backend()
  return {'cuda': 'gpu', 'rocm': 'gpu'}.get(device.platform, device.platform)


def _choose(query: jax.Array) -> str:
  platform, head_dim = _platform(), query.shape[-1]
  if query.dtype.itemsize != 2 or platform not in ('gpu', 'tpu'):
    return 'xla'
  if platform == 'tpu':
    if head_dim % _HEAD_MULTIPLE == 0:
      return 'splash'
    _warn('splash', f'heads have {head_dim} channels, not a multiple of {_HEAD_MULTIPLE}')
    return 'xla'
  capability, obstacle = _compute_capability(), None
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
  _warn('cuDNN', obstacle)
  return 'xla'


def _compute_capability() -> tuple[int, ...] | None:
  """Of the first GPU; None if it is not NVIDIA's."""
  backend = jax.extend.backend.get_backend()
  if 'cuda' not in backend.platform_version:
    return None
  return tuple(int(part) for part in backend.local_devices()[0].compute_capability.split('.'))


@functools.cache
def _warn(kernel: str, obstacle: str) -> None:
  logging.warning(
    "Attention runs without %s, since %s: XLA's is slower and keeps every score in memory.",
    kernel,
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
