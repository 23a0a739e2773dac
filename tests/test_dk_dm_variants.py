"""Time weights, guidance and the states of DK-DM's variants, on fields known in closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fields import (
  DIM,
  NOTHING,
  batch,
  check_gradient,
  check_pure,
  constant,
  gaussian,
  linear,
  normal,
  params,
  prompts,
)

from eru_jax import flow
from eru_jax.errors import UserError
from eru_jax.losses import dk_dm, time_weights
from eru_jax.types import Conditioning


@pytest.mark.parametrize('noise_level', [0.4, 0.7, 2**0.5, 2.0])
def test_path_kl_is_the_kl_of_the_samplers_steps(noise_level):
  """KL of two Gaussians with one variance, for steps of `flow.sde_step`, per unit of time."""
  for time in (0.1, 0.3, 0.6, 0.9):
    t, dt = jnp.float32(time), 1e-3
    x, v, difference = normal(0, 4, DIM), normal(1, 4, DIM), normal(2, 4, DIM)
    first, std = flow.sde_step(x, v, t, t - dt, noise_level, 0.9)
    second, _ = flow.sde_step(x, v + difference, t, t - dt, noise_level, 0.9)
    kl = np.mean(np.square(np.asarray(second - first, np.float64)) / (2 * float(std) ** 2))
    weight = time_weights.path_kl(t, noise_level)
    np.testing.assert_allclose(kl / dt, weight * jnp.mean(jnp.square(difference)), rtol=2e-3)


def test_path_kl_is_smallest_at_square_root_of_two_and_stays_finite():
  t = jnp.linspace(0.05, 0.95, 10)
  best = time_weights.path_kl(t)
  np.testing.assert_allclose(best, (1 - t) / t, rtol=1e-6)
  for noise_level in (0.7, 1.2, 1.6, 3.0):
    assert jnp.all(time_weights.path_kl(t, noise_level) > best)
  assert time_weights.path_kl(jnp.float32(0), t_min=0.1) == pytest.approx(9)
  assert time_weights.path_kl(jnp.float32(1)) == 0


def test_path_kl_is_the_kl_of_the_samples():
  """By quadrature over x and t, for Gaussian flows: equal to KL(q_0 || p_0) at a = sqrt 2.

  At any other noise level it is an upper bound, by the factor between the weights.
  """
  cases = [((0.5, 0.6), (1.5, 0.6)), ((0.0, 0.5), (0.0, 1.0)), ((1.0, 0.4), (-0.5, 0.8))]
  t = (jnp.arange(4000) + 0.5) / 4000
  nodes, weights = np.polynomial.hermite_e.hermegauss(5)

  def path(q, p, noise_level):
    spread = jnp.sqrt((1 - t) ** 2 * q[1] ** 2 + t**2)[:, None]
    x = (1 - t)[:, None] * q[0] + spread * nodes
    gap = jnp.square(gaussian(*q)(x, t, NOTHING) - gaussian(*p)(x, t, NOTHING))
    return jnp.mean(time_weights.path_kl(t, noise_level, t_min=1e-6) * (gap @ weights))

  weights = jnp.asarray(weights / weights.sum(), jnp.float32)
  nodes = jnp.asarray(nodes, jnp.float32)
  for q, p in cases:
    kl = np.log(p[1] / q[1]) + (q[1] ** 2 + (q[0] - p[0]) ** 2) / (2 * p[1] ** 2) - 0.5
    np.testing.assert_allclose(path(q, p, 2**0.5), kl, rtol=1e-3)
    assert path(q, p, 0.7) > 1.4 * kl


@pytest.mark.parametrize('gamma', [1.0, 5.0])
def test_min_snr_weighs_the_error_of_the_clean_sample(gamma):
  """Hang et al.'s weights for predicted data and for predicted noise, turned into velocities."""
  x_0, noise, t, _ = batch(size=64)
  v, guess = noise - x_0, normal(9, 64, DIM)
  s = t[:, None]
  x_t = (1 - s) * x_0 + s * noise
  snr = (1 - t) ** 2 / t**2
  x0_error = np.mean(np.square((x_t - s * guess) - x_0), 1)
  noise_error = np.mean(np.square((x_t + (1 - s) * guess) - noise), 1)
  weighted = time_weights.min_snr(t, gamma) * np.mean(np.square(guess - v), 1)
  np.testing.assert_allclose(weighted, np.minimum(snr, gamma) * x0_error, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(weighted, np.minimum(1, gamma / snr) * noise_error, rtol=1e-3)
  grid = jnp.linspace(0, 1, 2001)
  peak = grid[jnp.argmax(time_weights.min_snr(grid, gamma))]
  assert peak == pytest.approx(1 / (1 + gamma**0.5), abs=1e-3)


@pytest.mark.parametrize('name', ['path_kl', 'min_snr'])
def test_time_weights_have_mean_one_where_t_is_drawn(name):
  from eru_jax.training.stage_config import DkDmStageConfig
  from eru_jax.training.variants.dk_dm import TIME_WEIGHTS, DkDm

  config = DkDmStageConfig(time_weight=name, time_mean=1.6, time_std=0.7)
  stage = DkDm(config, None, None, 1.0, None)
  t = stage.times(jax.random.key(0), 200_000)
  weight = stage.weight(t)
  assert float(jnp.mean(weight)) == pytest.approx(1, abs=0.02)
  ratio = weight / TIME_WEIGHTS[name](t)
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def _branchwise(p, teacher=None, seed=0):
  x_0, noise, t, weight = batch(seed)
  return dk_dm.branchwise_matching(
    linear(p),
    linear(params(1) if teacher is None else teacher),
    flow.interpolate(x_0, noise, t),
    t,
    prompts(seed=1),
    prompts(seed=2),
    prompts(1, seed=3),
    weight,
  )


def _baked(p, teacher=None, scale=3.0):
  x_0, noise, t, weight = batch()
  teacher = linear(params(1) if teacher is None else teacher)
  x_t = flow.interpolate(x_0, noise, t)
  null = prompts(1, seed=3)
  return dk_dm.baked_guidance_matching(
    linear(p), teacher, x_t, t, prompts(seed=1), prompts(seed=2), null, scale, weight
  )


def _paired(p, teacher=None):
  target = params(1) if teacher is None else teacher
  noise, schedule = normal(3, 6, DIM), flow.timestep_schedule(5)
  x_0 = flow.euler_ode(linear(target), noise, schedule, prompts(seed=2))
  return dk_dm.paired_endpoint(linear(p), noise, x_0, schedule, prompts(seed=1), batch()[3])


@pytest.mark.parametrize('loss', [_branchwise, _baked, _paired])
def test_losses_are_pure_with_right_gradients_and_frozen_teachers(loss):
  check_gradient(lambda p: loss(p)[0], params())
  check_pure(loss, [params(i) for i in range(3)])
  grads = jax.jit(jax.grad(lambda p: loss(params(), p)[0]))(params(7))
  assert all(jnp.all(g == 0) for g in jax.tree.leaves(grads))


def test_branches_that_match_fit_every_guidance_scale():
  """A student whose implicit prompts mean the explicit ones, guided by either, is the teacher."""
  teacher, double = params(1), {**params(1), 'text': 2 * params(1)['text']}
  implicit, null = prompts(seed=1), Conditioning(tokens=jnp.zeros((1, 2, DIM)))
  explicit = jax.tree.map(lambda x: 2 * x, implicit)
  x_t, _, t, _ = batch()
  loss, aux = dk_dm.branchwise_matching(
    linear(double), linear(teacher), x_t, t, implicit, explicit, null
  )
  assert loss < 1e-10 and aux.keys() == {'velocity_matching', 'null_matching'}
  for scale in (0.0, 1.0, 3.5):
    student, guide = (
      flow.classifier_free_guidance(linear(p), null, scale) for p in (double, teacher)
    )
    np.testing.assert_allclose(student(x_t, t, implicit), guide(x_t, t, explicit), atol=1e-4)
  # Either branch alone is seen: one prompt's and the empty prompt's error, half of each.
  shifted = {**double, 'bias': double['bias'] + 1}
  _, aux = dk_dm.branchwise_matching(
    linear(shifted), linear(teacher), x_t, t, implicit, explicit, null
  )
  expected = np.mean(np.square(t))
  np.testing.assert_allclose(aux['velocity_matching'], expected, rtol=1e-4)
  np.testing.assert_allclose(aux['null_matching'], expected, rtol=1e-4)


def test_baked_guidance_is_the_formula():
  x_0, noise, t, weight = batch()
  x_t = flow.interpolate(x_0, noise, t)
  student, teacher, null = linear(params()), linear(params(1)), prompts(6, seed=3)
  null = jax.tree.map(lambda x: jnp.repeat(x[:1], 6, 0), null)
  with_prompt, without = teacher(x_t, t, prompts(seed=2)), teacher(x_t, t, null)
  error = student(x_t, t, prompts(seed=1)) - (without + 3.0 * (with_prompt - without))
  single = jax.tree.map(lambda x: x[:1], null)
  loss, _ = dk_dm.baked_guidance_matching(
    student, teacher, x_t, t, prompts(seed=1), prompts(seed=2), single, 3.0, weight
  )
  np.testing.assert_allclose(loss, np.mean(weight * np.mean(np.square(error), 1)), rtol=1e-4)
  with pytest.raises(UserError):
    _baked(params(), scale=-1.0)


def test_renoised_states_have_the_students_marginal():
  """The flow of N(1.5, 0.5^2), whose samples noised to t are normal with known moments."""
  size, schedule = 20000, flow.timestep_schedule(100)
  keys = jax.random.split(jax.random.key(0), 2)
  start, noise = (jax.random.normal(key, (size, 1)) for key in keys)

  def states(shift, time):
    student = lambda *args: gaussian(1.5, 0.5)(*args) + shift  # noqa: E731
    return dk_dm.renoised_states(student, start, noise, jnp.full(size, time), schedule, NOTHING)

  for time in (0.2, 0.7):
    x, spread = states(0.0, time), ((1 - time) ** 2 * 0.25 + time**2) ** 0.5
    assert abs(x.mean() - (1 - time) * 1.5) < 5 * spread / size**0.5
    assert abs(x.std() / spread - 1) < 0.03
  assert jax.grad(lambda s: jnp.sum(states(s, 0.5)))(0.0) == 0


def test_the_teachers_trajectory_under_the_explicit_prompt_is_variant_d():
  schedule, noise = flow.timestep_schedule(4), normal(0, 5, DIM)
  explicit = prompts(5, seed=2)
  x_t, t, rollout = dk_dm.rollout_states(
    jax.random.key(0), linear(params(1)), noise, schedule, explicit, 4
  )
  _, states = flow.euler_ode(linear(params(1)), noise, schedule, explicit, return_trajectory=True)
  found = {(float(time), int(row)): x for x, time, row in zip(x_t, t, rollout, strict=True)}
  for n, row in itertools.product(range(4), range(5)):
    np.testing.assert_allclose(found[float(schedule[n]), row], states[n, row], atol=1e-5)


def test_paired_endpoint_is_the_squared_distance_of_samples():
  """A constant velocity c moves every sample by -c, whatever the schedule."""
  noise, c = normal(0, 6, DIM), jnp.array([0.5, -1.0, 2.0])
  schedule = flow.timestep_schedule(3, 0.7)
  x_0 = noise - jnp.array([0.5, 1.0, 1.0])
  loss, _ = dk_dm.paired_endpoint(constant(c), noise, x_0, schedule, NOTHING)
  np.testing.assert_allclose(loss, (0 + 4 + 1) / 3, rtol=1e-5)
  same, _ = dk_dm.paired_endpoint(constant(c), noise, noise - c, schedule, NOTHING)
  assert same < 1e-10


def test_mistakes_are_user_errors():
  t = jnp.array([0.5])
  for call in (
    lambda: time_weights.path_kl(t, noise_level=0.0),
    lambda: time_weights.path_kl(t, t_min=0.0),
    lambda: time_weights.path_kl(t, t_min=1.0),
    lambda: time_weights.min_snr(t, gamma=0.0),
  ):
    with pytest.raises(UserError):
      call()


@pytest.mark.parametrize('parts', [1, 3, 4])
def test_states_in_turn_give_the_same_velocities_and_gradients(parts):
  from eru_jax.training.variants.dk_dm import in_turn

  x, t = normal(0, 6, DIM), jnp.linspace(0.1, 0.9, 6)
  text = Conditioning(normal(1, 6, 2, DIM), pooled=normal(2, 6, DIM))

  def loss(w, turned):
    def field(x_t, t, conditioning):
      return jnp.tanh(x_t @ w * t[:, None] + conditioning.tokens.sum(1) * conditioning.pooled)

    field = in_turn(field, parts) if turned else field
    return jnp.sum(jnp.square(field(x, t, text)))

  w = normal(3, DIM, DIM)
  whole, turned = (jax.value_and_grad(loss)(w, each) for each in (False, True))
  for a, b in zip(turned, whole, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
