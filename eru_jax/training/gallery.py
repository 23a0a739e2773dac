"""Before and after: the same prompts, from the same noise, at every stage of a run."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from eru_jax.data.pairs import EXPLICIT_SPLITS
from eru_jax.training.evaluation import Evaluation, Generated, anchored, gallery, selected
from eru_jax.training.experiment import Experiment
from eru_jax.training.pictures import enlargement, image_grid, save_png
from eru_jax.training.report import GalleryRow
from eru_jax.training.report_scores import after

# Unseen wordings first: they are what the method is for. Splits of a user's own come last.
_ORDER = ('wording', 'train', 'fact', 'explicit', 'unrelated')


def gallery_rows(experiment: Experiment, evaluations: Mapping[str, Evaluation]) -> list[GalleryRow]:
  """The report's rows: target, the base on the explicit prompt, then every stage's picture."""
  rows = []
  splits = experiment.world.splits
  for split in dict.fromkeys((*_ORDER, *splits)) if evaluations else ():
    if split in splits:
      rows += [_row(experiment, evaluations, split, row) for row in gallery(experiment, split)]
  rows += _mistakes(experiment, evaluations)
  return rows


def _row(
  experiment: Experiment,
  evaluations: Mapping[str, Evaluation],
  split: str,
  row: int,
) -> GalleryRow:
  """Row `row` of what was evaluated of a split."""
  pairs, answers = selected(experiment, split)

  def picture(title: str, generated: Generated, at: int) -> tuple[str, np.ndarray, bool | None]:
    right = None if answers is None else bool(generated.shown[at] == answers[row])
    return title, generated.images[at], right

  pictures = []
  if row in (drawn := anchored(experiment, split)) and 'base' in evaluations:
    anchors = evaluations['base'].generated[f'{split} anchors']
    pictures.append(picture('Base, explicit prompt', anchors, int(np.searchsorted(drawn, row))))
  for label, evaluation in evaluations.items():
    pictures.append(picture(after(label), evaluation.generated[split], row))
  pair = pairs[row]
  anchor = pair.explicit if split not in EXPLICIT_SPLITS else ''
  target = None if answers is None else experiment.world.pictures.images[answers[row]]
  return GalleryRow(pair.implicit, anchor, split, target, pictures)


def _mistakes(experiment: Experiment, evaluations: Mapping[str, Evaluation]) -> list[GalleryRow]:
  """Explicit prompts that the base gets wrong: these, unlike all others, are picked by result."""
  if 'base' not in evaluations or 'explicit' not in evaluations['base'].generated:
    return []
  _, answers = selected(experiment, 'explicit')
  if answers is None:
    return []
  wrong = np.flatnonzero(evaluations['base'].generated['explicit'].shown != answers)
  wrong = wrong[: experiment.config.evaluation.gallery]
  rows = [_row(experiment, evaluations, 'explicit', int(row)) for row in wrong]
  return [dataclasses.replace(row, split='explicit mistakes') for row in rows]


def save_grids(directory: pathlib.Path, rows: Sequence[GalleryRow]) -> None:
  """One PNG a split: prompts down, target and stages across."""
  directory.mkdir(parents=True, exist_ok=True)
  for split in dict.fromkeys(row.split for row in rows):
    images, labels = [], []
    for row in (r for r in rows if r.split == split):
      target = [] if row.target is None else [('', row.target, None)]
      shown = [*target, *row.pictures]
      columns = len(shown)
      images += [image for _, image, _ in shown]
      labels += [row.prompt, *(title for title, _, _ in shown[1:])]
    # A user's split may have any name, and a file may not.
    name = re.sub(r'[^\w-]', '_', split)[:100]
    grid = image_grid(np.stack(images), columns, labels, enlargement(images[0]))
    save_png(directory / f'{name}.png', grid)
