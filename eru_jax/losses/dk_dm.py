"""DK-DM: registers what a model draws under an implicit prompt with its explicit anchor.

EruDiff's code and equations are not public. This is a reconstruction: a multi-step flow model's
velocity is its own score, so matching the distribution under the implicit prompt to the base's
under the explicit one needs no critic; it is velocity matching between one network under two
prompts. On states of the teacher it bounds the forward path-KL, on states of the student's own
rollouts the reverse one (Girsanov); v_student(x, t, i) = v_teacher(x, t, e) minimises both.

The variants differ in the states, and all but (c) share one loss:

| variant | states, and what is matched |
|---|---|
| (a) off-policy | `teacher_states`; `velocity_matching`, or `flow_matching` on the same samples |
| (b1) on-policy | `rollout_states` of the student; `velocity_matching` |
| (b2) on-policy, any t | `renoised_states`; `velocity_matching` |
| (c) critic | `eru_jax.losses.dmd` |
| (d) teacher's trajectory | `rollout_states` of the teacher; with `paired_endpoint` if wanted |
| mixture, the default | `dk_dm_mixture` of (a) and (b1), and `preservation` |
"""

import itertools
import math
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from eru_jax import flow
from eru_jax.errors import UserError
from eru_jax.losses.flow_matching import frozen_velocity, mean_per_example, weighted_mean
from eru_jax.types import Conditioning, VelocityFn


def _squared_distance(student, teacher, x_t, t, implicit, explicit):
  """|| v_student - sg v_teacher ||^2 per dimension, (B,) float32."""
  target = frozen_velocity(teacher, x_t, t, explicit)
  return mean_per_example(jnp.square(student(x_t, t, implicit).astype(jnp.float32) - target))


@flax.struct.dataclass
class States:
  """A batch of states, and what the student's velocity is to be there.

  Attributes:
    x_t: (B, ...) states.
    t: (B,) times.
    implicit: what the student sees.
    explicit: what the teacher sees, or None with a target.
    target: (B, ...) velocities to match in place of the teacher's, or None.
    weight: (B,) weights, or None.
  """

  x_t: jax.Array
  t: jax.Array
  implicit: Conditioning
  explicit: Conditioning | None = None
  target: jax.Array | None = None
  weight: jax.Array | None = None


def joint_matching(
  student: VelocityFn, teacher: VelocityFn, groups: Mapping[str, States]
) -> dict[str, jax.Array]:
  """`velocity_matching` on several batches of states; each network runs once, on all of them.

  Args:
    student: the field to train.
    teacher: the frozen base; it runs on the groups without a target.
    groups: batches by name.

  Returns:
    Every group's loss () float32, by its name.

  Raises:
    UserError: if the conditionings do not fit together.
    ValueError: if a group has both a target and an explicit prompt, or neither.
  """
  for name, states in groups.items():
    if (states.explicit is None) == (states.target is None):
      raise ValueError(f'{name}: a group has either an explicit prompt or a target.')
  batches = list(groups.values())
  asked = [states for states in batches if states.target is None]

  def joined(parts: list[States], prompt: str) -> tuple[jax.Array, jax.Array, Conditioning]:
    x_t, t = (jnp.concatenate([getattr(part, k) for part in parts]) for k in ('x_t', 't'))
    prompts = [getattr(part, prompt) for part in parts]
    return x_t, t, flow.concatenate_conditionings(*prompts)

  answers = iter(())
  if asked:
    stops = list(itertools.accumulate(states.t.shape[0] for states in asked))[:-1]
    answers = iter(jnp.split(frozen_velocity(teacher, *joined(asked, 'explicit')), stops))
  target = jnp.concatenate(
    [next(answers) if states.target is None else states.target for states in batches]
  )
  error = student(*joined(batches, 'implicit')).astype(jnp.float32) - jax.lax.stop_gradient(target)
  stops = list(itertools.accumulate(states.t.shape[0] for states in batches))[:-1]
  errors = jnp.split(mean_per_example(jnp.square(error)), stops)
  return {
    name: weighted_mean(part, states.weight)
    for (name, states), part in zip(groups.items(), errors, strict=True)
  }


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


def branchwise_matching(
  student: VelocityFn,
  teacher: VelocityFn,
  x_t: jax.Array,
  t: jax.Array,
  implicit: Conditioning,
  explicit: Conditioning,
  null: Conditioning,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Matches both branches of classifier-free guidance, each network in one call.

      L = 1/2 E w ( || v_s(i) - sg v_T(e) ||^2 + || v_s(null) - sg v_T(null) ||^2 )

  Where both vanish, v_s(null) + s (v_s(i) - v_s(null)) is the guided teacher for every scale s
  (derived): the sampler's scale stays free.

  Args:
    student, teacher, x_t, t, implicit, explicit, weight: as `velocity_matching`.
    null: the empty prompt, batch size 1, shaped like the prompts otherwise.

  Returns:
    The loss () float32 and {'velocity_matching': first term, 'null_matching': second}.

  Raises:
    UserError: if the conditionings do not fit together.
  """
  batch = t.shape[0]
  empty = jax.tree.map(lambda n: jnp.broadcast_to(n, (batch, *n.shape[1:])), null)
  errors = _squared_distance(
    student,
    teacher,
    jnp.concatenate([x_t, x_t]),
    jnp.concatenate([t, t]),
    flow.concatenate_conditionings(implicit, empty),
    flow.concatenate_conditionings(explicit, empty),
  )
  prompted, unprompted = (weighted_mean(part, weight) for part in jnp.split(errors, 2))
  loss = 0.5 * (prompted + unprompted)
  return loss, {'velocity_matching': prompted, 'null_matching': unprompted}


def baked_guidance_matching(
  student: VelocityFn,
  teacher: VelocityFn,
  x_t: jax.Array,
  t: jax.Array,
  implicit: Conditioning,
  explicit: Conditioning,
  null: Conditioning,
  scale: float,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`velocity_matching` to the guided teacher, v_s(i) -> v_T(null) + s (v_T(e) - v_T(null)).

  The student then draws without guidance what the teacher draws with it, at half the cost; its
  scale is fixed for good.

  Args:
    student, teacher, x_t, t, implicit, explicit, weight: as `velocity_matching`.
    null: the empty prompt, batch size 1, shaped like the prompts otherwise.
    scale: s, the guidance scale that is baked in.

  Returns:
    The loss () float32 and {'velocity_matching': loss}.

  Raises:
    UserError: if the scale is negative, or the conditionings do not fit together.
  """
  guided = flow.classifier_free_guidance(teacher, null, scale)
  return velocity_matching(student, guided, x_t, t, implicit, explicit, weight)


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

  Variant (d) is the same of the teacher under the explicit prompts.

  Args:
    key: picks which of the visited states are kept.
    student: the field that is being trained (or the teacher).
    noise: (B, ...) start noise.
    schedule: (N + 1,) solver grid from 1 to 0.
    implicit: prompts of the B rollouts (or the explicit ones).
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


def renoised_states(
  student: VelocityFn,
  start_noise: jax.Array,
  noise: jax.Array,
  t: jax.Array,
  schedule: jax.Array,
  implicit: Conditioning,
) -> jax.Array:
  """States of the student's law at any time: its finished samples, noised anew. No gradient.

  Args:
    student: the field that is being trained.
    start_noise: (B, ...) what the samples are drawn from.
    noise: (B, ...) what they are noised with.
    t: (B,) times.
    schedule: (N + 1,) solver grid from 1 to 0.
    implicit: prompts of the samples.

  Returns:
    x_t (B, ...) float32.
  """

  def frozen(x_t, t, conditioning):
    # Stopped at every step, as in `rollout_states`.
    return jax.lax.stop_gradient(student(x_t, t, conditioning))

  return teacher_states(flow.euler_ode(frozen, start_noise, schedule, implicit), noise, t)


def paired_endpoint(
  student: VelocityFn,
  noise: jax.Array,
  x_0: jax.Array,
  schedule: jax.Array,
  implicit: Conditioning,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """E w || ODE_student(z, i) - x_0 ||^2: the same noise must become the teacher's picture.

  The gradient runs through the whole sampler; activations are computed again on the way back, so
  memory grows with the states alone.

  Args:
    student: the field to train.
    noise: (B, ...) the z that x_0 was drawn from.
    x_0: (B, ...) the teacher's samples under the explicit prompts; no gradient.
    schedule: (N + 1,) solver grid from 1 to 0.
    implicit: what the student sees.
    weight: (B,) weights, or None.

  Returns:
    The loss () float32 and {'paired_endpoint': loss}.
  """
  drawn = flow.euler_ode(jax.checkpoint(student), noise, schedule, implicit)
  error = jnp.square(drawn - jax.lax.stop_gradient(x_0).astype(jnp.float32))
  loss = weighted_mean(mean_per_example(error), weight)
  return loss, {'paired_endpoint': loss}


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
  losses = joint_matching(
    student,
    teacher,
    {
      'teacher_states': States(*teacher_states),
      'rollout_states': States(*rollouts),
      'preservation': States(*preserved, explicit=preserved[2]),
    },
  )
  loss = (1 - mixture) * losses['teacher_states'] + mixture * losses['rollout_states']
  loss = loss + preservation_weight * losses['preservation']
  return loss, {**losses, 'mixture': jnp.asarray(mixture, jnp.float32)}
