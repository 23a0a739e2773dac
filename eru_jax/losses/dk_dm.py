"""DK-DM: registers what a model draws under an implicit prompt with its explicit anchor.

EruDiff's code and equations are not public. This is a reconstruction: a multi-step flow model's
velocity is its own score, so matching the distribution under the implicit prompt to the base's
under the explicit one needs no critic; it is velocity matching between one network under two
prompts. On states of the teacher it bounds the forward path-KL, on states of the student's own
rollouts the reverse one (Girsanov); v_student(x, t, i) = v_teacher(x, t, e) minimises both.
"""

import math

import jax
import jax.numpy as jnp

from eru_jax import flow
from eru_jax.errors import UserError
from eru_jax.losses.flow_matching import mean_per_example, weighted_mean
from eru_jax.types import Conditioning, VelocityFn


def _squared_distance(student, teacher, x_t, t, implicit, explicit):
  """|| v_student - sg v_teacher ||^2 per dimension, (B,) float32."""
  # The two are nearly equal: networks in bfloat16 are subtracted in float32.
  target = jax.lax.stop_gradient(teacher(x_t, t, explicit)).astype(jnp.float32)
  return mean_per_example(jnp.square(student(x_t, t, implicit).astype(jnp.float32) - target))


def velocity_matching(
  student: VelocityFn,
  teacher: VelocityFn,
  x_t: jax.Array,
  t: jax.Array,
  implicit: Conditioning,
  explicit: Conditioning,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """E w || v_student(x_t, t, i) - sg v_teacher(x_t, t, e) ||^2.

  Args:
    student: the field to train.
    teacher: the frozen base; no gradient flows into it.
    x_t: (B, ...) states, from whatever law.
    t: (B,) their times.
    implicit: what the student sees.
    explicit: what the teacher sees.
    weight: (B,) weights, or None.

  Returns:
    The loss () float32 and {'velocity_matching': loss}.
  """
  loss = weighted_mean(_squared_distance(student, teacher, x_t, t, implicit, explicit), weight)
  return loss, {'velocity_matching': loss}


def preservation(
  student: VelocityFn,
  teacher: VelocityFn,
  x_t: jax.Array,
  t: jax.Array,
  conditioning: Conditioning,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`velocity_matching` where both see the same prompt, so that nothing changes there.

  Meant for explicit, unrelated and empty prompts.

  Returns:
    The loss () float32 and {'preservation': loss}.
  """
  loss, _ = velocity_matching(student, teacher, x_t, t, conditioning, conditioning, weight)
  return loss, {'preservation': loss}


def teacher_states(x_0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """States of the teacher's law: its own samples x_0 (B, ...), noised to t (B,). No gradient."""
  return jax.lax.stop_gradient(flow.interpolate(x_0, noise, t))


def rollout_states(
  key: jax.Array,
  student: VelocityFn,
  noise: jax.Array,
  schedule: jax.Array,
  implicit: Conditioning,
  states_per_rollout: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """States the student visits when it draws the implicit prompts itself, without gradient.

  Args:
    key: picks which of the visited states are kept.
    student: the field that is being trained.
    noise: (B, ...) start noise.
    schedule: (N + 1,) solver grid from 1 to 0.
    implicit: prompts of the B rollouts.
    states_per_rollout: k <= N states kept of each, without replacement.

  Returns:
    x_t (B k, ...), t (B k,) and the rollout each state is of, (B k,) int32, to gather
    conditionings with.

  Raises:
    UserError: if more states are asked for than a rollout visits.
  """
  num_steps, batch = schedule.shape[0] - 1, noise.shape[0]
  if not 1 <= states_per_rollout <= num_steps:
    raise UserError(
      f'states_per_rollout is {states_per_rollout} but must be between 1 and the {num_steps} steps '
      'of a rollout.'
    )

  def frozen(x_t, t, conditioning):
    # Stopped at every step, not only at the end: a differentiated loss then stores nothing here.
    return jax.lax.stop_gradient(student(x_t, t, conditioning))

  _, states = flow.euler_ode(frozen, noise, schedule, implicit, return_trajectory=True)
  order = jax.vmap(lambda k: jax.random.permutation(k, num_steps))(jax.random.split(key, batch))
  step = order[:, :states_per_rollout]
  rollout = jnp.broadcast_to(jnp.arange(batch)[:, None], step.shape)
  x_t = states[step, rollout].reshape(-1, *noise.shape[1:])
  t = schedule[step].reshape(-1)
  return jax.lax.stop_gradient(x_t), t, rollout.reshape(-1)


def mixture_schedule(
  step: jax.Array, num_steps: int, final: float = 0.5, ramp: float = 0.3
) -> jax.Array:
  """Weight of rollout states: grows from 0 to `final` over the first `ramp` of the stage.

  Raises:
    UserError: if final or ramp is outside [0, 1], or num_steps not positive.
  """
  if not (0 <= final <= 1 and 0 <= ramp <= 1 and num_steps >= 1):
    raise UserError(
      f'mixture_schedule needs final and ramp in [0, 1] and a step, got final = {final}, '
      f'ramp = {ramp} and num_steps = {num_steps}.'
    )
  progress = step / max(1.0, ramp * num_steps)
  return final * jnp.minimum(progress, 1.0)


def dk_dm_mixture(
  student: VelocityFn,
  teacher: VelocityFn,
  teacher_states: tuple[jax.Array, jax.Array, Conditioning, Conditioning],
  rollouts: tuple[jax.Array, jax.Array, Conditioning, Conditioning],
  preserved: tuple[jax.Array, jax.Array, Conditioning],
  mixture: jax.Array | float,
  preservation_weight: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The default DK-DM objective (reconstruction).

      (1 - m) L(teacher states) + m L(rollout states) + w L(preservation)

  with L of `velocity_matching`; preservation matches student and teacher under the same prompt.
  Each network runs once, on all three batches joined.

  Args:
    student: the field to train.
    teacher: the frozen base.
    teacher_states: x_t (A, ...), t (A,), implicit, explicit: noised pictures of the teacher.
    rollouts: the same for states of the student's rollouts, (R, ...).
    preserved: x_t (P, ...), t (P,), conditioning: where nothing should change.
    mixture: m in [0, 1], see `mixture_schedule`.
    preservation_weight: w.

  Returns:
    The loss () float32 and its terms `teacher_states`, `rollout_states`, `preservation`, and
    `mixture`.

  Raises:
    UserError: if preservation_weight is negative, or the conditionings do not fit together.
  """
  if not 0 <= preservation_weight < math.inf:
    raise UserError(
      f'DK-DM: preservation_weight is {preservation_weight} but must be zero or more.'
    )
  batches = (teacher_states, rollouts, preserved)
  x_t, t = (jnp.concatenate([batch[i] for batch in batches]) for i in (0, 1))
  implicit = flow.concatenate_conditionings(teacher_states[2], rollouts[2], preserved[2])
  explicit = flow.concatenate_conditionings(teacher_states[3], rollouts[3], preserved[2])
  errors = _squared_distance(student, teacher, x_t, t, implicit, explicit)
  first = teacher_states[0].shape[0]
  second = first + rollouts[0].shape[0]
  off_policy, on_policy = jnp.mean(errors[:first]), jnp.mean(errors[first:second])
  kept = jnp.mean(errors[second:])
  loss = (1 - mixture) * off_policy + mixture * on_policy + preservation_weight * kept
  return loss, {
    'teacher_states': off_policy,
    'rollout_states': on_policy,
    'preservation': kept,
    'mixture': jnp.asarray(mixture, jnp.float32),
  }
