"""Attention on TPUs: JAX's splash kernel, forward and backward, with padding and a mesh around it.

The kernel never writes the scores to memory. It takes lengths that are multiples of its blocks, one
example at a time, on one device: this pads, maps over examples and over the mesh.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from eru_jax.models.attention_layout import Layout

# The kernel's tiles are this wide, and larger ones than the second do not fit a v5e's VMEM.
_LANES, _LARGEST = 128, 1024


def splash(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """`attention` by the splash kernel, split over the mesh in context, if any, as `Layout` says.

  Args:
    query, key, value, mask: as of `attention`.
    interpret: run the kernel without a TPU, slowly; for tests.

  Returns:
    (B, L, H, D) in the query's dtype. Of an example without any key, something finite.
  """
  layout = Layout.of(query.shape[2])
  scale = query.shape[3] ** -0.5
  query = (query.astype(jnp.float32) * scale).astype(query.dtype)
  if mask is None:
    mask = jnp.ones(key.shape[:2], bool)
  whole = (query, key, value, mask)
  if layout is None:
    return _local(*whole, interpret=interpret)
  # Each device takes as many examples and queries as any other: some of them may be padding.
  query, key, value, mask = (_padded(x, 0, layout.batch_size) for x in whole)
  query = _padded(query, 1, layout.query_size)
  mapped = jax.shard_map(
    lambda *parts: _local(*parts, interpret=interpret),
    in_specs=(layout.query, layout.key, layout.key, P(layout.key[0])),
    out_specs=layout.query,
    # The kernel does not say how its results vary over the mesh.
    check_vma=False,
  )
  return mapped(query, key, value, mask)[: whole[0].shape[0], : whole[0].shape[1]]


def block(length: int) -> int:
  """Rows of a tile for a length: large ones keep the matrix unit busy, padding is work in vain."""
  sizes = range(_LANES, _LARGEST + 1, _LANES)
  return min(sizes, key=lambda size: -(-length // size) * (size + _LANES))


def _local(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, interpret: bool
) -> jax.Array:
  """One device's share."""
  # Here, because it takes a while and only TPUs need it.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  length, heads = query.shape[1:3]
  rows, columns = block(length), block(key.shape[1])
  # Keys of padding are in no query's segment.
  query = _padded(query, 1, rows)
  key, value, mask = (_padded(x, 1, columns) for x in (key, value, mask))
  shape = (query.shape[1], key.shape[1])
  attend = kernel.make_splash_mha_single_device(
    masks.MultiHeadMask([masks.FullMask(shape)] * heads),
    block_sizes=kernel.BlockSizes(
      block_q=rows,
      block_kv=columns,
      block_q_dkv=rows,
      block_kv_dkv=columns,
      block_q_dq=rows,
      block_kv_dq=columns,
    ),
    interpret=interpret,
  )
  segments = kernel.SegmentIds(
    jnp.ones((query.shape[0], shape[0]), jnp.int32), mask.astype(jnp.int32)
  )
  heads_first = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  out = jax.vmap(attend)(*heads_first, segments)
  return jnp.swapaxes(out, 1, 2)[:, :length].astype(query.dtype)


def _padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
  """Zeros (or False) behind an axis, up to a multiple."""
  missing = -x.shape[axis] % multiple
  if not missing:
    return x
  return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
