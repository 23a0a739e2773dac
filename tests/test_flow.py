"""The rectified-flow path, schedules, samplers and guidance, against diffusers and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eru_jax import flow
from eru_jax.errors import UserError
from eru_jax.types import Conditioning

# Data x_0 ~ N(MEAN, STD^2) per dimension, for which everything is known.
MEAN, STD = 1.5, 0.5
NOTHING = Conditioning(tokens=jnp.zeros((1, 1, 1)))


def _moments(t):
  """Mean and variance of x_t."""
  return (1 - t) * MEAN, (1 - t) ** 2 * STD**2 + t**2


def _gaussian_velocity(x_t, t, conditioning):
  """E[noise - x_0 | x_t] for that data."""
  del conditioning
  t = flow.expand(t, x_t)
  mean, variance = _moments(t)
  return (t - (1 - t) * STD**2) / variance * (x_t - mean) - MEAN


def _normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _pair(seed=0, shape=(6, 3, 2)):
  t = np.random.default_rng(seed).uniform(0.05, 0.95, shape[:1])
  return _normal(seed + 1, *shape), _normal(seed + 2, *shape), jnp.asarray(t, jnp.float32)


def _conditioning(batch, length=2, mask=None, seed=0):
  tokens, pooled = _normal(seed + 10, batch, length, 3), _normal(seed + 11, batch, 3)
  return Conditioning(tokens=tokens, mask=mask, pooled=pooled)


def _prompted_velocity(x_t, t, conditioning):
  """Depends on every field, so that a wrong row shows."""
  mask = conditioning.mask
  weight = jnp.ones(conditioning.tokens.shape[:2]) if mask is None else mask
  text = jnp.mean(conditioning.tokens * weight[..., None], 1) + 2 * conditioning.pooled
  return x_t * flow.expand(t, x_t) + flow.expand(jnp.sum(text, 1), x_t)


def test_path_and_predictions_invert_each_other():
  x_0, noise, t = _pair()
  x_t, v = flow.interpolate(x_0, noise, t), flow.velocity(x_0, noise)
  s = t[:, None, None]
  np.testing.assert_allclose(x_t, (1 - s) * x_0 + s * noise, atol=1e-6)
  np.testing.assert_allclose(flow.predict_x0(x_t, v, t), x_0, atol=1e-6)
  np.testing.assert_allclose(flow.predict_noise(x_t, v, t), noise, atol=1e-6)
  np.testing.assert_allclose(flow.score(x_t, v, t), -noise / s, rtol=1e-4, atol=1e-5)
  _, slope = jax.jvp(lambda t: flow.interpolate(x_0, noise, t), (t,), (jnp.ones_like(t),))
  np.testing.assert_allclose(slope, v, atol=1e-6)


def test_score_is_the_gradient_of_the_marginal_log_density():
  x_t, _, t = _pair()
  mean, variance = _moments(t[:, None, None])
  score = flow.score(x_t, _gaussian_velocity(x_t, t, NOTHING), t)
  np.testing.assert_allclose(score, -(x_t - mean) / variance, rtol=1e-3, atol=1e-4)


def test_path_is_float32_from_bfloat16():
  x_0, noise, t = _pair()
  low = [x.astype(jnp.bfloat16) for x in (x_0, noise)]
  expected = flow.interpolate(*(x.astype(jnp.float32) for x in low), t)
  assert flow.interpolate(*low, t).dtype == flow.velocity(*low).dtype == jnp.float32
  np.testing.assert_array_equal(flow.interpolate(*low, t), expected)


def test_shift_adds_mu_to_the_logit_and_keeps_the_ends():
  t = jnp.linspace(0.01, 0.99, 50)
  for mu in (-1.0, 0.5, 1.15, 3.0):
    shifted = flow.shift_timesteps(t, mu)
    formula = np.exp(mu) / (np.exp(mu) + 1 / np.asarray(t) - 1)
    np.testing.assert_allclose(shifted, formula, rtol=1e-5)
    np.testing.assert_allclose(flow.shift_timesteps(shifted, -mu), t, rtol=1e-5)
    np.testing.assert_array_equal(flow.shift_timesteps(jnp.array([0.0, 1.0]), mu), [0, 1])
  np.testing.assert_array_equal(flow.shift_timesteps(t, 0.0), t)


@pytest.mark.parametrize('kind', ['uniform', 'logit_normal'])
def test_densities_have_their_quantiles(kind):
  density = flow.TimestepDensity(kind, mean=0.4, std=0.8, shift_mu=0.7, t_min=0.1, t_max=0.9)
  t = jax.jit(density.sample, static_argnums=1)(jax.random.key(0), (20000,))
  assert t.dtype == jnp.float32 and t.min() >= 0.1 and t.max() <= 0.9
  u = jnp.array([0.1, 0.5, 0.9])
  base = u if kind == 'uniform' else jax.nn.sigmoid(0.4 + 0.8 * jax.scipy.stats.norm.ppf(u))
  expected = 0.1 + 0.8 * flow.shift_timesteps(base, 0.7)
  # Standard errors of these quantiles are at most 0.003.
  np.testing.assert_allclose(np.quantile(t, u), expected, atol=0.015)
  # Midpoints of five parts: the 10th, 30th ... 90th percentile.
  np.testing.assert_allclose(density.quantiles(5)[::2], expected, rtol=1e-5)


@pytest.mark.parametrize(
  'bad',
  [
    {'kind': 'cosine'},
    {'std': 0.0},
    {'std': float('nan')},
    {'mean': float('inf')},
    {'shift_mu': float('nan')},
    {'shift_mu': 1000.0},
    {'shift_mu': -1000.0},
    {'t_min': -0.1},
    {'t_max': 1.1},
    {'t_min': 0.6, 't_max': 0.4},
  ],
)
def test_densities_out_of_range_are_user_errors(bad):
  with pytest.raises(UserError):
    flow.TimestepDensity(**{'kind': 'logit_normal', **bad})


@pytest.mark.parametrize('num_steps', [1, 2, 4, 8, 28, 50])
@pytest.mark.parametrize('tokens', [256, 1024, 4096, None])
def test_schedule_and_euler_equal_diffusers(num_steps, tokens):
  """FLUX.1-dev's settings for a number of tokens, FLUX.1-schnell's for None; step by step."""
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  from diffusers.pipelines.flux.pipeline_flux import calculate_shift

  dynamic = tokens is not None
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
    shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic
  )
  mu = calculate_shift(tokens) if dynamic else None
  scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
  if dynamic:
    assert flow.resolution_mu(tokens) == pytest.approx(mu, abs=1e-12)
  schedule = flow.timestep_schedule(num_steps, mu or 0.0)
  assert schedule.dtype == jnp.float32 and schedule[0] == 1 and schedule[-1] == 0
  np.testing.assert_allclose(schedule, scheduler.sigmas.numpy(), rtol=0, atol=1.5e-7)

  def field(x, t, conditioning):
    return x * flow.expand(0.5 - 1.5 * t, x) + 0.3

  noise = _normal(1, 2, 5)
  x_0, states = flow.euler_ode(field, noise, schedule, NOTHING, return_trajectory=True)
  visited = [*states, x_0]
  assert len(visited) == num_steps + 1
  x = torch.from_numpy(np.array(noise))
  for n, timestep in enumerate(scheduler.timesteps):
    np.testing.assert_allclose(visited[n], x.numpy(), atol=2e-6)
    v = x * (0.5 - 1.5 * timestep / 1000) + 0.3
    x = scheduler.step(v, timestep, x).prev_sample
  np.testing.assert_allclose(x_0, x.numpy(), atol=2e-6)


def test_ode_reaches_the_data_and_its_error_halves_with_twice_the_steps():
  # The exact flow of this data is x_0 = MEAN + STD x_T.
  noise = _normal(2, 64, 2)
  exact = MEAN + STD * noise
  errors = []
  for num_steps in (50, 100, 200):
    x_0 = flow.euler_ode(_gaussian_velocity, noise, flow.timestep_schedule(num_steps), NOTHING)
    errors.append(float(jnp.max(jnp.abs(x_0 - exact))))
  assert errors[-1] < 0.02
  assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3


def _sde_law(noise_level, num_steps):
  """Mean and variance of every state of the discrete SDE, exactly: each step is linear in x."""
  schedule = flow.timestep_schedule(num_steps)
  mean, variance, law = 0.0, 1.0, []

  @jax.jit
  def coefficients(t, t_next):
    x = jnp.array([[0.0], [1.0]])
    v = _gaussian_velocity(x, jnp.full(2, t), NOTHING)
    at, std = flow.sde_step(x, v, t, t_next, noise_level, schedule[1])
    return at[0, 0], at[1, 0] - at[0, 0], std

  for t, t_next in zip(schedule[:-1], schedule[1:], strict=True):
    law.append((mean, variance))
    offset, slope, std = map(float, coefficients(t, t_next))
    mean, variance = offset + slope * mean, slope**2 * variance + std**2
  return np.array([*law, (mean, variance)])


def test_sde_keeps_the_marginals_at_every_time():
  num_steps, noise_level, samples = 100, 0.7, 20000
  schedule = flow.timestep_schedule(num_steps)
  keys = jax.random.split(jax.random.key(3))
  noise = jax.random.normal(keys[0], (samples, 1))
  x_0, states = flow.euler_sde(
    keys[1],
    _gaussian_velocity,
    noise,
    schedule,
    NOTHING,
    noise_level=noise_level,
    return_trajectory=True,
  )
  assert states.shape == (num_steps, samples, 1)
  law = _sde_law(noise_level, num_steps)
  for n in (10, 30, 50, 80, 100):
    x = np.asarray(x_0 if n == num_steps else states[n], np.float64)
    # Against the law of the discrete process: 5 standard errors.
    mean_error = np.sqrt(law[n, 1] / samples)
    assert abs(x.mean() - law[n, 0]) < 5 * mean_error
    assert abs(x.var() / law[n, 1] - 1) < 5 * np.sqrt(2 / samples)
    # Against the flow's marginal: 5 standard errors, plus 8 % of the variance for 100 steps.
    mean, variance = _moments(float(schedule[n]))
    assert abs(x.mean() - mean) < 5 * mean_error
    assert abs(x.var() / variance - 1) < 5 * np.sqrt(2 / samples) + 0.08


def test_sde_error_shrinks_with_steps():
  for noise_level, factor in ((0.7, 1.35), (1.0, 1.8)):
    errors = []
    for num_steps in (20, 40, 80):
      schedule = np.asarray(flow.timestep_schedule(num_steps))
      mean, variance = _moments(schedule)
      law = _sde_law(noise_level, num_steps)
      np.testing.assert_allclose(law[:, 0], mean, atol=1e-3)
      errors.append(abs(law[num_steps // 2, 1] / variance[num_steps // 2] - 1))
    assert errors[0] > factor * errors[1] > factor**2 * errors[2]


def test_sde_step_is_flow_grpos():
  """Their formula in NumPy, with the clamp at t = 1 and its absence elsewhere."""
  x, v, _ = _pair()
  a, schedule = 0.9, np.asarray(flow.timestep_schedule(6, 0.8), np.float64)
  for n in range(5):
    t, dt = schedule[n], schedule[n + 1] - schedule[n]
    sigma = a * np.sqrt(t / (1 - (schedule[1] if n == 0 else t)))
    expected = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    times = (jnp.float32(schedule[n]), jnp.float32(schedule[n + 1]))
    mean, std = flow.sde_step(x, v, *times, a, schedule[1])
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(std, sigma * np.sqrt(-dt), rtol=1e-5)
  mean, std = flow.sde_step(x, v, jnp.float32(schedule[5]), jnp.float32(0), a, schedule[1])
  assert std == 0
  np.testing.assert_allclose(mean, x - schedule[5] * v, atol=1e-6)


def test_sde_without_noise_is_the_ode_and_its_noise_is_reproducible():
  noise = _normal(4, 8, 2)
  schedule, key = flow.timestep_schedule(7, 0.5), jax.random.key(5)
  run = lambda key, a: flow.euler_sde(  # noqa: E731
    key, _gaussian_velocity, noise, schedule, NOTHING, noise_level=a
  )
  ode = flow.euler_ode(_gaussian_velocity, noise, schedule, NOTHING)
  np.testing.assert_allclose(run(key, 0.0), ode, atol=1e-6)
  np.testing.assert_array_equal(run(key, 0.7), run(key, 0.7))
  assert jnp.abs(run(key, 0.7) - run(jax.random.key(6), 0.7)).min() > 0


@pytest.mark.parametrize('noise_level', [0.3, 0.8, 1.0])
def test_cps_is_exact_for_data_at_one_point_where_the_sde_is_too_noisy(noise_level):
  """x_t must be normal around (1 - t) MEAN with standard deviation t, at any number of steps."""
  samples, schedule = 20000, flow.timestep_schedule(5, 0.5)
  noise = jax.random.normal(jax.random.key(0), (samples, 1))

  def point(x, t, c):
    # x_0 is known, so the velocity is (x_t - x_0) / t.
    return (x - MEAN) / flow.expand(t, x)

  def spread(dynamics):
    x_0, states = flow.euler_sde(
      jax.random.key(1),
      point,
      noise,
      schedule,
      NOTHING,
      noise_level=noise_level,
      dynamics=dynamics,
      return_trajectory=True,
    )
    np.testing.assert_allclose(x_0, MEAN, atol=1e-5)
    times = np.asarray(schedule[:-1])
    for x, t in zip(states, times, strict=True):
      assert abs(x.mean() - (1 - t) * MEAN) < 5 * 1.5 * t / samples**0.5
    return np.asarray(states).std((1, 2)) / times

  assert np.all(np.abs(spread('cps') - 1) < 5 * (1 / (2 * samples)) ** 0.5)
  assert spread('sde')[1:].max() > 1.03


def test_cps_without_noise_is_an_euler_step_and_with_all_forgets_it():
  x, v, _ = _pair()
  t, t_next = jnp.float32(0.7), jnp.float32(0.4)
  mean, std = flow.cps_step(x, v, t, t_next, 0.0)
  assert std == 0
  np.testing.assert_allclose(mean, x + (t_next - t) * v, atol=1e-5)
  mean, std = flow.cps_step(x, v, t, t_next, 1.0)
  np.testing.assert_allclose(std, t_next, rtol=1e-6)
  np.testing.assert_allclose(mean, (1 - t_next) * (x - t * v), atol=1e-5)
  _, last = flow.cps_step(x, v, t, jnp.float32(0), 0.8)
  assert last == 0


def test_log_prob_is_the_mean_over_dimensions():
  scipy_stats = pytest.importorskip('scipy.stats')
  x, mean, _ = _pair()
  expected = scipy_stats.norm.logpdf(np.asarray(x), np.asarray(mean), 0.3).mean((1, 2))
  np.testing.assert_allclose(flow.gaussian_log_prob(x, mean, jnp.float32(0.3)), expected, rtol=1e-5)


def test_trajectory_holds_the_state_at_the_start_of_each_step():
  noise = _normal(7, 3, 2)
  schedule = flow.timestep_schedule(5, 0.6)
  x_0, states = flow.euler_ode(_gaussian_velocity, noise, schedule, NOTHING, return_trajectory=True)
  np.testing.assert_array_equal(states[0], noise)
  ends = [*states[1:], x_0]
  for n in range(5):
    v = _gaussian_velocity(states[n], jnp.full(3, schedule[n]), NOTHING)
    np.testing.assert_allclose(ends[n], states[n] + (schedule[n + 1] - schedule[n]) * v, atol=1e-5)
  again = flow.euler_ode(_gaussian_velocity, noise, schedule, NOTHING)
  np.testing.assert_allclose(again, x_0, atol=1e-6)


def test_bfloat16_velocity_leaves_time_and_state_in_float32():
  seen = []

  def field(x, t, conditioning):
    seen.append((x.dtype, t.dtype, t.shape))
    # Returns the time itself, so that rounding of t to bfloat16 would show in the sum.
    return jnp.broadcast_to(t[:, None], x.shape).astype(jnp.bfloat16)

  noise = _normal(8, 4, 2).astype(jnp.bfloat16)
  schedule = flow.timestep_schedule(100, 1.15)
  x_0 = flow.euler_ode(field, noise, schedule, NOTHING)
  assert x_0.dtype == jnp.float32
  assert set(seen) == {(jnp.dtype('float32'), jnp.dtype('float32'), (4,))}
  steps = np.diff(np.asarray(schedule, np.float64))
  low = np.asarray(schedule[:-1].astype(jnp.bfloat16).astype(jnp.float32), np.float64)
  expected = np.asarray(noise.astype(jnp.float32), np.float64) + (steps * low).sum()
  np.testing.assert_allclose(x_0, expected, atol=2e-6)


def test_samplers_are_pure_under_jit_vmap_and_grad():
  noise = _normal(9, 3, 4, 2)
  schedule, key = flow.timestep_schedule(4), jax.random.key(1)

  def run(x, scale=1.0):
    def field(x, t, c):
      return scale * _gaussian_velocity(x, t, c)

    return flow.euler_sde(key, field, x, schedule, NOTHING, noise_level=0.5)

  each = jnp.stack([run(x) for x in noise])
  np.testing.assert_allclose(jax.jit(jax.vmap(run))(noise), each, atol=1e-5)
  total = jax.jit(jax.value_and_grad(lambda s: jnp.sum(run(noise[0], s))))
  slope, (ahead, behind) = total(1.0)[1], (total(1 + e)[0] for e in (1e-2, -1e-2))
  np.testing.assert_allclose(slope, (ahead - behind) / 2e-2, rtol=1e-2)


@pytest.mark.parametrize('masks', ['none', 'both', 'prompt', 'null'])
def test_guidance_is_the_formula_in_one_call(masks):
  x_t, _, t = _pair(shape=(4, 3))
  mask = jnp.array([[True, False]] * 4)
  conditioning = _conditioning(4, mask=mask if masks in ('both', 'prompt') else None)
  null_mask = mask[:1] if masks in ('both', 'null') else None
  null = _conditioning(1, mask=null_mask, seed=5)
  calls = []

  def field(x, t, c):
    calls.append(x.shape)
    return _prompted_velocity(x, t, c).astype(jnp.bfloat16)

  guided = flow.classifier_free_guidance(field, null, 3.5)(x_t, t, conditioning)
  assert calls == [(8, 3)] and guided.dtype == jnp.float32
  everywhere = jax.tree.map(lambda n: jnp.repeat(n, 4, axis=0), null)
  with_prompt, without = (field(x_t, t, c).astype(jnp.float32) for c in (conditioning, everywhere))
  np.testing.assert_allclose(guided, without + 3.5 * (with_prompt - without), rtol=1e-5, atol=1e-5)


def test_guidance_scales_zero_and_one():
  x_t, _, t = _pair(shape=(2, 3))
  conditioning, null = _conditioning(2), _conditioning(1, seed=5)
  assert flow.classifier_free_guidance(_prompted_velocity, null, 1.0) is _prompted_velocity
  ignored = flow.classifier_free_guidance(_prompted_velocity, null, 0.0)(x_t, t, conditioning)
  everywhere = jax.tree.map(lambda n: jnp.repeat(n, 2, axis=0), null)
  np.testing.assert_allclose(ignored, _prompted_velocity(x_t, t, everywhere), atol=1e-6)


@pytest.mark.parametrize('mu', [-flow.MAX_SHIFT_MU, flow.MAX_SHIFT_MU])
def test_the_largest_shift_still_gives_a_grid(mu):
  schedule = np.asarray(flow.timestep_schedule(50, mu))
  assert np.isfinite(schedule).all() and (schedule[0], schedule[-1]) == (1, 0)
  assert (np.diff(schedule) <= 0).all()
  t = flow.TimestepDensity(shift_mu=mu).sample(jax.random.key(0), (1000,))
  assert bool(jnp.all((t >= 0) & (t <= 1)))


def test_mistakes_are_user_errors():
  x_t, _, t = _pair(shape=(2, 3))
  schedule = flow.timestep_schedule(2)
  for call in (
    lambda: flow.timestep_schedule(0),
    lambda: flow.timestep_schedule(4, float('nan')),
    lambda: flow.timestep_schedule(4, 1000.0),
    lambda: flow.timestep_schedule(4, -1000.0),
    lambda: flow.resolution_mu(0),
    lambda: flow.resolution_mu(64, base=256, maximum=256),
    lambda: flow.euler_ode(_gaussian_velocity, x_t, schedule[:1], NOTHING),
    lambda: flow.euler_sde(
      jax.random.key(0), _gaussian_velocity, x_t, schedule[:1], NOTHING, noise_level=0.1
    ),
    lambda: flow.euler_sde(
      jax.random.key(0), _gaussian_velocity, x_t, schedule, NOTHING, noise_level=-0.1
    ),
    lambda: flow.euler_sde(
      jax.random.key(0),
      _gaussian_velocity,
      x_t,
      schedule,
      NOTHING,
      noise_level=0.1,
      dynamics='heun',
    ),
    lambda: flow.classifier_free_guidance(_prompted_velocity, _conditioning(1), -1.0),
    lambda: flow.classifier_free_guidance(_prompted_velocity, _conditioning(1, length=3), 2.0)(
      x_t, t, _conditioning(2)
    ),
    lambda: flow.concatenate_conditionings(_conditioning(2), _conditioning(2).replace(pooled=None)),
  ):
    with pytest.raises(UserError):
      call()
