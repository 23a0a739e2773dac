"""The losses take any JAX model: a plain function, a flax.nnx and an Equinox one, same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eru_jax import flow
from eru_jax.losses import dk_dm, no_rl
from eru_jax.losses.flow_matching import flow_matching
from eru_jax.types import Conditioning

DIM, HIDDEN, BATCH = 2, 4, 6


def _weights(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  inputs = 3 * DIM + 1
  return {
    'w1': jax.random.normal(keys[0], (inputs, HIDDEN)) / np.sqrt(inputs),
    'w2': jax.random.normal(keys[1], (HIDDEN, DIM)),
  }


def _features(x_t, t, c):
  return jnp.concatenate([x_t, t[:, None], jnp.mean(c.tokens, axis=1), c.pooled], axis=1)


def _plain():
  """Parameters of the student, and (parameters -> VelocityFn)."""

  def build(params):
    return lambda x, t, c: jnp.tanh(_features(x, t, c) @ params['w1']) @ params['w2']

  return _weights(0), build, lambda grads: (grads['w1'], grads['w2'])


def _nnx():
  nnx = pytest.importorskip('flax.nnx')

  class Model(nnx.Module):
    def __init__(self, weights, rngs):
      inputs = weights['w1'].shape[0]
      self.first = nnx.Linear(inputs, HIDDEN, use_bias=False, rngs=rngs)
      self.second = nnx.Linear(HIDDEN, DIM, use_bias=False, rngs=rngs)
      self.first.kernel = nnx.Param(weights['w1'])
      self.second.kernel = nnx.Param(weights['w2'])

    def __call__(self, x_t, t, c):
      return self.second(jnp.tanh(self.first(_features(x_t, t, c))))

  graph, params = nnx.split(Model(_weights(0), nnx.Rngs(0)))
  pick = lambda grads: tuple(jax.tree.leaves(grads))  # noqa: E731
  return params, lambda params: nnx.merge(graph, params), pick


def _equinox():
  eqx = pytest.importorskip('equinox')

  class Model(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __call__(self, x_t, t, c):
      return jax.vmap(lambda row: self.second(jnp.tanh(self.first(row))))(_features(x_t, t, c))

  weights, keys = _weights(0), jax.random.split(jax.random.key(0), 2)
  model = Model(
    eqx.nn.Linear(3 * DIM + 1, HIDDEN, use_bias=False, key=keys[0]),
    eqx.nn.Linear(HIDDEN, DIM, use_bias=False, key=keys[1]),
  )
  model = eqx.tree_at(
    lambda m: (m.first.weight, m.second.weight), model, (weights['w1'].T, weights['w2'].T)
  )
  params, static = eqx.partition(model, eqx.is_array)
  pick = lambda grads: (grads.first.weight.T, grads.second.weight.T)  # noqa: E731
  return params, lambda params: eqx.combine(params, static), pick


def _conditioning(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  return Conditioning(
    tokens=jax.random.normal(keys[0], (BATCH, 3, DIM)),
    pooled=jax.random.normal(keys[1], (BATCH, DIM)),
  )


def _losses():
  """Every loss as a function of the student alone; the frozen networks are plain functions."""
  keys = jax.random.split(jax.random.key(1), 4)
  x_0, noise = (jax.random.normal(key, (BATCH, DIM)) for key in keys[:2])
  t, r = (jax.random.uniform(key, (BATCH,), minval=0.1) for key in keys[2:])
  implicit, explicit, other = (_conditioning(seed) for seed in (2, 3, 4))
  frozen = _plain()[1](_weights(5))
  x_t = flow.interpolate(x_0, noise, t)

  def mixture(student):
    kept = dk_dm.rollout_states(keys[0], student, noise, flow.timestep_schedule(3), implicit, 2)
    rows = [jax.tree.map(lambda x: x[kept[2]], c) for c in (implicit, explicit)]
    return dk_dm.dk_dm_mixture(
      student, frozen, (x_t, t, implicit, explicit), (*kept[:2], *rows), (x_t, t, other), 0.5
    )

  return {
    'flow_matching': lambda s: flow_matching(s, x_0, noise, t, implicit),
    'velocity_matching': lambda s: dk_dm.velocity_matching(s, frozen, x_t, t, implicit, explicit),
    'preservation': lambda s: dk_dm.preservation(s, frozen, x_t, t, other),
    'dk_dm_mixture': mixture,
    'no_rl': lambda s: no_rl.no_rl(s, frozen, frozen, x_0, noise, t, implicit, r),
  }


@pytest.mark.parametrize('framework', [_nnx, _equinox])
def test_losses_and_gradients_do_not_depend_on_the_framework(framework):
  for name, loss in _losses().items():
    results = []
    for params, build, pick in (_plain(), framework()):
      value_and_grad = jax.jit(jax.value_and_grad(lambda p: loss(build(p)), has_aux=True))  # noqa: B023
      (value, aux), grads = value_and_grad(params)
      assert value.shape == () and all(jnp.isfinite(x) for x in aux.values()), name
      results.append((value, *pick(grads)))
    assert all(jnp.abs(g).max() > 1e-3 for g in results[0][1:]), name
    for expected, found in zip(*results, strict=True):
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_guided_sampling_takes_any_framework():
  noise, schedule = jnp.ones((BATCH, DIM)), flow.timestep_schedule(3)
  null = jax.tree.map(lambda x: x[:1], _conditioning(9))
  samples = []
  for framework in (_plain, _nnx, _equinox):
    params, build, _ = framework()
    field = flow.classifier_free_guidance(build(params), null, 2.0)
    samples.append(flow.euler_ode(field, noise, schedule, _conditioning(2)))
  for found in samples[1:]:
    np.testing.assert_allclose(found, samples[0], rtol=1e-4, atol=1e-5)
