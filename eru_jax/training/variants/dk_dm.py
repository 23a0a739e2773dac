"""The variants of DK-DM: on which states of which law, and against what, velocities are matched.

`VARIANTS` holds them by the name that `dk_dm.variant` takes. Adding one is writing the function
that returns its groups of states (and, if they are states of a rollout, the one that rolls out),
and naming it there; preservation, time weights and guidance are the stage's and come with it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eru_jax import flow
from eru_jax.losses import dk_dm, dmd, time_weights
from eru_jax.models.registry import DiffusionModel
from eru_jax.training.step import joined_leading, split_leading
from eru_jax.training.text_dropout import perturb
from eru_jax.types import Conditioning, VelocityFn

if TYPE_CHECKING:
  from eru_jax.training.stage_config import DkDmStageConfig

PyTree = Any
Batch = Mapping[str, Any]
Groups = dict[str, tuple[dk_dm.States, jax.Array | float]]

TIME_WEIGHTS: dict[str, Callable[[jax.Array], jax.Array] | None] = {
  'uniform': None,
  'path_kl': functools.partial(time_weights.path_kl, t_min=0.1),
  'min_snr': time_weights.min_snr,
}
_QUANTILES = 1024
# 'matched' leaves guidance to the preservation of the empty prompt, 'branchwise' matches both of
# its branches on every state, 'baked' teaches the student what the guided teacher does.
GUIDANCE = ('matched', 'branchwise', 'baked')


@dataclasses.dataclass(frozen=True)
class DkDm:
  """What the variants have in common: the stage's model and settings.

  Attributes:
    config: the stage's config.
    model: the diffusion model.
    null: the empty prompt, batch size 1.
    cfg_scale: guidance scale of the deployed sampler.
    schedule: (rollout_steps + 1,) solver grid of rollouts.
  """

  config: 'DkDmStageConfig'
  model: DiffusionModel
  null: Conditioning
  cfg_scale: float
  schedule: jax.Array

  def student(self, frozen: PyTree, params: PyTree) -> VelocityFn:
    return self.model.velocity(frozen['backbone'], params)

  def teacher(self, frozen: PyTree) -> VelocityFn:
    """The frozen base; with baked guidance, guided."""
    field = self.model.velocity(frozen['backbone'])
    if self.config.guidance == 'baked':
      return flow.classifier_free_guidance(field, self.null, self.config.baked_scale)
    return field

  def deployed(self, field: VelocityFn) -> VelocityFn:
    """The field that the sampler integrates."""
    return flow.classifier_free_guidance(field, self.null, self.cfg_scale)

  @property
  def density(self) -> flow.TimestepDensity:
    return flow.TimestepDensity('logit_normal', self.config.time_mean, self.config.time_std)

  def times(self, key: jax.Array, count: int) -> jax.Array:
    return self.density.sample(key, (count,))

  def noise(self, key: jax.Array, count: int) -> jax.Array:
    return jax.random.normal(key, (count, *self.model.latent_shape))

  def noised(
    self, keys: jax.Array, pictures: jax.Array, rows: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Pictures of rows at random noise levels: x_t, t, x_0 and the noise."""
    which = jax.random.randint(keys[0], rows.shape, 0, pictures.shape[1])
    x_0 = nn.with_logical_constraint(pictures[rows, which], ('batch', 'length', None))
    t = self.times(keys[1], rows.shape[0])
    noise = jax.random.normal(keys[2], x_0.shape)
    return flow.interpolate(x_0, noise, t), t, x_0, noise

  def blurred(self, key: jax.Array, conditioning: Conditioning) -> Conditioning:
    """The implicit prompts as the student sees them in training."""
    return perturb(
      key, conditioning, noise=self.config.text_noise, pooled_only=self.config.pooled_only
    )

  def weight(self, t: jax.Array) -> jax.Array | None:
    weight = TIME_WEIGHTS[self.config.time_weight]
    if weight is None:
      return None
    # Of mean 1 where t is drawn: its size would be one of preservation's weight.
    return weight(t) / jnp.mean(weight(self.density.quantiles(_QUANTILES)))


def in_turn(field: VelocityFn, parts: int) -> VelocityFn:
  """A field that sees equal parts of a batch one after the other.

  The backward pass computes each part again, and so holds the activations of one part only. Where
  the parts would not be equal, the batch stays whole.
  """

  def turned(x_t: jax.Array, t: jax.Array, conditioning: Conditioning) -> jax.Array:
    if x_t.shape[0] % parts:
      return field(x_t, t, conditioning)
    inputs = split_leading((x_t, t, conditioning), parts)
    again = jax.checkpoint(lambda part: field(*part), prevent_cse=False)
    return joined_leading(jax.lax.map(again, inputs))

  return turned


# Pictures of the teacher (or of the data), noised.


def _off_policy(stage, frozen, batch, keys, step) -> Groups:
  """(a): noised pictures of the teacher, and its velocity there."""
  del step
  pairs = batch['pairs']
  x_t, t, _, _ = stage.noised(keys[:3], frozen['pictures'], pairs['anchor'])
  implicit = stage.blurred(keys[3], pairs['implicit'])
  states = dk_dm.States(x_t, t, implicit, pairs['explicit'], weight=stage.weight(t))
  return {'teacher_states': (states, 1.0)}


def _path(pictures, stage, frozen, batch, keys, step) -> Groups:
  """Flow matching under the implicit prompt, on the teacher's own pictures or on the data's."""
  del step
  pairs = batch['pairs']
  x_t, t, x_0, noise = stage.noised(keys[:3], frozen[pictures], pairs['anchor'])
  implicit = stage.blurred(keys[3], pairs['implicit'])
  target = flow.velocity(x_0, noise)
  states = dk_dm.States(x_t, t, implicit, target=target, weight=stage.weight(t))
  return {'flow_matching': (states, 1.0)}


# Rollouts. They are made before the update, all of an iteration's at once.


def _roll_out(stage, field, noise, key, prompts, implicit):
  """States that a field visits under prompts; what student and teacher see there comes along."""
  x_t, t, row = dk_dm.rollout_states(
    key, field, noise, stage.schedule, implicit, stage.config.states_per_rollout
  )
  return {'x_t': x_t, 't': t, **jax.tree.map(lambda x: x[row], prompts)}


def _roll_out_student(stage, policy, frozen, prompts, key):
  """States the deployed student visits."""
  noise_key, state_key = jax.random.split(key)
  noise = stage.noise(noise_key, prompts['anchor'].shape[0])
  field = stage.deployed(stage.student(frozen, policy))
  return _roll_out(stage, field, noise, state_key, prompts, prompts['implicit'])


def _roll_out_unguided(stage, policy, frozen, prompts, key):
  """States of the student's own law, whose score a critic can learn."""
  noise_key, state_key = jax.random.split(key)
  noise = stage.noise(noise_key, prompts['anchor'].shape[0])
  field = stage.student(frozen, policy)
  return _roll_out(stage, field, noise, state_key, prompts, prompts['implicit'])


def _renoise_student(stage, policy, frozen, prompts, key):
  """The student's finished pictures, each noised anew to several levels."""
  start_key, noise_key, time_key = jax.random.split(key, 3)
  count, copies = prompts['anchor'].shape[0], stage.config.states_per_rollout
  field = stage.deployed(stage.student(frozen, policy))
  x_0 = flow.euler_ode(field, stage.noise(start_key, count), stage.schedule, prompts['implicit'])
  row = jnp.repeat(jnp.arange(count), copies)
  t = stage.times(time_key, count * copies)
  x_t = dk_dm.teacher_states(x_0[row], stage.noise(noise_key, count * copies), t)
  return {'x_t': x_t, 't': t, **jax.tree.map(lambda x: x[row], prompts)}


def _roll_out_teacher(stage, policy, frozen, prompts, key):
  """States the deployed teacher visits under the explicit prompts."""
  del policy
  noise_key, state_key = jax.random.split(key)
  noise = stage.noise(noise_key, prompts['anchor'].shape[0])
  field = stage.deployed(stage.teacher(frozen))
  return _roll_out(stage, field, noise, state_key, prompts, prompts['explicit'])


def _pair_endpoints(stage, policy, frozen, prompts, key):
  """`_roll_out_teacher`, with the noise that each state's rollout began with and where it ended."""
  noise_key, _ = jax.random.split(key)
  states = _roll_out_teacher(stage, policy, frozen, prompts, key)
  noise = stage.noise(noise_key, prompts['anchor'].shape[0])
  field = stage.deployed(stage.teacher(frozen))
  x_0 = flow.euler_ode(field, noise, stage.schedule, prompts['explicit'])
  row = jnp.repeat(jnp.arange(x_0.shape[0]), stage.config.states_per_rollout)
  return {**states, 'noise': noise[row], 'x_0': x_0[row]}


def _rolled(stage, frozen, batch, keys, step) -> Groups:
  """(b1), (b2), (d): states that `roll_out` made."""
  del frozen, step
  rolled = batch['rollouts']
  implicit = stage.blurred(keys[4], rolled['implicit'])
  states = dk_dm.States(
    rolled['x_t'], rolled['t'], implicit, rolled['explicit'], weight=stage.weight(rolled['t'])
  )
  return {'rollout_states': (states, 1.0)}


def _mixture(stage, frozen, batch, keys, step) -> Groups:
  """(a) and (b1), the second with a weight that grows from zero."""
  config = stage.config
  share = dk_dm.mixture_schedule(step, config.num_steps, config.mixture, config.mixture_ramp)
  groups = {
    **_off_policy(stage, frozen, batch, keys, step),
    **_rolled(stage, frozen, batch, keys, step),
  }
  states, rolled = (groups[name][0] for name in ('teacher_states', 'rollout_states'))
  return {'teacher_states': (states, 1 - share), 'rollout_states': (rolled, share)}


def _endpoint(stage, params, frozen, batch):
  """What (d) adds: the student's sampler must end where the teacher's did from the same noise."""
  rolled = batch['rollouts']
  # One of the copies that stand beside each state.
  noise, x_0, implicit = jax.tree.map(
    lambda x: x[:: stage.config.states_per_rollout],
    (rolled['noise'], rolled['x_0'], rolled['implicit']),
  )
  field = stage.deployed(stage.student(frozen, params))
  return dk_dm.paired_endpoint(field, noise, x_0, stage.schedule, implicit)


@dataclasses.dataclass(frozen=True)
class Variant:
  """A variant of DK-DM.

  Attributes:
    groups: (stage, frozen, batch, five keys, step) -> {name: (states, their weight in the loss)}.
    roll_out: (stage, policy, frozen, prompts, key) -> what stands in batch['rollouts'] for the
      loss, (rollouts * states_per_rollout, ...); or None if there are no rollouts.
    addition: (stage, params, frozen, batch) -> (loss, measurements) that is added, or None.
    critic: whether a critic is trained beside the student; then `groups` is not used.
  """

  groups: Callable[..., Groups] | None
  roll_out: Callable[..., PyTree] | None = None
  addition: Callable[..., tuple[jax.Array, dict]] | None = None
  critic: bool = False


VARIANTS = {
  'mixture': Variant(_mixture, _roll_out_student),
  'off_policy': Variant(_off_policy),
  'self_distillation': Variant(functools.partial(_path, 'pictures')),
  'supervised': Variant(functools.partial(_path, 'data')),
  'on_policy': Variant(_rolled, _roll_out_student),
  'renoised': Variant(_rolled, _renoise_student),
  'trajectory': Variant(_rolled, _roll_out_teacher),
  'paired_endpoint': Variant(_rolled, _pair_endpoints, _endpoint),
  'critic': Variant(None, _roll_out_unguided, critic=True),
}


def _preserved(stage, frozen, batch, keys) -> dk_dm.States:
  x_t, t, _, _ = stage.noised(keys, frozen['pictures'], batch['preserved']['anchor'])
  prompt = batch['preserved']['prompt']
  return dk_dm.States(x_t, t, prompt, prompt)


def _branches(stage, groups: Groups) -> Groups:
  """Both branches of guidance on every state, each with half of its weight."""
  result = {}
  for name, (states, share) in groups.items():
    null = jax.tree.map(lambda n, s=states: jnp.repeat(n, s.t.shape[0], 0), stage.null)
    unprompted = states.replace(implicit=null, explicit=null, target=None)
    result |= {name: (states, share / 2), f'{name}_null': (unprompted, share / 2)}
  return result


def matching_loss(
  stage: DkDm, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of every variant without critic: its groups, and preservation.

  Args:
    stage: what the variants have in common.
    params: the student's.
    frozen: 'backbone' and 'pictures' (N, seeds, ...), the teacher's of each preserved prompt;
      'data' (N, 1, ...), the world's own, where the variant asks for them.
    batch: 'pairs' ('anchor', rows of the pictures; 'implicit', 'explicit'), 'rollouts' (what
      `roll_out` made) and 'preserved' ('anchor', 'prompt').
    key: randomness.
    step: iterations done.

  Returns:
    The loss () and every group's, `preservation`, and the groups' weights where they vary.
  """
  keys = jax.random.split(key, 8)
  variant = VARIANTS[stage.config.variant]
  groups = variant.groups(stage, frozen, batch, (*keys[:3], keys[6], keys[7]), step)
  if stage.config.guidance == 'branchwise':
    groups = _branches(stage, groups)
  states = {name: group for name, (group, _) in groups.items()}
  states['preservation'] = _preserved(stage, frozen, batch, keys[3:6])
  student, teacher = stage.student(frozen, params), stage.teacher(frozen)
  if stage.config.in_turn:
    student = in_turn(student, len(states))
  losses = dk_dm.joint_matching(student, teacher, states)
  loss = sum(share * losses[name] for name, (_, share) in groups.items())
  loss = loss + stage.config.preservation_weight * losses['preservation']
  if stage.config.variant == 'mixture':
    losses['mixture'] = jnp.asarray(groups['rollout_states'][1], jnp.float32)
  if variant.addition is not None:
    added, measurements = variant.addition(stage, params, frozen, batch)
    loss, losses = loss + added, losses | measurements
  return loss, losses


def critic_loss(
  stage: DkDm, params: tuple, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of variant (c), for `params` = (student's, critic's): one of the two learns at a time.

  Args:
    stage, frozen, key, step: as `matching_loss`.
    batch: as there, with `students_turn` (B,) bool, the same for a whole update.

  Returns:
    The loss () whose gradient is zero for the one whose turn it is not, and `dmd_gradient`,
    `critic` and `preservation`: zero in the other's turns, and else such that their mean over a
    round is what they are.
  """
  del step
  keys = jax.random.split(key, 5)
  rolled = batch['rollouts']
  count = rolled['t'].shape[0]
  noise = stage.noise(keys[0], count)
  t = jnp.clip(stage.times(keys[1], count), *dmd.TIME_RANGE)
  zero, updates = jnp.zeros(()), stage.config.critic_updates

  def pictures(student):
    velocity = student(rolled['x_t'], rolled['t'], rolled['implicit']).astype(jnp.float32)
    return flow.predict_x0(rolled['x_t'], velocity, rolled['t'])

  def move_student(params):
    student, critic = (stage.student(frozen, part) for part in params)
    teacher = stage.teacher(frozen)
    x_0 = pictures(student)
    matched, measured = dmd.distribution_matching(
      teacher, critic, x_0, noise, t, rolled['implicit'], rolled['explicit']
    )
    kept = dk_dm.joint_matching(
      student, teacher, {'preservation': _preserved(stage, frozen, batch, keys[2:5])}
    )['preservation']
    loss = matched + stage.config.preservation_weight * kept
    measured = jax.tree.map(lambda x: (updates + 1) * x, {'preservation': kept, **measured})
    return loss, {'critic': zero, **measured}

  def move_critic(params):
    student, critic = (stage.student(frozen, part) for part in params)
    x_0 = jax.lax.stop_gradient(pictures(student))
    loss, measured = dmd.critic_matching(critic, x_0, noise, t, rolled['implicit'])
    measured = jax.tree.map(lambda x: (updates + 1) / updates * x, measured)
    return loss, {**measured, 'preservation': zero, 'dmd_gradient': zero}

  return jax.lax.cond(batch['students_turn'][0], move_student, move_critic, params)
