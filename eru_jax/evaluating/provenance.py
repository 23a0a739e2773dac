"""What an evaluation was made with: enough to make it again."""

import datetime
import pathlib
from collections.abc import Sequence
from typing import Any

import eru_jax
from eru_jax.evaluating import drawing
from eru_jax.evaluating.request import EvaluationRequest
from eru_jax.evaluating.scorers import Scorer


def settings(
  request: EvaluationRequest,
  conditions: Sequence[str],
  images_per_prompt: int,
  questions: str,
  scorer: Scorer | None,
) -> dict[str, Any]:
  """Everything that was chosen, by flags or else by models and the benchmark, as JSON data.

  Args:
    request: the flags.
    conditions: that were drawn, in order.
    images_per_prompt: pictures of each.
    questions: where they come from.
    scorer: looks at the pictures.

  Returns:
    Flags by their names, paths in full; 'scorer' with its 'identity', of CLIP by contents;
    'eru_jax': the version.
  """
  judge = request.judge.client.config.model if request.judge is not None else None
  return {
    'models': [_path(model) for model in request.models],
    'stages': list(request.stages),
    'benchmark': request.benchmark,
    'data': None if request.data is None else _path(request.data),
    'questions': questions,
    'limit': request.limit,
    'conditions': list(conditions),
    'images_per_prompt': images_per_prompt,
    'seed': request.seed,
    'scorer': {
      'name': scorer.name if scorer else None,
      'model': judge or (None if request.scorer_model is None else _path(request.scorer_model)),
      'identity': scorer.identity if scorer else None,
    },
    'eru_jax': eru_jax.__version__,
  }


def of_pictures(output: pathlib.Path, stages: Sequence[str]) -> dict[str, Any]:
  """What is known once all pictures are there.

  Args:
    output: of the evaluation.
    stages: what was drawn is called.

  Returns:
    'drawn': {stage: what its pictures were drawn with, such as 'height', 'sampling' and, by
    contents, the weights}; 'date': now, UTC.
  """
  return {
    'drawn': {stage: drawing.drawn_with(drawing.directory_of(output, stage)) for stage in stages},
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def _path(text: str) -> str:
  """A path in full; a name that is none, such as that of a model of the package, as it is."""
  path = pathlib.Path(text).expanduser()
  return str(path.resolve()) if path.exists() else text
