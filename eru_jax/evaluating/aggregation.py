"""From pictures' scores to the numbers of a table: means as published, intervals, comparisons.

A picture without a score is counted as unscored and left out of the means, as the published scripts
leave out rows that their judge's answer could not be read from. It never counts as 0.

Means are of pictures; intervals and tests are of clusters, the prompts about one thing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eru_jax.benchmarks import statistics
from eru_jax.benchmarks.base import Protocol, Question
from eru_jax.benchmarks.proportions import proportion_interval
from eru_jax.benchmarks.statistics import Design, Sample

# Conditions that what a model makes of implicit prompts is not measured by.
_SAYING_NO_MORE = ('implicit', 'superficial')

Values = Mapping[str, Mapping[str, np.ndarray]]


def aggregate(
  protocol: Protocol, questions: Sequence[Question], values: np.ndarray
) -> dict[str, Any]:
  """Everything that is told of one model under one condition.

  Args:
    protocol: the rules.
    questions: Q of them.
    values: (Q, K) of their pictures as `Protocol.values` makes them, NaN where there is none.

  Returns:
    {'score', 'ci95', 'n': scored pictures, 'unscored': pictures, 'prompts': Q with a score,
    'clusters': of these, 'categories': {name: the same}, 'subcategories': {name: the same}},
    'score' and 'ci95' being None where there is nothing to tell, and 'missing' the categories
    without scored pictures where these have weights.
  """
  found = _mean(protocol, questions, values, protocol.weights)
  for kind, attribute in (('categories', 'category'), ('subcategories', 'subcategory')):
    names = [getattr(question, attribute) for question in questions]
    found[kind] = {}
    for name in dict.fromkeys(names):
      rows = [row for row, other in enumerate(names) if other == name]
      part = [questions[row] for row in rows]
      if name:
        found[kind][name] = _mean(protocol, part, values[rows], None)
  return found


def _mean(
  protocol: Protocol,
  questions: Sequence[Question],
  values: np.ndarray,
  weights: Mapping[str, float] | None,
) -> dict[str, Any]:
  design, sample = _design(questions, weights), Sample.of(values)
  score, n = design.overall(sample), int(sample.counts.sum())
  told: dict[str, Any] = {
    'score': score if np.isfinite(score) else None,
    'ci95': None,
    'n': n,
    'unscored': int(values.size - n),
    'prompts': int((sample.counts > 0).sum()),
    'clusters': design.scored_clusters(sample.counts > 0),
  }
  if weights is not None:
    scored = {q.category for q, count in zip(questions, sample.counts, strict=True) if count}
    told['missing'] = [name for name in weights if name not in scored]
  if not np.isfinite(score):
    return told
  find = proportion_interval if protocol.proportion else statistics.interval
  told['ci95'] = _within(protocol.span, find(design, sample))
  return told


def _design(questions: Sequence[Question], weights: Mapping[str, float] | None) -> Design:
  categories = [question.category for question in questions]
  return Design.of(categories, weights, [question.cluster for question in questions])


def _within(
  span: tuple[float | None, float | None], interval: list[float] | None
) -> list[float] | None:
  """The part of an interval that values of such a span can be in."""
  least, most = span
  if interval is None:
    return None
  low, high = interval
  return [low if least is None else max(low, least), high if most is None else min(high, most)]


def _span_of_differences(protocol: Protocol) -> tuple[float | None, float | None]:
  least, most = protocol.span
  return (None, None) if least is None or most is None else (least - most, most - least)


def comparisons(
  protocol: Protocol, questions: Sequence[Question], values: Values, seed: int = 0
) -> list[dict[str, Any]]:
  """Every later model against the first under each condition, and the first's own prompts.

  Args:
    protocol: the rules.
    questions: Q of them.
    values: model -> condition -> (Q, K), the first model being the base.
    seed: of `statistics.exchanged`.

  Returns:
    [{'model', 'condition', 'against': {'model', 'condition'}, 'difference', 'ci95', 'p', 'n':
    prompts, 'clusters': of these}]: each model under each condition minus the base under the same
    one; and each under implicit prompts minus the base under others that say more: explicit ones,
    which bound what moving knowledge alone can reach, and rewritten ones, the rival that trains
    nothing.
  """
  if not values:
    return []
  design = _design(questions, protocol.weights)
  base = next(iter(values))
  pairs = [
    (model, condition, base, condition)
    for model in list(values)[1:]
    for condition in values[model]
    if condition in values[base]
  ]
  pairs += [
    (model, 'implicit', base, condition)
    for condition in values[base]
    for model in values
    if condition not in _SAYING_NO_MORE and 'implicit' in values[model]
  ]
  told = []
  for model, condition, other, under in pairs:
    first, second = Sample.of(values[other][under]), Sample.of(values[model][condition])
    found = statistics.compare(design, first, second, seed)
    if found is not None:
      found['ci95'] = _within(_span_of_differences(protocol), found['ci95'])
      against = {'model': other, 'condition': under}
      told.append({'model': model, 'condition': condition, 'against': against, **found})
  return told


def ratios(
  protocol: Protocol, questions: Sequence[Question], values: Values
) -> dict[str, dict[str, Any]]:
  """Science-T2I's ND and RI of each model, as far as the conditions they need were drawn.

  Each is taken over the prompts that have scored pictures in all its three parts.

  Returns:
    {model: {'nd': {'value', 'ci95', 'n', 'clusters'}, 'ri': {...}}}; the base has no RI.
  """
  if not values:
    return {}
  design = _design(questions, protocol.weights)
  samples = {
    model: {condition: Sample.of(array) for condition, array in found.items()}
    for model, found in values.items()
  }
  base, told = next(iter(samples)), {}
  before = samples[base]
  for model, found in samples.items():
    mine: dict[str, Any] = {}
    if {'implicit', 'superficial', 'explicit'} <= found.keys():
      three = (found['implicit'], found['superficial'], found['explicit'])
      mine['nd'] = statistics.position(design, *three)
    if model != base and 'implicit' in found and {'implicit', 'explicit'} <= before.keys():
      three = (found['implicit'], before['implicit'], before['explicit'])
      mine['ri'] = statistics.position(design, *three)
    told[model] = {name: value for name, value in mine.items() if value is not None}
  return {model: mine for model, mine in told.items() if mine}
