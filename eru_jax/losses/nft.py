"""DiffusionNFT: reinforcement on the forward process, by regression.

Zheng et al., DiffusionNFT (arXiv 2509.16117). Samples of an old policy are noised again and the
velocity is regressed through two implicit policies, one drawn to samples that are right and one
repelled, in mirror image, by those that are wrong.
"""

import jax
import jax.numpy as jnp

from eru_jax import flow
from eru_jax.errors import UserError
from eru_jax.losses.advantages import negative_part
from eru_jax.losses.flow_matching import frozen_velocity, mean_per_example, weighted_mean
from eru_jax.types import Conditioning, VelocityFn

# Floor of the adaptive weight, as in DiffusionNFT's code.
_WEIGHT_FLOOR = 1e-5

_CLIPS = {
  'all': lambda r: r,
  'negative_only': lambda r: jnp.minimum(r, 0.5),
  'positive_only': lambda r: jnp.maximum(r, 0.5),
}


def check_weights(beta: float, reference_weight: float) -> None:
  """Raises UserError unless 0 < beta <= 1 and reference_weight >= 0."""
  if not 0 < beta <= 1:
    raise UserError(f'beta is {beta} but must be in (0, 1].')
  if not reference_weight >= 0:
    raise UserError(f'reference_weight is {reference_weight} but must be zero or more.')


def adaptive_weight(x_t: jax.Array, v: jax.Array, t: jax.Array, x_0: jax.Array) -> jax.Array:
  """sg mean abs( x0_hat(v) - x_0 ), at least 1e-5: (B,) float32. Losses are divided by it."""
  distance = mean_per_example(jnp.abs(flow.predict_x0(x_t, v, t) - x_0))
  return jax.lax.stop_gradient(jnp.maximum(distance, _WEIGHT_FLOOR))


def diagnostics(
  r: jax.Array, v_student: jax.Array, v_old: jax.Array, to_reference: jax.Array
) -> dict[str, jax.Array]:
  """What every loss on samples of an old policy reports, all () float32."""
  return {
    'negative_fraction': jnp.mean((negative_part(r) > 0).astype(jnp.float32)),
    'optimality': jnp.mean(r),
    'old_deviation': jnp.mean(jnp.square(v_student - v_old)),
    'reference_distance': to_reference,
  }


def nft(
  student: VelocityFn,
  old: VelocityFn,
  reference: VelocityFn,
  x_0: jax.Array,
  noise: jax.Array,
  t: jax.Array,
  conditioning: Conditioning,
  r: jax.Array,
  *,
  mode: str = 'all',
  weights: str = 'shared',
  beta: float = 1.0,
  reference_weight: float = 0.0,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """DiffusionNFT's loss, its A_max left out, with either kind of adaptive weight.

      v+ = (1 - beta) v_old + beta v_student      v- = (1 + beta) v_old - beta v_student
      L = E ( r~ l+ + (1 - r~) l- ) / beta + reference_weight mean( v_student - v_reference )^2
      l+- = mean( x0_hat(v+-) - x_0 )^2 / w+-

  `weights` says what w is. 'branch' is the official w+- = sg mean abs( x0_hat(v+-) - x_0 ). With
  it, and r~ = 1/2, the force that brings the student back to the old policy vanishes to first
  order along v - v_old. 'shared' takes w = sg mean abs( x0_hat(v_old) - x_0 ) in both branches
  (derived), which makes the loss an ordinary regression: with v = noise - x_0,
  d = v_student - v_old and u = v - v_old, the branches miss v by beta d - u and -(beta d + u), so

      r~ ||beta d - u||^2 + (1 - r~) ||beta d + u||^2
        = beta^2 || d - ((2 r~ - 1) / beta) u ||^2 + ||u||^2 (1 - (2 r~ - 1)^2)

  The last term does not depend on the student, and this is what is computed:

      (beta / w) mean( x0_hat(v_student) - x0_hat(v_old + ((2 r~ - 1) / beta) u) )^2

  On-policy, and with expectations weighted by 1 / w, its minimiser is
  v_old + Cov(2 r~ - 1, v | x_t) / beta. All samples stay in the batch: those with r~ = 1/2 are
  anchors that hold the student at the old policy.

  Args:
    student: the field to train.
    old: the policy that made x_0; no gradient.
    reference: the model at the start of the stage; no gradient.
    x_0: (B, ...) samples of the old policy under `conditioning`.
    noise: (B, ...) standard normal.
    t: (B,) times in (0, 1].
    conditioning: prompts of the samples.
    r: (B,) optimality probabilities in [0, 1].
    mode: 'all' (r~ = r), 'negative_only' (r~ = min(r, 1/2)) or 'positive_only' (max(r, 1/2)).
    weights: 'shared' or 'branch'.
    beta: step of the implicit branches, in (0, 1].
    reference_weight: weight of the distance to the reference.
    weight: (B,) weights of the examples, or None.

  Returns:
    The loss () float32 and `negative_fraction`, `optimality`, `old_deviation` (mean squared
    distance of student and old velocities) and `reference_distance`.

  Raises:
    UserError: if mode or weights is unknown, beta or reference_weight out of range.
  """
  check_weights(beta, reference_weight)
  if mode not in _CLIPS:
    raise UserError(f'Unknown mode {mode!r} of NFT: choose one of {", ".join(_CLIPS)}.')
  if weights not in ('shared', 'branch'):
    raise UserError(f"Unknown weights {weights!r} of NFT: choose 'shared' or 'branch'.")
  x_t = flow.interpolate(x_0, noise, t)
  v = flow.velocity(x_0, noise)
  v_old = frozen_velocity(old, x_t, t, conditioning)
  v_reference = frozen_velocity(reference, x_t, t, conditioning)
  v_student = student(x_t, t, conditioning).astype(jnp.float32)

  clipped = _CLIPS[mode](r)
  # x0_hat is linear in the velocity with slope -t.
  distance = lambda a, b: jnp.square(t) * mean_per_example(jnp.square(a - b))  # noqa: E731
  if weights == 'shared':
    v_target = v_old + flow.expand((2 * clipped - 1) / beta, v) * (v - v_old)
    policy = beta * distance(v_student, v_target) / adaptive_weight(x_t, v_old, t, x_0)
  else:
    plus = (1 - beta) * v_old + beta * v_student
    minus = (1 + beta) * v_old - beta * v_student
    losses = (distance(b, v) / adaptive_weight(x_t, b, t, x_0) for b in (plus, minus))
    policy = sum(share * loss for share, loss in zip((clipped, 1 - clipped), losses, strict=True))
    policy = policy / beta
  to_reference = jnp.mean(jnp.square(v_student - v_reference))
  loss = weighted_mean(policy, weight) + reference_weight * to_reference
  return loss, diagnostics(r, v_student, v_old, to_reference)
