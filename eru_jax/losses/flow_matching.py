"""Flow matching: the objective that pretrains a velocity field."""

import jax
import jax.numpy as jnp

from eru_jax import flow
from eru_jax.types import Conditioning, VelocityFn


def mean_per_example(x: jax.Array) -> jax.Array:
  """Averages everything but the batch axis, in float32: (B, ...) -> (B,)."""
  return jnp.mean(x.astype(jnp.float32), axis=tuple(range(1, x.ndim)))


def weighted_mean(values: jax.Array, weight: jax.Array | None) -> jax.Array:
  """Mean of values (B,), each multiplied by its weight (B,) if there are weights."""
  return jnp.mean(values if weight is None else weight * values)


def frozen_velocity(
  velocity_fn: VelocityFn, x_t: jax.Array, t: jax.Array, conditioning: Conditioning
) -> jax.Array:
  """What a network that is not trained says, (B, ...) float32, without gradient.

  Two nearly equal fields are subtracted from each other in most losses: float32 whatever they
  compute in.
  """
  return jax.lax.stop_gradient(velocity_fn(x_t, t, conditioning)).astype(jnp.float32)


def flow_matching(
  velocity_fn: VelocityFn,
  x_0: jax.Array,
  noise: jax.Array,
  t: jax.Array,
  conditioning: Conditioning,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """E w || v(x_t, t, c) - (noise - x_0) ||^2 (Lipman et al., Flow Matching, 2023).

  Args:
    velocity_fn: the field to train.
    x_0: (B, ...) data.
    noise: (B, ...) standard normal.
    t: (B,) float32 times in [0, 1].
    conditioning: prompts of the batch.
    weight: (B,) weights of the examples, or None.

  Returns:
    The loss () float32 (mean over dimensions and batch) and {'flow_matching': loss}.
  """
  x_t = flow.interpolate(x_0, noise, t)
  error = velocity_fn(x_t, t, conditioning).astype(jnp.float32) - flow.velocity(x_0, noise)
  loss = weighted_mean(mean_per_example(jnp.square(error)), weight)
  return loss, {'flow_matching': loss}
