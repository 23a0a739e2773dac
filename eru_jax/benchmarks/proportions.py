"""Intervals of shares of right pictures, which say something of 0 and 100 %, too.

Wilson's interval (1927) of a share is that of independent pictures. Pictures of one cluster are
not, so it is taken of the effective number of pictures: so many independent ones would vary as
much, share (1 - share) / variance (Kish 1965; Korn and Graubard 1998 have it so for exact
intervals). The variance is that of the weighted mean of ratios, its clusters drawn within
categories.

Where nearly all are right or nearly all wrong, a sample says little of its variance, and where all
are, nothing. So it is estimated with two more clusters in each category, one all right, one all
wrong (as Agresti and Coull 1998 have it for the share itself). They are as large as the cluster of
a random picture, sum(m^2) / sum(m) of clusters with m pictures each.
"""

import numpy as np

from eru_jax.benchmarks.statistics import Design, Sample, student_quantile
from eru_jax.training.metrics import wilson_interval


def proportion_interval(design: Design, sample: Sample) -> list[float] | None:
  """The 95 % interval of a share of right pictures.

  Wilson's of the pictures, where every picture is a cluster of its own and there are no weights.
  Else Wilson's of the effective number of pictures, with Student's quantile in place of the normal
  one, as that number is a guess from these clusters. The degrees of freedom are the effective
  number of clusters (Kish's, by their shares of the score) with the two that are added, less one
  for the mean.

  Args:
    design: of Q prompts.
    sample: values of 0 and 1.

  Returns:
    [low, high]; None if there is no score.
  """
  share = design.overall(sample)
  if not np.isfinite(share):
    return None
  counts, sums = design.table(sample.counts), design.table(sample.sums)
  quantile = 1.96
  if len(design.weights) > 1 or counts.sum(axis=1).max() > 1:
    shares = counts @ (design.weights / counts.sum(axis=0))
    quantile = student_quantile(shares.sum() ** 2 / np.sum(shares**2) + 1)
  size = _effective_size(design.weights, counts, sums)
  # Not off 0 or 1 by the rounding of weights.
  share = round(share, 12) if len(design.weights) > 1 else share
  low, high = wilson_interval(share * size, size, quantile)
  # No wrong picture may say more of a share than if all were right, by a smaller variance.
  size = _effective_size(design.weights, counts, counts)
  least, most = wilson_interval(size, size, quantile)[0], wilson_interval(0, size, quantile)[1]
  return [min(low, least), max(high, most)]


def _effective_size(weights: np.ndarray, counts: np.ndarray, sums: np.ndarray) -> float:
  """So many independent pictures say as much as these.

  At least one, and at most their number, except with weights: where categories differ in what is
  right of them, that they have a part each is worth pictures.

  Args:
    weights: (S,) of categories.
    counts, sums: (C, S) pictures of clusters in categories, and how many of them are right.
  """
  typical = np.diag((counts**2).sum(axis=0) / counts.sum(axis=0))
  drawn = np.concatenate([counts, typical, typical])
  right = np.concatenate([sums, typical, 0 * typical])
  total = drawn.sum(axis=0)
  means = right.sum(axis=0) / total
  # The jackknife's: a cluster pulls the mean to itself, the more the larger it is.
  parts = weights * (right - means * drawn) / (total - drawn)
  variance = np.sum(parts.sum(axis=1) ** 2)
  share = weights @ means
  most = counts.sum() if len(weights) == 1 else np.inf
  return float(np.clip(share * (1 - share) / variance, 1, most))
