"""One evaluation: draw, score, aggregate, compare, write down. All benchmarks go through here.

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
from eru_jax.evaluating import drawing, results, scoring
from eru_jax.evaluating.gallery import write_gallery
from eru_jax.evaluating.models import Task, draw_models
from eru_jax.evaluating.request import EvaluationRequest
from eru_jax.evaluating.scorers import Score, Scorer, open_scorer
from eru_jax.files import check_directory
from eru_jax.training.experiment import Experiment
from eru_jax.training.run import enable_compilation_cache

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
    seed: of the start noise and of resampling.
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
    The contents of evaluation.json.

  Raises:
    UserError: for whatever the user can mend.
  """
  output = pathlib.Path(request.output).expanduser()
  check_directory(output)
  chosen = benchmark(request.benchmark)
  everything = list(questions) or chosen.read(request.data)
  asked = fewer(everything, request.limit)
  conditions, protocol = _conditions(request, asked), None
  if scorer is not None:
    protocol = chosen.protocol(scorer.name)
  elif request.scorer != NO_SCORER:
    name = request.scorer or next(iter(chosen.protocols))
    protocol = chosen.protocol(name)
    source = request.data or f'benchmark {chosen.name!r}'
    scorer = open_scorer(name, request.scorer_model, asked, source, request.mesh)
  asked = _rewritten(request, asked)
  enable_compilation_cache()
  images = request.images_per_prompt or chosen.images_per_prompt
  rewriters = tuple(request.rewriters)
  pictures = draw_models(
    Task(request, output, asked, conditions, rewriters, images, _checker(scorer))
  )
  kept = scoring.ScoreFile(output / 'scores.jsonl')
  scores = {}
  for model, drawn in pictures.items() if scorer is not None else ():
    directory, title = drawing.directory_of(output, model), f'{model}: {scorer.name}'
    scores[model] = scoring.score_pictures(scorer, protocol, directory, asked, drawn, kept, title)
  sets: dict[str, int] = {}
  for question in everything:
    sets[question.split] = sets.get(question.split, 0) + 1
  evaluated = Evaluated(
    chosen, protocol, scorer, asked, sets, [*conditions, *rewriters], pictures, scores, output,
    request.seed,
  )  # fmt: skip
  result = results.collect(evaluated)
  results.write(evaluated, result)
  gallery = write_gallery(evaluated, result)
  results.tell(evaluated, result)
  print(f'Scores: {output / "evaluation.json"}\nPictures: {gallery}')
  return result


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


def _rewritten(request: EvaluationRequest, questions: Sequence[Question]) -> list[Question]:
  """The questions with the prompts that the request's rewriters make."""
  found = list(questions)
  for condition, rewriter in request.rewriters.items():
    texts = rewriter([question.implicit for question in questions])
    for row, text in enumerate(texts):
      if text:
        prompts = {**found[row].prompts, condition: text}
        found[row] = dataclasses.replace(found[row], prompts=prompts)
  return found


def _checker(scorer: Scorer | None):
  """What refuses a model whose pictures the scorer cannot look at."""

  def check(experiment: Experiment, size: tuple[int, int], model: str) -> None:
    if scorer is None or scorer.size is None:
      return
    if experiment.world.pictures is None:
      raise UserError(
        f'--model={model}: no judge knows what its pictures should show, as its data.world is '
        f'{experiment.config.data.world!r}; take --scorer=clip_score with --scorer_model, or '
        '--scorer=none to draw only.'
      )
    if size != scorer.size:
      raise UserError(
        f'--model={model} draws pictures of {size[0]} x {size[1]} pixels, but the judge knows '
        f'those of {scorer.size[0]} x {scorer.size[1]} only: `sample` can draw with this model, '
        'nothing can score it.'
      )

  return check
