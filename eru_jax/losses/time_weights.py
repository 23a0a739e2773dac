"""Weights of the squared velocity error as functions of time, for the losses' `weight`."""

import math

import jax
import jax.numpy as jnp

from eru_jax.errors import UserError


def path_kl(t: jax.Array, noise_level: float = math.sqrt(2), t_min: float = 0.02) -> jax.Array:
  """The weight that makes velocity matching the KL between two sampling paths (derived).

  Both networks are integrated by the SDE of `flow.sde_step`, whose drifts differ by
  (1 + sigma^2 (1 - t) / (2 t)) (v_s - v_T) under the same noise sigma dW. Girsanov's theorem:

      KL(path_s || path_T) = int_0^1 E w(t) ||v_s - v_T||^2 dt,   x_t ~ the student's path
      w(t) = 1/2 (1 / sigma_t + sigma_t (1 - t) / (2 t))^2 = 1/2 (1/a + a/2)^2 (1 - t) / t

  for sigma_t = a sqrt(t / (1 - t)). It bounds the KL of the pictures; the noise level changes its
  size but not its shape. a = sqrt 2 makes it smallest, (1 - t) / t, and the bound an equality: that
  SDE is the time reversal of one noising x_0 -> x_t that does not depend on the data, so that the
  paths differ by what their ends differ by (Song et al., arXiv 2101.09258, for diffusions; for
  velocities that really are those of their samples' law). With the squared *sum* over dimensions
  it counts nats; this library's losses are means over dimensions.

  Args:
    t: (B,) times.
    noise_level: a.
    t_min: times below it weigh like it, since w grows without bound towards t = 0.

  Returns:
    (B,) float32.

  Raises:
    UserError: if noise_level is not positive or t_min not in (0, 1).
  """
  if not 0 < noise_level < math.inf:
    raise UserError(f'path_kl: noise_level is {noise_level} but must be positive.')
  if not 0 < t_min < 1:
    raise UserError(f'path_kl: t_min is {t_min} but must be between 0 and 1.')
  t = jnp.maximum(t.astype(jnp.float32), t_min)
  return 0.5 * (1 / noise_level + noise_level / 2) ** 2 * (1 - t) / t


def min_snr(t: jax.Array, gamma: float = 5.0) -> jax.Array:
  """Min-SNR-gamma for the velocity of a rectified flow: min((1 - t)^2, gamma t^2).

  Hang et al., Efficient Diffusion Training via Min-SNR Weighting (arXiv 2303.09556), weigh the
  error of the predicted *clean sample* by min(SNR, gamma). Here (derived) the signal-to-noise
  ratio of x_t = (1 - t) x_0 + t noise is SNR = (1 - t)^2 / t^2, and x0_hat = x_t - t v gives
  ||x0_hat - x_0||^2 = t^2 ||v_hat - v||^2, so the same loss in velocities has the weight
  t^2 min(SNR, gamma). It vanishes at both ends and peaks at t = 1 / (1 + sqrt gamma), where SNR
  is gamma.

  Args:
    t: (B,) times.
    gamma: the SNR above which errors stop to count more.

  Returns:
    (B,) float32.

  Raises:
    UserError: if gamma is not positive.
  """
  if not 0 < gamma < math.inf:
    raise UserError(f'min_snr: gamma is {gamma} but must be positive.')
  t = t.astype(jnp.float32)
  return jnp.minimum(jnp.square(1 - t), gamma * jnp.square(t))
