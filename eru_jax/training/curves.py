"""Line charts as inline SVG whose colours are the CSS variables of the page around them.

The page defines `--ink`, `--faint` and `--series-0` ... `--series-5`, so that one drawing serves
light and dark mode.
"""

import dataclasses
import html
import io
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

SERIES = 6  # distinct looks; further series start again
SYMBOLS = '●■▲◆▼★'  # the markers below, for legends in text
_MARKERS = 'os^Dv*'
# Colours that matplotlib is told to use, and that are then replaced by variables.
_INK, _FAINT = '#00fe01', '#00fe02'
_COLOURS = tuple(f'#00ff0{index}' for index in range(SERIES))
_VARIABLES = {_INK: '--ink', _FAINT: '--faint'} | {
  colour: f'--series-{index}' for index, colour in enumerate(_COLOURS)
}
_MAX_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Series:
  """One line: x and y (N,), and the ends of its interval at each point, low and high (N,)."""

  name: str
  x: Sequence[float]
  y: Sequence[float]
  low: Sequence[float] | None = None
  high: Sequence[float] | None = None


def step_chart(series: Series, description: str, *, percent: bool = False) -> str:
  """One measurement by step: what was measured, faintly, and its running mean.

  Args:
    series: any number of points; values that are not finite leave gaps.
    description: what the chart shows, for those who cannot see it.
    percent: label y as a percentage, from 0 to 100.

  Returns:
    An `<svg>` element.
  """
  x, y = _block_means(np.asarray(series.x, float)), _block_means(np.asarray(series.y, float))
  figure, axes = _figure()
  axes.plot(x, y, color=_COLOURS[0], alpha=0.35, linewidth=1)
  axes.plot(x, _running_mean(y, max(1, len(y) // 12)), color=_COLOURS[0], linewidth=2)
  if len(y) == 1:
    axes.plot(x, y, color=_COLOURS[0], marker=_MARKERS[0])
  finite = y[np.isfinite(y)]
  if percent:
    _percent_axis(axes)
  elif finite.size and finite.min() > 0 and finite.max() > 30 * finite.min():
    axes.set_yscale('log')
  axes.set_xlabel('step')
  return _svg(figure, description)


def stage_chart(series: Sequence[Series], stages: Sequence[str], description: str) -> str:
  """Shares between 0 and 1 across stages, with their intervals.

  Args:
    series: at most one point a stage, x being the stage's index.
    stages: names under the x axis.
    description: what the chart shows, for those who cannot see it.

  Returns:
    An `<svg>` element. The i-th series has the colour `--series-{i % SERIES}` and the marker
    SYMBOLS[i % SERIES].
  """
  figure, axes = _figure()
  for index, one in enumerate(series):
    # Side by side, or the intervals of one stage would hide each other.
    x = np.asarray(one.x, float) + 0.05 * (index - (len(series) - 1) / 2)
    y = np.asarray(one.y, float)
    colour = _COLOURS[index % SERIES]
    if one.low is not None:
      ends = np.clip([y - one.low, one.high - y], 0, None)
      axes.errorbar(x, y, yerr=ends, color=colour, linewidth=0, elinewidth=1.2, alpha=0.6)
    axes.plot(x, y, color=colour, marker=_MARKERS[index % SERIES], markersize=5, linewidth=1.8)
  _percent_axis(axes)
  # A dollar sign would start a formula.
  axes.set_xticks(range(len(stages)), [name.replace('$', r'\$') for name in stages])
  axes.set_xlim(-0.4, len(stages) - 0.6)
  return _svg(figure, description)


def block_chart(
  series: Sequence[Series],
  floor: Sequence[float],
  groups: Sequence[str],
  description: str,
  *,
  percent: bool = False,
) -> str:
  """A measure after every block of a network, one line a model.

  Args:
    series: lines of one point a block, x being the block's index.
    floor: at every block, what a feature that says nothing has; dashed.
    groups: what kind of block each one is; where the kind changes, a line is drawn.
    description: what the chart shows, for those who cannot see it.
    percent: label y as a percentage.

  Returns:
    An `<svg>` element; colours and markers are those of `stage_chart`.
  """
  figure, axes = _figure()
  for index in range(1, len(groups)):
    if groups[index] != groups[index - 1]:
      axes.axvline(index - 0.5, color=_FAINT, linewidth=0.8)
  axes.plot(range(len(floor)), floor, color=_INK, linewidth=1.2, linestyle='--', alpha=0.7)
  for index, one in enumerate(series):
    colour, marker = _COLOURS[index % SERIES], _MARKERS[index % SERIES]
    # Markers of a deep network would touch.
    marker = marker if len(groups) <= 24 else ''
    axes.plot(one.x, one.y, color=colour, marker=marker, markersize=5, linewidth=1.8)
  # From zero, or small differences would look large.
  axes.set_ylim(min(0, axes.get_ylim()[0]), 1.05 * axes.get_ylim()[1])
  if percent:
    axes.yaxis.set_major_formatter(lambda share, _: f'{100 * share:.0f} %')
  step = -(-len(groups) // 12)
  axes.set_xticks(range(0, len(groups), step), [str(i + 1) for i in range(0, len(groups), step)])
  axes.set_xlabel('block')
  return _svg(figure, description)


def plane_chart(
  points: np.ndarray,
  anchors: np.ndarray,
  own: np.ndarray,
  limits: tuple[np.ndarray, np.ndarray],
  look: int,
  description: str,
) -> str:
  """Points in a plane, each tied to its anchor.

  Args:
    points: (N, 2).
    anchors: (A, 2), all of them.
    own: (N,) row of each point's anchor.
    limits: lower and upper corner (2,) of what is shown, so that charts can share it.
    look: which of the colours `--series-{look}`.
    description: what the chart shows, for those who cannot see it.

  Returns:
    An `<svg>` element.
  """
  figure, axes = _figure((4.4, 4.0))
  axes.spines['bottom'].set_visible(False)
  axes.grid(False)
  axes.set_xticks([])
  axes.set_yticks([])
  ends = np.stack([points, anchors[own], np.full_like(points, np.nan)], axis=1).reshape(-1, 2)
  colour = _COLOURS[look % SERIES]
  axes.plot(*ends.T, color=colour, linewidth=0.8, alpha=0.45)
  axes.plot(*anchors.T, 'o', markersize=4, markerfacecolor='none', markeredgecolor=_INK, alpha=0.6)
  axes.plot(*points.T, 'o', markersize=3.6, color=colour, markeredgewidth=0)
  axes.set(xlim=(limits[0][0], limits[1][0]), ylim=(limits[0][1], limits[1][1]))
  return _svg(figure, description)


def _block_means(values: np.ndarray) -> np.ndarray:
  """At most _MAX_POINTS values, each the mean of a block; the last block may be shorter."""
  size = -(-len(values) // _MAX_POINTS)
  if size <= 1:
    return values
  starts = np.arange(0, len(values), size)
  return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
  """The mean of the finite values within window / 2 on either side, NaN where there are none."""
  finite = np.isfinite(values)
  totals = np.cumsum(np.insert(np.where(finite, values, 0), 0, 0))
  counts = np.cumsum(np.insert(finite, 0, 0))
  places = np.arange(len(values))
  starts = np.maximum(places - window // 2, 0)
  ends = np.minimum(places + window // 2 + 1, len(values))
  number = counts[ends] - counts[starts]
  mean = (totals[ends] - totals[starts]) / np.maximum(number, 1)
  return np.where(number > 0, mean, np.nan)


def _figure(size: tuple[float, float] = (4.4, 2.7)) -> tuple[Any, Any]:
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, layout='constrained')
  axes = figure.subplots()
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.spines['bottom'].set_color(_FAINT)
  axes.tick_params(color=_FAINT, labelcolor=_INK, labelsize=10, left=False)
  axes.xaxis.label.set(color=_INK, size=10)
  axes.grid(axis='y', color=_FAINT, linewidth=0.7)
  axes.set_axisbelow(True)
  return figure, axes


def _percent_axis(axes: Any) -> None:
  axes.set_ylim(-0.02, 1.04)
  axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ['0 %', '25 %', '50 %', '75 %', '100 %'])


def _svg(figure: Any, description: str) -> str:
  """The figure as an element that may stand in an HTML page, several times over."""
  import matplotlib

  buffer = io.StringIO()
  nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  # Text stays text: smaller, searchable, and in the page's font.
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'eru_jax'}):
    figure.savefig(buffer, format='svg', transparent=True, metadata=nothing)
  svg = buffer.getvalue()
  svg = svg[svg.index('<svg') :]
  size = re.search(r'viewBox="[^"]*"', svg).group()
  body = re.sub(r'<style.*?</style>', '', svg[svg.index('>') + 1 :], flags=re.DOTALL)
  body = re.sub(r'font-family: [^;]*sans-serif', 'font-family: inherit', body)
  for colour, variable in _VARIABLES.items():
    body = body.replace(colour, f'var({variable})')
  # Ids must be unique in the page: those in use get a prefix, the others go.
  used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
  prefix = f'c{zlib.crc32((description + body).encode()):08x}-'
  body = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else '', body)
  body = re.sub(r'(href="|url\()#', rf'\1#{prefix}', body)
  return f'<svg {size} role="img" aria-label="{html.escape(description)}">{body.strip()}'
