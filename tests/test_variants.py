"""The variants of both stages on a model small enough to know: a Gaussian's own velocity field."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from eru_jax import flow
from eru_jax.errors import UserError
from eru_jax.training.stage_config import DkDmStageConfig, NoRlStageConfig
from eru_jax.training.stages.dk_dm import split_tokens
from eru_jax.training.state import OptimizerConfig, two_time_scales
from eru_jax.training.variants import dk_dm, no_rl
from eru_jax.types import Conditioning

# Prompts by number. The base draws each explicit one around a mean of its own, and both implicit
# ones around the wrong place.
MEANS = jnp.array([[2.0, -1.0], [-2.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
EXPLICIT, IMPLICIT, NULL = (0, 1), (2, 3), 4
BASE = {'kernel': MEANS}
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Gaussians:
  """Stands in for a DiffusionModel: unit Gaussians around params['kernel'][prompt], (B, 1, 2)."""

  latent_shape = (1, 2)

  def velocity(self, base, trainable=None):
    means = (base if trainable is None else trainable)['kernel']

    def field(x_t, t, conditioning):
      mean = conditioning.tokens[:, 0] @ means
      t, x = t[:, None], x_t[:, 0]
      x_0 = mean + (1 - t) * (x - (1 - t) * mean) / ((1 - t) ** 2 + t**2)
      return ((x - x_0) / jnp.maximum(t, 1e-3))[:, None]

    return field


def prompt(numbers):
  return Conditioning(tokens=jax.nn.one_hot(jnp.asarray(numbers), 5)[:, None])


def stage(**settings):
  defaults = dict(
    num_steps=100, rollouts=BATCH, rollout_steps=8, states_per_rollout=1, text_noise=0.0,
    pooled_only=0.0, preservation_batch=BATCH,
  )  # fmt: skip
  config = DkDmStageConfig(**{**defaults, **settings})
  schedule = flow.timestep_schedule(config.rollout_steps)
  return dk_dm.DkDm(config, Gaussians(), prompt([NULL]), 1.0, schedule)


def frozen_parts(key):
  """What the stage freezes: the base, and its pictures of what is preserved."""
  means = MEANS[jnp.array([*EXPLICIT, NULL])]
  pictures = means[:, None, None] + jax.random.normal(key, (3, 512, 1, 2))
  return {'backbone': BASE, 'pictures': pictures, 'data': pictures[:2]}


def batch_of(key):
  concept = jax.random.randint(key, (BATCH,), 0, 2)
  texts = {'anchor': concept, 'implicit': prompt(concept + 2), 'explicit': prompt(concept)}
  kept = jnp.arange(BATCH) % 3
  kept_prompt = prompt(jnp.array([*EXPLICIT, NULL])[kept])
  preserved = {'anchor': kept, 'prompt': kept_prompt}
  return {'pairs': texts, 'rollouts': dict(texts), 'preserved': preserved}


def rolled_out(tools, policy, frozen, batch, key):
  roll_out = dk_dm.VARIANTS[tools.config.variant].roll_out
  if roll_out is None:
    return batch
  return {**batch, 'rollouts': roll_out(tools, policy, frozen, batch['rollouts'], key)}


MATCHING = [name for name, variant in dk_dm.VARIANTS.items() if not variant.critic]


@pytest.mark.parametrize(
  'settings',
  [{'variant': name} for name in MATCHING]
  + [{'time_weight': 'path_kl'}, {'time_weight': 'min_snr'}, {'guidance': 'branchwise'}],
  ids=lambda s: '-'.join(s.values()),
)
def test_every_variant_draws_the_implicit_prompts_where_the_teacher_draws_the_explicit(settings):
  """And leaves explicit prompts and the empty one where they were."""
  tools = stage(**settings)
  frozen = frozen_parts(jax.random.key(0))
  optimizer = optax.adam(0.1)

  @jax.jit
  def update(params, state, key, step):
    keys = jax.random.split(key, 3)
    batch = rolled_out(tools, params, frozen, batch_of(keys[0]), keys[1])
    loss = lambda p: dk_dm.matching_loss(tools, p, frozen, batch, keys[2], step)  # noqa: E731
    grads, measured = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, measured

  params, state = BASE, optimizer.init(BASE)
  for step in range(100):
    params, state, measured = update(params, state, jax.random.key(step), step)
  # Targets that are single paths leave noise of their own; the teacher's velocity leaves none.
  tolerance = 0.3 if settings.get('variant') in ('self_distillation', 'supervised') else 0.1
  np.testing.assert_allclose(params['kernel'][jnp.array(IMPLICIT)], MEANS[:2], atol=tolerance)
  np.testing.assert_allclose(params['kernel'][jnp.array([*EXPLICIT, NULL])], MEANS[:3], atol=0.1)
  assert measured['preservation'] < 0.01
  assert ('teacher_states_null' in measured) == (settings.get('guidance') == 'branchwise')


def test_baked_guidance_draws_what_the_guided_teacher_draws():
  """Guidance between unit Gaussians around 0 and m is the unit Gaussian around s m."""
  tools = stage(guidance='baked', baked_scale=1.5, variant='off_policy')
  frozen = frozen_parts(jax.random.key(0))
  guided = MEANS * jnp.array([1.5, 1.5, 1.5, 1.5, 1.0])[:, None]
  guided = guided.at[2:4].set(guided[:2])

  @jax.jit
  def loss(means):
    batch, key = batch_of(jax.random.key(1)), jax.random.key(2)
    return dk_dm.matching_loss(tools, {'kernel': means}, frozen, batch, key, 0)[0]

  np.testing.assert_allclose(loss(guided), 0, atol=1e-9)
  assert loss(MEANS) > 0.1


def test_mixture_weighs_rollouts_more_as_it_goes():
  tools = stage(mixture=0.5, mixture_ramp=0.5)
  frozen = frozen_parts(jax.random.key(0))

  @jax.jit
  def run(step):
    batch = rolled_out(tools, BASE, frozen, batch_of(jax.random.key(1)), jax.random.key(2))
    return dk_dm.matching_loss(tools, BASE, frozen, batch, jax.random.key(3), step)

  losses = []
  for step, share in ((0, 0.0), (25, 0.25), (50, 0.5), (99, 0.5)):
    loss, found = run(step)
    np.testing.assert_allclose(found['mixture'], share)
    parts = (1 - share) * found['teacher_states'] + share * found['rollout_states']
    np.testing.assert_allclose(loss, parts + found['preservation'], rtol=1e-6)
    losses.append(float(loss))
  assert len(set(losses)) == 3


def test_paired_endpoint_adds_the_distance_of_the_samplers_ends():
  """Of the same noise; zero where the student under the implicit prompt is the teacher."""
  tools = stage(variant='paired_endpoint', states_per_rollout=2, rollouts=BATCH // 2)
  frozen = frozen_parts(jax.random.key(0))

  @jax.jit
  def run(means):
    params, batch = {'kernel': means}, batch_of(jax.random.key(1))
    batch['rollouts'] = jax.tree.map(lambda x: x[: BATCH // 2], batch['rollouts'])
    rolled = rolled_out(tools, params, frozen, batch, jax.random.key(2))
    return dk_dm.matching_loss(tools, params, frozen, rolled, jax.random.key(3), 0)

  taught = MEANS.at[2:4].set(MEANS[:2])
  for means, zero in ((taught, True), (MEANS, False)):
    _, found = run(means)
    assert (float(found['paired_endpoint']) < 1e-9) == zero
    assert (float(found['rollout_states']) < 1e-9) == zero


def test_critic_and_student_take_turns_and_meet_the_teacher():
  tools = stage(variant='critic', critic_updates=3)
  frozen = frozen_parts(jax.random.key(0))
  settings = OptimizerConfig(learning_rate=0.05)
  optimizer = two_time_scales(settings, 400, per_round=4)

  @jax.jit
  def update(params, state, key, turn):
    keys = jax.random.split(key, 3)
    batch = rolled_out(tools, params[0], frozen, batch_of(keys[0]), keys[1])
    batch['students_turn'] = jnp.full(BATCH, turn)
    loss = lambda p: dk_dm.critic_loss(tools, p, frozen, batch, keys[2], 0)  # noqa: E731
    grads, measured = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, measured

  params = (BASE, BASE)
  state = optimizer.init(params)
  for step in range(400):
    turn = step % 4 == 3
    before = params
    params, state, measured = update(params, state, jax.random.key(step), turn)
    moved = [bool(jnp.any(a['kernel'] != b['kernel'])) for a, b in zip(before, params, strict=True)]
    assert moved == [turn, not turn]
    assert (measured['critic'] == 0) == turn and (measured['dmd_gradient'] > 0) == turn
  np.testing.assert_allclose(params[0]['kernel'][jnp.array(IMPLICIT)], MEANS[:2], atol=0.35)
  np.testing.assert_allclose(
    params[0]['kernel'][jnp.array([*EXPLICIT, NULL])], MEANS[:3], atol=0.35
  )


# NO-RL.


def rated(score, **settings):
  config = NoRlStageConfig(images_per_prompt=2, reward_low=0.0, reward_high=1.0, **settings)
  return no_rl.ratings(jnp.asarray(score), config)


def test_ratings_are_absolute_or_relative_to_the_prompts_other_pictures():
  score = [0.0, 0.25, 1.0, 0.95]
  absolute = rated(score)
  np.testing.assert_allclose(absolute['r'], score)
  np.testing.assert_allclose(absolute['advantage'], [-1, -0.5, 1, 0.9])
  np.testing.assert_allclose(absolute['weight'], 1)
  np.testing.assert_allclose(rated(score, drop_solved=True)['weight'], [1, 1, 0, 0])
  group = rated(score, reward_scale='group', advantage_clip=1.0)
  std = np.std(score) + 1e-4
  np.testing.assert_allclose(
    group['advantage'], np.array([-0.125, 0.125, 0.025, -0.025]) / std, rtol=1e-4
  )
  np.testing.assert_allclose(group['r'], 0.5 + group['advantage'] / 2, rtol=1e-6)


def _pushes(variant, at=0.0, **settings):
  """How a variant moves the mean of a policy, in x: half of its pictures, those on the right, are
  good. Positive is towards them. `at` moves the student away from the old policy."""
  count = 4096
  config = NoRlStageConfig(
    variant=variant, rollout_steps=8, timesteps_per_image=2, reference_weight=0.0, **settings
  )
  model, text = Gaussians(), prompt(jnp.full(count, NULL))
  keys = jax.random.split(jax.random.key(0), 4)
  field = model.velocity(BASE)
  noise = jax.random.normal(keys[0], (count, 1, 2))
  schedule = flow.timestep_schedule(8)
  extra = {}
  row = jnp.arange(count)
  if no_rl.VARIANTS[variant].on_steps:
    from eru_jax.losses import policy_gradient

    dynamics = no_rl.dynamics(config)
    x_0, steps, row = policy_gradient.sample_transitions(
      keys[1], field, noise, schedule, text, dynamics, 2
    )
    text = jax.tree.map(lambda x: x[row], text)
    log_prob = policy_gradient.transition_log_prob(field, steps, text, dynamics)
    extra = {'transitions': steps, 'old_log_prob': log_prob}
  else:
    x_0 = flow.euler_ode(field, noise, schedule, text)
    times = jax.random.uniform(keys[2], (count,), minval=0.3, maxval=0.95)
    extra = {'x_0': x_0, 't': times, 'noise': jax.random.normal(keys[3], x_0.shape)}
  rating = no_rl.ratings((x_0[:, 0, 0] > 0).astype(jnp.float32), config)
  examples = no_rl.Examples(text=text, **{k: v[row] for k, v in rating.items()}, **extra)

  def loss(shift):
    params = {'kernel': MEANS.at[NULL].add(shift)}
    fields = no_rl.Fields(model.velocity(BASE, params), field, field)
    return no_rl.VARIANTS[variant].loss(fields, examples, config)[0]

  return -jax.jit(jax.grad(loss))(jnp.full(2, at))


@pytest.mark.parametrize('variant', no_rl.VARIANTS)
def test_every_variant_sets_out_towards_what_is_right(variant):
  """From the old policy; sideways, where nothing is wrong, it hardly moves."""
  push = _pushes(variant)
  assert push[0] > 0 and abs(push[1]) < 0.25 * push[0]


def test_options_reach_the_losses():
  """Each setting changes what is computed, and only where it is meant to."""
  push = lambda *args, **kw: float(_pushes(*args, **kw)[0])  # noqa: E731
  assert push('nft') > push('negative_only') and push('nft') > push('positive_only')
  assert push('nft', at=0.5, nft_weights='branch') != push('nft', at=0.5)
  whole, negative = (push('policy_gradient', positive_weight=w) for w in (1.0, 0.0))
  assert whole > 1.2 * negative
  np.testing.assert_allclose(push('negative_only', beta=0.5), push('negative_only'), rtol=1e-4)
  soft, hard = (push('bounded_unlearning', at=0.5, sharpness=k) for k in (1.0, 8.0))
  assert soft != hard
  assert push('policy_gradient', dynamics='sde') != push('policy_gradient')


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: DkDmStageConfig(variant='b3'), r"`variant` is 'b3' but must be one of mixture, off_p"),
    (
      lambda: DkDmStageConfig(time_weight='snr'),
      r'`time_weight`.*one of uniform, path_kl, min_snr',
    ),
    (lambda: DkDmStageConfig(guidance='cfg'), r'`guidance`.*one of matched, branchwise, baked\.$'),
    (
      lambda: DkDmStageConfig(variant='critic', guidance='branchwise'),
      r"`guidance` is 'branchwise'.*one of matched, baked, as variant 'critic' has no branches",
    ),
    (
      lambda: DkDmStageConfig(variant='critic', guidance='cfg'),
      r"`guidance` is 'cfg' but must be one of matched, baked\.$",
    ),
    (lambda: DkDmStageConfig(critic_updates=0), '`critic_updates` is 0 but must be at least 1'),
    (lambda: NoRlStageConfig(variant='n1'), r"`variant` is 'n1' but must be one of negative_only"),
    (lambda: NoRlStageConfig(reward_scale='z'), r'`reward_scale`.*one of absolute, group'),
    (lambda: NoRlStageConfig(nft_weights='both'), r'`nft_weights`.*one of shared, branch'),
    (lambda: NoRlStageConfig(noise_level=1.2), r"`noise_level` is 1.2 .* at most 1 for 'cps'"),
    (lambda: NoRlStageConfig(clip_range=0.0), r'`clip_range` is 0.0 but must be positive, or None'),
    (
      lambda: NoRlStageConfig(variant='policy_gradient', timesteps_per_image=8),
      r'`timesteps_per_image` is 8 but must be fewer than rollout_steps',
    ),
  ],
)
def test_bad_options_are_one_clear_sentence(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_pictures_are_split_over_all_devices():
  sizes = (2, 2, 2, 1)
  mesh = AbstractMesh(sizes, ('data', 'fsdp', 'tensor', 'sequence'), (AxisType.Auto,) * 4)
  pictures = (37, 2, 16, 4)
  assert split_tokens(mesh, pictures).shard_shape(pictures) == (37, 2, 2, 4)
  # Eight devices do not divide twelve tokens.
  assert split_tokens(mesh, (37, 2, 12, 4)).shard_shape((37, 2, 12, 4)) == (37, 2, 12, 4)
