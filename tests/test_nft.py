"""DiffusionNFT and the variants of NO-RL: identities, conditional means and known collapses."""

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
  linear,
  params,
  prompts,
)

from eru_jax.errors import UserError
from eru_jax.losses import advantages, nft, no_rl

MODES = ('all', 'negative_only', 'positive_only')


def _nft(p, seed=0, old=None, reference=None, **kwargs):
  x_0, noise, t, r = batch(seed)
  old, reference = (linear(params(i) if q is None else q) for i, q in ((1, old), (2, reference)))
  settings = {'beta': 0.7, 'reference_weight': 0.3, **kwargs}
  return nft.nft(linear(p), old, reference, x_0, noise, t, prompts(), r, **settings)


def _on_samples(loss, names=('old', 'reference')):
  """The same for the losses of no_rl.py that take (student, *names, x_0, noise, ...)."""

  def run(p, seed=0, **networks):
    x_0, noise, t, r = batch(seed)
    frozen = [linear(networks.get(n, params(1 + i))) for i, n in enumerate(names)]
    return loss(linear(p), *frozen, x_0, noise, t, prompts(), r)

  return run


def _two_branches(p, r, beta, weights):
  """DiffusionNFT as its paper and code have it, in the textbook order of operations."""
  x_0, noise, t, _ = batch()
  s = t[:, None]
  x_t = (1 - s) * x_0 + s * noise
  v_old, v = linear(params(1))(x_t, t, prompts()), linear(p)(x_t, t, prompts())
  predictions = [
    x_t - s * b for b in ((1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v)
  ]
  scales = predictions if weights == 'branch' else [x_t - s * v_old] * 2
  scales = [jax.lax.stop_gradient(jnp.mean(jnp.abs(x - x_0), 1)) for x in scales]
  plus, minus = (jnp.mean((x - x_0) ** 2, 1) / w for x, w in zip(predictions, scales, strict=True))
  anchor = jnp.mean((v - linear(params(2))(x_t, t, prompts())) ** 2)
  return jnp.mean(r * plus + (1 - r) * minus) / beta + 0.3 * anchor


@pytest.mark.parametrize('weights', ['shared', 'branch'])
@pytest.mark.parametrize('mode', MODES)
def test_nft_has_the_two_branch_losses_gradient(mode, weights):
  """The identity NFT = regression: gradients equal, values equal up to what is constant."""
  r = {'all': lambda r: r, 'negative_only': lambda r: np.minimum(r, 0.5)}.get(
    mode, lambda r: np.maximum(r, 0.5)
  )(batch()[3])
  for beta in (0.2, 1.0):
    ours = jax.jit(
      jax.value_and_grad(lambda p, b=beta: _nft(p, mode=mode, weights=weights, beta=b)[0])
    )
    theirs = jax.jit(jax.value_and_grad(lambda p, b=beta: _two_branches(p, r, b, weights)))
    gaps = []
    for seed in (5, 6):
      (value, grads), (expected, expected_grads) = ours(params(seed)), theirs(params(seed))
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, expected_grads
      )
      gaps.append(expected - value)
    np.testing.assert_allclose(gaps[0], gaps[1], rtol=1e-3, atol=1e-3)
    if weights == 'branch':
      np.testing.assert_allclose(gaps, 0, atol=1e-3)


def test_branch_weights_lose_their_restoring_force_at_one_half():
  """d parallel to u, r = 1/2: l+ and l- grow and shrink by the same at first order.

  With the branch weight the force is that of | |d - u| + |d + u| |, flat until |d| = |u|.
  """
  x_0, noise, t = jnp.zeros((1, DIM)), jnp.ones((1, DIM)), jnp.array([0.5])
  old = constant(0.0)

  def force(d, weights):
    run = lambda d: nft.nft(  # noqa: E731
      constant(d), old, old, x_0, noise, t, NOTHING, jnp.array([0.5]), weights=weights
    )[0]
    return jax.jit(jax.grad(run))(d)

  # u = 1: shared is beta t^2 / w * 2 d with w = t; branch sums -2 (1 - d) / (1 - d) and its mirror.
  np.testing.assert_allclose(force(0.1, 'shared'), 0.1, rtol=1e-5)
  np.testing.assert_allclose(force(0.1, 'branch'), 0.0, atol=1e-6)


def test_no_rl_is_the_negative_only_mode():
  x_0, noise, t, r = batch()
  args = (*(linear(params(i)) for i in range(3)), x_0, noise, t, prompts(), r)
  first = no_rl.no_rl(*args, beta=0.6, reference_weight=0.2)
  second = nft.nft(*args, mode='negative_only', beta=0.6, reference_weight=0.2)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  saturated = nft.nft(*args[:-1], jnp.minimum(r, 0.5), beta=0.6, reference_weight=0.2)
  np.testing.assert_allclose(first[0], saturated[0], rtol=1e-6)
  assert first[1]['negative_fraction'] == jnp.mean(r < 0.5)


def _law(seed=0, size=400):
  """Samples that all meet in one state x_t = 0 at t = 1/2, for conditional means of v.

  x_0 = -noise has one length, so that the shared weight drops out of the means.
  """
  angle = np.random.default_rng(seed).vonmises(0.0, 0.7, size)
  noise = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], 1), jnp.float32)
  r = jnp.asarray(0.5 + 0.45 * np.sin(3 * angle) * np.cos(angle), jnp.float32)
  return -noise, noise, jnp.full(size, 0.5), r, 2 * noise


def _minimiser(loss):
  """One Newton step on a quadratic in a constant velocity (2,)."""
  at = jnp.zeros(2)
  hessian, gradient = jax.jit(lambda s: (jax.hessian(loss)(s), jax.grad(loss)(s)))(at)
  return at - np.linalg.solve(hessian, gradient)


@pytest.mark.parametrize('beta', [0.5, 1.0])
@pytest.mark.parametrize('mode', MODES)
def test_fixed_points_are_old_plus_covariances(mode, beta):
  """On-policy in the mean: v_old + Cov(2 r~ - 1, v | x_t) / beta, once w is constant.

  w is |u| here and u depends on the sample, so the expectation is weighted by 1 / w.
  """
  x_0, noise, t, r, v = _law()
  v_old = jnp.mean(v, 0)
  direction = 2 * np.asarray(r) - 1
  direction = {
    'negative_only': np.minimum(direction, 0),
    'positive_only': np.maximum(direction, 0),
  }.get(mode, direction)
  u = np.asarray(v - v_old)
  share = 1 / np.mean(np.abs(u), 1)
  share = share / share.sum()
  expected = np.asarray(v_old) + share @ (direction[:, None] * u) / beta
  old = constant(v_old)
  found = _minimiser(
    lambda s: nft.nft(constant(s), old, old, x_0, noise, t, NOTHING, r, mode=mode, beta=beta)[0]
  )
  assert np.abs(expected - v_old).max() > 0.05
  np.testing.assert_allclose(found, expected, atol=1e-3)


def test_dropping_what_is_not_negative_over_pushes():
  """Binary r: the subset's step is 1 / P(bad | x_t) times that of N1."""
  x_0, noise, t, r, v = _law()
  r = (r > 0.35).astype(jnp.float32)
  old = constant(jnp.mean(v, 0))
  steps = [
    _minimiser(
      lambda s, f=f: f(constant(s), old, old, x_0, noise, t, NOTHING, r, reference_weight=0.0)[0]
    )
    - jnp.mean(v, 0)
    for f in (no_rl.no_rl, no_rl.negatives_subset)
  ]
  share = 1 / np.mean(np.abs(np.asarray(v - jnp.mean(v, 0))), 1)
  bad = np.sum(share * np.asarray(r == 0)) / share.sum()
  assert 0.1 < bad < 0.5 and jnp.abs(steps[0]).max() > 0.05
  np.testing.assert_allclose(steps[1], steps[0] / bad, rtol=1e-2, atol=1e-3)


def test_anchored_negatives_by_hand():
  """v_old = 0, v = u = 1, t = 1/2, so w = 1/2; student 0.5, beta 0.5, r = 0.1 and 0.9."""
  loss, aux = no_rl.anchored_negatives(
    constant(0.5),
    constant(0.0),
    constant(2.0),
    jnp.zeros((2, DIM)),
    jnp.ones((2, DIM)),
    jnp.full(2, 0.5),
    NOTHING,
    jnp.array([0.1, 0.9]),
    beta=0.5,
    reference_weight=0.1,
  )
  # v- = -0.25 misses v by 1.25: n l- / beta = 0.8 * 0.25 * 1.25^2 / 0.5 / 0.5; anchor 0.25.
  np.testing.assert_allclose(loss, (0.8 * 1.5625 + 0.25) / 2 + 0.225, rtol=1e-5)
  np.testing.assert_allclose(aux['negative_fraction'], 0.5)


def test_bounded_unlearning_starts_as_repulsion_and_fades():
  x_0, noise, t, r = batch()
  start = params(1)
  run = lambda p, **k: no_rl.bounded_unlearning(  # noqa: E731
    linear(p), linear(start), x_0, noise, t, prompts(), r, **k
  )[0]
  repel = lambda p: no_rl.repulsion(linear(p), x_0, noise, t, prompts(), r)[0]  # noqa: E731
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    jax.grad(lambda p: run(p, sharpness=3.0))(start),
    jax.grad(repel)(start),
  )
  far = jax.tree.map(lambda x: 100 * x, start)
  assert all(jnp.abs(g).max() < 1e-3 for g in jax.tree.leaves(jax.grad(run)(far)))
  assert all(jnp.abs(g).max() > 1 for g in jax.tree.leaves(jax.grad(repel)(far)))
  # Never below zero, where the repulsion falls without end.
  assert run(far) >= 0 and repel(far) < -100


VARIANTS = [
  _nft,
  lambda p, **k: _nft(p, weights='branch', mode='negative_only', **k),
  _on_samples(no_rl.anchored_negatives),
  _on_samples(no_rl.negatives_subset),
  _on_samples(no_rl.bounded_unlearning, ('reference',)),
  _on_samples(no_rl.repulsion, ()),
]


@pytest.mark.parametrize('loss', VARIANTS)
def test_variants_are_pure(loss):
  check_pure(loss, [params(i) for i in range(3)])


# The branch weights are constants to the gradient, but not to differences.
@pytest.mark.parametrize('loss', [VARIANTS[0], *VARIANTS[2:]])
def test_variants_have_right_gradients(loss):
  check_gradient(lambda p: loss(p)[0], params())


@pytest.mark.parametrize(
  ('loss', 'names'), [(VARIANTS[i], n) for i, n in ((0, 2), (1, 2), (2, 2), (3, 2), (4, 1))]
)
def test_no_gradient_reaches_the_frozen_networks(loss, names):
  for name in ('old', 'reference')[2 - names :]:
    run = jax.jit(jax.value_and_grad(lambda q, n=name: loss(params(), **{n: q})[0]))
    value, grads = run(params(7))
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(grads))
    # The others give their reference no weight unless asked.
    if name == 'old' or loss in (VARIANTS[0], VARIANTS[1], VARIANTS[4]):
      assert value != run(params(8))[0]


def test_weights_drop_examples():
  x_0, noise, t, r = batch()
  half = jnp.array([2.0, 2, 2, 0, 0, 0])
  networks = [linear(params(i)) for i in range(3)]

  def value(loss, rows, weight=None, **kwargs):
    parts = [a[rows] for a in (x_0, noise, t)]
    c = jax.tree.map(lambda x: x[rows], prompts())
    return loss(*networks, *parts, c, r[rows], weight=weight, reference_weight=0.0, **kwargs)[0]

  for loss in (nft.nft, no_rl.no_rl, no_rl.anchored_negatives):
    np.testing.assert_allclose(
      value(loss, np.arange(6), half), value(loss, np.arange(3)), rtol=1e-5
    )


def test_a_batch_without_negatives_leaves_the_subset_still():
  x_0, noise, t, _ = batch()
  p = params()

  def loss(p):
    args = (linear(p), linear(params(1)), linear(params(1)), x_0, noise, t, prompts(), jnp.ones(6))
    return no_rl.negatives_subset(*args)[0]

  assert all(jnp.all(g == 0) for g in jax.tree.leaves(jax.grad(loss)(p)))


def test_mistakes_are_user_errors():
  for kwargs in (
    {'mode': 'none'},
    {'weights': 'official'},
    {'beta': 0.0},
    {'reference_weight': -1.0},
  ):
    with pytest.raises(UserError):
      _nft(params(), **kwargs)
  x_0, noise, t, r = batch()
  field = linear(params())
  for kwargs in ({'sharpness': 0.0}, {'reference_weight': -1.0}):
    with pytest.raises(UserError):
      no_rl.bounded_unlearning(field, field, x_0, noise, t, prompts(), r, **kwargs)
  for call in (
    lambda: advantages.group_normalized(jnp.zeros((2, 3)), std='prompt'),
    lambda: advantages.group_normalized(jnp.zeros((2, 3)), clip=0.0),
    lambda: advantages.probability(r, clip=0.0),
    lambda: advantages.scale_positives(r, weight=-0.1),
  ):
    with pytest.raises(UserError):
      call()


def test_advantages_by_hand():
  rewards = jnp.array([[0.0, 1, 1, 2], [5.0, 5, 5, 5]])
  batch_std = np.std(np.asarray(rewards))
  found = advantages.group_normalized(rewards)
  np.testing.assert_allclose(found[0], np.array([-1, 0, 0, 1]) / batch_std, rtol=1e-3)
  np.testing.assert_array_equal(found[1], 0)
  found = advantages.group_normalized(rewards, std='group', clip=1.2)
  np.testing.assert_allclose(found[0], [-1.2, 0, 0, 1.2], rtol=1e-6)
  np.testing.assert_array_equal(found[1], 0)
  np.testing.assert_allclose(
    advantages.probability(jnp.array([-9.0, -5, 0, 2.5, 7])), [0, 0, 0.5, 0.75, 1]
  )
  a = jnp.array([-2.0, 0, 3])
  np.testing.assert_allclose(advantages.scale_positives(a), [-2, 0, 0])
  np.testing.assert_allclose(advantages.scale_positives(a, 0.1), [-2, 0, 0.3])
  r = jnp.array([[1.0, 1, 0.5], [1.0, 1, 1], [0.0, 0, 0]])
  np.testing.assert_array_equal(advantages.unsolved_groups(r), [[1] * 3, [0] * 3, [1] * 3])
