"""Distribution matching distillation with an online critic: variant (c) of DK-DM.

Yin et al., DMD (arXiv 2311.18828) and DMD2 (arXiv 2405.14867), written in velocities. A generator
gives samples, a critic learns their score by flow matching, and the difference of the critic's and
the teacher's scores says where the samples should move. Two time scales: DMD2 updates the critic
five to ten times for each update of the generator, and draws t in [0.02, 0.98].

`dk_dm.velocity_matching` has the same optimum without critic: a multi-step flow model knows its own
score. This is what it is compared with.
"""

import jax
import jax.numpy as jnp

from eru_jax import flow
from eru_jax.losses.dk_dm import rollout_states
from eru_jax.losses.flow_matching import (
  flow_matching,
  frozen_velocity,
  mean_per_example,
  weighted_mean,
)
from eru_jax.types import Conditioning, VelocityFn

# Of t, in DMD2's code.
TIME_RANGE = (0.02, 0.98)
# A generator that has met the teacher exactly would divide by zero.
_NORMALISER_FLOOR = 1e-5


def backward_simulation(
  key: jax.Array,
  student: VelocityFn,
  noise: jax.Array,
  schedule: jax.Array,
  implicit: Conditioning,
) -> jax.Array:
  """The clean sample the student predicts at a random step of its own rollout.

  As in DMD2: the rollout up to that step runs without gradient, so that the student is
  trained on states it visits itself, and the one prediction carries the gradient.

  Args:
    key: picks the step, for each rollout its own.
    student: the field that is being trained.
    noise: (B, ...) start noise.
    schedule: (N + 1,) solver grid from 1 to 0.
    implicit: prompts of the B rollouts.

  Returns:
    x_0 (B, ...) float32, differentiable in the student's parameters. Predictions at noisy steps
    are means over many samples: their law is blurrier than that of finished rollouts.
  """
  x_t, t, _ = rollout_states(key, student, noise, schedule, implicit, states_per_rollout=1)
  return flow.predict_x0(x_t, student(x_t, t, implicit).astype(jnp.float32), t)


def distribution_matching(
  teacher: VelocityFn,
  critic: VelocityFn,
  x_0: jax.Array,
  noise: jax.Array,
  t: jax.Array,
  implicit: Conditioning,
  explicit: Conditioning,
  *,
  normalize: bool = True,
  weight: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The generator's loss, whose gradient moves samples from the critic's law to the teacher's.

      L = 1/2 mean( x_0 - sg[x_0 - g] )^2,   g = t (v_T(x_t, t, e) - v_critic(x_t, t, i)) / m
      m = sg mean abs( x_0 - x0_hat(v_T) ), per sample

  Without m, since s_q - s_p = ((1 - t) / t) (v_p - v_q), g is t^2 / (1 - t) times the difference of
  scores, and the expected gradient in the generator's parameters is (t / (1 - t))^2 times that of
  KL(q_t || p_t), over the number of dimensions.

  Args:
    teacher: the frozen base, e.g. through `flow.classifier_free_guidance`; no gradient.
    critic: the field learnt on the generator's samples, unguided; no gradient.
    x_0: (B, ...) samples of the generator, with gradient.
    noise: (B, ...) standard normal.
    t: (B,) times in (0, 1).
    implicit: what the critic sees.
    explicit: what the teacher sees.
    normalize: divide by m.
    weight: (B,) weights of the examples, or None.

  Returns:
    The loss () float32 (its value says little; its gradient counts) and `dmd_gradient`, the root
    mean square of g.
  """
  x_0 = x_0.astype(jnp.float32)
  sample = jax.lax.stop_gradient(x_0)
  x_t = flow.interpolate(sample, noise, t)
  v_teacher = frozen_velocity(teacher, x_t, t, explicit)
  v_critic = frozen_velocity(critic, x_t, t, implicit)
  gradient = flow.expand(t, x_t) * (v_teacher - v_critic)
  if normalize:
    m = mean_per_example(jnp.abs(sample - flow.predict_x0(x_t, v_teacher, t)))
    gradient = gradient / flow.expand(jnp.maximum(m, _NORMALISER_FLOOR), gradient)
  loss = 0.5 * weighted_mean(mean_per_example(jnp.square(x_0 - (sample - gradient))), weight)
  return loss, {'dmd_gradient': jnp.sqrt(jnp.mean(jnp.square(gradient)))}


def critic_matching(
  critic: VelocityFn,
  x_0: jax.Array,
  noise: jax.Array,
  t: jax.Array,
  implicit: Conditioning,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The critic's loss: `flow_matching` on the generator's samples, which get no gradient.

  Args:
    critic: the field to train.
    x_0: (B, ...) samples of the generator.
    noise: (B, ...) standard normal.
    t: (B,) times in [0, 1].
    implicit: prompts of the samples.

  Returns:
    The loss () float32 and {'critic': loss}.
  """
  loss, _ = flow_matching(critic, jax.lax.stop_gradient(x_0), noise, t, implicit)
  return loss, {'critic': loss}
