"""Which questions an evaluation asks: those of files, or of what the first model was trained on."""

from eru_jax.benchmarks.base import Benchmark, Question
from eru_jax.evaluating.request import EvaluationRequest
from eru_jax.training.restore import read_config


def read_questions(request: EvaluationRequest, chosen: Benchmark) -> tuple[list[Question], str]:
  """All questions, and where they come from, for people.

  A benchmark that knows runs asks the first model's own, if that is one of its world and no --data
  says otherwise: what others were trained on is not among them.

  Raises:
    UserError: for a bad model or bad files.
  """
  if request.data is not None or chosen.of_run is None:
    return chosen.read(request.data), request.data or ''
  config, workdir = read_config(request.models[0])
  if workdir is None or config.data.world != chosen.name:
    return chosen.read(None), 'everything that the package knows'
  return chosen.of_run(config.data), f'what --model={request.models[0]} was given to learn'
