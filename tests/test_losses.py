"""Flow matching, DK-DM and NO-RL on toy distributions whose answers are known in closed form."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from eru_jax import flow
from eru_jax.errors import UserError
from eru_jax.losses import dk_dm, no_rl
from eru_jax.losses.flow_matching import flow_matching
from eru_jax.types import Conditioning

DIM = 3


def _normal(generator, *shape):
  return jnp.asarray(generator.standard_normal(shape), jnp.float32)


def _conditioning(batch, seed=0, mask=False):
  generator = np.random.default_rng(seed)
  tokens, pooled = _normal(generator, batch, 2, DIM), _normal(generator, batch, DIM)
  real = jnp.asarray(generator.random((batch, 2)) < 0.7)
  return Conditioning(tokens=tokens, mask=real if mask else None, pooled=pooled)


def _params(seed=0, scale=0.5):
  generator = np.random.default_rng(100 + seed)
  shapes = {'x': (DIM, DIM), 'text': (DIM, DIM), 'pooled': (DIM, DIM), 'bias': (DIM,)}
  return {name: scale * _normal(generator, *shape) for name, shape in shapes.items()}


def _linear(params, dtype=jnp.float32):
  """A velocity linear in its parameters: losses are quadratic, central differences exact."""

  def velocity_fn(x_t, t, c):
    mask = jnp.ones(c.tokens.shape[:2]) if c.mask is None else c.mask
    text = jnp.mean(c.tokens * mask[..., None], axis=1)
    out = x_t @ params['x'] + text @ params['text'] + c.pooled @ params['pooled']
    return (out + t[:, None] * params['bias']).astype(dtype)

  return velocity_fn


def _batch(seed=0, size=6):
  """x_0, noise, t and r (or weights)."""
  generator = np.random.default_rng(200 + seed)
  x_0, noise = _normal(generator, size, DIM), _normal(generator, size, DIM)
  t, r = generator.uniform(0.1, 0.9, size), generator.random(size)
  return x_0, noise, jnp.asarray(t, jnp.float32), jnp.asarray(r, jnp.float32)


def _central_differences(fn, params, step=0.1):
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  along = jax.jit(jax.vmap(lambda d: fn(unravel(flat + d)) - fn(unravel(flat - d))))
  return along(step * jnp.eye(flat.size)) / (2 * step)


def _flow_matching_loss(params, seed=0):
  x_0, noise, t, weight = _batch(seed)
  return flow_matching(_linear(params), x_0, noise, t, _conditioning(6), weight)


def _matching_loss(params, seed=0, teacher=None):
  x_t, _, t, weight = _batch(seed)
  teacher = _linear(_params(1) if teacher is None else teacher)
  return dk_dm.velocity_matching(
    _linear(params), teacher, x_t, t, _conditioning(6), _conditioning(6, 1), weight
  )


def _mixture_loss(params, seed=0, teacher=None, lam=0.3):
  teacher = _linear(_params(1) if teacher is None else teacher)
  a, b, c = (_batch(seed + i, size) for i, size in enumerate((6, 4, 5)))
  return dk_dm.dk_dm_mixture(
    _linear(params),
    teacher,
    (a[0], a[2], _conditioning(6, 1), _conditioning(6, 2)),
    (b[0], b[2], _conditioning(4, 3), _conditioning(4, 4)),
    (c[0], c[2], _conditioning(5, 5)),
    lam,
    0.7,
  )


def _no_rl_loss(params, seed=0, old=None, reference=None, beta=0.8):
  x_0, noise, t, r = _batch(seed)
  old = _linear(_params(1) if old is None else old)
  reference = _linear(_params(2) if reference is None else reference)
  return no_rl.no_rl(
    _linear(params),
    old,
    reference,
    x_0,
    noise,
    t,
    _conditioning(6),
    r,
    beta=beta,
    reference_weight=0.3,
  )


LOSSES = [_flow_matching_loss, _matching_loss, _mixture_loss, _no_rl_loss]


@pytest.mark.parametrize('loss', LOSSES)
def test_gradients_equal_central_differences(loss):
  params = _params()
  expected = _central_differences(lambda p: loss(p)[0], params)
  grads = jax.jit(jax.grad(lambda p: loss(p)[0]))(params)
  grads, _ = jax.flatten_util.ravel_pytree(grads)
  assert jnp.abs(grads).max() > 0.1
  np.testing.assert_allclose(grads, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('loss', LOSSES)
def test_losses_are_pure_float32_scalars_under_jit_and_vmap(loss):
  many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(_params(i) for i in range(3)))
  values, aux = jax.jit(jax.vmap(loss))(many)
  one = jax.jit(loss)
  for i in range(3):
    value, parts = one(_params(i))
    assert value.shape == () and value.dtype == jnp.float32
    np.testing.assert_allclose(values[i], value, rtol=1e-5)
    for name, part in parts.items():
      assert part.shape == (), name
      np.testing.assert_allclose(aux[name][i], part, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ('loss', 'frozen'),
  [
    (_matching_loss, 'teacher'),
    (_mixture_loss, 'teacher'),
    (_no_rl_loss, 'old'),
    (_no_rl_loss, 'reference'),
  ],
)
def test_no_gradient_reaches_the_frozen_networks(loss, frozen):
  value_and_grad = jax.jit(jax.value_and_grad(lambda p: loss(_params(), **{frozen: p})[0]))
  value, grads = value_and_grad(_params(7))
  assert all(jnp.all(g == 0) for g in jax.tree.leaves(grads))
  assert value != value_and_grad(_params(8))[0]


def test_flow_matching_is_the_weighted_mean_square():
  x_0, noise, t, weight = _batch()
  velocity_fn, c = _linear(_params()), _conditioning(6)
  error = velocity_fn((1 - t[:, None]) * x_0 + t[:, None] * noise, t, c) - (noise - x_0)
  per_example = np.mean(np.square(error), axis=1)
  loss, _ = flow_matching(velocity_fn, x_0, noise, t, c)
  np.testing.assert_allclose(loss, per_example.mean(), rtol=1e-5)
  loss, _ = flow_matching(velocity_fn, x_0, noise, t, c, weight)
  np.testing.assert_allclose(loss, np.mean(weight * per_example), rtol=1e-5)


def test_flow_matching_learns_the_closed_form_velocity_of_a_gaussian():
  """At t = 1/2 the best velocity is affine; the loss there is the known residual variance."""
  mean, std, t = 1.0, 0.5, 0.5
  keys = jax.random.split(jax.random.key(0))
  x_0 = mean + std * jax.random.normal(keys[0], (50000, 1))
  noise = jax.random.normal(keys[1], x_0.shape)
  c, times = Conditioning(tokens=jnp.zeros((1, 1, 1))), jnp.full(len(x_0), t)

  def loss(p):
    return flow_matching(lambda x, t, c: p[0] * x + p[1], x_0, noise, times, c)[0]

  step = jax.jit(lambda p: p - 0.3 * jax.grad(loss)(p))
  p = jnp.zeros(2)
  for _ in range(300):
    p = step(p)
  variance = (1 - t) ** 2 * std**2 + t**2
  slope = (t - (1 - t) * std**2) / variance
  # 50,000 samples put standard errors near 0.005 on both.
  np.testing.assert_allclose(p, [slope, -mean - slope * (1 - t) * mean], atol=0.025)
  residual = 1 + std**2 - (t - (1 - t) * std**2) ** 2 / variance
  np.testing.assert_allclose(loss(p), residual, rtol=0.02)


def test_bfloat16_networks_are_compared_in_float32():
  x_t, noise, t, r = _batch()
  c = _conditioning(6)
  student, teacher = (_linear(_params(i), jnp.bfloat16) for i in (0, 1))
  low = lambda fn: lambda *args: fn(*args).astype(jnp.float32)  # noqa: E731

  def values(student, teacher):
    group = (x_t, t, c, c)
    return jnp.stack(
      [
        flow_matching(student, x_t.astype(jnp.bfloat16), noise.astype(jnp.bfloat16), t, c)[0],
        dk_dm.velocity_matching(student, teacher, x_t, t, c, c)[0],
        dk_dm.dk_dm_mixture(student, teacher, group, group, group[:3], 0.5)[0],
        no_rl.no_rl(student, teacher, teacher, x_t, noise, t, c, r)[0],
      ]
    )

  found = values(student, teacher)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, values(low(student), low(teacher)), rtol=1e-6)


def test_matching_is_zero_at_the_teacher_and_learns_it():
  """Gradient descent on rollout states under implicit prompts finds the teacher's map."""
  teacher = _params(1)
  # Explicit prompts hold twice the implicit one's numbers: the student must double its text rows.
  implicit = _conditioning(64)
  explicit = jax.tree.map(lambda x: 2 * x, implicit)
  expected = {**teacher, 'text': 2 * teacher['text'], 'pooled': 2 * teacher['pooled']}
  noise = jax.random.normal(jax.random.key(2), (64, DIM))
  schedule = flow.timestep_schedule(4)

  @jax.jit
  def update(params, key):
    student = _linear(params)
    x_t, t, index = dk_dm.rollout_states(key, student, noise, schedule, implicit, 2)
    rows = lambda c: jax.tree.map(lambda x: x[index], c)  # noqa: E731

    def loss(p):
      return dk_dm.velocity_matching(
        _linear(p), _linear(teacher), x_t, t, rows(implicit), rows(explicit)
      )[0]

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.4 * g, params, grads), value

  params = _params()
  first = None
  for key in jax.random.split(jax.random.key(3), 600):
    params, value = update(params, key)
    first = value if first is None else first
  assert value < 1e-6 * first
  for name, leaf in expected.items():
    np.testing.assert_allclose(params[name], leaf, atol=5e-3)
  x_t, _, t, _ = _batch()
  same, _ = dk_dm.preservation(_linear(teacher), _linear(teacher), x_t, t, _conditioning(6))
  assert same == 0


def test_teacher_states_are_the_path_without_gradient():
  x_0, noise, t, _ = _batch()
  np.testing.assert_array_equal(
    dk_dm.teacher_states(x_0, noise, t), flow.interpolate(x_0, noise, t)
  )
  grads = jax.grad(lambda x: jnp.sum(dk_dm.teacher_states(x, noise, t)))(x_0)
  assert jnp.all(grads == 0)


def test_rollout_states_are_visited_states_without_replacement():
  batch, kept, schedule = 5, 3, flow.timestep_schedule(6, 0.8)
  noise = jax.random.normal(jax.random.key(0), (batch, DIM))
  student, c = _linear(_params(scale=0.2)), _conditioning(batch)
  rollout = jax.jit(lambda key: dk_dm.rollout_states(key, student, noise, schedule, c, kept))
  x_t, t, index = rollout(jax.random.key(1))
  assert x_t.shape == (batch * kept, DIM) and t.shape == index.shape == (batch * kept,)
  assert jnp.issubdtype(index.dtype, jnp.integer)
  np.testing.assert_array_equal(np.bincount(index), [kept] * batch)
  _, states = flow.euler_ode(student, noise, schedule, c, return_trajectory=True)
  steps = [int(jnp.argmin(jnp.abs(schedule[:-1] - time))) for time in t]
  for x, time, row, n in zip(x_t, t, index, steps, strict=True):
    assert time == schedule[n]
    np.testing.assert_allclose(x, states[n, row], atol=1e-5)
  assert len(set(zip(index.tolist(), steps, strict=True))) == batch * kept
  chosen = {tuple(sorted(np.asarray(steps)[np.asarray(index) == row])) for row in range(batch)}
  assert len(chosen) > 1
  # Every step is kept equally often: 0.5 +- 5 standard errors over 400 rollouts of 5.
  times = jax.vmap(lambda k: rollout(k)[1])(jax.random.split(jax.random.key(2), 400))
  for time in schedule[:-1]:
    assert abs(jnp.sum(times == time) / (400 * batch) - 0.5) < 5 * 0.5 / np.sqrt(400 * batch)


def test_rollout_states_carry_no_gradient():
  noise = jax.random.normal(jax.random.key(0), (2, DIM))

  def total(params):
    states = dk_dm.rollout_states(
      jax.random.key(1), _linear(params), noise, flow.timestep_schedule(3), _conditioning(2), 2
    )
    return jnp.sum(states[0])

  grads = jax.jit(jax.grad(total))(_params())
  assert all(jnp.all(g == 0) for g in jax.tree.leaves(grads))


def test_rollouts_inside_a_differentiated_loss_store_no_residuals():
  steps, batch, hidden = 5, 2, 11
  weights = jnp.full((DIM, hidden), 0.1)

  def loss(w):
    student = lambda x, t, c: jnp.tanh(x @ w) @ w.T  # noqa: E731
    noise, c = jnp.ones((batch, DIM)), Conditioning(tokens=jnp.zeros((batch, 1, 1)))
    x_t, t, index = dk_dm.rollout_states(
      jax.random.key(0), student, noise, flow.timestep_schedule(steps), c, 1
    )
    c = jax.tree.map(lambda x: x[index], c)
    return dk_dm.velocity_matching(student, lambda x, t, c: x, x_t, t, c, c)[0]

  program = str(jax.make_jaxpr(jax.grad(loss))(weights))
  # Activations of the network, stacked over the steps of the rollout, would have this shape.
  assert f'f32[{steps},{batch},{hidden}]' not in program
  assert f'f32[{steps},{batch},{DIM}]' in program


def test_mixture_schedule_ramps_and_stays():
  steps = jnp.array([0, 15, 30, 99])
  np.testing.assert_allclose(dk_dm.mixture_schedule(steps, 100), [0, 0.25, 0.5, 0.5], atol=1e-6)
  np.testing.assert_allclose(dk_dm.mixture_schedule(steps, 100, 0.8, 1.0), 0.008 * steps, atol=1e-6)
  assert jax.jit(lambda s: dk_dm.mixture_schedule(s, 100))(jnp.int32(15)) == 0.25
  assert dk_dm.mixture_schedule(jnp.int32(1), 100, ramp=0.0) == 0.5


@pytest.mark.parametrize('masked', [(), (0, 1, 2), (1,), (2,)])
def test_mixture_equals_separate_calls_and_calls_each_network_once(masked):
  """Values and gradients, whichever of the three batches come with a text mask."""
  batches = [_batch(i, size) for i, size in enumerate((6, 4, 5))]
  implicit = [_conditioning(len(b[2]), i, i in masked) for i, b in enumerate(batches)]
  explicit = [_conditioning(len(b[2]), 9 + i, i in masked) for i, b in enumerate(batches)]
  explicit[2] = implicit[2]
  calls = []

  def counted(params):
    calls.append(1)
    return _linear(params)

  def joined(p):
    student = lambda *args: counted(p)(*args)  # noqa: E731
    teacher = lambda *args: counted(_params(1))(*args)  # noqa: E731
    groups = [(b[0], b[2], i, e) for b, i, e in zip(batches, implicit, explicit, strict=True)]
    return dk_dm.dk_dm_mixture(student, teacher, *groups[:2], groups[2][:3], 0.3, 0.7)

  def separate(p):
    terms = [
      dk_dm.velocity_matching(_linear(p), _linear(_params(1)), b[0], b[2], i, e)[0]
      for b, i, e in zip(batches, implicit, explicit, strict=True)
    ]
    return 0.7 * terms[0] + 0.3 * terms[1] + 0.7 * terms[2], terms

  (loss, aux), grads = jax.jit(jax.value_and_grad(joined, has_aux=True))(_params())
  apart = jax.jit(jax.value_and_grad(separate, has_aux=True))
  (expected, terms), expected_grads = apart(_params())
  assert len(calls) == 2
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  parts = [aux[name] for name in ('teacher_states', 'rollout_states', 'preservation')]
  np.testing.assert_allclose(parts, terms, rtol=1e-5)
  assert aux['mixture'] == jnp.float32(0.3)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads
  )


def _diffusion_nft(params, seed, beta):
  """The two-branch loss of DiffusionNFT, r clipped at 1/2, one weight from the old policy."""
  x_0, noise, t, r = _batch(seed)
  c = _conditioning(6)
  s = t[:, None]
  x_t = (1 - s) * x_0 + s * noise
  v_old, v = _linear(_params(1))(x_t, t, c), _linear(params)(x_t, t, c)
  w = jnp.mean(jnp.abs(x_t - s * v_old - x_0), axis=1)
  branches = [(1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v]
  plus, minus = (jnp.mean(jnp.square(x_t - s * b - x_0), axis=1) / w for b in branches)
  r = jnp.minimum(r, 0.5)
  reference = jnp.mean(jnp.square(v - _linear(_params(2))(x_t, t, c)))
  return jnp.mean(r * plus + (1 - r) * minus) / beta + 0.3 * reference


@pytest.mark.parametrize('beta', [0.1, 0.8, 1.0])
def test_no_rl_equals_diffusion_nft_with_clipped_reward_and_shared_weight(beta):
  ours = jax.jit(jax.value_and_grad(lambda p: _no_rl_loss(p, beta=beta)[0]))
  theirs = jax.jit(jax.value_and_grad(lambda p: _diffusion_nft(p, 0, beta)))
  constants = []
  for seed in (5, 6, 7):
    (loss, grads), (expected, expected_grads) = ours(_params(seed)), theirs(_params(seed))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), grads, expected_grads
    )
    constants.append(expected - loss)
  # The values differ by what does not depend on the student.
  np.testing.assert_allclose(constants, constants[0], rtol=1e-3, atol=1e-3)


def test_mistakes_are_user_errors():
  noise, schedule = jnp.zeros((2, DIM)), flow.timestep_schedule(3)
  x_0, eps, t, r = _batch()
  student, c = _linear(_params()), _conditioning(6)
  group = (x_0, t, c, c)

  def run(**kwargs):
    return no_rl.no_rl(student, student, student, x_0, eps, t, c, r, **kwargs)

  for call in (
    lambda: dk_dm.rollout_states(jax.random.key(0), student, noise, schedule, _conditioning(2), 4),
    lambda: dk_dm.rollout_states(jax.random.key(0), student, noise, schedule, _conditioning(2), 0),
    lambda: dk_dm.mixture_schedule(0, 10, final=1.5),
    lambda: dk_dm.mixture_schedule(0, 10, ramp=-0.1),
    lambda: dk_dm.mixture_schedule(0, 0),
    lambda: dk_dm.dk_dm_mixture(student, student, group, group, group[:3], 0.5, -1.0),
    lambda: dk_dm.dk_dm_mixture(
      student, student, group, group, (x_0, t, c.replace(pooled=None)), 0.5
    ),
    lambda: no_rl.optimality(r, 1.0, 1.0),
    lambda: run(beta=0.0),
    lambda: run(beta=1.5),
    lambda: run(reference_weight=-0.1),
  ):
    with pytest.raises(UserError):
      call()
