"""DMD between Gaussians, where both scores and the KL are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fields import NOTHING, batch, check_pure, gaussian, linear, normal, params, prompts

from eru_jax import flow
from eru_jax.losses import dmd

# Law of the teacher.
MEAN, STD = 1.0, 0.5


def _kl(p, t):
  """KL of N(m, s^2) noised to t from the teacher's law noised to t."""
  mean, variance = (1 - t) * p[0], (1 - t) ** 2 * p[1] ** 2 + t**2
  target, spread = (1 - t) * MEAN, (1 - t) ** 2 * STD**2 + t**2
  return 0.5 * (jnp.log(spread / variance) + (variance + (mean - target) ** 2) / spread - 1)


def _generator_loss(p, time, *, normalize, size=60, dims=1):
  """Generator m + s z with an exact critic; z and the noise on a grid of quantiles."""
  grid = jax.scipy.stats.norm.ppf((jnp.arange(size) + 0.5) / size)
  z, noise = (jnp.repeat(g.reshape(-1, 1), dims, 1) for g in jnp.meshgrid(grid, grid))
  x_0 = p[0] + p[1] * z
  critic = gaussian(*jax.lax.stop_gradient(p))
  t = jnp.full(len(x_0), time)
  return dmd.distribution_matching(
    gaussian(MEAN, STD), critic, x_0, noise, t, NOTHING, NOTHING, normalize=normalize
  )


@pytest.mark.parametrize('time', [0.2, 0.5, 0.8])
@pytest.mark.parametrize('p', [(0.0, 0.8), (1.4, 0.3)])
def test_gradient_is_that_of_the_kl(time, p):
  """In the mean and the spread; dimensions that are copies give the mean over them."""
  p = jnp.array(p)
  expected = (time / (1 - time)) ** 2 * jax.grad(_kl)(p, time)
  for dims in (1, 3):
    loss = lambda p, d=dims: _generator_loss(p, time, normalize=False, dims=d)[0]  # noqa: E731
    found = jax.jit(jax.grad(loss))(p)
    # The quantiles' variance is 1.5 % below one.
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=2e-3)


def test_descent_finds_the_teacher_and_stays_there():
  step = jax.jit(
    lambda p: p - 0.1 * jax.grad(lambda p: _generator_loss(p, 0.5, normalize=True)[0])(p)
  )
  p = jnp.array([-1.0, 1.5])
  for _ in range(200):
    p = step(p)
  np.testing.assert_allclose(p, [MEAN, STD], atol=0.01)
  value, aux = _generator_loss(jnp.array([MEAN, STD]), 0.5, normalize=True)
  assert value < 1e-10 and aux['dmd_gradient'] < 1e-5


def test_normaliser_is_the_distance_to_the_teachers_prediction():
  x_0, noise, t, _ = batch()
  s, eta = t[:, None], prompts(seed=1)
  teacher, critic = linear(params(1)), linear(params(2))
  x_t = (1 - s) * x_0 + s * noise
  v_teacher, v_critic = teacher(x_t, t, eta), critic(x_t, t, prompts())
  g = s * (v_teacher - v_critic)
  g = g / np.mean(np.abs(x_0 - (x_t - s * v_teacher)), axis=1, keepdims=True)
  run = lambda x: dmd.distribution_matching(teacher, critic, x, noise, t, prompts(), eta)[0]  # noqa: E731
  np.testing.assert_allclose(run(x_0), 0.5 * np.mean(np.square(g)), rtol=1e-4)
  # The gradient is g itself, over the numbers that are averaged.
  np.testing.assert_allclose(jax.grad(run)(x_0), g / g.size, rtol=1e-3, atol=1e-6)


def test_generator_gets_no_gradient_through_either_network():
  x_0, noise, t, _ = batch()

  def loss(networks):
    teacher, critic = (linear(p) for p in networks)
    return dmd.distribution_matching(teacher, critic, x_0, noise, t, prompts(), prompts())[0]

  grads = jax.grad(loss)((params(1), params(2)))
  assert all(jnp.all(g == 0) for g in jax.tree.leaves(grads))


def test_backward_simulation_differentiates_one_step_only():
  """v = p: the state at t is z - (1 - t) p, the prediction z - p, with slope -t and not -1."""
  noise, schedule = normal(0, 400, 1), flow.timestep_schedule(4)
  field = lambda p: lambda x, t, c: jnp.full_like(x, p)  # noqa: E731
  run = lambda p: dmd.backward_simulation(jax.random.key(0), field(p), noise, schedule, NOTHING)  # noqa: E731
  x_0, slopes = jax.jit(lambda p: jax.jvp(run, (p,), (1.0,)))(0.7)
  np.testing.assert_allclose(x_0, noise - 0.7, atol=1e-5)
  times, counts = np.unique(np.round(-np.asarray(slopes), 5), return_counts=True)
  np.testing.assert_allclose(times, [0.25, 0.5, 0.75, 1.0])
  # 100 each, within five standard errors.
  assert np.all(np.abs(counts - 100) < 5 * 400**0.5 * (0.25 * 0.75) ** 0.5)


def test_critic_learns_the_generators_velocity_and_sends_nothing_back():
  p = jnp.array([0.3, 0.7])
  keys = jax.random.split(jax.random.key(0))
  z, noise = (jax.random.normal(key, (50000, 1)) for key in keys)
  t = jnp.full(50000, 0.5)

  def loss(q, p=p):
    critic = lambda x, t, c: q[0] * x + q[1]  # noqa: E731
    return dmd.critic_matching(critic, p[0] + p[1] * z, noise, t, NOTHING)[0]

  step = jax.jit(lambda q: q - 0.3 * jax.grad(loss)(q))
  q = jnp.zeros(2)
  for _ in range(200):
    q = step(q)
  exact = gaussian(0.3, 0.7)(jnp.array([[0.0], [1.0]]), jnp.full(2, 0.5), NOTHING)[:, 0]
  np.testing.assert_allclose(q, [exact[1] - exact[0], exact[0]], atol=0.03)
  assert jnp.all(jax.grad(loss, argnums=1)(q, p) == 0)


def test_losses_are_pure():
  x_0, noise, t, weight = batch()
  schedule, key = flow.timestep_schedule(3), jax.random.key(0)

  def generator(p):
    drawn = dmd.backward_simulation(key, linear(p), noise, schedule, prompts())
    return dmd.distribution_matching(
      linear(params(1)),
      linear(params(2)),
      drawn,
      noise,
      t,
      prompts(),
      prompts(seed=1),
      weight=weight,
    )

  critic = lambda p: dmd.critic_matching(linear(p), x_0, noise, t, prompts())  # noqa: E731
  for loss in (generator, critic):
    check_pure(loss, [params(i) for i in range(3)])
