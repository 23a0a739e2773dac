"""Stochastic samplers as policies, PPO's clip and AWM, against SciPy and closed forms."""

import functools

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
from eru_jax.losses import policy_gradient as pg

SCHEDULE = flow.timestep_schedule(6, 0.5)
DYNAMICS = [flow.Dynamics('sde', 0.7), flow.Dynamics('cps', 0.6)]


@functools.cache
def _rollout(dynamics, kept=3):
  c = prompts(6)
  sample = jax.jit(
    lambda key, noise: pg.sample_transitions(
      key, linear(params(1)), noise, SCHEDULE, c, dynamics, kept
    )
  )
  x_0, transitions, row = sample(jax.random.key(0), normal(3, 6, DIM))
  return x_0, transitions, row, jax.tree.map(lambda x: x[row], c)


@pytest.mark.parametrize('dynamics', DYNAMICS)
def test_log_prob_is_scipys(dynamics):
  """The steps' formulas written out in NumPy, and SciPy's normal density."""
  stats = pytest.importorskip('scipy.stats')
  _, tr, _, c = _rollout(dynamics)
  x, t, s = (np.asarray(a, np.float64) for a in (tr.x_t, tr.t[:, None], tr.t_next[:, None]))
  v = np.asarray(linear(params(2))(tr.x_t, tr.t, c), np.float64)
  if dynamics.kind == 'sde':
    at = np.where(t == 1, float(SCHEDULE[1]), t)
    sigma = dynamics.noise_level * np.sqrt(at / (1 - at)) * np.sqrt(t / at)
    drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
    mean, std = x + drift * (s - t), sigma * np.sqrt(t - s)
  else:
    std = s * np.sin(dynamics.noise_level * np.pi / 2)
    mean = (1 - s) * (x - t * v) + np.sqrt(s**2 - std**2) * (x + (1 - t) * v)
  expected = stats.norm.logpdf(np.asarray(tr.x_next), mean, std).mean(1)
  found = pg.transition_log_prob(linear(params(2)), tr, c, dynamics)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('dynamics', DYNAMICS)
def test_transitions_are_noisy_steps_of_the_sampler_without_replacement(dynamics):
  x_0, tr, row, c = _rollout(dynamics, kept=5)
  assert x_0.shape == (6, DIM) and tr.x_t.shape == (30, DIM) and row.dtype == jnp.int32
  np.testing.assert_array_equal(np.bincount(row), [5] * 6)
  steps = np.argmin(np.abs(np.asarray(SCHEDULE)[None] - np.asarray(tr.t)[:, None]), 1)
  np.testing.assert_array_equal(tr.t_next, SCHEDULE[steps + 1])
  assert set(zip(row.tolist(), steps.tolist(), strict=True)) == {
    (i, n) for i in range(6) for n in range(5)
  }
  # One step's end is the next one's start, and the last deterministic step leads to x_0.
  at = {(int(i), int(n)): k for k, (i, n) in enumerate(zip(row, steps, strict=True))}
  for i in range(6):
    for n in range(4):
      np.testing.assert_array_equal(tr.x_next[at[i, n]], tr.x_t[at[i, n + 1]])
  last = np.array([at[i, 4] for i in range(6)])
  x, t = tr.x_next[last], jnp.full(6, SCHEDULE[5])
  v = linear(params(1))(x, t, jax.tree.map(lambda a: a[last], c))
  np.testing.assert_allclose(x_0, x - t[:, None] * v, atol=1e-5)


def test_noise_of_the_transitions_is_standard_normal():
  for dynamics in DYNAMICS:
    noise = normal(0, 4000, 1)
    field = gaussian(1.0, 0.5)
    _, tr, _ = pg.sample_transitions(
      jax.random.key(1), field, noise, SCHEDULE, NOTHING, dynamics, 2
    )
    log_prob = pg.transition_log_prob(field, tr, NOTHING, dynamics)
    t, s = tr.t[:, None], tr.t_next[:, None]
    _, std = dynamics.step(tr.x_t, field(tr.x_t, tr.t, NOTHING), t, s, SCHEDULE[1])
    # -2 (log p + log std + log(2 pi) / 2) is z^2: mean 1, variance 2.
    squares = -2 * (log_prob + jnp.log(std[:, 0]) + 0.5 * jnp.log(2 * jnp.pi))
    assert abs(squares.mean() - 1) < 5 * (2 / 8000) ** 0.5
    assert abs(squares.var() - 2) < 0.4


@pytest.mark.parametrize('dynamics', DYNAMICS)
def test_ratio_is_one_before_the_first_update(dynamics):
  _, tr, row, c = _rollout(dynamics)
  advantage = jnp.linspace(-1, 1, 6)[row]

  @jax.jit
  def first(p):
    old = pg.transition_log_prob(linear(params(1)), tr, c, dynamics)
    student = linear(p)
    return pg.policy_gradient(student, student, tr, c, old, advantage, dynamics)

  loss, aux = first(params(1))
  assert aux['ratio'] == 1 and aux['clip_fraction'] == 0
  np.testing.assert_allclose(loss, -advantage.mean(), atol=1e-6)

  # ... and there its gradient is REINFORCE's: - E A grad log p.
  def reinforce(p):
    return -jnp.mean(advantage * pg.transition_log_prob(linear(p), tr, c, dynamics))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    jax.grad(lambda p: first(p)[0])(params(1)),
    jax.jit(jax.grad(reinforce))(params(1)),
  )


def test_reinforce_gradient_is_the_gradient_of_the_expected_reward():
  """One CPS step from x = z: reward x_next, mean known, so dE[reward]/dv is the step's slope."""
  dynamics, size = flow.Dynamics('cps', 0.8), 200000
  schedule = jnp.array([1.0, 0.6, 0.0])
  noise = jax.random.normal(jax.random.key(0), (size, 1))
  _, tr, _ = pg.sample_transitions(
    jax.random.key(1), constant(0.3), noise, schedule, NOTHING, dynamics, 1
  )
  old = pg.transition_log_prob(constant(0.3), tr, NOTHING, dynamics)
  reward = tr.x_next[:, 0]
  loss = lambda v: pg.policy_gradient(  # noqa: E731
    constant(v), constant(v), tr, NOTHING, old, reward - reward.mean(), dynamics
  )[0]
  # x_next = 0.4 (x - v) + cos() 0.6 x + noise at t = 1: its mean falls by 0.4 a unit of v.
  np.testing.assert_allclose(jax.grad(loss)(0.3), 0.4, rtol=0.03)


def test_clip_stops_examples_that_have_moved_enough():
  log_prob = jnp.log(jnp.array([0.5, 0.95, 1.5, 0.5, 1.05, 1.5]))
  advantage = jnp.array([-1.0, -1, -1, 1, 1, 1])
  run = lambda x: pg.ppo_clip(x, jnp.zeros(6), advantage, 0.2)  # noqa: E731
  losses, aux = run(log_prob)
  np.testing.assert_allclose(losses, [0.8, 0.95, 1.5, -0.5, -1.05, -1.2], rtol=1e-6)
  np.testing.assert_allclose(aux['clip_fraction'], 2 / 6)
  grads = jax.grad(lambda x: jnp.sum(run(x)[0]))(log_prob)
  np.testing.assert_array_equal(grads == 0, [True, False, False, False, False, True])
  old = jax.grad(lambda x: jnp.sum(pg.ppo_clip(log_prob, x, advantage, 0.2)[0]))(jnp.zeros(6))
  assert jnp.all(old == 0)


@pytest.mark.parametrize('dynamics', DYNAMICS)
def test_kl_term_is_that_of_two_gaussians(dynamics):
  distributions = pytest.importorskip('torch.distributions')
  torch = pytest.importorskip('torch')
  _, tr, _, c = _rollout(dynamics)
  t, s = tr.t[:, None], tr.t_next[:, None]
  laws = []
  for p in (params(2), params(3)):
    mean, std = dynamics.step(tr.x_t, linear(p)(tr.x_t, tr.t, c), t, s, SCHEDULE[1])
    mean, std = np.array(mean), np.array(jnp.broadcast_to(std, mean.shape))
    laws.append(distributions.Normal(torch.from_numpy(mean), torch.from_numpy(std)))
  expected = distributions.kl_divergence(*laws).mean().item()
  args = (linear(params(2)), linear(params(3)), tr, c, jnp.zeros(18), jnp.zeros(18), dynamics)
  loss, aux = pg.policy_gradient(*args, kl_weight=0.5)
  np.testing.assert_allclose(aux['reference_kl'], expected, rtol=1e-3)
  np.testing.assert_allclose(loss, 0.5 * expected, rtol=1e-3)


def _policy_gradient(p, frozen=None, kind=0):
  dynamics = DYNAMICS[kind]
  _, tr, row, c = _rollout(dynamics)
  reference = linear(params(2) if frozen is None else frozen)
  old = pg.transition_log_prob(linear(params(1)), tr, c, dynamics)
  advantage = jnp.linspace(-1, 1, 6)[row]
  return pg.policy_gradient(
    linear(p), reference, tr, c, old, advantage, dynamics, clip_range=1e6, kl_weight=0.1
  )


def _awm(p, frozen=None, clip_range=1e6):
  x_0, noise, t, r = batch()
  old, reference = linear(params(1)), linear(params(2) if frozen is None else frozen)
  return pg.advantage_weighted_matching(
    linear(p),
    old,
    reference,
    x_0,
    noise,
    t,
    prompts(),
    r - 0.5,
    clip_range=clip_range,
    reference_weight=0.3,
  )


@pytest.mark.parametrize('loss', [_policy_gradient, _awm])
def test_losses_are_pure_with_right_gradients_and_frozen_references(loss):
  near = jax.tree.map(lambda a, b: a + 0.02 * b, params(1), params(5))
  check_gradient(lambda p: loss(p)[0], near, step=2e-3, rtol=3e-2, atol=2e-2)
  check_pure(loss, [near, params(1)])
  grads = jax.grad(lambda q: loss(near, q)[0])(params(7))
  assert all(jnp.all(g == 0) for g in jax.tree.leaves(grads))


def test_awm_is_advantage_weighted_flow_matching_at_the_old_policy():
  x_0, noise, t, r = batch()

  def matching(p):
    x_t = (1 - t[:, None]) * x_0 + t[:, None] * noise
    error = jnp.mean((linear(p)(x_t, t, prompts()) - (noise - x_0)) ** 2, 1)
    anchor = jnp.mean((linear(p)(x_t, t, prompts()) - linear(params(2))(x_t, t, prompts())) ** 2)
    return jnp.mean((r - 0.5) * error) + 0.3 * anchor

  loss, aux = _awm(params(1), clip_range=0.2)
  assert aux['ratio'] == 1 and jnp.isfinite(loss)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
    jax.grad(lambda p: _awm(p, clip_range=0.2)[0])(params(1)),
    jax.grad(matching)(params(1)),
  )


def test_awm_repulsion_is_bounded_by_the_clip():
  """All samples bad: descent stops where every ratio has fallen below 1 - c."""
  x_0, noise, t, _ = batch()
  old = constant(0.0)
  loss = lambda v: pg.advantage_weighted_matching(  # noqa: E731
    constant(v), old, old, x_0, noise, t, NOTHING, -jnp.ones(6), clip_range=0.2
  )[0]
  step = jax.jit(lambda v: v - 0.05 * jax.grad(loss)(v))
  v = jnp.array([0.1, -0.2, 0.3])
  for _ in range(500):
    v = step(v)
  assert jnp.all(jax.grad(loss)(v) == 0) and jnp.abs(v).max() < 5
  np.testing.assert_allclose(loss(v), 0.8, rtol=1e-5)


def test_mistakes_are_user_errors():
  dynamics = DYNAMICS[0]
  _, tr, _, c = _rollout(dynamics)
  field, noise = linear(params()), normal(0, 6, DIM)
  sample = lambda d, kept: pg.sample_transitions(  # noqa: E731
    jax.random.key(0), field, noise, SCHEDULE, prompts(), d, kept
  )
  zeros = jnp.zeros(18)
  x_0, eps, t, r = batch()
  for call in (
    lambda: sample(dynamics, 6),
    lambda: sample(dynamics, 0),
    lambda: sample(flow.Dynamics('sde', 0.0), 2),
    lambda: flow.Dynamics('ode'),
    lambda: flow.Dynamics('sde', -0.1),
    lambda: flow.Dynamics('cps', 1.5),
    lambda: flow.Dynamics('sde', float('inf')),
    lambda: pg.ppo_clip(zeros, zeros, zeros, 0.0),
    lambda: pg.policy_gradient(field, field, tr, c, zeros, zeros, dynamics, kl_weight=-1.0),
    lambda: pg.advantage_weighted_matching(
      field, field, field, x_0, eps, t, prompts(), r, reference_weight=-1.0
    ),
  ):
    with pytest.raises(UserError):
      call()
