"""Policy gradients: PPO's clipped surrogate on two log-probabilities of a flow model.

`policy_gradient` (variant N3 of NO-RL) takes the Gaussian steps of a stochastic sampler, as
Flow-GRPO does (Liu et al., arXiv 2505.05470); `advantage_weighted_matching` (N4) the flow-matching
error on the forward process (AWM, Xue et al., arXiv 2509.25050). Both are "negative-only" by what
they are given: `advantages.scale_positives` with weight 0, or 0.1 for W-REINFORCE.
"""

import flax.struct
import jax
import jax.numpy as jnp

from eru_jax import flow
from eru_jax.errors import UserError
from eru_jax.losses.flow_matching import frozen_velocity, mean_per_example, weighted_mean
from eru_jax.types import Conditioning, VelocityFn


@flax.struct.dataclass
class Transitions:
  """Steps of a stochastic sampler.

  Attributes:
    x_t: (B, ...) states.
    x_next: (B, ...) the states that followed.
    t: (B,) times of x_t.
    t_next: (B,) times of x_next, below t and above 0.
    t_clamp: () the schedule's second entry, see `flow.sde_step`.
  """

  x_t: jax.Array
  x_next: jax.Array
  t: jax.Array
  t_next: jax.Array
  t_clamp: jax.Array


def sample_transitions(
  key: jax.Array,
  policy: VelocityFn,
  noise: jax.Array,
  schedule: jax.Array,
  conditioning: Conditioning,
  dynamics: flow.Dynamics,
  transitions_per_rollout: int,
) -> tuple[jax.Array, Transitions, jax.Array]:
  """Draws samples stochastically and keeps some of the steps that led to them.

  Args:
    key: randomness of the sampler and of the choice of steps.
    policy: the field that samples; no gradient.
    noise: (B, ...) start noise.
    schedule: (N + 1,) solver grid from 1 to 0.
    conditioning: prompts of the B rollouts.
    dynamics: how noise is injected.
    transitions_per_rollout: k <= N - 1 steps kept of each, without replacement. The last step is
      deterministic and never kept.

  Returns:
    Samples x_0 (B, ...), transitions (B k of them), and the rollout each is of, (B k,) int32.

  Raises:
    UserError: if more transitions are asked for than there are, or the dynamics is noiseless.
  """
  num_steps, batch = schedule.shape[0] - 1, noise.shape[0]
  if not 1 <= transitions_per_rollout <= num_steps - 1:
    raise UserError(
      f'transitions_per_rollout is {transitions_per_rollout} but must be between 1 and the '
      f'{num_steps - 1} noisy steps of a rollout.'
    )
  if dynamics.noise_level == 0:
    raise UserError('Policy gradients need noise: the noise_level of the dynamics is 0.')
  sample_key, choice_key = jax.random.split(key)
  x_0, states = flow.euler_sde(
    sample_key,
    lambda *args: jax.lax.stop_gradient(policy(*args)),
    noise,
    schedule,
    conditioning,
    noise_level=dynamics.noise_level,
    dynamics=dynamics.kind,
    return_trajectory=True,
  )
  order = jax.vmap(lambda k: jax.random.permutation(k, num_steps - 1))(
    jax.random.split(choice_key, batch)
  )
  step = order[:, :transitions_per_rollout].reshape(-1)
  rollout = jnp.repeat(jnp.arange(batch), transitions_per_rollout)
  transitions = Transitions(
    x_t=states[step, rollout],
    x_next=states[step + 1, rollout],
    t=schedule[step],
    t_next=schedule[step + 1],
    t_clamp=schedule[1],
  )
  return jax.lax.stop_gradient((x_0, transitions, rollout))


def _step(velocity, transitions, dynamics):
  """Mean (B, ...) and standard deviation (B, 1, ...) of the policy's next state."""
  t, t_next = (flow.expand(s, transitions.x_t) for s in (transitions.t, transitions.t_next))
  x_t = transitions.x_t.astype(jnp.float32)
  return dynamics.step(x_t, velocity, t, t_next, transitions.t_clamp)


def transition_log_prob(
  policy: VelocityFn,
  transitions: Transitions,
  conditioning: Conditioning,
  dynamics: flow.Dynamics,
) -> jax.Array:
  """log p(x_next | x_t) under a policy, averaged over dimensions as Flow-GRPO does.

  For both dynamics this is the Gaussian's own log-density; Flow-GRPO's code leaves out 1/(2 std^2)
  and the constants for 'cps', and so weighs late steps less.

  Args:
    policy: the field.
    transitions: B steps.
    conditioning: their prompts.
    dynamics: what they were sampled with.

  Returns:
    (B,) float32, nats per dimension.
  """
  v = policy(transitions.x_t, transitions.t, conditioning).astype(jnp.float32)
  return flow.gaussian_log_prob(transitions.x_next, *_step(v, transitions, dynamics))


def ppo_clip(
  log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array, clip_range: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """PPO's clipped surrogate (Schulman et al., arXiv 1707.06347), to be minimised.

      -min( rho A, clip(rho, 1 - c, 1 + c) A ),   rho = exp(log_prob - old_log_prob)

  A negative example stops pushing once its ratio falls below 1 - c: that is what bounds
  negative-only updates.

  Args:
    log_prob: (B,) under the student.
    old_log_prob: (B,) under the policy that sampled; no gradient.
    advantage: (B,).
    clip_range: c.

  Returns:
    The losses (B,) float32, and `ratio` (mean) and `clip_fraction` (share of examples without
    gradient, those of advantage zero not counted), both ().

  Raises:
    UserError: if clip_range is not positive.
  """
  if not clip_range > 0:
    raise UserError(f'ppo_clip: clip_range is {clip_range} but must be positive.')
  ratio = jnp.exp(log_prob - jax.lax.stop_gradient(old_log_prob))
  clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
  losses = -jnp.minimum(ratio * advantage, clipped * advantage)
  stopped = clipped * advantage < ratio * advantage
  aux = {'ratio': jnp.mean(ratio), 'clip_fraction': jnp.mean(stopped.astype(jnp.float32))}
  return losses, aux


def policy_gradient(
  student: VelocityFn,
  reference: VelocityFn,
  transitions: Transitions,
  conditioning: Conditioning,
  old_log_prob: jax.Array,
  advantage: jax.Array,
  dynamics: flow.Dynamics,
  *,
  clip_range: float = 1e-4,
  kl_weight: float = 0.0,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """PPO on the steps of a stochastic sampler, variant N3 (Flow-GRPO's loss).

      L = E ppo_clip + kl_weight mean( mu_student - mu_reference )^2 / (2 std^2)

  The second term is the KL of one step, per dimension. (Flow-GRPO divides by sigma^2, without the
  length of the step.)

  Args:
    student: the field to train.
    reference: the model at the start of the stage; no gradient. Called only if kl_weight > 0.
    transitions: B steps of the old policy.
    conditioning: their prompts.
    old_log_prob: (B,) `transition_log_prob` of the old policy.
    advantage: (B,) advantage of the sample each step led to.
    dynamics: what the steps were sampled with.
    clip_range: Flow-GRPO uses 1e-4 for pictures, whose log-probabilities are means over many
      dimensions; few dimensions need more.
    kl_weight: weight of the KL to the reference.
    weight: (B,) weights of the examples, or None.

  Returns:
    The loss () float32 and `ratio`, `clip_fraction` and `reference_kl` (nats per dimension).

  Raises:
    UserError: if clip_range is not positive or kl_weight negative.
  """
  if not kl_weight >= 0:
    raise UserError(f'policy_gradient: kl_weight is {kl_weight} but must be zero or more.')
  v = student(transitions.x_t, transitions.t, conditioning).astype(jnp.float32)
  mean, std = _step(v, transitions, dynamics)
  log_prob = flow.gaussian_log_prob(transitions.x_next, mean, std)
  losses, aux = ppo_clip(log_prob, old_log_prob, advantage, clip_range)
  loss, kl = weighted_mean(losses, weight), jnp.float32(0)
  if kl_weight > 0:
    v_reference = frozen_velocity(reference, transitions.x_t, transitions.t, conditioning)
    mean_reference, _ = _step(v_reference, transitions, dynamics)
    kl = jnp.mean(0.5 * jnp.square((mean - mean_reference) / std))
  return loss + kl_weight * kl, {**aux, 'reference_kl': kl}


def advantage_weighted_matching(
  student: VelocityFn,
  old: VelocityFn,
  reference: VelocityFn,
  x_0: jax.Array,
  noise: jax.Array,
  t: jax.Array,
  conditioning: Conditioning,
  advantage: jax.Array,
  *,
  clip_range: float = 0.2,
  reference_weight: float = 0.0,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """PPO with the flow-matching error for a log-probability, variant N4 (AWM's ratio).

      log p = -mean( v - (noise - x_0) )^2        L = E ppo_clip + reference_weight
                                                      mean( v_student - v_reference )^2

  Never leave the clip out: the repulsion from a negative example is unbounded. (AWM's code has a
  Huber-like power and a weight t besides.)

  Args:
    student: the field to train.
    old: the policy that made x_0; no gradient.
    reference: the model at the start of the stage; no gradient.
    x_0: (B, ...) samples of the old policy.
    noise: (B, ...) standard normal.
    t: (B,) times in [0, 1].
    conditioning: prompts of the samples.
    advantage: (B,).
    clip_range: of the ratio of the two surrogate probabilities.
    reference_weight: weight of the distance to the reference.
    weight: (B,) weights of the examples, or None.

  Returns:
    The loss () float32 and `ratio`, `clip_fraction` and `reference_distance`.

  Raises:
    UserError: if clip_range is not positive or reference_weight negative.
  """
  if not reference_weight >= 0:
    raise UserError(f'reference_weight is {reference_weight} but must be zero or more.')
  x_t, v = flow.interpolate(x_0, noise, t), flow.velocity(x_0, noise)
  v_student = student(x_t, t, conditioning).astype(jnp.float32)
  v_old, v_reference = (frozen_velocity(f, x_t, t, conditioning) for f in (old, reference))
  log_prob, old_log_prob = (-mean_per_example(jnp.square(f - v)) for f in (v_student, v_old))
  losses, aux = ppo_clip(log_prob, old_log_prob, advantage, clip_range)
  to_reference = jnp.mean(jnp.square(v_student - v_reference))
  loss = weighted_mean(losses, weight) + reference_weight * to_reference
  return loss, {**aux, 'reference_distance': to_reference}
