"""From rewards to what the losses take: optimality probabilities, advantages and weights.

Rewards come as (G, K), K samples of each of G prompts, where a function speaks of groups.
"""

import math

import jax
import jax.numpy as jnp

from eru_jax.errors import UserError

# Keeps a group whose samples all score the same from being divided by zero, as in DiffusionNFT.
_STD_FLOOR = 1e-4


def optimality(score: jax.Array, low: float | jax.Array, high: float | jax.Array) -> jax.Array:
  """The probability that a sample is right: its absolute score, mapped from [low, high] to [0, 1].

  Args:
    score: any shape.
    low: score of a picture that is certainly wrong, e.g. the base's mean under the superficial
      prompt; a number, or an array that broadcasts against score (one per prompt).
    high: likewise of one that is certainly right, e.g. under the explicit prompt.

  Raises:
    UserError: if high is a number not above low. (Arrays are not looked into.)
  """
  if isinstance(low, int | float) and isinstance(high, int | float) and not high > low:
    raise UserError(f'optimality needs high > low, got low = {low} and high = {high}.')
  return jnp.clip((score - low) / (high - low), 0, 1)


def negative_part(r: jax.Array) -> jax.Array:
  """n = max(1 - 2 r, 0): how wrong a sample of optimality r is. Zero from one half upwards."""
  return jnp.maximum(1 - 2 * r, 0)


def group_normalized(
  rewards: jax.Array,
  *,
  std: str = 'batch',
  clip: float = math.inf,
  known: jax.Array | None = None,
) -> jax.Array:
  """(reward - mean of its group) / standard deviation: better or worse than its siblings.

  Args:
    rewards: (G, K).
    std: 'batch', of all rewards (DiffusionNFT's default), or 'group' (GRPO).
    clip: largest absolute value.
    known: (G, K), 0 for rewards that do not count, else 1; None if all do.

  Returns:
    Advantages (G, K) float32, 0 where the reward does not count.

  Raises:
    UserError: if std is something else, or clip not positive.
  """
  if std not in ('batch', 'group'):
    raise UserError(f"group_normalized: std is {std!r} but must be 'batch' or 'group'.")
  if not clip > 0:
    raise UserError(f'group_normalized: clip is {clip} but must be positive.')
  rewards = rewards.astype(jnp.float32)
  where = None if known is None else known > 0
  centred = rewards - _mean(rewards, -1, where)
  axis = -1 if std == 'group' else None
  if where is None:
    scale = jnp.std(rewards, axis=axis, keepdims=True)
  else:
    scale = jnp.sqrt(_mean(jnp.square(rewards - _mean(rewards, axis, where)), axis, where))
    centred = jnp.where(where, centred, 0)
  return jnp.clip(centred / (scale + _STD_FLOOR), -clip, clip)


def _mean(values: jax.Array, axis: int | None, where: jax.Array | None) -> jax.Array:
  """The mean of what counts, 0 of nothing; dimensions stay."""
  if where is None:
    return jnp.mean(values, axis=axis, keepdims=True)
  total = jnp.sum(values, axis=axis, keepdims=True, where=where)
  return total / jnp.maximum(jnp.sum(where, axis=axis, keepdims=True), 1)


def probability(advantage: jax.Array, clip: float = 5.0) -> jax.Array:
  """r = 1/2 + A / (2 A_max) in [0, 1]: DiffusionNFT's optimality of a normalised advantage.

  Args:
    advantage: any shape.
    clip: A_max, the advantage at which a sample counts as certainly right.

  Raises:
    UserError: if clip is not positive.
  """
  if not 0 < clip < math.inf:
    raise UserError(f'probability: clip is {clip} but must be positive.')
  return jnp.clip(0.5 + advantage / (2 * clip), 0, 1)


def scale_positives(advantage: jax.Array, weight: float = 0.0) -> jax.Array:
  """Multiplies positive advantages by a weight and keeps negative ones.

  Zhu et al., arXiv 2506.01347: 0 is negative sample reinforcement, 0.1 W-REINFORCE, 1 everything.

  Args:
    advantage: any shape.
    weight: of positives.

  Raises:
    UserError: if the weight is negative.
  """
  if not 0 <= weight < math.inf:
    raise UserError(f'scale_positives: weight is {weight} but must be zero or more.')
  return jnp.where(advantage > 0, weight * advantage, advantage)


def unsolved_groups(r: jax.Array, solved: float = 0.9, known: jax.Array | None = None) -> jax.Array:
  """Weights that drop prompts which are right already: 0 where a group's mean r exceeds `solved`.

  Args:
    r: (G, K) optimality probabilities.
    solved: the largest mean of a group that is kept.
    known: (G, K), 0 for those that do not count, else 1; None if all do.

  Returns:
    (G, K) float32 of zeros and ones. The shapes stay: compiled code cannot drop examples.
  """
  kept = _mean(r, -1, None if known is None else known > 0) <= solved
  return jnp.broadcast_to(kept, r.shape).astype(jnp.float32)
