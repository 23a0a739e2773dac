"""Opens the models of an evaluation one after another, and has each draw what is not there yet."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eru_jax import distributed
from eru_jax.benchmarks.base import Question
from eru_jax.errors import UserError
from eru_jax.evaluating import drawing
from eru_jax.evaluating.drawing import Picture
from eru_jax.evaluating.request import EvaluationRequest
from eru_jax.files import replace_file
from eru_jax.training.config import MODEL_NAMES, model_path
from eru_jax.training.restore import open_model, read_config, snapshots
from eru_jax.training.sampling import overridden
from eru_jax.training.together import by_main

_RECORD = 'models.json'
# Of the request, what decides what a model draws; its output and scorer do not.
_MATTER = (
  'models', 'benchmark', 'stages', 'seed', 'steps', 'guidance', 'cfg_scale', 'height', 'width',
  'dtype',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
  """What all models are to draw.

  Attributes:
    request: the flags.
    output: of the evaluation.
    questions: of the benchmark.
    conditions: which of their prompts every model draws.
    first_only: conditions that the first model draws besides.
    images_per_prompt: pictures of each.
    ready: called once there is something to draw, before a model is read; raises UserError if
      nothing could score it.
  """

  request: EvaluationRequest
  output: pathlib.Path
  questions: Sequence[Question]
  conditions: Sequence[str]
  first_only: Sequence[str]
  images_per_prompt: int
  ready: Callable[[], None] | None = None

  def wanted(self, first: bool) -> list[Picture]:
    """The pictures of a model."""
    conditions = [*self.conditions, *(self.first_only if first else ())]
    return drawing.wanted(self.questions, conditions, self.images_per_prompt)


def handed_on(request: EvaluationRequest, task: Task | None) -> Task:
  """Process 0's task in every process, as far as it takes to draw.

  So the others read no questions, and it does not matter which of them can.

  Args:
    request: this process's own.
    task: in process 0, the task.
  """

  def told() -> list[Any]:
    questions = [[q.id, q.category, dict(q.prompts)] for q in task.questions]
    return [questions, list(task.conditions), list(task.first_only), task.images_per_prompt]

  request = distributed.of_main(
    dataclasses.replace(request, judge=None, rewriter=None, rewriters={})
  )
  questions, *others = distributed.agreed(told)
  if task is not None:
    return task
  asked = [Question(*values) for values in questions]
  return Task(request, pathlib.Path(request.output), asked, *others)


def model_names(models: Sequence[str]) -> list[str]:
  """Short and different names of what --model lists."""
  names: list[str] = []
  counts: collections.Counter[str] = collections.Counter()
  for model in models:
    name = pathlib.PurePath(model.rstrip('/')).name or model
    counts[name] += 1
    names.append(f'{name} ({counts[name]})' if counts[name] > 1 else name)
  return names


def check_world(request: EvaluationRequest) -> None:
  """Looks at the configs alone, before encoders and weights are read.

  Raises:
    UserError: if a model draws what no pictures are known of.
  """
  for model in request.models:
    world = read_config(model)[0].data.world
    if world != 'emoji':
      raise UserError(
        f'--model={model}: no judge knows what its pictures should show, as its data.world is '
        f'{world!r}: take --benchmark=science_t2i or wise, --scorer=clip_score with '
        '--scorer_model, or --scorer=none to draw only.'
      )


def model_sizes(request: EvaluationRequest) -> list[tuple[str, tuple[int, int]]]:
  """Each --model and the (height, width) that it will draw, from configs and headers alone.

  Raises:
    UserError: for a bad model or flag.
  """
  drawn = [(model, overridden(request, read_config(model)[0])[1]) for model in request.models]
  return [(model, (one.height, one.width)) for model, one in drawn]


def draw_models(task: Task) -> dict[str, list[Picture]]:
  """Draws with every model, or every stage of it.

  Returns:
    What it is called -> its pictures, all of which process 0 has on disk. With one --model that is
    the stage; with several, their names come first.

  Raises:
    UserError: for a bad model, or if a stage is asked for that none of them has reached.
  """
  drawn: dict[str, list[Picture]] = {}
  seen: dict[str, str] = {}
  models = task.request.models
  for model, name in zip(models, model_names(models), strict=True):
    first = not drawn
    labels = distributed.agreed(lambda m=model, f=first: _remembered(task, m, f))
    if labels is not None:
      for label, settings in labels.items():
        seen.setdefault(settings, label)
    else:
      labels = _draw(task, model, name if len(models) > 1 else '', seen, first)
      if distributed.is_main():
        _remember(task, model, labels)
    for label in labels:
      drawn[label] = task.wanted(first=not drawn)
  if not drawn:
    stages = f' of --stages={",".join(task.request.stages)}' if task.request.stages else ''
    raise UserError(
      f'--model={",".join(models)}: this run has not finished a stage{stages} that draws pictures '
      'yet.'
    )
  return drawn


def _draw(task: Task, model: str, name: str, seen: dict[str, str], first: bool) -> list[str]:
  """Opens a model and draws with each of its stages; returns what they are called."""
  request = task.request
  with distributed.main_first():
    config, _ = read_config(model)
  # What headers tell of a mistake is told before encoders and weights are read.
  overrides, described = overridden(request, config)
  size = (described.height, described.width)
  conditions = [*task.conditions, *task.first_only]
  prompts = [q.prompts[c] for q in task.questions for c in conditions if c in q.prompts]
  with by_main('the judge') as mine:
    if mine and task.ready is not None:
      task.ready()
  experiment, base, workdir = open_model(model, prompts, request.mesh, **overrides)
  labels: list[str] = []
  for stage, snapshot in snapshots(experiment, base, workdir):
    if request.stages and stage not in request.stages:
      continue
    label = ' '.join(part for part in (name, stage if workdir or not name else '') if part)
    drawer = dataclasses.replace(snapshot.model, height=size[0], width=size[1])
    snapshot = dataclasses.replace(snapshot, model=drawer)
    settings = drawing.settings_of(experiment, snapshot, request.seed, request.benchmark)
    same = seen.setdefault(_same_model(settings), label)
    if same != label:
      distributed.announce(f'{label} is the same model as {same}: drawn once.')
      continue
    wanted = task.wanted(first and not labels)
    drawing.draw_missing(experiment, snapshot, task.output, label, task.questions, wanted, settings)
    labels.append(label)
  return labels


def _same_model(settings: Mapping[str, Any]) -> str:
  """What two stages share that draw the same pictures."""
  return json.dumps(settings, sort_keys=True)


def _remembered(task: Task, model: str, first: bool) -> dict[str, str] | None:
  """What a model's stages are called and `_same_model` of each; None if it has to draw.

  A model that has drawn everything before and is still the same is not opened again, say for
  another scorer.
  """
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    record = json.loads((task.output / _RECORD).read_text(encoding='utf-8'))[model]
    labels = [str(label) for label in record['labels']]
    if record['stamp'] == _stamp(task.request, model) and not any(
      drawing.missing(
        drawing.directory_of(task.output, label), task.wanted(first and label == labels[0])
      )
      for label in labels
    ):
      places = {label: drawing.directory_of(task.output, label) for label in labels}
      return {label: _same_model(drawing.drawn_with(place)) for label, place in places.items()}
  return None


def _remember(task: Task, model: str, labels: Sequence[str]) -> None:
  path, record = task.output / _RECORD, {}
  with contextlib.suppress(OSError, ValueError):
    record = json.loads(path.read_text(encoding='utf-8'))
  record = record if isinstance(record, dict) else {}
  record[model] = {'stamp': _stamp(task.request, model), 'labels': list(labels)}
  replace_file(path, json.dumps(record, indent=1).encode())


def _stamp(request: EvaluationRequest, model: str) -> str:
  """Changes whenever a file of the model does, or what is drawn with it."""
  config, workdir = read_config(model)
  roots = [] if config.model.source == 'scratch' else [model_path(config.model.source)]
  if workdir is not None:
    roots.append(workdir / 'checkpoints')
  elif model not in MODEL_NAMES:
    roots.append(pathlib.Path(model).expanduser())
  files: list[Any] = [[str(getattr(request, name)) for name in _MATTER], config.adapter]
  for root in roots:
    for path in sorted(root.rglob('*')):
      if path.is_file():
        status = path.stat()
        files.append([str(path.relative_to(root)), status.st_size, status.st_mtime_ns])
  return hashlib.sha256(json.dumps(files).encode()).hexdigest()
