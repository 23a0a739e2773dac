"""Layers every backbone shares: Dense (LoRA- and int8-aware), norms, embeddings, taps."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., jax.Array]


class Dense(nn.Module):
  """A linear layer over the last axis that also knows adapters and int8 storage.

  Both are read from the variables at hand, so a model needs no configuration for either:
    - collection `lora`, if given, may hold `a` (in, r), `b` (r, out) and `scale` () or (B,) at
      this layer's path. The layer then adds `scale * (x @ a) @ b`. The product a @ b is never
      formed: its gradient would have the full kernel's size. A scale of shape (B,) gates the
      adapter per example, so that a teacher (0) and a student (1) share one batch.
    - a parameter `kernel_scale` (out,) beside an int8 `kernel` marks a quantised kernel,
      dequantised after the product.

  Attributes:
    features: size of the output axis.
    use_bias: whether to add a bias.
    axes: logical axis names of the kernel, (in, out), for `eru_jax.sharding`.
    dtype: dtype of the computation; parameters are cast to it.
    param_dtype: dtype parameters are created in.
    kernel_init: initializer of the kernel.
  """

  features: int
  use_bias: bool = True
  axes: tuple[str | None, str | None] = ('embed', 'mlp')
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., in) to (..., features)."""
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(self.kernel_init, self.axes),
      (x.shape[-1], self.features),
      self.param_dtype,
    )
    x = _whole(x.astype(self.dtype), self.axes[0])
    y = _whole(_matmul(x, kernel.astype(self.dtype)), self.axes[1])
    if self.has_variable('params', 'kernel_scale'):
      # Rounded to bfloat16, a scale would add half as much error again as the kernel's int8 has.
      scale = self.get_variable('params', 'kernel_scale').astype(jnp.float32)
      y = (y.astype(jnp.float32) * scale).astype(self.dtype)
    if self.has_variable('lora', 'a'):
      a, b, scale = (self.get_variable('lora', name) for name in ('a', 'b', 'scale'))
      delta = _matmul(_matmul(x, a.astype(self.dtype)), b.astype(self.dtype))
      scale = scale.reshape(scale.shape + (1,) * (y.ndim - scale.ndim)) if scale.ndim else scale
      y = y + scale.astype(self.dtype) * delta
    if self.use_bias:
      bias = self.param(
        'bias',
        nn.with_logical_partitioning(nn.initializers.zeros, (self.axes[1],)),
        (self.features,),
        self.param_dtype,
      )
      y = y + bias.astype(self.dtype)
    return y


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x (..., in) @ kernel (in, out), over a single axis of rows where no mesh splits them.

  XLA's CPU backend computes the gradient of a kernel from x transposed. Of x with several axes it
  writes that copy, and computes once more in it whatever elementwise chain made x, which through
  the residual stream is every earlier block's: a sixth of a training step. A GPU sees the same
  product either way, and so does a TPU at lengths divisible by 8; on a mesh, where merging split
  axes would move data between devices, x stays as it is.
  """
  if x.ndim == 2 or jax.sharding.get_abstract_mesh().size > 1:
    return x @ kernel
  rows = x.reshape(-1, x.shape[-1]) @ kernel
  return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def _whole(x: jax.Array, axis: str | None) -> jax.Array:
  """Keeps the channels of activations (B, ..., C) whole on a mesh where a kernel's are `embed`.

  Left to itself, the partitioner may split them along `tensor`, and then XLA (seen in jaxlib 0.10.2
  and 0.12.0) multiplies wrongly: with examples over (data, fsdp) and a kernel over (tensor, fsdp),
  devices end up with each other's examples. On the way in this guards the gradient, on the way out
  the product.
  """
  if axis != 'embed':
    return x
  return nn.with_logical_constraint(x, ('batch', *['length'] * (x.ndim - 2), 'act_embed'))


def embedding(
  rows: int, features: int, axis: str | None, std: float, dtype: Any, name: str
) -> nn.Embed:
  """A learnt vector (features,) for each of so many numbers.

  Args:
    rows, features: size of the table.
    axis: logical axis of the rows: 'vocab', or None where devices could not share them evenly, as
      those of positions.
    std: of freshly initialised vectors.
    dtype: of the result.
    name: of the module.
  """
  init = nn.with_logical_partitioning(nn.initializers.normal(std), (axis, 'embed'))
  return nn.Embed(rows, features, dtype=dtype, embedding_init=init, name=name)


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis, in float32, returned in the input's dtype.

  Attributes:
    epsilon: added to the variance.
    affine: whether to learn `scale` and `bias`.
  """

  epsilon: float = 1e-6
  affine: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, axis=-1, keepdims=True)
    centred = y - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + self.epsilon)
    if self.affine:
      shape = (x.shape[-1],)
      partitioned = nn.with_logical_partitioning
      y = y * self.param('scale', partitioned(nn.initializers.ones, ('norm',)), shape)
      y = y + self.param('bias', partitioned(nn.initializers.zeros, ('norm',)), shape)
    return y.astype(x.dtype)


class RMSNorm(nn.Module):
  """Root-mean-square normalisation over the last axis, in float32, with a learnt `scale`."""

  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param(
      'scale', nn.with_logical_partitioning(nn.initializers.ones, ('norm',)), (x.shape[-1],)
    )
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
    return (y * scale).astype(x.dtype)


def sinusoidal_embedding(t: jax.Array, dim: int, max_period: float = 10_000.0) -> jax.Array:
  """Sinusoidal embedding of a scalar, cosines first as in the FLUX reference.

  Args:
    t: (B,) positions; FLUX feeds 1000 x its timestep in [0, 1].
    dim: even size of the embedding.
    max_period: slowest wavelength over 2 pi.

  Returns:
    (B, dim) float32, whatever the dtype of t: bfloat16 cannot hold 1000 t.
  """
  half = dim // 2
  # Angles reach thousands of radians, where the last bit of a frequency is seen: exponents are
  # rounded to float32 as the reference does, exponentials correctly.
  exponents = -math.log(max_period) * np.arange(half, dtype=np.float32) / half
  frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
  angles = t.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def tap(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
  """Names an activation, so that it can be read and overridden from outside.

  Reading: `apply(..., mutable=['intermediates'])` returns it (stacked over scanned blocks).
  Overriding: an `overrides` collection holding `name` at the module's path replaces it.
  """
  if module.has_variable('overrides', name):
    x = module.get_variable('overrides', name)
  module.sow('intermediates', name, x, init_fn=lambda: None, reduce_fn=lambda _, new: new)
  return x


def feature(module: nn.Module, name: str, x: jax.Array, mask: jax.Array | None = None) -> None:
  """Offers the mean of x (B, L, W) over its tokens to whoever asks: a width an example, no more.

  Asking: `apply(..., mutable=['features'])` returns it, (B, W) float32, stacked over scanned
  blocks. Unasked, nothing is traced: what training compiles stays the same.

  Args:
    module: the block whose feature it is.
    name: the stream, 'image' or 'text'.
    x: activations.
    mask: (B, L) bool, True where a token is real; None counts all.
  """
  if not module.is_mutable_collection('features'):
    return
  weights = jnp.ones(x.shape[:2]) if mask is None else mask.astype(jnp.float32)
  # A prompt may have no real token left: its feature is then zero, not NaN.
  count = jnp.maximum(weights.sum(1), 1)[:, None]
  mean = jnp.einsum('bl,blw->bw', weights, x.astype(jnp.float32)) / count
  module.sow('features', name, mean, init_fn=lambda: None, reduce_fn=lambda _, new: new)
