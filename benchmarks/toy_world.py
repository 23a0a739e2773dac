"""A world of six concepts in the plane, whose answers, rewards and velocities are known exactly.

Concept k has a right answer of two equal modes far out at angle 60 k degrees, and a superficial one
between them and the origin. A prompt is a mixture of modes: the explicit prompt of a concept is
mostly right, the implicit one mostly superficial, and both sometimes show a neighbour's answer. The
world is symmetric about each concept's axis, so that no wrong answer favours one right mode. The
model is a small network that is trained on samples of all thirteen prompts.
"""

import jax
import jax.numpy as jnp
import numpy as np

from eru_jax import flow
from eru_jax.losses.flow_matching import flow_matching
from eru_jax.types import Conditioning

CONCEPTS = 6
# Prompts are numbered: explicit 0-5, implicit 6-11, and the empty one.
IMPLICIT, NULL, PROMPTS = CONCEPTS, 2 * CONCEPTS, 2 * CONCEPTS + 1
STD = 0.25
# A sample is right within this distance of one of its concept's two modes: 99.7 % of a mode.
RADIUS = 3.4 * STD
# Shares of the own right modes (both), the own superficial mode and the two neighbours' right ones.
EXPLICIT_SHARES, IMPLICIT_SHARES = (0.82, 0.11, 0.07), (0.10, 0.70, 0.20)
SAMPLER_STEPS = 10
HIDDEN, FREQUENCIES = 96, 4


def _polar(radius, degrees):
  angle = np.deg2rad(degrees)
  return radius * np.stack([np.cos(angle), np.sin(angle)], -1)


def _modes():
  """Centres: right (6, 2 modes, 2) and superficial (6, 2)."""
  angle = 60.0 * np.arange(CONCEPTS)
  return _polar(4.0, angle[:, None] + np.array([-13.0, 13.0])), _polar(1.8, angle)


RIGHT, SUPERFICIAL = _modes()
CENTRES = np.concatenate([RIGHT.reshape(-1, 2), SUPERFICIAL])


def _prompt_weights():
  """Shares (13 prompts, 18 modes)."""
  weights = np.zeros((PROMPTS, len(CENTRES)))
  for first, shares in ((0, EXPLICIT_SHARES), (IMPLICIT, IMPLICIT_SHARES)):
    for k in range(CONCEPTS):
      weights[first + k, [2 * k, 2 * k + 1]] = shares[0] / 2
      weights[first + k, 2 * CONCEPTS + k] = shares[1]
      for other in ((k - 1) % CONCEPTS, (k + 1) % CONCEPTS):
        weights[first + k, [2 * other, 2 * other + 1]] = shares[2] / 4
  weights[NULL] = weights[:CONCEPTS].mean(0)
  return weights


WEIGHTS = _prompt_weights()


def conditioning(prompt: jax.Array) -> Conditioning:
  """Numbers of prompts (B,) as one token each."""
  return Conditioning(tokens=jax.nn.one_hot(prompt, PROMPTS)[:, None])


def schedule() -> jax.Array:
  """The sampler's grid, in training and evaluation alike."""
  return flow.timestep_schedule(SAMPLER_STEPS)


def data(key: jax.Array, prompt: jax.Array) -> jax.Array:
  """Samples (B, 2) of what prompts (B,) mean."""
  mode_key, noise_key = jax.random.split(key)
  mode = jax.random.categorical(mode_key, jnp.log(jnp.asarray(WEIGHTS, jnp.float32))[prompt])
  noise = jax.random.normal(noise_key, (*prompt.shape, 2))
  return jnp.asarray(CENTRES, jnp.float32)[mode] + STD * noise


def exact_velocity(x_t: jax.Array, t: jax.Array, conditioning: Conditioning) -> jax.Array:
  """E[noise - x_0 | x_t] of that data, in closed form: the field a perfect model would have."""
  t = t[:, None]
  centres, weights = jnp.asarray(CENTRES, jnp.float32), jnp.asarray(WEIGHTS, jnp.float32)
  variance = (1 - t) ** 2 * STD**2 + t**2
  away = x_t[:, None] - (1 - t)[..., None] * centres
  log_weight = jnp.log(conditioning.tokens[:, 0] @ weights)
  share = jax.nn.softmax(log_weight - jnp.sum(away**2, -1) / (2 * variance), axis=-1)
  slope = (t - (1 - t) * STD**2) / variance
  return jnp.einsum('bm,bmd->bd', share, slope[..., None] * away - centres)


def shown(x_0: jax.Array, concept: jax.Array) -> jax.Array:
  """Which mode of the concept's right answer samples (B, 2) show: (B, 2 modes) bool."""
  distance = jnp.linalg.norm(x_0[:, None] - jnp.asarray(RIGHT, jnp.float32)[concept], axis=-1)
  return distance < RADIUS


def reward(x_0: jax.Array, concept: jax.Array) -> jax.Array:
  """1.0 where a sample shows its concept's right answer, 0.0 elsewhere: (B,)."""
  return jnp.any(shown(x_0, concept), axis=-1).astype(jnp.float32)


def init(key: jax.Array) -> dict[str, jax.Array]:
  """Parameters of the network, about 21,000 numbers."""
  sizes = (2 + 1 + 2 * FREQUENCIES + PROMPTS, HIDDEN, HIDDEN, HIDDEN, 2)
  keys = jax.random.split(key, len(sizes) - 1)
  params = {}
  for i, (k, rows, columns) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True)):
    params[f'w{i}'] = jax.random.normal(k, (rows, columns)) / rows**0.5
    params[f'b{i}'] = jnp.zeros(columns)
  return params


def velocity(params: dict[str, jax.Array]):
  """The network as a VelocityFn."""

  def velocity_fn(x_t, t, conditioning):
    t = t[:, None]
    waves = jnp.pi * t * jnp.arange(1, FREQUENCIES + 1)
    h = jnp.concatenate(
      [x_t, t, jnp.sin(waves), jnp.cos(waves), conditioning.tokens[:, 0]], axis=-1
    )
    for i in range(3):
      h = jax.nn.silu(h @ params[f'w{i}'] + params[f'b{i}'])
    return h @ params['w3'] + params['b3']

  return velocity_fn


def sample(key: jax.Array, velocity_fn, prompt: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Start noise and samples (B, 2) of prompts (B,)."""
  noise = jax.random.normal(key, (*prompt.shape, 2))
  return noise, flow.euler_ode(velocity_fn, noise, schedule(), conditioning(prompt))


def pretraining_loss(params, key: jax.Array, batch: int) -> jax.Array:
  """Flow matching on all prompts."""
  prompt_key, data_key, noise_key, time_key = jax.random.split(key, 4)
  prompt = jax.random.randint(prompt_key, (batch,), 0, PROMPTS)
  x_0 = data(data_key, prompt)
  noise, t = jax.random.normal(noise_key, x_0.shape), jax.random.uniform(time_key, (batch,))
  return flow_matching(velocity(params), x_0, noise, t, conditioning(prompt))[0]


def evaluate(velocity_fn, key: jax.Array, samples: int) -> dict[str, jax.Array]:
  """What a model draws.

  Args:
    velocity_fn: the model.
    key: start noise.
    samples: of each prompt.

  Returns:
    `correct`: share of right samples under implicit prompts; `worst`: of the worst concept;
    `balance`: the rarer mode of the right answer over the commoner, mean over concepts, 0 for a
    concept that never comes out right; `explicit`: right share under explicit prompts;
    `samples` (6, samples, 2) under implicit prompts. Whatever is not finite counts as wrong.
  """
  implicit_key, explicit_key = jax.random.split(key)
  concept = jnp.repeat(jnp.arange(CONCEPTS), samples)
  _, x_0 = sample(implicit_key, velocity_fn, concept + IMPLICIT)
  modes = shown(x_0, concept).reshape(CONCEPTS, samples, 2).mean(1)
  each = reward(x_0, concept).reshape(CONCEPTS, samples).mean(1)
  balance = jnp.min(modes, -1) / jnp.maximum(jnp.max(modes, -1), 1e-9)
  _, explicit = sample(explicit_key, velocity_fn, concept)
  return {
    'correct': jnp.mean(each),
    'worst': jnp.min(each),
    'balance': jnp.mean(balance),
    'explicit': jnp.mean(reward(explicit, concept)),
    'samples': x_0.reshape(CONCEPTS, samples, 2),
  }
