"""Every variant of DK-DM and NO-RL on the toy world, by the library's own losses.

A variant is one entry of `DK_DM`, `DMD` or `NO_RL`. World, network, optimiser, learning rates and
numbers of steps are the same for all of them, and nothing was searched for; what a step sees is not
quite. DK-DM matches `BATCH` states a step: the mixture twice as many (as many of the teacher as of
rollouts), the paired endpoint `ROLLOUTS` whole trajectories more, the critic's generator
`GENERATED` pictures. NO-RL's updates see each of an epoch's pictures once, PPO's `TRANSITIONS`
sampler steps of each, under a clip range of 0.1 set by hand.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import toy_world as world

from eru_jax import flow
from eru_jax.losses import advantages, dk_dm, dmd, nft, no_rl, policy_gradient, time_weights
from eru_jax.losses.flow_matching import flow_matching


@dataclasses.dataclass(frozen=True)
class Budget:
  """How long everything runs.

  Attributes:
    pretraining: steps that make the base.
    dk_dm: steps of DK-DM, and the earlier step that is reported too.
    no_rl: epochs of NO-RL, and likewise.
    samples: of each prompt in an evaluation.
  """

  pretraining: int = 5000
  dk_dm: tuple[int, int] = (1000, 300)
  no_rl: tuple[int, int] = (300, 60)
  samples: int = 1000


PRETRAINING_BATCH, BATCH, PRESERVED = 512, 192, 64
ROLLOUTS, STATES_PER_ROLLOUT = 48, 4
GENERATED = 96
TEACHER_SAMPLES = 2048
IMAGES_PER_PROMPT, UPDATES_PER_EPOCH, TRANSITIONS = 96, 2, 2
LEARNING_RATE, NO_RL_LEARNING_RATE = 1e-3, 1e-4
CRITIC_UPDATES = 5
T_MIN, T_MAX = 0.02, 0.98
SDE, CPS = flow.Dynamics('sde', 0.7), flow.Dynamics('cps', 0.5)


def _optimizer(rate):
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def _descend(optimizer, loss, params, opt_state):
  updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def _run(update, state, steps, key):
  """Scans update(state, step, key); parameters at the end and at the earlier step."""
  last, early = steps

  def body(carry, inputs):
    state, kept = carry
    step, key = inputs
    state = update(state, step, key)
    kept = jax.tree.map(lambda k, p: jnp.where(step + 1 == early, p, k), kept, state['params'])
    return (state, kept), None

  keys = jax.random.split(key, last)
  (state, kept), _ = jax.lax.scan(body, (state, state['params']), (jnp.arange(last), keys))
  return {'end': state['params'], 'early': kept}


def pretrain(key: jax.Array, num_steps: int) -> dict[str, jax.Array]:
  """The base model of one seed."""
  init_key, run_key = jax.random.split(key)
  params = world.init(init_key)
  optimizer = _optimizer(optax.cosine_decay_schedule(2e-3, num_steps))

  def update(state, step, key):
    loss = lambda p: world.pretraining_loss(p, key, PRETRAINING_BATCH)  # noqa: E731
    params, opt_state = _descend(optimizer, loss, state['params'], state['opt'])
    return {'params': params, 'opt': opt_state}

  state = {'params': params, 'opt': optimizer.init(params)}
  return _run(update, state, (num_steps, num_steps), run_key)['end']


# DK-DM. A source of states is (key, params, teacher) -> x_t, t, concept.


def make_teacher(base, key: jax.Array):
  """The frozen base and its samples of every prompt it is asked for, made once.

  Returns:
    {'params', 'start', 'x_0'}: start noise and samples (7, 2048, 2) of the explicit prompts and,
    last, the empty one.
  """
  prompt = jnp.append(jnp.arange(world.CONCEPTS), world.NULL).repeat(TEACHER_SAMPLES)
  pair = world.sample(key, world.velocity(base), prompt)
  start, x_0 = (x.reshape(-1, TEACHER_SAMPLES, 2) for x in pair)
  return {'params': base, 'start': start, 'x_0': x_0}


def _concepts(key, count):
  return jax.random.randint(key, (count,), 0, world.CONCEPTS)


def _prompts(concept):
  """The implicit and the explicit conditioning of concepts (B,)."""
  return world.conditioning(concept + world.IMPLICIT), world.conditioning(concept)


def _noise_and_time(key, count):
  noise_key, time_key = jax.random.split(key)
  t = jax.random.uniform(time_key, (count,), minval=T_MIN, maxval=T_MAX)
  return jax.random.normal(noise_key, (count, 2)), t


def _teacher_batch(key, teacher):
  """The teacher's samples x_0 of explicit prompts, what they were drawn from, noise and t."""
  concept_key, row_key, key = jax.random.split(key, 3)
  concept = _concepts(concept_key, BATCH)
  row = jax.random.randint(row_key, (BATCH,), 0, TEACHER_SAMPLES)
  start, x_0 = teacher['start'][concept, row], teacher['x_0'][concept, row]
  return start, x_0, *_noise_and_time(key, BATCH), concept


def _off_policy(key, params, teacher):
  del params
  _, x_0, noise, t, concept = _teacher_batch(key, teacher)
  return dk_dm.teacher_states(x_0, noise, t), t, concept


def _rollouts(key, velocity_fn, shift):
  concept_key, noise_key, key = jax.random.split(key, 3)
  concept = _concepts(concept_key, ROLLOUTS)
  noise = jax.random.normal(noise_key, (ROLLOUTS, 2))
  prompt = world.conditioning(concept + shift)
  x_t, t, row = dk_dm.rollout_states(
    key, velocity_fn, noise, world.schedule(), prompt, STATES_PER_ROLLOUT
  )
  return x_t, t, concept[row]


def _on_policy(key, params, teacher):
  del teacher
  return _rollouts(key, world.velocity(params), world.IMPLICIT)


def _teacher_trajectory(key, params, teacher):
  del params
  return _rollouts(key, world.velocity(teacher['params']), 0)


def _renoised(key, params, teacher):
  del teacher
  concept_key, start_key, key = jax.random.split(key, 3)
  concept = _concepts(concept_key, BATCH)
  start = jax.random.normal(start_key, (BATCH, 2))
  noise, t = _noise_and_time(key, BATCH)
  prompt = world.conditioning(concept + world.IMPLICIT)
  states = dk_dm.renoised_states(world.velocity(params), start, noise, t, world.schedule(), prompt)
  return states, t, concept


def _preserved(key, teacher):
  """States of the base under explicit prompts and the empty one."""
  prompt_key, row_key, key = jax.random.split(key, 3)
  prompt = jax.random.randint(prompt_key, (PRESERVED,), 0, world.CONCEPTS + 1)
  row = jax.random.randint(row_key, (PRESERVED,), 0, TEACHER_SAMPLES)
  noise, t = _noise_and_time(key, PRESERVED)
  x_t = dk_dm.teacher_states(teacher['x_0'][prompt, row], noise, t)
  return x_t, t, world.conditioning(jnp.where(prompt == world.CONCEPTS, world.NULL, prompt))


def _preservation(params, teacher, key):
  fields = world.velocity(params), world.velocity(teacher['params'])
  return dk_dm.preservation(*fields, *_preserved(key, teacher))[0]


def _matching(source, weight=None):
  """Velocity matching on a source of states, and preservation."""

  def loss(params, teacher, key, step, last):
    del step, last
    state_key, kept_key = jax.random.split(key)
    x_t, t, concept = source(state_key, params, teacher)
    fields = world.velocity(params), world.velocity(teacher['params'])
    w = None if weight is None else weight(t)
    matched, _ = dk_dm.velocity_matching(*fields, x_t, t, *_prompts(concept), w)
    return matched + _preservation(params, teacher, kept_key)

  return loss


def _self_distillation(params, teacher, key, step, last):
  """(a) with the path's velocity as target: flow matching on the teacher's samples."""
  del step, last
  state_key, kept_key = jax.random.split(key)
  _, x_0, noise, t, concept = _teacher_batch(state_key, teacher)
  matched, _ = flow_matching(world.velocity(params), x_0, noise, t, _prompts(concept)[0])
  return matched + _preservation(params, teacher, kept_key)


def _with_endpoint(params, teacher, key, step, last):
  """(d) with the paired endpoint."""
  state_key, pair_key = jax.random.split(key)
  start, x_0, _, _, concept = _teacher_batch(pair_key, teacher)
  implicit, _ = _prompts(concept[:ROLLOUTS])
  endpoint, _ = dk_dm.paired_endpoint(
    world.velocity(params), start[:ROLLOUTS], x_0[:ROLLOUTS], world.schedule(), implicit
  )
  return _matching(_teacher_trajectory)(params, teacher, state_key, step, last) + endpoint


def _mixture(params, teacher, key, step, last):
  keys = jax.random.split(key, 3)
  groups = []
  for source, k in ((_off_policy, keys[0]), (_on_policy, keys[1])):
    x_t, t, concept = source(k, params, teacher)
    groups.append((x_t, t, *_prompts(concept)))
  mixture = dk_dm.mixture_schedule(step, last)
  return dk_dm.dk_dm_mixture(
    world.velocity(params),
    world.velocity(teacher['params']),
    *groups,
    _preserved(keys[2], teacher),
    mixture,
  )[0]


# Weights in t are taken as they are, of mean 2.2 (path-KL) and 0.17 (min-SNR) over these t:
# they also change what preservation weighs beside them.
DK_DM = {
  'a, path velocity': _self_distillation,
  'a': _matching(_off_policy),
  'a, path-KL weight': _matching(_off_policy, functools.partial(time_weights.path_kl, t_min=0.1)),
  'a, min-SNR weight': _matching(_off_policy, time_weights.min_snr),
  'b1': _matching(_on_policy),
  'b2': _matching(_renoised),
  'd': _matching(_teacher_trajectory),
  'd, paired endpoint': _with_endpoint,
  'mix': _mixture,
}
# Updates of the critic for each of the generator.
DMD = {'c, 5 critic updates': CRITIC_UPDATES, 'c, 1 critic update': 1}


def _matching_update(loss, teacher, last):
  optimizer = _optimizer(LEARNING_RATE)

  def update(state, step, key):
    run = lambda p: loss(p, teacher, key, step, last)  # noqa: E731
    params, opt_state = _descend(optimizer, run, state['params'], state['opt'])
    return {'params': params, 'opt': opt_state}

  return update, {'params': teacher['params'], 'opt': optimizer.init(teacher['params'])}


def _critic_update(ratio, teacher):
  """DMD: the critic starts as the base, and generator and critic share a learning rate."""
  optimizer = _optimizer(LEARNING_RATE)
  base = teacher['params']

  def generate(params, key):
    concept_key, noise_key, key = jax.random.split(key, 3)
    implicit, explicit = _prompts(_concepts(concept_key, GENERATED))
    noise = jax.random.normal(noise_key, (GENERATED, 2))
    drawn = dmd.backward_simulation(key, world.velocity(params), noise, world.schedule(), implicit)
    return drawn, implicit, explicit

  def update(state, step, key):
    del step
    critic_key, sample_key, noise_key, kept_key = jax.random.split(key, 4)

    def learn(carry, key):
      sample_key, noise_key = jax.random.split(key)
      x_0, implicit, _ = generate(state['params'], sample_key)
      noise, t = _noise_and_time(noise_key, GENERATED)

      def loss(critic):
        return dmd.critic_matching(world.velocity(critic), x_0, noise, t, implicit)[0]

      return _descend(optimizer, loss, *carry), None

    (critic, critic_opt), _ = jax.lax.scan(
      learn, (state['critic'], state['critic_opt']), jax.random.split(critic_key, ratio)
    )

    def loss(params):
      x_0, implicit, explicit = generate(params, sample_key)
      fields = world.velocity(base), world.velocity(critic)
      noise, t = _noise_and_time(noise_key, GENERATED)
      matched, _ = dmd.distribution_matching(*fields, x_0, noise, t, implicit, explicit)
      return matched + _preservation(params, teacher, kept_key)

    params, opt_state = _descend(optimizer, loss, state['params'], state['opt'])
    return {'params': params, 'opt': opt_state, 'critic': critic, 'critic_opt': critic_opt}

  opt_state = optimizer.init(base)
  return update, {'params': base, 'opt': opt_state, 'critic': base, 'critic_opt': opt_state}


def train_dk_dm(name: str, teacher, key: jax.Array, budget: Budget):
  """{'end', 'early'}: parameters of one seed after a variant of `DK_DM` or `DMD`."""
  if name in DMD:
    update, state = _critic_update(DMD[name], teacher)
  else:
    update, state = _matching_update(DK_DM[name], teacher, budget.dk_dm[0])
  return _run(update, state, budget.dk_dm, key)


# NO-RL.


@dataclasses.dataclass(frozen=True)
class NoRl:
  """A variant.

  Attributes:
    loss: (student, old, reference, examples, noise, t) -> loss, on noised samples; or, with
      dynamics, (student, reference, examples, dynamics) -> loss, on steps of the sampler.
    dynamics: of a stochastic sampler, or None for the deployed one.
    inertia: whether the policy that samples follows slowly, as in DiffusionNFT.
  """

  loss: Callable
  dynamics: flow.Dynamics | None = None
  inertia: bool = True


def _nft(mode, weights='shared', r='r', reference_weight=0.0):
  def loss(student, old, reference, ex, noise, t):
    return nft.nft(
      student,
      old,
      reference,
      ex['x_0'],
      noise,
      t,
      ex['prompt'],
      ex[r],
      mode=mode,
      weights=weights,
      reference_weight=reference_weight,
    )[0]

  return NoRl(loss)


def _on_negatives(method, **settings):
  """A loss of no_rl.py that takes student, old and reference."""

  def loss(student, old, reference, ex, noise, t):
    args = (student, old, reference, ex['x_0'], noise, t, ex['prompt'], ex['r'])
    return method(*args, **settings)[0]

  return NoRl(loss)


def _solved_dropped(student, old, reference, ex, noise, t):
  weight = advantages.unsolved_groups(ex['r'].reshape(world.CONCEPTS, -1)).reshape(-1)
  args = (student, old, reference, ex['x_0'], noise, t, ex['prompt'], ex['r'])
  return no_rl.no_rl(*args, weight=weight)[0]


def _bounded(reference_weight):
  def loss(student, old, reference, ex, noise, t):
    del old
    return no_rl.bounded_unlearning(
      student,
      reference,
      ex['x_0'],
      noise,
      t,
      ex['prompt'],
      ex['r'],
      reference_weight=reference_weight,
    )[0]

  return NoRl(loss)


def _repulsion(student, old, reference, ex, noise, t):
  del old, reference
  return no_rl.repulsion(student, ex['x_0'], noise, t, ex['prompt'], ex['r'])[0]


def _rejection(student, old, reference, ex, noise, t):
  """Rejection-sampling fine-tuning: flow matching on the samples that are right."""
  del old, reference
  return flow_matching(student, ex['x_0'], noise, t, ex['prompt'], ex['r'])[0]


def _awm(positives, old_weight=0.0):
  """AWM, with a distance to the old policy as its authors have it."""

  def loss(student, old, reference, ex, noise, t):
    del reference
    advantage = advantages.scale_positives(ex['advantage'], positives)
    args = (student, old, old, ex['x_0'], noise, t, ex['prompt'], advantage)
    return policy_gradient.advantage_weighted_matching(*args, reference_weight=old_weight)[0]

  return NoRl(loss, inertia=False)


def _ppo(dynamics, positives):
  def loss(student, reference, ex, dynamics):
    return policy_gradient.policy_gradient(
      student,
      reference,
      ex['transitions'],
      ex['prompt'],
      ex['old_log_prob'],
      advantages.scale_positives(ex['advantage'], positives),
      dynamics,
      clip_range=0.1,
    )[0]

  return NoRl(loss, dynamics, inertia=False)


# `r` is absolute (right or wrong), `r_group` DiffusionNFT's of normalised rewards.
NO_RL = {
  'full NFT, branch weights': _nft('all', 'branch', 'r_group'),
  'full NFT': _nft('all', 'shared', 'r_group'),
  'full NFT, absolute r': _nft('all'),
  'full NFT, absolute r, KL 0.05': _nft('all', reference_weight=0.05),
  'positive-only NFT': _nft('positive_only', 'shared', 'r_group'),
  'rejection sampling (RFT)': NoRl(_rejection),
  'negative-only, branch weights': _nft('negative_only', 'branch', 'r_group'),
  'negative-only, absolute r, branch weights': _nft('negative_only', 'branch'),
  'negative-only': _nft('negative_only', 'shared', 'r_group'),
  'negative-only, absolute r': _nft('negative_only'),
  'N1': _on_negatives(no_rl.no_rl),
  'N1, branch weights': _nft('negative_only', 'branch', reference_weight=0.05),
  'N1, solved prompts dropped': NoRl(_solved_dropped),
  'N2': _on_negatives(no_rl.anchored_negatives),
  'N2, KL 0.05': _on_negatives(no_rl.anchored_negatives, reference_weight=0.05),
  'N3, Flow-SDE': _ppo(SDE, 0.0),
  'N3, CPS': _ppo(CPS, 0.0),
  'N3, W-REINFORCE, CPS': _ppo(CPS, 0.1),
  'PPO (positives too), CPS': _ppo(CPS, 1.0),
  'N4': _awm(0.0),
  'N4, KL 1 to the old policy': _awm(0.0, old_weight=1.0),
  'AWM (positives too)': _awm(1.0),
  'N5': _bounded(0.0),
  'N5, KL 0.05': _bounded(0.05),
  'negatives subset': _on_negatives(no_rl.negatives_subset),
  'negatives subset, KL 0.05': _on_negatives(no_rl.negatives_subset, reference_weight=0.05),
  'N0': NoRl(_repulsion),
}
FROM_BASE = ('full NFT', 'positive-only NFT', 'negative-only, absolute r', 'N1')


def _collect(variant, old, key):
  """Samples of the old policy under implicit prompts, their rewards and, for PPO, steps."""
  count = world.CONCEPTS * IMAGES_PER_PROMPT
  concept = jnp.repeat(jnp.arange(world.CONCEPTS), IMAGES_PER_PROMPT)
  prompt = world.conditioning(concept + world.IMPLICIT)
  examples = {'prompt': prompt}
  if variant.dynamics is None:
    _, x_0 = world.sample(key, world.velocity(old), concept + world.IMPLICIT)
    examples['x_0'], row = x_0, jnp.arange(count)
  else:
    noise_key, key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (count, 2))
    policy = world.velocity(old)
    x_0, transitions, row = policy_gradient.sample_transitions(
      key, policy, noise, world.schedule(), prompt, variant.dynamics, TRANSITIONS
    )
    prompt = jax.tree.map(lambda x: x[row], prompt)
    examples = {'prompt': prompt, 'transitions': transitions}
    examples['old_log_prob'] = policy_gradient.transition_log_prob(
      policy, transitions, prompt, variant.dynamics
    )
  rewards = world.reward(x_0, concept)
  advantage = advantages.group_normalized(
    rewards.reshape(world.CONCEPTS, IMAGES_PER_PROMPT), clip=5.0
  ).reshape(-1)
  return examples | {
    'r': advantages.optimality(rewards, 0.0, 1.0)[row],
    'r_group': advantages.probability(advantage)[row],
    'advantage': advantage[row],
  }


def train_no_rl(name: str, start, key: jax.Array, budget: Budget):
  """{'end', 'early'}: parameters of one seed after a variant of `NO_RL` from `start`."""
  variant = NO_RL[name]
  optimizer = _optimizer(NO_RL_LEARNING_RATE)

  def update(state, epoch, key):
    old = state['old']
    collect_key, key = jax.random.split(key)
    examples = _collect(variant, old, collect_key)

    def learn(carry, key):
      params, opt_state = carry

      def loss(params):
        student, reference = world.velocity(params), world.velocity(start)
        if variant.dynamics is not None:
          return variant.loss(student, reference, examples, variant.dynamics)
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, examples['x_0'].shape)
        t = jax.random.uniform(time_key, noise.shape[:1], minval=T_MIN, maxval=1.0)
        return variant.loss(student, world.velocity(old), reference, examples, noise, t)

      return _descend(optimizer, loss, params, opt_state), None

    (params, opt_state), _ = jax.lax.scan(
      learn, (state['params'], state['opt']), jax.random.split(key, UPDATES_PER_EPOCH)
    )
    # DiffusionNFT's first schedule.
    kept = jnp.minimum(0.001 * epoch, 0.5) if variant.inertia else 0.0
    old = jax.tree.map(lambda o, p: kept * o + (1 - kept) * p, old, params)
    return {'params': params, 'opt': opt_state, 'old': old}

  state = {'params': start, 'opt': optimizer.init(start), 'old': start}
  return _run(update, state, budget.no_rl, key)
