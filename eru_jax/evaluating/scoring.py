"""Scores the pictures of an evaluation, keeping what has been scored, so that it can go on."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from eru_jax.benchmarks.base import Protocol, Question
from eru_jax.errors import UserError
from eru_jax.evaluating.drawing import Picture
from eru_jax.evaluating.scorers import BATCH, Score, Scorer
from eru_jax.training.progress import Progress


class ScoreFile:
  """scores.jsonl of an evaluation: a line a picture, of any scorer, found again by its contents."""

  def __init__(self, path: pathlib.Path):
    self._path, self._known = path, {}
    with contextlib.suppress(FileNotFoundError):
      for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a torn line is scored again
          row = json.loads(line)
          self._known[row['key']] = dict(row['score'])

  def get(self, key: str) -> Score:
    return self._known.get(key)

  def add(self, scores: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Appends (key, score), on disk when this returns.

    Raises:
      UserError: if they cannot be written.
    """
    self._known.update(scores)
    lines = ''.join(json.dumps({'key': key, 'score': score}) + '\n' for key, score in scores)
    try:
      with open(self._path, 'a', encoding='utf-8') as file:
        # After a torn line, on one of its own.
        file.write(lines if file.tell() == 0 else '\n' + lines)
    except OSError as error:
      raise UserError(f'{self._path} cannot be written: {error.strerror or error}.') from error


def score_pictures(
  scorer: Scorer,
  protocol: Protocol,
  directory: pathlib.Path,
  questions: Sequence[Question],
  pictures: Sequence[Picture],
  kept: ScoreFile,
  model: str,
) -> list[Score]:
  """A score or None for each picture, in order.

  Args:
    scorer: looks at them.
    protocol: says which numbers a score must have; one without them is not kept.
    directory: of the model's pictures.
    questions: of the benchmark.
    pictures: which have been drawn.
    kept: scores of before.
    model: what the model is called.

  Raises:
    UserError: if a file is no picture, or scores cannot be written.
  """
  if scorer.files is not None:
    files = [directory / picture.file for picture in pictures]
    asked = [questions[picture.row] for picture in pictures]
    return [None if one is None else dict(one) for one in scorer.files(files, asked, model)]
  scores: list[Score] = [None] * len(pictures)
  waiting: dict[tuple[int, ...], list[tuple[int, str, np.ndarray]]] = {}
  with Progress(len(pictures), f'{model}: {scorer.name}') as progress:

    def flush(batch: list[tuple[int, str, np.ndarray]]) -> None:
      asked = [questions[pictures[index].row] for index, _, _ in batch]
      found = scorer.score(np.stack([image for _, _, image in batch]), asked)
      for (index, _, _), score in zip(batch, found, strict=True):
        scores[index] = None if score is None else dict(score)
      whole = np.isfinite(protocol.values(found))
      if scorer.keep:
        kept.add(
          [(key, scores[index]) for (index, key, _), good in zip(batch, whole, strict=True) if good]
        )

    done = 0
    for index, picture in enumerate(pictures):
      path = directory / picture.file
      key, image = _opened(path, scorer, questions[picture.row])
      scores[index] = kept.get(key)
      if scores[index] is None:
        # A call takes pictures of one size.
        batch = waiting.setdefault(image.shape, [])
        batch.append((index, key, image))
        if len(batch) == BATCH:
          flush(waiting.pop(image.shape))
          done += BATCH
      else:
        done += 1
      progress.update(done)
    for batch in waiting.values():
      flush(batch)
    progress.update(len(pictures))
  return scores


def _opened(path: pathlib.Path, scorer: Scorer, question: Question) -> tuple[str, np.ndarray]:
  """What a score is kept under, and the picture (H, W, 3) uint8."""
  from PIL import Image

  try:
    data = path.read_bytes()
    with Image.open(path) as opened:
      image = np.asarray(opened.convert('RGB'))
  except (OSError, ValueError, SyntaxError) as error:
    raise UserError(
      f'{path} is no readable picture ({error}): remove it and run the same command again.'
    ) from error
  asked = [question.implicit, question.explanation, dict(question.rubric)]
  depends = [scorer.identity, asked, hashlib.sha256(data).hexdigest()]
  return hashlib.sha256(json.dumps(depends).encode()).hexdigest(), image
