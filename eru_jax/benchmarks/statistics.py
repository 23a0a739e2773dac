"""Confidence intervals by resampling prompts, and differences between models by resampling pairs.

What a benchmark measures is a mean over prompts, of which it has a sample: so prompts are drawn
with replacement (Efron's bootstrap, percentile intervals), with all pictures that they have. Where
categories have weights of their own, prompts are drawn within their category, as a category's size
is no accident. Two models answer the same prompts: their difference is resampled with both scores
of a prompt drawn together, and so is every ratio of several means.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

RESAMPLES = 2000
_LEVEL = 0.95


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

  def overall(self, sample: Sample, times: np.ndarray | None = None) -> np.ndarray:
    """The score of each resample, (R,); NaN where a category has no scored picture.

    Args:
      sample: of Q prompts.
      times: (R, Q) how often a resample has each prompt; None is the sample itself, R = 1.
    """
    times = np.ones((1, len(self.strata))) if times is None else times
    total = np.zeros(len(times))
    for stratum, weight in enumerate(self.weights):
      rows = self.strata == stratum
      with np.errstate(invalid='ignore', divide='ignore'):
        mean = (times[:, rows] @ sample.sums[rows]) / (times[:, rows] @ sample.counts[rows])
      total += weight * mean
    return total

  def resamples(self, seed: int, count: int = RESAMPLES) -> np.ndarray:
    """How often each of `count` bootstrap samples has each prompt: (count, Q)."""
    rng = np.random.default_rng(seed)
    times = np.zeros((count, len(self.strata)), np.float64)
    for stratum in range(len(self.weights)):
      rows = np.flatnonzero(self.strata == stratum)
      if len(rows):
        times[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=count)
    return times


def interval(estimates: np.ndarray) -> list[float] | None:
  """The 95 % percentile interval of resampled estimates; None if none of them is a number."""
  found = estimates[np.isfinite(estimates)]
  if not len(found):
    return None
  low, high = np.quantile(found, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
  return [float(low), float(high)]


def two_sided(differences: np.ndarray) -> float:
  """Achieved significance: how often resampled differences fall on the rarer side of 0, doubled.

  One count is added, so that it is never 0; ties count for both sides.
  """
  rarer = min(int(np.sum(differences <= 0)), int(np.sum(differences >= 0)))
  return min(1.0, 2 * (1 + rarer) / (len(differences) + 1))


def compare(design: Design, first: Sample, second: Sample, times: np.ndarray) -> dict | None:
  """Second minus first, over the prompts of which both have scored pictures.

  Args:
    design: of Q prompts.
    first, second: their values by two models.
    times: (R, Q) resamples.

  Returns:
    {'difference', 'ci95', 'p', 'n': prompts}; None if the difference cannot be told.
  """
  both = (first.counts > 0) & (second.counts > 0)
  first, second = first.where(both), second.where(both)
  difference = float((design.overall(second) - design.overall(first))[0])
  if not np.isfinite(difference):
    return None
  resampled = design.overall(second, times) - design.overall(first, times)
  resampled = resampled[np.isfinite(resampled)]
  return {
    'difference': difference,
    'ci95': interval(resampled),
    'p': two_sided(resampled),
    'n': int(both.sum()),
  }


def normalised_difference(implicit, superficial, explicit):
  """Science-T2I's ND: where implicit lies between superficial (0) and explicit (1)."""
  return (implicit - superficial) / (explicit - superficial)


def relative_improvement(implicit, base_implicit, base_explicit):
  """Science-T2I's RI: how much of the base's gap to its explicit prompts is closed."""
  return (implicit - base_implicit) / (base_explicit - base_implicit)


def ratio(
  function: Callable, design: Design, samples: Sequence[Sample], times: np.ndarray
) -> dict | None:
  """A function of several overall scores, such as `normalised_difference`, with its interval.

  Args:
    function: of as many numbers, elementwise.
    design: of Q prompts.
    samples: as many values of the same prompts.
    times: (R, Q) resamples, which all of them share.

  Returns:
    {'value', 'ci95'}; None if it is no number.
  """
  with np.errstate(invalid='ignore', divide='ignore'):
    value = function(*(design.overall(sample) for sample in samples))[0]
    resampled = function(*(design.overall(sample, times) for sample in samples))
  if not np.isfinite(value):
    return None
  return {'value': float(value), 'ci95': interval(resampled)}
