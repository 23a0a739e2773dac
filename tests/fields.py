"""Velocity fields of a few lines for the tests of losses, two of them known in closed form."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from eru_jax import flow
from eru_jax.types import Conditioning

DIM = 3
NOTHING = Conditioning(tokens=jnp.zeros((1, 1, 1)))


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def batch(seed=0, size=6):
  """x_0, noise (size, DIM), t and r (size,)."""
  rng = np.random.default_rng(300 + seed)
  t, r = rng.uniform(0.1, 0.9, size), rng.random(size)
  x_0, noise = normal(400 + seed, size, DIM), normal(500 + seed, size, DIM)
  return x_0, noise, jnp.asarray(t, jnp.float32), jnp.asarray(r, jnp.float32)


def prompts(size=6, seed=0):
  return Conditioning(tokens=normal(600 + seed, size, 2, DIM))


def params(seed=0, scale=0.5):
  shapes = {'x': (DIM, DIM), 'text': (DIM, DIM), 'bias': (DIM,)}
  return {k: scale * normal(700 + 10 * seed + i, *s) for i, (k, s) in enumerate(shapes.items())}


def linear(p):
  """A velocity linear in its parameters."""

  def velocity_fn(x_t, t, c):
    return x_t @ p['x'] + jnp.mean(c.tokens, 1) @ p['text'] + t[:, None] * p['bias']

  return velocity_fn


def gaussian(mean, std):
  """E[noise - x_0 | x_t] for data of N(mean, std^2) in every dimension."""

  def velocity_fn(x_t, t, conditioning):
    del conditioning
    t = flow.expand(t, x_t)
    variance = (1 - t) ** 2 * std**2 + t**2
    return (t - (1 - t) * std**2) / variance * (x_t - (1 - t) * mean) - mean

  return velocity_fn


def constant(value):
  return lambda x_t, t, c: jnp.broadcast_to(jnp.asarray(value, jnp.float32), x_t.shape)


def check_gradient(loss, at, step=1e-2, rtol=5e-3, atol=5e-4):
  """jit(grad(loss)) against central differences along five random directions."""
  flat, unravel = jax.flatten_util.ravel_pytree(at)
  value = jax.jit(lambda x: loss(unravel(x)))
  gradient = jax.jit(jax.grad(value))(flat)
  assert jnp.abs(gradient).max() > 1e-3
  directions = normal(1, 5, flat.size)
  expected = [(value(flat + step * d) - value(flat - step * d)) / (2 * step) for d in directions]
  np.testing.assert_allclose(directions @ gradient, expected, rtol=rtol, atol=atol)


def check_pure(loss, trees):
  """The loss is one float32 number, and vmap over parameters equals one call after another."""
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  values, aux = jax.jit(jax.vmap(loss))(stacked)
  one = jax.jit(loss)
  for i, tree in enumerate(trees):
    value, parts = one(tree)
    assert value.shape == () and value.dtype == jnp.float32
    np.testing.assert_allclose(values[i], value, rtol=1e-4, atol=1e-6)
    for name, part in parts.items():
      assert part.shape == (), name
      np.testing.assert_allclose(aux[name][i], part, rtol=1e-4, atol=1e-5)
