"""Judges over HTTP as scorers of an evaluation: every verdict is kept, and what it cost is told."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from eru_jax.benchmarks.base import Question
from eru_jax.errors import UserError
from eru_jax.evaluating.scorers import Score, Scorer
from eru_jax.judges import protocols, summary, verdicts
from eru_jax.judges.protocols import PROTOCOLS, Protocol
from eru_jax.judges.service import Service
from eru_jax.training.progress import Progress

# Whoever waits for the first answer of an evaluation is not made to wait for long.
_ATTEMPTS_AT_FIRST = 2


def judged_by(names: Sequence[str], benchmark: str) -> str:
  """Which of a benchmark's scorers a judge is.

  Raises:
    UserError: if none of them is.
  """
  found = next((name for name in names if name in PROTOCOLS), None)
  if found is None:
    raise UserError(
      f'--judge is given, but benchmark {benchmark!r} is scored by {", ".join(names)}: leave it '
      'out.'
    )
  return found


def open_judge(
  service: Service, name: str, questions: Sequence[Question], output: pathlib.Path
) -> Scorer:
  """A judge as a scorer; nothing is asked yet.

  Args:
    service: the judge.
    name: of its protocol.
    questions: all that will be asked.
    output: of the evaluation; verdicts.jsonl there keeps what the judge says.

  Raises:
    UserError: if the file of instructions is none, or a question lacks what the judge must be told.
  """
  protocol = protocols.protocol(name, service.instructions)
  for question in questions:
    protocol.ask(_values(question))
  judging = _Judging(service, protocol, output / 'verdicts.jsonl')
  return Scorer(
    name,
    verdicts.judge_name(service.client, protocol),
    files=judging.score,
    why=judging.why,
    words=judging.words,
    ready=functools.cache(
      lambda: verdicts.check_judge(service.client.impatient(_ATTEMPTS_AT_FIRST), protocol)
    ),
    told=judging.told,
    keep=False,
  )


def _values(question: Question) -> dict[str, str]:
  """What a judge is told: always of the implicit prompt, whatever a picture was drawn of."""
  return {**question.rubric, 'prompt': question.implicit, 'explanation': question.explanation}


class _Judging:
  """Has pictures judged, a model after another, and adds up what that comes to."""

  def __init__(self, service: Service, protocol: Protocol, path: pathlib.Path):
    self._service, self._protocol, self._path = service, protocol, path
    self._came_to: dict[str, summary.Summary] = {}
    self._reasons: dict[pathlib.Path, str] = {}
    self._words: dict[pathlib.Path, str] = {}

  def score(
    self, files: Sequence[pathlib.Path], questions: Sequence[Question], model: str
  ) -> list[Score]:
    items = [
      verdicts.Item(question.id, file, _values(question))
      for file, question in zip(files, questions, strict=True)
    ]
    title = f'{model}: {self._protocol.name}'
    with verdicts.open_journal(self._path) as journal, Progress(len(items), title) as progress:
      found, self._came_to[model] = verdicts.judge_pictures(
        self._service.client,
        self._protocol,
        items,
        journal,
        self._service.price,
        lambda done, _: progress.update(done),
      )
    self._reasons |= {file: verdict.reason for file, verdict in zip(files, found, strict=True)}
    self._words |= {file: verdict.words for file, verdict in zip(files, found, strict=True)}
    return [verdict.marks for verdict in found]

  def why(self, file: pathlib.Path) -> str:
    return self._reasons.get(file, '')

  def words(self, file: pathlib.Path) -> str:
    return self._words.get(file, '')

  def told(self) -> Mapping[str, Any]:
    models = {model: one.to_json() for model, one in self._came_to.items()}
    return {
      **self._service.to_json(),
      'protocol': self._protocol.name,
      'version': verdicts.judge_name(self._service.client, self._protocol),
      'total': summary.total(list(self._came_to.values())).to_json(),
      'models': models,
    }
