"""Noise and dropout on prompts, so that no single path from the text is all a model relies on."""

import functools

import jax
import jax.numpy as jnp

from eru_jax.types import Conditioning


def _add_noise(scale: float, key: jax.Array, values: jax.Array) -> jax.Array:
  """Adds Gaussian noise, its standard deviation relative to that of each example's values."""
  spread = jnp.std(values, axis=tuple(range(1, values.ndim)), keepdims=True)
  return values + scale * spread * jax.random.normal(key, values.shape, values.dtype)


def perturb(
  key: jax.Array,
  conditioning: Conditioning,
  *,
  noise: float = 0.0,
  pooled_only: float = 0.0,
  tokens_only: float = 0.0,
  drop: float = 0.0,
  null: Conditioning | None = None,
) -> Conditioning:
  """Perturbs each example's prompt at random.

  A text encoder places a fact's unseen wordings near its known ones, not on them. A model that
  has learnt from points and from token sequences alone memorises phrases; Gaussian noise on the
  text and examples that carry only the pooled vector make it answer a neighbourhood of meanings.

  Args:
    key: randomness.
    conditioning: prompts of a batch of B.
    noise: standard deviation of Gaussian noise, relative to that of the prompt's own values.
    pooled_only: probability that the token states are masked out.
    tokens_only: probability that the pooled vector is zeroed.
    drop: probability that the whole prompt becomes the empty one.
    null: the empty prompt, batch size 1; needed for drop > 0.

  Returns:
    Conditioning of the same shapes (with a mask, if token states may be masked out).
  """
  tokens, mask, pooled = conditioning.tokens, conditioning.mask, conditioning.pooled
  token_key, pooled_key, choice_key = jax.random.split(key, 3)
  if noise:
    noised = functools.partial(_add_noise, noise)
    if pooled is not None and tokens.shape[1:] == (1, pooled.shape[1]):
      # One sentence vector in both places (`sentence_conditioning`) stays one.
      pooled = noised(pooled_key, pooled)
      tokens = pooled[:, None]
    else:
      tokens = noised(token_key, tokens)
      pooled = None if pooled is None else noised(pooled_key, pooled)
  chance = jax.random.uniform(choice_key, (tokens.shape[0],))
  if pooled_only:
    if mask is None:
      mask = jnp.ones(tokens.shape[:2], bool)
    mask = mask & ~(chance < pooled_only)[:, None]
  if tokens_only and pooled is not None:
    zeroed = (chance >= pooled_only) & (chance < pooled_only + tokens_only)
    pooled = jnp.where(zeroed[:, None], 0, pooled)
  result = Conditioning(tokens, mask, pooled)
  if drop:
    if mask is not None and null.mask is None:
      null = null.replace(mask=jnp.ones(null.tokens.shape[:2], bool))
    dropped = chance >= 1 - drop

    def choose(value: jax.Array, empty: jax.Array) -> jax.Array:
      return jnp.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), empty, value)

    result = jax.tree.map(choose, result, null)
  return result
