"""What the report says about the structure of knowledge: where implicit prompts lie, inside."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from eru_jax.similarity import CKA_ROWS
from eru_jax.training import curves
from eru_jax.training.diagnosis import ANCHORS, MEASURES, Diagnosis
from eru_jax.training.report_scores import SPLITS, STAGES, percent, table, text

# Measure -> heading, and what the dashed line is.
_HEADINGS = {
  'retrieval': ('The nearest anchor is its own', 'chance'),
  'distance': ('Distance to the own anchor', 'the middle of all anchors'),
  'cka': ('Linear CKA with the anchors', 'nothing in common'),
}
_PAIRS_SHOWN = 48  # lines in a plane; more would hide each other


def structure(diagnosis: Diagnosis | None) -> str:
  """The section as HTML; '' without a diagnosis."""
  if diagnosis is None:
    return ''
  picture = diagnosis.picture
  heading = SPLITS.get(picture.split, (picture.split,))[0]
  count, width = diagnosis.prompts[picture.split], len(diagnosis.blocks)
  return (
    f'{_meaning(diagnosis)}'
    f'<h3>{text(heading)}, block by block</h3><p class="meaning">{count} prompts, {width} blocks, '
    f'image stream, at t = {picture.timestep:g}; dashed is what a feature that says nothing '
    f'has.</p><div class="charts">{"".join(_block_figures(diagnosis))}</div>'
    f'{_planes(diagnosis, heading)}{_table(diagnosis)}{_details(diagnosis)}'
  )


def _meaning(diagnosis: Diagnosis) -> str:
  lacking = text(undefined(diagnosis))
  return (
    '<p>All prompts are given to the network on one and the same noised state, so that what '
    'differs inside (the residual stream after each block, averaged over tokens) is what the '
    'prompt does; that of an implicit prompt is compared with that of '
    f'{diagnosis.anchors} anchors under the base. Where knowledge is in order, an implicit prompt '
    'lies near its own anchor, nearer than to any other, and lies to other prompts as its anchor '
    'does to theirs (CKA near 1).</p>'
    '<p class="caveat">This says where prompts lead inside the network, not whether pictures are '
    'right. Distance, and with it the nearest anchor, also counts what all prompts have moved by '
    'together; CKA does not. The lower t is, the less is the common state like one that sampling '
    f'visits.{" " * bool(lacking)}{lacking}</p>'
  )


def undefined(diagnosis: Diagnosis) -> str:
  """Why some measures are shown as a dash, a sentence; '' if all are defined."""
  lacking = {
    split
    for split in diagnosis.prompts
    for values in diagnosis.values[split].values()
    if not all(np.isfinite(x).all() for stream in values.values() for x in stream.values())
  }
  reasons = []
  few = [f'{s} has {n}' for s, n in diagnosis.prompts.items() if s in lacking and n < CKA_ROWS]
  if few:
    reasons.append(f'CKA needs at least {CKA_ROWS} prompts, and {", ".join(few)}')
  if len(lacking) > len(few):
    reasons.append('features that are equal for all prompts, or not finite, have no structure')
  return f'A dash is what is not defined: {"; ".join(reasons)}.' if reasons else ''


def _legend(diagnosis: Diagnosis) -> str:
  items = ''.join(
    f'<li><span style="color:var(--series-{look % curves.SERIES})">'
    f'{curves.SYMBOLS[look % curves.SERIES]}</span> {text(STAGES.get(stage, stage))}</li>'
    for look, stage in enumerate(diagnosis.stages)
  )
  return f'<ul class="legend">{items}</ul>'


def _block_figures(diagnosis: Diagnosis) -> Iterator[str]:
  split, blocks = diagnosis.picture.split, diagnosis.blocks
  groups = [name.rpartition(' ')[0] for name in blocks]
  floors = {
    'retrieval': np.full(len(blocks), 1 / diagnosis.anchors),
    'distance': diagnosis.centre['image'][0],
    'cka': np.zeros(len(blocks)),
  }
  for measure, (heading, floor) in _HEADINGS.items():
    lines, told = [], []
    for stage in diagnosis.stages:
      y = diagnosis.values[split][stage]['image'][measure][0]
      lines.append(curves.Series(stage, np.arange(len(y)), y))
      ends = f'from {y[0]:.2f} to {y[-1]:.2f}' if np.isfinite(y).all() else 'not defined'
      told.append(f'{STAGES.get(stage, stage)} {ends}')
    description = f'{heading}, from the first block to the last: {"; ".join(told)}.'
    chart = curves.block_chart(
      lines, floors[measure], groups, description, percent=measure == 'retrieval'
    )
    yield (
      f'<figure><figcaption>{heading}<small>dashed: {floor}</small></figcaption>{chart}'
      f'{_legend(diagnosis)}</figure>'
    )


def _planes(diagnosis: Diagnosis, heading: str) -> str:
  picture = diagnosis.picture
  rows = (
    np.linspace(0, len(picture.own) - 1, min(len(picture.own), _PAIRS_SHOWN)).round().astype(int)
  )
  own = picture.own[rows]
  used, own = np.unique(own, return_inverse=True)
  anchors = picture.anchors[used]
  cloud = np.concatenate([anchors, *(points[rows] for points in picture.prompts.values())])
  cloud = cloud[np.isfinite(cloud).all(1)]
  low, high = cloud.min(0), cloud.max(0)
  margin = 0.06 * (high - low) + 1e-9
  figures = []
  for look, (stage, points) in enumerate(picture.prompts.items()):
    name = STAGES.get(stage, stage)
    chart = curves.plane_chart(
      points[rows], anchors, own, (low - margin, high + margin), look,
      f'{name}: {len(rows)} implicit prompts in the plane of the anchors, each tied to its own.',
    )  # fmt: skip
    figures.append(f'<figure><figcaption>{text(name)}</figcaption>{chart}</figure>')
  shares = ' and '.join(percent(share) for share in picture.explained)
  return (
    f'<h3>{text(heading)}, as a map</h3><p class="meaning">{len(rows)} of the prompts (filled), '
    'evenly spread, each tied to its anchor under the base (hollow), in the first two principal '
    f'components of all anchors after block {picture.block + 1} at t = {picture.timestep:g}: the '
    f'same axes for every model, with {shares} of the anchors’ variance. The other components are '
    'not seen here.</p>'
    f'<div class="charts">{"".join(figures)}</div>'
  )


def _number(value: float, measure: str) -> str:
  if not np.isfinite(value):
    return '–'
  return percent(value) if measure == 'retrieval' else f'{value:.2f}'


def _table(diagnosis: Diagnosis) -> str:
  head = ''.join(f'<th scope="col">{text(STAGES.get(s, s))}</th>' for s in diagnosis.stages)
  rows = []
  for split, count in diagnosis.prompts.items():
    heading = 'The anchors themselves' if split == ANCHORS else SPLITS.get(split, (split,))[0]
    cells = ''
    for stage in diagnosis.stages:
      found = {m: _number(diagnosis.mean(split, stage, m), m) for m in MEASURES}
      cells += (
        f'<td><b>{found["retrieval"]}</b><small>distance {found["distance"]}, '
        f'CKA\u00a0{found["cka"]}</small></td>'
      )
    rows.append(
      f'<tr><th scope="row">{text(heading)}<small>{count} prompts</small></th>{cells}</tr>'
    )
  caption = (
    'Share of prompts whose nearest anchor is their own, distance and CKA: image stream, '
    f't = {diagnosis.timesteps[0]:g}, mean over the blocks'
  )
  return '<h3>Every split</h3>' + table(
    caption,
    f'<thead><tr><th scope="col">Prompts</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>',
    'accuracy',
  )


def _details(diagnosis: Diagnosis) -> str:
  """Every figure of the split that is shown, folded away."""
  split, stages = diagnosis.picture.split, diagnosis.stages
  tables = []
  for stream in diagnosis.values[split][stages[0]]:
    for measure in MEASURES:
      tables.append(_grid(diagnosis, split, stream, measure))
  return (
    '<details><summary>Every block and timestep, image and text stream</summary>'
    f'<p class="meaning">In each cell {text(", ".join(STAGES.get(s, s) for s in stages))}.</p>'
    f'{"".join(tables)}</details>'
  )


def _grid(diagnosis: Diagnosis, split: str, stream: str, measure: str) -> str:
  head = ''.join(f'<th scope="col">t = {t:g}</th>' for t in diagnosis.timesteps)
  rows = []
  for block, name in enumerate(diagnosis.blocks):
    cells = ''.join(
      f'<td>{_cell(diagnosis.values[split], diagnosis.stages, stream, measure, (step, block))}</td>'
      for step in range(len(diagnosis.timesteps))
    )
    rows.append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
  return table(
    f'{_HEADINGS[measure][0]}, {stream} stream',
    f'<thead><tr><th scope="col">After block</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>',
    'plain',
  )


def _cell(
  values: Any, stages: Sequence[str], stream: str, measure: str, place: tuple[int, int]
) -> str:
  return ', '.join(_number(values[stage][stream][measure][place], measure) for stage in stages)
