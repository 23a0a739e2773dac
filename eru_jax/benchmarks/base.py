"""What a benchmark is: questions, the conditions they are asked under, and what scores count."""

import collections
import dataclasses
import functools
import hashlib
import importlib
import math
import numbers
import pkgutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eru_jax.data.pairs import KnowledgePair
from eru_jax.errors import UserError

if TYPE_CHECKING:
  from eru_jax.training.config import DataConfig

# In the order in which they are told.
CONDITIONS = ('implicit', 'explicit', 'superficial')


@dataclasses.dataclass(frozen=True)
class Question:
  """One thing that a picture is asked for, in several ways.

  Attributes:
    id: unique within a benchmark; pictures are named by it.
    category: what scores are grouped and weighted by.
    prompts: condition -> prompt. 'implicit' is always there: it is what pictures are held against,
      whatever prompt they were drawn of.
    subcategory: a finer group, such as the law of nature; may be ''.
    split: the set that it belongs to, such as 'S' of Science-T2I; may be ''.
    explanation: what a right picture shows, for a judge; may be ''.
    rubric: further texts for a judge by name, such as 'scene' and 'reality'.
    cluster: what it is about: questions of one cluster are not independent, and count as one in
      intervals and tests; '' for a question on its own.
  """

  id: str
  category: str
  prompts: Mapping[str, str]
  subcategory: str = ''
  split: str = ''
  explanation: str = ''
  rubric: Mapping[str, str] = dataclasses.field(default_factory=dict)
  cluster: str = ''

  @property
  def implicit(self) -> str:
    return self.prompts['implicit']


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How what a scorer says of a picture becomes the benchmark's number.

  Attributes:
    keys: numbers that a score must have; without one of them the picture counts as unscored.
    value: score -> the picture's value.
    weights: category -> its share of the overall score, which is then the weighted sum of the
      categories' means, and missing while a category has no scored picture; None makes it the
      mean of all pictures.
    span: least and greatest value, or None for each that has no bound; for people's eyes only.
    digits: decimal places that people are shown.
    percent: whether people are shown percent.
    proportion: whether each value is 0 or 1, so that intervals are Wilson's, see
      `proportions.proportion_interval`.
  """

  keys: tuple[str, ...]
  value: Callable[[Mapping[str, float]], float]
  weights: Mapping[str, float] | None = None
  span: tuple[float | None, float | None] = (None, None)
  digits: int = 2
  percent: bool = False
  proportion: bool = False

  def values(self, scores: Sequence[Mapping[str, float] | None]) -> np.ndarray:
    """Values (N,) of pictures, NaN for those without a whole score."""
    return np.array([self._one(score) for score in scores], np.float64)

  def _one(self, score: Mapping[str, float] | None) -> float:
    if score is None or not all(_is_number(score.get(key)) for key in self.keys):
      return math.nan
    return float(self.value(score))


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A set of questions and its rules.

  Attributes:
    name: as --benchmark has it.
    title: as people read it.
    read: --data (or None) -> questions, in a fixed order; raises UserError for bad files.
    protocols: scorer -> protocol; the first is what the benchmark was published with.
    images_per_prompt: pictures of each prompt that its authors draw.
    training: --data -> knowledge pairs to train on, or None where all is for testing.
    edition: (split, questions that it has) -> which edition that is, or None where there is one.
    size: questions that it has, or None if that differs.
    of_run: the configuration of a run's data -> the questions of what it knows, or None where there
      are no others than those of `read`.
    headline: the split that the overall score and all comparisons are of, where several splits are
      asked and this is one of them; each has numbers of its own. '' takes all splits together.
    about: a sentence on what the numbers are, and what they are not.
  """

  name: str
  title: str
  read: Callable[[str | None], list[Question]]
  protocols: Mapping[str, Protocol]
  images_per_prompt: int = 1
  training: Callable[[str], list[KnowledgePair]] | None = None
  edition: Callable[[str, int], str] | None = None
  size: int | None = None
  of_run: Callable[['DataConfig'], list[Question]] | None = None
  headline: str = ''
  about: str = ''

  def protocol(self, scorer: str) -> Protocol:
    """The protocol of a scorer.

    Raises:
      UserError: if the benchmark has none, naming those that it has.
    """
    if scorer not in self.protocols:
      raise UserError(
        f'--scorer={scorer}: benchmark {self.name!r} can be scored by {", ".join(self.protocols)}.'
      )
    return self.protocols[scorer]


def single(key: str, **options: Any) -> Protocol:
  """The protocol that takes one number of a score as it is, such as that of CLIPScore."""
  return Protocol((key,), lambda score: score[key], **options)


# Scores of CLIP, which any benchmark can be given beside its own.
CLIP_PROTOCOLS = {'sci_score': single('sci_score'), 'clip_score': single('clip_score')}


def as_pairs(questions: Sequence[Question], split: str | None = None) -> list[KnowledgePair]:
  """Questions with an explicit prompt as knowledge pairs, say to ask a run about.

  Args:
    questions: any.
    split: of the pairs; by default that of each question, or 'test'.
  """
  return [
    KnowledgePair(
      implicit=question.implicit,
      explicit=question.prompts['explicit'],
      category=question.subcategory or question.category,
      split=split or question.split or 'test',
      id=question.id,
    )
    for question in questions
    if 'explicit' in question.prompts
  ]


@functools.cache
def registry() -> Mapping[str, Benchmark]:
  """Name -> benchmark, of every module of this package that has `BENCHMARKS`."""
  package = importlib.import_module(__package__)
  found = {}
  for module in pkgutil.iter_modules(package.__path__):
    if not module.name.startswith('_'):
      loaded = importlib.import_module(f'{__package__}.{module.name}')
      found |= {one.name: one for one in getattr(loaded, 'BENCHMARKS', ())}
  return found


def benchmark(name: str) -> Benchmark:
  """The benchmark of that name.

  Raises:
    UserError: if there is none.
  """
  if name not in registry():
    raise UserError(f'--benchmark={name}: there are {", ".join(sorted(registry()))}.')
  return registry()[name]


def fewer(
  questions: Sequence[Question], limit: int | None, splits_alike: bool = False
) -> list[Question]:
  """At most `limit` questions, evenly spread over each split and category, always the same.

  A larger limit has all those of a smaller one, so raising it draws nothing again. Which of a
  category or kind come first goes by a hash of their ids, which has nothing to do with what they
  ask. Every category is given two before any is given three: of one prompt no spread can be told.

  Args:
    questions: with different ids.
    limit: how many; None takes all.
    splits_alike: as many of each split, where these are never added up, not in proportion.
  """
  if limit is None or limit >= len(questions):
    return list(questions)
  hashed = sorted(range(len(questions)), key=lambda row: _hash(questions[row].id))
  of_kind = _turns(hashed, [(q.split, q.category, q.subcategory) for q in questions])
  order = sorted(hashed, key=lambda row: of_kind[row][1])
  turns = _turns(order, [(q.split, q.category) for q in questions])
  sizes = collections.Counter(question.split if splits_alike else '' for question in questions)
  sooner = [sizes[question.split if splits_alike else ''] for question in questions]
  chosen = sorted(order, key=lambda row: (min(turns[row][0], 2), turns[row][1] * sooner[row]))
  return [questions[row] for row in sorted(chosen[:limit])]


def _turns(order: Sequence[int], groups: Sequence[Hashable]) -> dict[int, tuple[int, float]]:
  """Row -> which of its group it is, and when its turn is if all are served by size.

  Turns are those of Sainte-Lague's rule: first come, first served, is proportional at any time.
  """
  sizes = collections.Counter(groups)
  seen: collections.Counter[Hashable] = collections.Counter()
  turns = {}
  for row in order:
    number = seen[groups[row]]
    turns[row] = number, (number + 0.5) / sizes[groups[row]]
    seen[groups[row]] += 1
  return turns


def _hash(text: str) -> bytes:
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).digest()


def _is_number(value: Any) -> bool:
  return isinstance(value, numbers.Real) and math.isfinite(value)
