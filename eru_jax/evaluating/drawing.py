"""Draws the prompts of a benchmark with each model, a file a picture, going on where it was killed.

  pictures/<model>/drawn.json              what they were drawn with, and of which prompts
  pictures/<model>/<condition>/<id>.png    <id>_<k>.png where a prompt has several

A picture's start noise depends on (seed, benchmark, question, k) only: it is the same for every
model and condition, and whatever else is drawn.

Of several processes, all draw; process 0 alone looks at these files, and writes them.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eru_jax import distributed
from eru_jax.benchmarks.base import Question
from eru_jax.data.digests import file_digest
from eru_jax.errors import UserError
from eru_jax.files import replace_file
from eru_jax.training.checksums import checksums
from eru_jax.training.config import model_path
from eru_jax.training.evaluation import draw, start_noise
from eru_jax.training.experiment import Experiment, Snapshot
from eru_jax.training.pictures import png_bytes
from eru_jax.training.progress import Progress
from eru_jax.training.watch import Stopped, rest, tick

_RECORD = 'drawn.json'


@dataclasses.dataclass(frozen=True)
class Picture:
  """One picture that is wanted.

  Attributes:
    row: of the question.
    condition: which of its prompts.
    k: which picture of the prompt, from 0.
    prompt: its text.
    file: where it goes, below the model's directory.
  """

  row: int
  condition: str
  k: int
  prompt: str
  file: str


def wanted(
  questions: Sequence[Question], conditions: Sequence[str], images_per_prompt: int
) -> list[Picture]:
  """Every picture of the questions, condition by condition, as far as they have such prompts.

  Raises:
    UserError: if two questions have one id.
  """
  seen: set[str] = set()
  for question in questions:
    name = file_name(question.id).casefold()  # some file systems do not tell case
    if name in seen:
      raise UserError(f'Two questions have the id {question.id!r}: give each its own.')
    seen.add(name)
  return [
    Picture(
      row, condition, k, question.prompts[condition],
      f'{file_name(condition)}/{file_name(question.id)}{f"_{k}" * (images_per_prompt > 1)}.png',
    )
    for condition in conditions
    for row, question in enumerate(questions)
    if condition in question.prompts
    for k in range(images_per_prompt)
  ]  # fmt: skip


def file_name(text: str) -> str:
  """A text as part of a path: with a hash where what may not stand there was replaced."""
  plain = re.sub(r'[^A-Za-z0-9._-]', '_', text).lstrip('.')[:80]
  if plain == text:
    return plain
  return f'{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}'


def directory_of(output: pathlib.Path, model: str) -> pathlib.Path:
  """Where a model's pictures go."""
  return output / 'pictures' / file_name(model)


def missing(directory: pathlib.Path, pictures: Sequence[Picture]) -> list[Picture]:
  """The pictures that have not been drawn yet, of these very prompts."""
  drawn = _read(directory).get('prompts', {})
  return [
    picture
    for picture in pictures
    if drawn.get(picture.file) != picture.prompt or not (directory / picture.file).is_file()
  ]


def drawn_with(directory: pathlib.Path) -> dict[str, Any]:
  """What the pictures of a directory were drawn with, as of `settings_of`; {} without a record."""
  return _read(directory).get('settings', {})


def settings_of(
  experiment: Experiment, snapshot: Snapshot, seed: int, benchmark: str
) -> dict[str, Any]:
  """All that a picture depends on beside its prompt, as JSON data, the same in every process."""
  config = experiment.config
  trained = None
  if snapshot.trainable is not None:
    sums = json.dumps(checksums(snapshot.trainable), sort_keys=True)
    trained = hashlib.sha256(sums.encode()).hexdigest()[:16]
  return {
    'benchmark': benchmark,
    'seed': seed,
    'height': snapshot.model.height,
    'width': snapshot.model.width,
    'sampling': dataclasses.asdict(config.sampling),
    'dtype': config.model.dtype,
    'params': config.model.params,
    'base': distributed.agreed(lambda: source_stamp(config.model.source)),
    'trained': trained,
  }


def source_stamp(source: str) -> str:
  """A model directory by the contents of its files; of 'scratch', that.

  Names and sizes would not do: fine-tuned models have those of their base.

  Raises:
    UserError: if a file cannot be read.
  """
  if source == 'scratch':
    return source
  root = model_path(source)
  files = sorted(path for path in root.rglob('*') if path.is_file())
  try:
    named = [(str(path.relative_to(root)), file_digest(path)) for path in files]
  except OSError as error:
    raise UserError(f'{error.filename} cannot be read: {error.strerror or error}.') from error
  return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def draw_missing(
  experiment: Experiment,
  snapshot: Snapshot,
  output: pathlib.Path,
  model: str,
  questions: Sequence[Question],
  pictures: Sequence[Picture],
  settings: Mapping[str, Any],
) -> int:
  """Draws what is not there yet, batch by batch, each on disk before the next.

  Args:
    experiment: has the embeddings of all prompts.
    snapshot: the model, of the size to draw.
    output: of the evaluation.
    model: what the model is called in it.
    questions: of the benchmark.
    pictures: all that are wanted.
    settings: as `settings_of` tells them.

  Returns:
    How many were drawn.

  Raises:
    UserError: if pictures are there that were drawn otherwise, or pictures are not finite.
  """
  directory, total = directory_of(output, model), len(pictures)
  files = set(distributed.agreed(lambda: _begin(directory, pictures, settings)))
  left = [picture for picture in pictures if picture.file in files]
  # Always as many at a time, so that a run that goes on makes what it would have made.
  size = min(experiment.config.evaluation.batch_size, total)
  noise_rows = np.array(
    [zlib.crc32(f'{questions[p.row].id}/{p.k}'.encode()) for p in left], np.uint32
  )
  done, main = total - len(left), distributed.is_main()
  with Progress(total, f'{model}: pictures', done, quiet=not main) as progress:
    for start in range(0, len(left), size):
      part = left[start : start + size]
      rows = np.resize(np.arange(start, start + len(part)), size)
      noise = start_noise(snapshot.model, settings['seed'], settings['benchmark'], noise_rows[rows])
      try:
        drawn = draw(experiment, snapshot, None, [left[row].prompt for row in rows], noise)
      except Stopped as stopped:  # none of these is on disk yet
        raise Stopped(f'after {done} of {total} pictures of {model}') from stopped
      if not np.isfinite(np.asarray(drawn.latents, np.float32)).all():
        raise UserError(
          f'{model}: the pictures are not finite: lower --guidance, or take --dtype=float32; if '
          'that does not help, the weights are damaged.'
        )
      for picture, image in zip(part, drawn.images, strict=False) if main else ():
        replace_file(directory / picture.file, png_bytes(image))
      done += len(part)
      progress.update(done)
      tick(f'{done} of {total} pictures of {model}')
  rest()
  return len(left)


def _begin(
  directory: pathlib.Path, pictures: Sequence[Picture], settings: Mapping[str, Any]
) -> list[str]:
  """Writes down what is going to be drawn, and returns the files that are not there yet.

  Raises:
    UserError: if pictures are there that were drawn otherwise.
  """
  record = _read(directory)
  _check_same(record.get('settings'), dict(settings), directory)
  left = missing(directory, pictures)
  for picture in left:  # of another prompt: gone before the record says that it is of this one
    (directory / picture.file).unlink(missing_ok=True)
  prompts = record.get('prompts', {}) | {picture.file: picture.prompt for picture in pictures}
  record = {'settings': dict(settings), 'prompts': prompts}
  replace_file(directory / _RECORD, json.dumps(record, indent=1, ensure_ascii=False).encode())
  _remove_debris(directory)
  return [picture.file for picture in left]


def _remove_debris(directory: pathlib.Path) -> None:
  """Removes what killed evaluations left half-written; an hour is far longer than writing takes."""
  for path in directory.rglob('*.tmp'):
    with contextlib.suppress(OSError):
      if time.time() - path.stat().st_mtime > 3600:
        path.unlink()


def _read(directory: pathlib.Path) -> dict[str, Any]:
  """The record of a directory of pictures; {} if there is none."""
  try:
    record = json.loads((directory / _RECORD).read_text(encoding='utf-8'))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(
      f'{directory / _RECORD} cannot be read ({error}): remove {directory}, to draw anew.'
    ) from error
  whole = isinstance(record, dict) and isinstance(record.get('prompts'), dict)
  if not whole or not isinstance(record.get('settings'), dict):
    raise UserError(f'{directory / _RECORD} is no record of pictures: remove {directory}.')
  return record


def _check_same(old: Mapping[str, Any] | None, new: Mapping[str, Any], where: pathlib.Path) -> None:
  for key, value in new.items() if old is not None else ():
    if old.get(key) != value:
      raise UserError(
        f'The pictures in {where} were drawn with {key} {old.get(key)!r}, and now it is {value!r}: '
        'choose another --output, or remove them.'
      )
