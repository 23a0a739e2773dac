"""Intervals of means over prompts, and whether two models differ; sound for few prompts, too.

What a benchmark measures is a mean over prompts, of which it has a sample. Where categories have
weights of their own, the mean is the weighted sum of the categories', and a category's size is no
accident: its variance is the weighted sum of those within categories (a stratified sample). With
several pictures, a prompt counts once: its pictures are a cluster (Taylor linearisation of the
ratio of sums). The quantiles are Student's t with Satterthwaite's degrees of freedom, which a
bootstrap's percentiles are not: of two prompts of a category they see almost no spread.

Two models answer the same prompts: their difference, and every ratio of several means, is taken
over the prompts that have all its parts. Whether there is a difference is asked by randomisation
(Fisher's paired test): as if chance had decided, prompt by prompt, which model is which.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

_LEVEL = 0.95
# All exchanges are counted if no more than so many prompts differ, else so many random ones.
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
  """

  strata: np.ndarray
  weights: np.ndarray

  @classmethod
  def of(cls, categories: Sequence[str], weights: Mapping[str, float] | None) -> 'Design':
    """The design of prompts of these categories; without weights, of their common mean."""
    if weights is None:
      return cls(np.zeros(len(categories), np.int64), np.ones(1))
    names = list(weights)
    return cls(
      np.array([names.index(category) for category in categories], np.int64),
      np.array([weights[name] for name in names], np.float64),
    )

  @property
  def members(self) -> np.ndarray:
    """(Q, S) 1 where a prompt is of a category."""
    return (self.strata[:, None] == np.arange(len(self.weights))).astype(np.float64)

  def overall(self, sample: Sample) -> float:
    """The score; NaN where a category has no scored picture."""
    return float(_weighted(self.weights, sample.sums @ self.members, sample.counts @ self.members))

  def parts(self, sample: Sample) -> np.ndarray:
    """(Q,) what each prompt adds to the score's error: linearised, 0 in sum in each category."""
    totals = sample.counts @ self.members
    with np.errstate(invalid='ignore', divide='ignore'):
      means = sample.sums @ self.members / totals
      shares = self.weights / totals
    return shares[self.strata] * (sample.sums - means[self.strata] * sample.counts)


def _weighted(weights: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Scores (...,) of sums and counts (..., S) by category."""
  with np.errstate(invalid='ignore', divide='ignore'):
    return (sums / counts) @ weights


@dataclasses.dataclass(frozen=True)
class _Spread:
  """Variances of scores from what prompts add to their errors.

  Attributes:
    design: of Q prompts.
    scored: (Q,) bool, which of them the scores are of.
  """

  design: Design
  scored: np.ndarray

  def by_category(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(S,) what categories add to the covariance of two scores with such parts (Q,)."""
    n = self.scored @ self.design.members
    with np.errstate(invalid='ignore', divide='ignore'):
      return n / (n - 1) * ((first * second * self.scored) @ self.design.members)

  def quantile(self, parts: np.ndarray) -> float:
    """Student's two-sided quantile, by Satterthwaite's degrees of freedom."""
    n, variances = self.scored @ self.design.members, self.by_category(parts, parts)
    return student_quantile(variances.sum() ** 2 / np.sum(variances**2 / (n - 1)))

  def tells(self, parts: np.ndarray, size: float) -> bool:
    """Whether every category has two prompts, and not all are alike up to rounding of a size."""
    n = self.scored @ self.design.members
    return bool(n.min() >= 2 and np.abs(parts[self.scored]).max() > _ROUNDING * size)


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
    [low, high]; None if there is no score, where a category has a single prompt (of whose spread
    nothing is known), and where all prompts of each category are alike.
  """
  score = design.overall(sample)
  if not np.isfinite(score):
    return None
  return _interval(design, score, design.parts(sample), sample.counts > 0, _size(sample))


def _size(*samples: Sample) -> float:
  """How large values are, in units of a part of the score."""
  return max(float(np.abs(sample.sums).max() / sample.counts.sum()) for sample in samples)


def _interval(
  design: Design, score: float, parts: np.ndarray, scored: np.ndarray, size: float
) -> list[float] | None:
  spread = _Spread(design, scored)
  if not spread.tells(parts, size):
    return None
  half = spread.quantile(parts) * math.sqrt(spread.by_category(parts, parts).sum())
  return [score - half, score + half]


def compare(design: Design, first: Sample, second: Sample, seed: int = 0) -> dict | None:
  """Second minus first, over the prompts of which both have scored pictures.

  Args:
    design: of Q prompts.
    first, second: their values by two models.
    seed: of random exchanges, where there are too many to count.

  Returns:
    {'difference', 'ci95' (None as of `interval`), 'p': see `exchanged`, 'n': prompts}; None if the
    difference cannot be told.
  """
  both = (first.counts > 0) & (second.counts > 0)
  first, second = first.where(both), second.where(both)
  difference = design.overall(second) - design.overall(first)
  if not np.isfinite(difference):
    return None
  parts = design.parts(second) - design.parts(first)
  return {
    'difference': difference,
    'ci95': _interval(design, difference, parts, both, _size(first, second)),
    'p': exchanged(design, first, second, seed),
    'n': int(both.sum()),
  }


def exchanged(design: Design, first: Sample, second: Sample, seed: int = 0) -> float:
  """How often exchanging the models at random prompts makes as large a difference, or a larger one.

  Of all exchanges where few prompts differ: then 6 that all do so in one direction have 2/64.
  Else of random ones and the one there is, which is never rarer than its chance (Phipson and Smyth
  2010).

  Args:
    design: of Q prompts.
    first, second: their values by two models, of the same prompts.
    seed: of the random exchanges.
  """
  differ = np.flatnonzero((first.sums != second.sums) | (first.counts != second.counts))
  members, categories = design.members, len(design.weights)
  totals = [array @ members for array in (first.sums, first.counts, second.sums, second.counts)]
  change = np.concatenate(
    [
      (theirs - ours)[differ, None] * members[differ]
      for ours, theirs in ((first.sums, second.sums), (first.counts, second.counts))
    ],
    axis=1,
  )

  def differences(exchanges: np.ndarray) -> np.ndarray:
    """(R, D) 1 where models are exchanged -> (R,)."""
    sums, counts = np.split(exchanges @ change, [categories], axis=1)
    before = _weighted(design.weights, totals[0] + sums, totals[1] + counts)
    return _weighted(design.weights, totals[2] - sums, totals[3] - counts) - before

  there = abs(differences(np.zeros((1, len(differ))))[0])
  least = there - _ROUNDING * _size(first, second)

  def as_large(exchanges: np.ndarray) -> int:
    return int(np.sum(np.abs(differences(exchanges.astype(np.float64))) >= least))

  if len(differ) <= _EXACT:
    every = np.arange(2 ** len(differ))[:, None] >> np.arange(len(differ)) & 1
    return as_large(every) / len(every)
  rng, found = np.random.default_rng(seed), 0
  for start in range(0, _EXCHANGES, _BLOCK):
    rows = min(_BLOCK, _EXCHANGES - start)
    found += as_large(rng.integers(0, 2, (rows, len(differ)), np.int8))
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
    prompts}; None if it is no number.
  """
  scored = (value.counts > 0) & (zero.counts > 0) & (one.counts > 0)
  value, zero, one = (sample.where(scored) for sample in (value, zero, one))
  top = design.overall(value) - design.overall(zero)
  bottom = design.overall(one) - design.overall(zero)
  if not np.isfinite([top, bottom]).all() or bottom == 0:
    return None
  tops, bottoms = (design.parts(sample) - design.parts(zero) for sample in (value, one))
  told = {'value': top / bottom, 'ci95': None, 'n': int(scored.sum())}
  spread, parts = _Spread(design, scored), tops - top / bottom * bottoms
  if not spread.tells(parts, _size(value, zero, one)):
    return told
  # The ratios r for which top - r bottom is within its own interval: a r^2 - 2 b r + c <= 0.
  t = spread.quantile(parts)
  a, b, c = (
    first * second - t**2 * spread.by_category(mine, theirs).sum()
    for first, second, mine, theirs in (
      (bottom, bottom, bottoms, bottoms), (top, bottom, tops, bottoms), (top, top, tops, tops)
    )
  )  # fmt: skip
  if a > 0:
    half = math.sqrt(max(b * b - a * c, 0.0))
    told['ci95'] = [(b - half) / a, (b + half) / a]
  return told
