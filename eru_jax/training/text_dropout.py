"""Noise and dropout on prompts, so that no single path from the text is all a model relies on."""

import jax
import jax.numpy as jnp

from eru_jax.types import Conditioning


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
    spread = jnp.std(tokens, axis=(1, 2), keepdims=True)
    tokens = tokens + noise * spread * jax.random.normal(token_key, tokens.shape, tokens.dtype)
    if pooled is not None:
      spread = jnp.std(pooled, axis=1, keepdims=True)
      pooled = pooled + noise * spread * jax.random.normal(pooled_key, pooled.shape, pooled.dtype)
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
    dropped = chance >= 1 - drop

    def choose(value: jax.Array, empty: jax.Array) -> jax.Array:
      return jnp.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), empty, value)

    result = jax.tree.map(choose, result, null)
  return result
