"""One evaluation: draw, score, aggregate, compare, write down. All benchmarks go through here.

Of several processes, all draw; whatever comes before and after that process 0 does alone.

The output directory:

  evaluation.json   all numbers
  summary.csv       a line for each model, condition and group; pictures.csv a line for each picture
  gallery.html      the pictures, to look through; complete in itself
  pictures/         PNG files, see `drawing`; scores.jsonl what has been scored
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eru_jax.benchmarks.base import CONDITIONS, Benchmark, Protocol, Question, benchmark, fewer
from eru_jax.errors import UserError
from eru_jax.evaluating import drawing, provenance, results, scoring
from eru_jax.evaluating.gallery import write_gallery
from eru_jax.evaluating.judging import judged_by, open_judge
from eru_jax.evaluating.models import Task, check_world, draw_models, handed_on, model_sizes
from eru_jax.evaluating.questions import read_questions
from eru_jax.evaluating.request import EvaluationRequest, Rewriter
from eru_jax.evaluating.rivals import REWRITTEN, Rewriting
from eru_jax.evaluating.scorers import KNOWN_PICTURES, Score, Scorer, open_scorer
from eru_jax.files import check_directory
from eru_jax.judges.protocols import PROTOCOLS
from eru_jax.training.run import enable_compilation_cache
from eru_jax.training.together import by_main, together

# --scorer: draw only, for a judge that is asked later or elsewhere.
NO_SCORER = 'none'


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """What came out of an evaluation.

  Attributes:
    benchmark, protocol, scorer: the rules and who looked; the latter two are None if nobody did.
    questions: what was asked, maybe a part of the benchmark.
    sets: split -> questions that it has in full.
    conditions: in the order they are told.
    pictures: model -> what was drawn with it; the base is first.
    scores: model -> the score of each of these.
    output: the directory.
    seed: of the start noise, and of how differences are tested.
    rewriting: what rewrote prompts over HTTP, or None.
    settings: what it was made with, see `provenance`.
  """

  benchmark: Benchmark
  protocol: Protocol | None
  scorer: Scorer | None
  questions: Sequence[Question]
  sets: Mapping[str, int]
  conditions: Sequence[str]
  pictures: Mapping[str, Sequence[drawing.Picture]]
  scores: Mapping[str, Sequence[Score]]
  output: pathlib.Path
  seed: int
  rewriting: Rewriting | None = None
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def headline(self) -> str:
    """The split that overall scores and comparisons are of, or '' where it is all that is asked."""
    splits = {question.split for question in self.questions}
    return self.benchmark.headline if {self.benchmark.headline} < splits else ''

  def values(self) -> dict[str, dict[str, np.ndarray]]:
    """Model -> condition -> values (Q, K), NaN where there is no score or no picture."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for model, pictures in self.pictures.items():
      arrays = found[model] = {}
      depth = 1 + max((picture.k for picture in pictures), default=0)
      numbers = [np.nan] * len(pictures)
      if self.protocol is not None:
        numbers = self.protocol.values(self.scores[model])
      for picture, number in zip(pictures, numbers, strict=True):
        if picture.condition not in arrays:
          arrays[picture.condition] = np.full((len(self.questions), depth), np.nan)
        arrays[picture.condition][picture.row, picture.k] = number
    return found

  def said(self, model: str, index: int) -> str:
    """Of a model's picture, what it shows, a judge's marks and reason, or why it has no score."""
    if self.scorer is None:
      return ''
    score = self.scores[model][index]
    if score is None:
      return self.scorer.why(self._file(model, index)) if self.scorer.why else ''
    if self.scorer.words is None:
      return self.scorer.say(score) if self.scorer.say else ''
    marks = ', '.join(f'{name} {value:g}' for name, value in score.items())
    return ': '.join(part for part in (marks, self.reason(model, index)) if part)

  def reason(self, model: str, index: int) -> str:
    """What a judge said beside its marks of a model's picture; '' for nothing."""
    if self.scorer is None or self.scorer.words is None or self.scores[model][index] is None:
      return ''
    return self.scorer.words(self._file(model, index))

  def _file(self, model: str, index: int) -> pathlib.Path:
    return drawing.directory_of(self.output, model) / self.pictures[model][index].file


def evaluate(
  request: EvaluationRequest,
  scorer: Scorer | None = None,
  questions: Sequence[Question] = (),
) -> dict[str, Any]:
  """Runs an evaluation, or goes on with one that was killed.

  Args:
    request: the flags.
    scorer: looks at the pictures; by default what the request names, or what the benchmark was
      published with.
    questions: in place of what the benchmark reads from the request's data.

  Returns:
    The contents of evaluation.json; {} in processes other than process 0.

  Raises:
    UserError: for whatever the user can mend.
  """
  with together():
    with by_main('the questions') as mine:
      prepared, task = _prepare(request, scorer, questions) if mine else (None, None)
    enable_compilation_cache()
    pictures = draw_models(handed_on(request, task))
    with by_main('the scores') as mine:
      return _score(dataclasses.replace(prepared, pictures=pictures)) if mine else {}


def _prepare(
  request: EvaluationRequest, scorer: Scorer | None, questions: Sequence[Question]
) -> tuple[Evaluated, Task]:
  """All that is known before something is drawn, and what is to be drawn.

  Raises:
    UserError: as `evaluate`.
  """
  output = pathlib.Path(request.output).expanduser()
  check_directory(output)
  chosen = benchmark(request.benchmark)
  everything, source = list(questions), 'given by the caller'
  if not everything:
    everything, source = read_questions(request, chosen)
  asked = fewer(everything, request.limit, splits_alike=bool(chosen.headline))
  conditions, protocol = _conditions(request, asked), None
  if scorer is not None:
    protocol = chosen.protocol(scorer.name)
  elif request.scorer != NO_SCORER or request.judge is not None:
    protocol, scorer = _scorer(request, chosen, asked, output)
  rewriters, rewriting = dict(request.rewriters), None
  if request.rewriter is not None:
    rewriting = rewriters[REWRITTEN] = Rewriting(request.rewriter, output)
  asked = _rewritten(rewriters, asked)
  images = request.images_per_prompt or chosen.images_per_prompt
  ready = scorer.ready if scorer is not None else None
  sets: dict[str, int] = {}
  for question in everything:
    sets[question.split] = sets.get(question.split, 0) + 1
  told = [*conditions, *rewriters]
  settings = provenance.settings(request, told, images, source, scorer)
  evaluated = Evaluated(
    chosen, protocol, scorer, asked, sets, told, {}, {}, output, request.seed, rewriting, settings
  )
  return evaluated, Task(request, output, asked, conditions, tuple(rewriters), images, ready)


def _score(evaluated: Evaluated) -> dict[str, Any]:
  """Scores the pictures that have been drawn, writes all files, and tells what came out.

  Raises:
    UserError: as `evaluate`.
  """
  output, scorer, questions = evaluated.output, evaluated.scorer, evaluated.questions
  kept = scoring.ScoreFile(output / 'scores.jsonl')
  scores = {}
  for model, drawn in evaluated.pictures.items() if scorer is not None else ():
    directory = drawing.directory_of(output, model)
    scores[model] = scoring.score_pictures(
      scorer, evaluated.protocol, directory, questions, drawn, kept, model
    )
  settings = evaluated.settings | provenance.of_pictures(output, list(evaluated.pictures))
  evaluated = dataclasses.replace(evaluated, scores=scores, settings=settings)
  result = results.collect(evaluated)
  results.write(evaluated, result)
  gallery = write_gallery(evaluated, result)
  results.tell(evaluated, result)
  print(f'Scores: {output / "evaluation.json"}\nPictures: {gallery}')
  return result


def _scorer(
  request: EvaluationRequest,
  chosen: Benchmark,
  questions: Sequence[Question],
  output: pathlib.Path,
) -> tuple[Protocol, Scorer]:
  """What looks at the pictures, and its rules, once it is sure that it can.

  Raises:
    UserError: if flags do not go together, or it could not look at the pictures of a model.
  """
  name = request.scorer
  if name is None:
    names = list(chosen.protocols)
    name = judged_by(names, chosen.name) if request.judge is not None else names[0]
  if request.judge is not None and name not in PROTOCOLS:
    raise UserError(f'--judge is given, but --scorer={name} asks none: leave one of them out.')
  protocol = chosen.protocol(name)
  if request.judge is not None:
    if request.scorer_model is not None:
      raise UserError('--scorer_model is given, but a --judge looks at the pictures: leave it out.')
    return protocol, open_judge(request.judge, name, questions, output)
  if name == KNOWN_PICTURES:
    check_world(request)
  source = request.data or f'benchmark {chosen.name!r}'
  scorer = open_scorer(name, request.scorer_model, questions, source, request.mesh)
  for model, size in model_sizes(request) if scorer.size is not None else ():
    if size != scorer.size:
      raise UserError(
        f'--model={model} draws pictures of {size[0]} x {size[1]} pixels, but the judge knows '
        f'those of {scorer.size[0]} x {scorer.size[1]} only: `sample` can draw with this model, '
        'nothing can score it.'
      )
  return protocol, scorer


def _conditions(request: EvaluationRequest, questions: Sequence[Question]) -> list[str]:
  """The conditions to draw, in order.

  Raises:
    UserError: if one is asked for that no question has.
  """
  there = {condition for question in questions for condition in question.prompts}
  known = [name for name in CONDITIONS if name in there]
  for name in request.conditions:
    if name not in known:
      raise UserError(
        f'--conditions={",".join(request.conditions)}: these questions have no {name!r} prompts, '
        f'but {", ".join(known)}.'
      )
  return [name for name in known if not request.conditions or name in request.conditions]


def _rewritten(rewriters: Mapping[str, Rewriter], questions: Sequence[Question]) -> list[Question]:
  """The questions with the prompts that rewriters make, by condition."""
  found = list(questions)
  for condition, rewriter in rewriters.items():
    texts = rewriter([question.implicit for question in questions])
    for row, text in enumerate(texts):
      if text:
        prompts = {**found[row].prompts, condition: text}
        found[row] = dataclasses.replace(found[row], prompts=prompts)
  return found
