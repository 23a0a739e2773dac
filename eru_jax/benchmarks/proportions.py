"""Intervals of shares of right pictures, which say something of 0 and 100 %, too."""

import numpy as np

from eru_jax.benchmarks import statistics
from eru_jax.benchmarks.statistics import Design, Sample
from eru_jax.training.metrics import wilson_interval


def proportion_interval(design: Design, sample: Sample) -> list[float] | None:
  """The 95 % interval of a share of right pictures.

  Wilson's, where every picture is a cluster of its own. Else Wilson's of the effective number of
  pictures, which is their number over the design effect (Kish 1965). Under weights that of
  `statistics.interval`; where that has none, Wilson's as if the pictures of a cluster were alike.

  Args:
    design: of Q prompts.
    sample: values of 0 and 1.

  Returns:
    [low, high]; None if there is no score.
  """
  share = design.overall(sample)
  if not np.isfinite(share):
    return None
  if len(design.weights) > 1 and (found := statistics.interval(design, sample)):
    return found
  if len(design.weights) > 1:
    counts = design.by_cluster(sample.counts[:, None] * design.members)
    size = _size_if_alike(counts @ (design.weights / counts.sum(axis=0)))
    # Not off 0 or 1 by the rounding of weights.
    share = round(share, 12)
  else:
    counts, sums = design.by_cluster(sample.counts), design.by_cluster(sample.sums)
    size = _effective_size(sums[counts > 0], counts[counts > 0])
  return list(wilson_interval(share * size, size))


def _effective_size(sums: np.ndarray, counts: np.ndarray) -> float:
  """So many independent pictures say as much as those of clusters (C,), `sums` of them right.

  Where nearly all are right or nearly all wrong, a sample says little of its design effect, and
  where all are, nothing. So it is estimated with two more clusters, one all right, one all wrong
  (as Agresti and Coull 1998 have it for the share), and is at most that of pictures that are alike.
  """
  total = counts.sum()
  if (counts == 1).all():
    return float(total)
  mean = total / len(counts)
  right, drawn = np.append(sums, [0, mean]), np.append(counts, [mean, mean])
  n, share = len(drawn), right.sum() / drawn.sum()
  variance = n / (n - 1) * np.sum(((right - share * drawn) / drawn.sum()) ** 2)
  effect = variance * drawn.sum() / (share * (1 - share))
  return float(np.clip(total / effect, _size_if_alike(counts), total))


def _size_if_alike(shares: np.ndarray) -> float:
  """The effective number of clusters (C,) that have such shares of a mean (Kish 1965)."""
  return float(shares.sum() ** 2 / np.sum(shares**2))
