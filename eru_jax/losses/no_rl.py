"""NO-RL: corrects a model from its bad samples only.

EruDiff's code and equations are not public. `no_rl`, the default, is a reconstruction (variant N1):
DiffusionNFT with the optimality probability clipped at one half, one adaptive weight shared by both
of its branches, and a velocity distance to the model the stage began with. Its alternatives:

| variant | call |
|---|---|
| N1 | `no_rl` |
| N2, negative branch and an anchor | `anchored_negatives` |
| N3, policy gradient | `policy_gradient.policy_gradient` on `scale_positives(A, 0 or 0.1)` |
| N4, advantage weighted matching | `policy_gradient.advantage_weighted_matching`, likewise |
| N5, bounded unlearning | `bounded_unlearning` |
| full DiffusionNFT, positive-only | `nft.nft` |
| controls that collapse | `repulsion` (N0), `negatives_subset` |
"""

import math

import jax
import jax.numpy as jnp

from eru_jax import flow
from eru_jax.errors import UserError
from eru_jax.losses.advantages import negative_part as negative_part
from eru_jax.losses.advantages import optimality as optimality
from eru_jax.losses.flow_matching import frozen_velocity, mean_per_example, weighted_mean
from eru_jax.losses.nft import adaptive_weight, check_weights, diagnostics, nft
from eru_jax.types import Conditioning, VelocityFn


def no_rl(
  student: VelocityFn,
  old: VelocityFn,
  reference: VelocityFn,
  x_0: jax.Array,
  noise: jax.Array,
  t: jax.Array,
  conditioning: Conditioning,
  r: jax.Array,
  *,
  beta: float = 1.0,
  reference_weight: float = 0.05,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Negative-only DiffusionNFT with a shared weight, variant N1 (reconstruction).

      L = E (beta / w) mean( x0_hat(v_student) - x0_hat(v_target) )^2
          + reference_weight mean( v_student - v_reference )^2
      v_target = v_old - (n / beta) (v - v_old),   n = max(1 - 2 r, 0),   v = noise - x_0
      w = sg mean abs( x0_hat(v_old) - x_0 )

  It is `nft` with mode 'negative_only', where the derivation is. On-policy, and with expectations
  weighted by 1 / w, the minimiser is v_old - Cov(n, v | x_t) / beta. All samples stay in the batch:
  those that are not negative (n = 0) are anchors that hold the student at the old policy. Dropping
  them instead over-pushes and collapses (`negatives_subset`).

  Args:
    student: the field to train.
    old: the policy that made x_0; no gradient. If guidance made x_0, this and the other two are
      the guided fields: else v - v_old has a mean of its own, and n pushes along it.
    reference: the model at the start of the stage; no gradient.
    x_0: (B, ...) samples of the old policy under `conditioning`.
    noise: (B, ...) standard normal.
    t: (B,) times in (0, 1].
    conditioning: prompts of the samples.
    r: (B,) optimality probabilities in [0, 1].
    beta: step of the implicit branches, in (0, 1].
    reference_weight: weight of the distance to the reference.
    weight: (B,) weights of the examples, or None.

  Returns:
    The loss () float32 and `negative_fraction`, `optimality`, `old_deviation` (mean squared
    distance of student and old velocities) and `reference_distance`.

  Raises:
    UserError: if beta or reference_weight is out of range.
  """
  return nft(
    student,
    old,
    reference,
    x_0,
    noise,
    t,
    conditioning,
    r,
    mode='negative_only',
    beta=beta,
    reference_weight=reference_weight,
    weight=weight,
  )


def anchored_negatives(
  student: VelocityFn,
  old: VelocityFn,
  reference: VelocityFn,
  x_0: jax.Array,
  noise: jax.Array,
  t: jax.Array,
  conditioning: Conditioning,
  r: jax.Array,
  *,
  beta: float = 1.0,
  reference_weight: float = 0.0,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Negative branch on what is wrong, old policy on what is not: variant N2 (reconstruction).

      L = E n l- / beta + 1[n = 0] mean( v_student - v_old )^2
      l- = mean( x0_hat(v-) - x_0 )^2 / w,   v- = (1 + beta) v_old - beta v_student

  with n and w as in `no_rl`. For n in {0, 1} it differs from N1 only in how an anchor is weighed:
  velocities, so all times alike, in place of beta t^2 / w.

  Args, Returns, Raises: as `no_rl`.
  """
  check_weights(beta, reference_weight)
  x_t = flow.interpolate(x_0, noise, t)
  v_old = frozen_velocity(old, x_t, t, conditioning)
  v_reference = frozen_velocity(reference, x_t, t, conditioning)
  v_student = student(x_t, t, conditioning).astype(jnp.float32)
  n = negative_part(r)
  minus = (1 + beta) * v_old - beta * v_student
  error = mean_per_example(jnp.square(flow.predict_x0(x_t, minus, t) - x_0))
  negative = error / adaptive_weight(x_t, v_old, t, x_0) / beta
  anchor = mean_per_example(jnp.square(v_student - v_old))
  to_reference = jnp.mean(jnp.square(v_student - v_reference))
  policy = weighted_mean(jnp.where(n > 0, n * negative, anchor), weight)
  return policy + reference_weight * to_reference, diagnostics(r, v_student, v_old, to_reference)


def bounded_unlearning(
  student: VelocityFn,
  reference: VelocityFn,
  x_0: jax.Array,
  noise: jax.Array,
  t: jax.Array,
  conditioning: Conditioning,
  r: jax.Array,
  *,
  sharpness: float = 1.0,
  reference_weight: float = 0.0,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Repels bad samples until they fit worse than under the reference: variant N5.

      L = -E (2 / k) n log sigmoid( k ( mean(v_student - v)^2 - mean(v_reference - v)^2 ) )

  Negative preference optimisation (Zhang et al., arXiv 2404.05868) with the flow-matching error for
  the negative log-likelihood. At the reference its gradient is that of n times `repulsion`; it
  fades once the student's error exceeds the reference's by about 1 / k, so that nothing is gained
  by running away.

  Args:
    student, reference, x_0, noise, t, conditioning, r, reference_weight, weight: as `no_rl`.
    sharpness: k, in units of one over a squared velocity per dimension.

  Returns:
    The loss () float32 and the entries of `no_rl`, with the reference as the old policy.

  Raises:
    UserError: if sharpness is not positive or reference_weight negative.
  """
  if not 0 < sharpness < math.inf:
    raise UserError(f'bounded_unlearning: sharpness is {sharpness} but must be positive.')
  check_weights(1.0, reference_weight)
  x_t, v = flow.interpolate(x_0, noise, t), flow.velocity(x_0, noise)
  v_reference = frozen_velocity(reference, x_t, t, conditioning)
  v_student = student(x_t, t, conditioning).astype(jnp.float32)
  error = lambda guess: mean_per_example(jnp.square(guess - v))  # noqa: E731
  margin = error(v_student) - error(v_reference)
  policy = -2 / sharpness * negative_part(r) * jax.nn.log_sigmoid(sharpness * margin)
  to_reference = jnp.mean(jnp.square(v_student - v_reference))
  loss = weighted_mean(policy, weight) + reference_weight * to_reference
  return loss, diagnostics(r, v_student, v_reference, to_reference)


def repulsion(
  student: VelocityFn,
  x_0: jax.Array,
  noise: jax.Array,
  t: jax.Array,
  conditioning: Conditioning,
  r: jax.Array,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Control N0: ascends the flow-matching error of bad samples, -E n mean( v_student - v )^2.

  Has no lower bound. It is here to be compared with, not to be used.

  Args:
    student, x_0, noise, t, conditioning, r, weight: as `no_rl`.

  Returns:
    The loss () float32 and {'repulsion': loss}.
  """
  x_t, v = flow.interpolate(x_0, noise, t), flow.velocity(x_0, noise)
  error = mean_per_example(jnp.square(student(x_t, t, conditioning).astype(jnp.float32) - v))
  loss = -weighted_mean(negative_part(r) * error, weight)
  return loss, {'repulsion': loss}


def negatives_subset(
  student: VelocityFn,
  old: VelocityFn,
  reference: VelocityFn,
  x_0: jax.Array,
  noise: jax.Array,
  t: jax.Array,
  conditioning: Conditioning,
  r: jax.Array,
  *,
  beta: float = 1.0,
  reference_weight: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Control: `no_rl` on a batch from which everything that is not bad was dropped.

  What the code of negative sample reinforcement for language models does. In a regression the
  minimiser then is v_old - (E[v | x_t, bad] - v_old) / beta where n = 1: without the factor
  P(bad | x_t), it pushes as hard where nearly everything is good. The mean is over the bad ones.

  Args, Returns, Raises: as `no_rl`.
  """
  bad = (negative_part(r) > 0).astype(jnp.float32)
  # A batch without bad samples has no gradient but that of the reference.
  weight = bad / jnp.maximum(jnp.mean(bad), 1 / bad.shape[0])
  return no_rl(
    student,
    old,
    reference,
    x_0,
    noise,
    t,
    conditioning,
    r,
    beta=beta,
    reference_weight=reference_weight,
    weight=weight,
  )
