"""Intervals of means over prompts, and whether two models differ; sound for few prompts, too.

What a benchmark measures is a mean over prompts, of which it has a sample. Pictures of one prompt,
and prompts about one thing, are right or wrong together, so what varies by chance is the cluster:
all pictures of all prompts about one thing, which count once (Taylor linearisation of the ratio of
sums). Where categories have weights of their own, the mean is the weighted sum of the categories',
and a category's size is no accident: its variance is the weighted sum of those within categories (a
stratified sample of clusters). Quantiles are Student's t with Satterthwaite's degrees of freedom; a
bootstrap's percentiles see almost no spread of two clusters of a category.

Two models answer the same prompts: their difference, and every ratio of several means, is taken
over the prompts that have all its parts. Whether there is a difference is asked by randomisation
(Fisher's paired test): as if chance had decided, cluster by cluster, which model is which.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

_LEVEL = 0.95
# All exchanges are counted if no more than so many clusters differ, else so many random ones.
_EXACT = 13
_EXCHANGES = 9999
_BLOCK = 1000
# Of sizes that are added up, what rounding can make of 0.
_ROUNDING = 1e-10


@dataclasses.dataclass(frozen=True)
class Sample:
  """Values of the pictures of Q prompts, as far as means need them.

  Attributes:
    sums: (Q,) sum of a prompt's scored pictures.
    counts: (Q,) how many of them there are; 0 for a prompt without any.
  """

  sums: np.ndarray
  counts: np.ndarray

  @classmethod
  def of(cls, values: np.ndarray) -> 'Sample':
    """From (Q, K) values, NaN for pictures that are not scored or not there."""
    scored = np.isfinite(values)
    return cls(np.where(scored, values, 0.0).sum(axis=1), scored.sum(axis=1).astype(np.float64))

  def where(self, kept: np.ndarray) -> 'Sample':
    """The same prompts, (Q,) bool of which keep their pictures."""
    return Sample(np.where(kept, self.sums, 0.0), np.where(kept, self.counts, 0.0))


@dataclasses.dataclass(frozen=True)
class Design:
  """How prompts make up the overall score.

  Attributes:
    strata: (Q,) number of each prompt's category, 0 for all if the score is one mean.
    weights: (S,) share of each category.
    clusters: (Q,) number of each prompt's cluster, from 0 to C - 1.
  """

  strata: np.ndarray
  weights: np.ndarray
  clusters: np.ndarray

  @classmethod
  def of(
    cls,
    categories: Sequence[str],
    weights: Mapping[str, float] | None,
    clusters: Sequence[str] | None = None,
  ) -> 'Design':
    """The design of prompts of these categories and clusters.

    Args:
      categories: of Q prompts.
      weights: of the categories; None makes the score the prompts' common mean.
      clusters: what each prompt is about, '' for a prompt that is on its own; None if all are.
    """
    numbers: dict[str | int, int] = {}
    names = clusters or [''] * len(categories)
    own = [numbers.setdefault(name or row, len(numbers)) for row, name in enumerate(names)]
    if weights is None:
      strata, shares = [0] * len(categories), [1.0]
    else:
      known = list(weights)
      strata, shares = [known.index(name) for name in categories], list(weights.values())
    return cls(np.array(strata, np.int64), np.array(shares, np.float64), np.array(own, np.int64))

  @property
  def members(self) -> np.ndarray:
    """(Q, S) 1 where a prompt is of a category."""
    return (self.strata[:, None] == np.arange(len(self.weights))).astype(np.float64)

  def table(self, values: np.ndarray) -> np.ndarray:
    """(Q,) of prompts -> (C, S), summed by cluster and category."""
    sums = np.zeros((self.clusters.max(initial=-1) + 1, len(self.weights)))
    np.add.at(sums, (self.clusters, self.strata), values)
    return sums

  def scored_clusters(self, scored: np.ndarray) -> int:
    """How many clusters there are, of (Q,) bool which prompts are scored."""
    return len(np.unique(self.clusters[scored]))

  def overall(self, sample: Sample) -> float:
    """The score; NaN where a category has no scored picture."""
    return float(_weighted(self.weights, sample.sums @ self.members, sample.counts @ self.members))

  def parts(self, sample: Sample) -> np.ndarray:
    """(C,) what each cluster adds to the score's error, linearised.

    A cluster pulls its category's mean to itself, so its error looks too small: the jackknife's is
    1 / (1 - share) times as large (CR3 in Cameron and Miller 2015). What is left of this where all
    n are of one size, n / (n - 1), is in the variances.
    """
    counts, sums = self.table(sample.counts), self.table(sample.sums)
    totals, n = counts.sum(axis=0), (counts > 0).sum(axis=0)
    with np.errstate(invalid='ignore', divide='ignore'):
      errors = self.weights / totals * (sums - sums.sum(axis=0) / totals * counts)
      pulled = np.where(counts < totals, (1 - 1 / n) / (1 - counts / totals), 1.0)
    return (errors * pulled).sum(axis=1)


def _weighted(weights: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Scores (...,) of sums and counts (..., S) by category."""
  with np.errstate(invalid='ignore', divide='ignore'):
    return (sums / counts) @ weights


@dataclasses.dataclass(frozen=True)
class _Spread:
  """Variances of scores from what clusters add to their errors.

  Clusters are drawn within categories. Categories that share one are drawn together: they are one
  stratum, which loses a degree of freedom for each of their means.

  Attributes:
    members: (C, G) 1 where a cluster with scored prompts is of a stratum.
    freedom: (G,) clusters of a stratum less its categories.
    effective: (G,) the same of the effective number of clusters, at least 1.
  """

  members: np.ndarray
  freedom: np.ndarray
  effective: np.ndarray

  @classmethod
  def of(cls, design: Design, counts: np.ndarray) -> '_Spread':
    """Of a design, and (Q,) how many pictures of its prompts the scores are of."""
    drawn = design.table(counts)
    touched = drawn > 0
    linked = np.eye(touched.shape[1], dtype=bool)
    for _ in design.weights:
      linked |= (touched.T.astype(int) @ touched @ linked) > 0
    # Of each category, the first that it is linked to.
    firsts, categories = np.unique(np.argmax(linked, axis=0), return_counts=True)
    members = (touched.astype(int) @ linked[:, firsts] > 0).astype(np.float64)
    # Kish's (1965), by shares of the score; where clusters are of one size, their number.
    sizes = (drawn @ (design.weights / drawn.sum(axis=0)))[:, None] * members
    effective = sizes.sum(axis=0) ** 2 / (sizes**2).sum(axis=0)
    freedom = members.sum(axis=0) - categories
    return cls(members, freedom, np.maximum(effective - categories, 1))

  def by_stratum(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(G,) what strata add to the covariance of two scores with such parts (C,)."""
    n = self.members.sum(axis=0)
    with np.errstate(invalid='ignore', divide='ignore'):
      return n / self.freedom * ((first * second) @ self.members)

  def quantile(self, parts: np.ndarray) -> float:
    """Student's two-sided quantile, by Satterthwaite's degrees of freedom."""
    variances = self.by_stratum(parts, parts)
    return student_quantile(variances.sum() ** 2 / np.sum(variances**2 / self.effective))

  def tells(self, parts: np.ndarray, size: float) -> bool:
    """Whether strata have a spread, and clusters are not all alike up to rounding of a size."""
    return bool(self.freedom.min() >= 1 and np.abs(parts).max() > _ROUNDING * size)


def student_quantile(freedom: float, level: float = _LEVEL) -> float:
  """The t that Student's distribution stays within, on both sides, with probability `level`.

  Args:
    freedom: degrees of freedom, 1 or more, whole or not.
    level: from 0 to 1.
  """
  # With t = sqrt(freedom) tan(angle), the density is cos(angle)^(freedom - 1).
  angles = np.linspace(0, min(math.pi / 2, 15 / math.sqrt(freedom)), 8001)
  density = np.cos(angles) ** (freedom - 1)
  below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
  return float(math.sqrt(freedom) * np.tan(np.interp(level, below / below[-1], angles)))


def interval(design: Design, sample: Sample) -> list[float] | None:
  """The 95 % interval of an overall score.

  Returns:
    [low, high]; None if there is no score, where a category has a single cluster (of whose spread
    nothing is known), and where all clusters of each category are alike.
  """
  score = design.overall(sample)
  if not np.isfinite(score):
    return None
  return _interval(design, score, design.parts(sample), sample.counts, _size(sample))


def _size(*samples: Sample) -> float:
  """How large values are, in units of a part of the score."""
  return max(float(np.abs(sample.sums).max() / sample.counts.sum()) for sample in samples)


def _interval(
  design: Design, score: float, parts: np.ndarray, counts: np.ndarray, size: float
) -> list[float] | None:
  spread = _Spread.of(design, counts)
  if not spread.tells(parts, size):
    return None
  half = spread.quantile(parts) * math.sqrt(spread.by_stratum(parts, parts).sum())
  return [score - half, score + half]


def compare(design: Design, first: Sample, second: Sample, seed: int = 0) -> dict | None:
  """Second minus first, over the prompts of which both have scored pictures.

  Args:
    design: of Q prompts.
    first, second: their values by two models.
    seed: of random exchanges, where there are too many to count.

  Returns:
    {'difference', 'ci95' (None as of `interval`), 'p': see `exchanged`, 'n': prompts, 'clusters'};
    None if the difference cannot be told.
  """
  both = (first.counts > 0) & (second.counts > 0)
  first, second = first.where(both), second.where(both)
  difference = design.overall(second) - design.overall(first)
  if not np.isfinite(difference):
    return None
  parts, counts = design.parts(second) - design.parts(first), first.counts + second.counts
  return {
    'difference': difference,
    'ci95': _interval(design, difference, parts, counts, _size(first, second)),
    'p': exchanged(design, first, second, seed),
    'n': int(both.sum()),
    'clusters': design.scored_clusters(both),
  }


def exchanged(design: Design, first: Sample, second: Sample, seed: int = 0) -> float:
  """How often exchanging the models at random clusters makes as large a difference, or a larger.

  Of all exchanges where few clusters differ: then 6 that all do so in one direction have 2/64. Else
  of random ones and the one there is, never rarer than its chance (Phipson and Smyth 2010).

  Args:
    design: of Q prompts.
    first, second: their values by two models, of the same prompts.
    seed: of the random exchanges.
  """
  members, categories = design.members, len(design.weights)
  totals = [array @ members for array in (first.sums, first.counts, second.sums, second.counts)]
  change = np.hstack(
    [design.table(second.sums - first.sums), design.table(second.counts - first.counts)]
  )
  change = change[change.any(axis=1)]

  def differences(exchanges: np.ndarray) -> np.ndarray:
    """(R, D) 1 where models are exchanged -> (R,)."""
    sums, counts = np.split(exchanges @ change, [categories], axis=1)
    before = _weighted(design.weights, totals[0] + sums, totals[1] + counts)
    return _weighted(design.weights, totals[2] - sums, totals[3] - counts) - before

  there = abs(differences(np.zeros((1, len(change))))[0])
  least = there - _ROUNDING * _size(first, second)

  def as_large(exchanges: np.ndarray) -> int:
    return int(np.sum(np.abs(differences(exchanges.astype(np.float64))) >= least))

  if len(change) <= _EXACT:
    every = np.arange(2 ** len(change))[:, None] >> np.arange(len(change)) & 1
    return as_large(every) / len(every)
  rng, found = np.random.default_rng(seed), 0
  for start in range(0, _EXCHANGES, _BLOCK):
    rows = min(_BLOCK, _EXCHANGES - start)
    found += as_large(rng.integers(0, 2, (rows, len(change)), np.int8))
  return (1 + found) / (1 + _EXCHANGES)


def position(design: Design, value: Sample, zero: Sample, one: Sample) -> dict | None:
  """Where a score lies between two others, (value - zero) / (one - zero), over common prompts.

  Science-T2I's ND is that of implicit between superficial and explicit prompts, its RI that of a
  model's implicit prompts between the base's implicit and explicit ones.

  Args:
    design: of Q prompts.
    value, zero, one: values of the same prompts.

  Returns:
    {'value', 'ci95': Fieller's, or None as of `interval` and where it would be unbounded, 'n':
    prompts, 'clusters'}; None if it is no number.
  """
  scored = (value.counts > 0) & (zero.counts > 0) & (one.counts > 0)
  value, zero, one = (sample.where(scored) for sample in (value, zero, one))
  top = design.overall(value) - design.overall(zero)
  bottom = design.overall(one) - design.overall(zero)
  if not np.isfinite([top, bottom]).all() or bottom == 0:
    return None
  tops, bottoms = (design.parts(sample) - design.parts(zero) for sample in (value, one))
  told = {'value': top / bottom, 'ci95': None, 'n': int(scored.sum())}
  told['clusters'] = design.scored_clusters(scored)
  parts = tops - top / bottom * bottoms
  spread = _Spread.of(design, value.counts + zero.counts + one.counts)
  if not spread.tells(parts, _size(value, zero, one)):
    return told
  # The ratios r for which top - r bottom is within its own interval: a r^2 - 2 b r + c <= 0.
  t = spread.quantile(parts)
  a, b, c = (
    one[0] * other[0] - t**2 * spread.by_stratum(one[1], other[1]).sum()
    for one, other in itertools.combinations_with_replacement(((bottom, bottoms), (top, tops)), 2)
  )
  if a > 0:
    half = math.sqrt(max(b * b - a * c, 0.0))
    told['ci95'] = [(b - half) / a, (b + half) / a]
  return told
