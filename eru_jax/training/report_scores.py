"""What the report says about scores: names of stages and splits, bars, a chart, tables.

`stages` is everywhere summary.json's {stage: {split: {'accuracy', 'n', 'clusters', 'ci95'}}};
without a judge there is 'anchor_distance' in place of 'accuracy'. Older runs have no 'clusters'.
"""

import html
from collections.abc import Mapping
from typing import Any

import numpy as np

from eru_jax.training import curves
from eru_jax.training.metrics import wilson_interval

STAGES = {
  'base': 'Base',
  'adapter': 'Adapter begun with',
  'dk_dm': 'DK-DM',
  'no_rl': 'NO-RL',
  'autoencoder': 'Autoencoder',
  'flow_matching': 'Flow matching',
  'reward': 'Reward model',
}


def after(stage: str) -> str:
  """Heading of the pictures that a model draws after a stage."""
  name = STAGES.get(stage, stage)
  return (
    name if stage in ('base', 'adapter') else f'After {name if name.isupper() else name.lower()}'
  )


# Splits in the table's order: heading, and what right answers there say.
SPLITS = {
  'explicit': (
    'Explicit prompts',
    'The anchors themselves: what the model draws when it is told outright.',
  ),
  'explicit mistakes': (
    'Explicit prompts that the base gets wrong',
    "The anchors' own errors, every one the judge found up to the length of a gallery: no "
    'distribution matched to these anchors can mend them. Correcting them is left to NO-RL.',
  ),
  'wording': (
    'Known facts, unseen wordings',
    'Facts that refactoring trains on, asked in words that it never uses. A model that reorganised '
    'its knowledge gets them right; one that memorised phrases does not.',
  ),
  'train': (
    'Training prompts',
    'The prompts that refactoring trains on, word for word: what it can fit, which is not yet '
    'what it has understood.',
  ),
  'fact': (
    'New facts',
    'Facts that refactoring never sees, in any words: does the new order carry over to them?',
  ),
  'unrelated': (
    'Unrelated prompts',
    'Nothing here should change: the pictures of a row should look alike, before and after.',
  ),
}

# What goes with intervals.
_CLUSTERS = ', in which prompts about one thing (a cluster) count once'


def text(value: Any) -> str:
  """Escaped for HTML, attributes included."""
  return html.escape(str(value))


def percent(share: float) -> str:
  """0.5 -> '50.0 %', with a narrow space that does not break."""
  return f'{100 * share:.1f}\u202f%'


def rates(stages: Mapping[str, Any], split: str) -> str:
  """The split's accuracy at each stage, as a row of bars above its pictures."""
  items = []
  for stage in stages:
    cell = _measured(stages, stage, split)
    if cell is not None:
      items.append(
        f'<li><span>{text(STAGES.get(stage, stage))}</span> <b>{percent(cell[0])}</b>'
        f'<i class="bar"><i style="width:{100 * cell[0]:.1f}%"></i></i></li>'
      )
      n = cell[1]
  if not items:
    return ''
  return f'<ul class="rates">{"".join(items)}<li>of {n} pictures are right</li></ul>'


def accuracy_figure(stages: Mapping[str, Any]) -> str:
  """A chart of every split's accuracy across the stages; '' if there are fewer than two."""
  series, legend, told = [], [], []
  for split in _split_order(stages):
    name = SPLITS.get(split, (split,))[0]
    cells = [(i, _measured(stages, stage, split)) for i, stage in enumerate(stages)]
    cells = [(i, cell) for i, cell in cells if cell is not None]
    if not cells:
      continue
    look = len(series) % curves.SERIES
    symbol = f'<span style="color:var(--series-{look})">{curves.SYMBOLS[look]}</span>'
    legend.append(f'<li>{symbol} {text(name)}</li>')
    told.append(f'{name}: {", ".join(percent(cell[0]) for _, cell in cells)}')
    values = [(i, cell[0], *cell[2]) for i, cell in cells]
    series.append(curves.Series(name, *(np.array(column) for column in zip(*values, strict=True))))
  if not series or len(stages) < 2:
    return ''
  names = [STAGES.get(stage, stage) for stage in stages]
  chart = curves.stage_chart(series, names, f'Accuracy after each stage. {"; ".join(told)}.')
  return (
    '<figure class="wide"><figcaption>Accuracy after each stage, with 95\u202f% intervals'
    f'</figcaption><div>{chart}<ul class="legend">{"".join(legend)}</ul></div></figure>'
  )


def _split_order(stages: Mapping[str, Any]) -> list[str]:
  found = {name: None for scores in stages.values() for name, v in scores.items() if _is_score(v)}
  return [split for split in SPLITS if split in found] + [s for s in found if s not in SPLITS]


def _is_score(value: Any) -> bool:
  return isinstance(value, Mapping) and value.get('accuracy') is not None


def _measured(
  stages: Mapping[str, Any], stage: str, split: str
) -> tuple[float, int, tuple[float, float]] | None:
  """Accuracy, number of prompts and 95 % interval of a split at a stage, or None."""
  score = stages[stage].get(split)
  if not _is_score(score):
    return None
  accuracy, n = float(score['accuracy']), int(score.get('n', 0))
  low, high = score.get('ci95') or wilson_interval(round(accuracy * n), n)
  return accuracy, n, (float(low), float(high))


def accuracy_table(stages: Mapping[str, Any]) -> str:
  """Splits by stages with intervals and numbers of prompts, and the drift; or ''."""
  distances = any(_has_distance(value) for scores in stages.values() for value in scores.values())
  if distances or not any(stages.values()):
    return ''
  rows = []
  for split in _split_order(stages):
    heading, meaning = SPLITS.get(split, (split, ''))
    cells = ''
    for stage in stages:
      cell = _measured(stages, stage, split)
      if cell is None:
        cells += '<td>–</td>'
        continue
      share, _, (low, high) = cell
      interval = f'{100 * low:.1f} to {percent(high)}, {_count(stages[stage][split])}'
      cells += f'<td><b>{percent(share)}</b><small>{interval}</small></td>'
    rows.append(_row(text(heading), text(meaning), cells))
  caption = f'Share of right pictures after each stage, with 95\u202f% intervals{_CLUSTERS}'
  return _by_stage(caption, rows + _drift(stages), stages)


def _count(score: Mapping[str, Any]) -> str:
  """How many prompts a score is of, and how many things they are about."""
  n = score.get('n', 0)
  clusters = score.get('clusters', n)
  return f'n\u00a0=\u00a0{n}' + (
    f' in {clusters} cluster{"s" * (clusters != 1)}' if clusters < n else ''
  )


def distance_table(stages: Mapping[str, Any]) -> str:
  """How far pictures are from their anchors', splits by stages, and the drift; or ''."""
  names = [name for scores in stages.values() for name, v in scores.items() if _has_distance(v)]
  rows = []
  for split in dict.fromkeys((*(name for name in SPLITS if name in names), *names)):
    heading, meaning = SPLITS.get(split, (split, ''))
    cells = ''
    for scores in stages.values():
      value = scores.get(split)
      if not _has_distance(value):
        cells += '<td>–</td>'
        continue
      interval = '{:.3f} to {:.3f}, '.format(*value['ci95']) if value.get('ci95') else ''
      interval += _count(value)
      cells += f'<td><b>{value["anchor_distance"]:.3f}</b><small>{interval}</small></td>'
    rows.append(_row(text(heading), text(meaning), cells))
  caption = (
    'Distance from what the base draws of the explicit anchor, from the same noise: root mean '
    'square pixel difference with 95\u202f% intervals' + _CLUSTERS
  )
  return _by_stage(caption, rows + _drift(stages), stages) if rows else ''


def _has_distance(value: Any) -> bool:
  return isinstance(value, Mapping) and value.get('anchor_distance') is not None


def _drift(stages: Mapping[str, Any]) -> list[str]:
  """The row of the drift, if it was measured."""
  drifts = [scores.get('unrelated_drift') for scores in stages.values()]
  if all(drift is None for drift in drifts):
    return []
  cells = ''.join('<td>–</td>' if d is None else f'<td><b>{d:.3f}</b></td>' for d in drifts)
  meaning = (
    'How far the pictures of unrelated prompts moved from the base’s: root mean square pixel '
    'difference; 0 is none, 1 is black to white.'
  )
  return [_row('Drift', meaning, cells)]


def _by_stage(caption: str, rows: list[str], stages: Mapping[str, Any]) -> str:
  """A table with a column for each stage."""
  head = ''.join(f'<th scope="col">{text(STAGES.get(stage, stage))}</th>' for stage in stages)
  head = f'<thead><tr><th scope="col">Split</th>{head}</tr></thead>'
  return table(caption, f'{head}<tbody>{"".join(rows)}</tbody>', 'accuracy')


def _row(heading: str, meaning: str, cells: str) -> str:
  return f'<tr><th scope="row">{heading}<small>{meaning}</small></th>{cells}</tr>'


def table(caption: str, rows: str, kind: str) -> str:
  """A table that scrolls by itself where the screen is too narrow for it."""
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">'
    f'<table class="{kind}"><caption>{text(caption)}</caption>{rows}</table></div>'
  )
