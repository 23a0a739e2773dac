"""Categories of pairs that a reward judges badly: left out of NO-RL, or taken less seriously."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from eru_jax.data.emoji_knowledge import PairTable
from eru_jax.data.pairs import normalise


def believed(
  table: PairTable, doubtful: Sequence[str], weight: float
) -> tuple[PairTable, np.ndarray]:
  """The pairs of a split that something can be learnt from, and how much their rewards weigh.

  Args:
    table: M pairs.
    doubtful: categories; those of Science-T2I are laws of nature.
    weight: of the rewards of their pairs, 0 to 1; with 0 they are left out, and not even drawn.

  Returns:
    The table of the N pairs that are left, in order, and weights (N,) float32.
  """
  names = {normalise(name) for name in doubtful}
  doubted = np.array([normalise(pair.category or '') in names for pair in table.pairs], bool)
  weights = np.where(doubted, np.float32(weight), np.float32(1))
  if weight > 0 or not doubted.any():
    return table, weights
  kept = np.flatnonzero(~doubted)
  return dataclasses.replace(
    table,
    pairs=tuple(table.pairs[row] for row in kept),
    index=None if table.index is None else table.index[kept],
  ), weights[kept]


def doubted(table: PairTable, doubtful: Sequence[str], weight: float) -> str:
  """How many pairs each doubtful category has, for people; 0 may be a name spelt otherwise."""
  if not doubtful:
    return ''
  counts = collections.Counter(normalise(pair.category or '') for pair in table.pairs)
  named = ', '.join(f'{name} {counts[normalise(name)]}' for name in doubtful)
  count = sum(counts[name] for name in {normalise(name) for name in doubtful})
  fate = f'weigh {weight:g}' if weight > 0 else 'are left out'
  return f'of {len(table.pairs)} training pairs, {count} {fate} as doubtful ({named})'
