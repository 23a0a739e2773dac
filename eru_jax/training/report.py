"""`report.html`: what a run did, pictures first; one file, no network, no scripts."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from eru_jax.files import replace_file
from eru_jax.training import curves
from eru_jax.training.diagnosis import Diagnosis
from eru_jax.training.report_gallery import GalleryRow as GalleryRow
from eru_jax.training.report_gallery import gallery
from eru_jax.training.report_scores import (
  STAGES,
  accuracy_figure,
  accuracy_table,
  distance_table,
  table,
  text,
)
from eru_jax.training.report_structure import structure
from eru_jax.training.report_style import CSS

# Reasons of unscored pictures that are told, the most common ones.
_REASONS = 8


@dataclasses.dataclass(frozen=True)
class ReportData:
  """All that a report shows.

  Attributes:
    title: the heading.
    summary: what summary.json holds: {'stages': {stage: {split:
      {'accuracy' or 'anchor_distance', 'n', 'ci95'}, 'unrelated_drift'}}, 'seconds': {phase: s},
      'peak_memory_gb': GB, 'versions': {name: text}, 'judge': see `rewards.judge.judge_spending`};
      every part may be missing, and stages and splits may have any name.
    gallery: rows, in the order to show them within their splits.
    metrics: rows of `read_metrics`.
    config: the configuration as text.
    notes: remarks for the end of the page, such as warnings and the pictures' licence.
    diagnosis: how the network's features are organised at every stage, or None.
  """

  title: str
  summary: Mapping[str, Any]
  gallery: Sequence[GalleryRow] = ()
  metrics: Sequence[Mapping[str, Any]] = ()
  config: str = ''
  notes: Sequence[str] = ()
  diagnosis: Diagnosis | None = None


def write_report(workdir: str | os.PathLike, report: ReportData) -> pathlib.Path:
  """Writes workdir/report.html, atomically, and returns its path.

  Raises:
    UserError: if it cannot be written, or a picture is not (H, W, 3) uint8.
  """
  path = pathlib.Path(workdir) / 'report.html'
  replace_file(path, _page(report).encode('utf-8', errors='replace'))
  return path


def write_diagnosis(path: str | os.PathLike, title: str, diagnosis: Diagnosis) -> pathlib.Path:
  """Writes the section on knowledge structure as a page of its own, and returns its path.

  Raises:
    UserError: if it cannot be written.
  """
  path = pathlib.Path(path)
  section = ('structure', 'Knowledge structure', structure(diagnosis))
  replace_file(path, _html(title, '', [section]).encode('utf-8', errors='replace'))
  return path


def _page(report: ReportData) -> str:
  stages = report.summary.get('stages') or {}
  sections = [
    ('pictures', 'Pictures', gallery(report.gallery, stages)),
    ('curves', 'Curves', _curves(report)),
    ('accuracy', 'Accuracy', accuracy_table(stages)),
    ('distance', 'Distance', distance_table(stages)),
    ('structure', 'Knowledge structure', structure(report.diagnosis)),
    ('run', 'Run', _run(report)),
    ('notes', 'Notes', _notes(report.notes)),
  ]
  sections = [section for section in sections if section[2]]
  links = ''.join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
  return _html(report.title, f'{_explanation(report)}<nav>{links}</nav>', sections)


def _html(title: str, introduction: str, sections: Sequence[tuple[str, str, str]]) -> str:
  """A page of sections (id, heading, HTML)."""
  body = ''.join(
    f'<section id="{name}"><h2>{heading}</h2>{content}</section>'
    for name, heading, content in sections
  )
  # The policy is a promise kept by the browser: nothing is loaded from anywhere.
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{text(title)}</title>
<style>{CSS}</style>
</head>
<body>
<header><h1>{text(title)}</h1>{introduction}</header>
<main>{body}</main>
<footer>Written by eru_jax. This file is complete in itself: it can be sent and archived.</footer>
</body>
</html>
"""


def _explanation(report: ReportData) -> str:
  stages = set(report.summary.get('stages') or {}) | {row.get('stage') for row in report.metrics}
  names = [STAGES[stage] for stage in ('dk_dm', 'no_rl') if stage in stages]
  if not names:
    return '<p>This run trained a text-to-image model; below are its pictures and measurements.</p>'
  example = ''
  for row in report.gallery:
    if row.anchor and row.anchor != row.prompt:
      example = f' (here “{text(row.prompt)}” for “{text(row.anchor)}”)'
      break
  does = {
    'DK-DM': '<b>DK-DM</b> trains the model to do under an <em>implicit</em> prompt what the '
    'frozen base does under its <em>explicit</em> anchor.',
    'NO-RL': '<b>NO-RL</b> lets the model draw, scores its pictures with a reward, and steers it '
    'away from the bad ones: it learns from negatives only.',
  }
  named = ' and '.join(names)
  return (
    '<p>A text-to-image model often knows a thing and still fails to draw it when a prompt only '
    f'implies it{example}. This run reorganised that knowledge. '
    f'{" ".join(does[name] for name in names)}</p>'
    f'<p class="caveat">EruDiff’s code is not public; {named} here '
    f'{"are reconstructions" if len(names) > 1 else "is a reconstruction"}; see docs/method.md.</p>'
  )


def _curves(report: ReportData) -> str:
  charts = [accuracy_figure(report.summary.get('stages') or {})]
  for stage in dict.fromkeys(row['stage'] for row in report.metrics):
    charts.append(_step_figure(report.metrics, stage, 'loss', 'loss'))
    charts.append(_step_figure(report.metrics, stage, 'reward', 'reward of its pictures'))
    charts.append(
      _step_figure(report.metrics, stage, 'negative_fraction', 'share of negatives', True)
    )
  charts = [chart for chart in charts if chart]
  return f'<div class="charts">{"".join(charts)}</div>' if charts else ''


def _step_figure(
  metrics: Sequence[Mapping[str, Any]],
  stage: str,
  name: str,
  what: str,
  percent: bool = False,
) -> str:
  """A measurement of a stage by step; '' if the stage does not make it."""
  points = [(r['step'], r[name]) for r in metrics if r['stage'] == stage and name in r]
  if not points:
    return ''
  x, y = zip(*points, strict=True)
  title = f'{STAGES.get(stage, stage)}: {what}'
  description = f'{title}, from {y[0]:.3g} at step {x[0]} to {y[-1]:.3g} at step {x[-1]}.'
  chart = curves.step_chart(curves.Series(name, x, y), description, percent=percent)
  return f'<figure><figcaption>{text(title)}</figcaption>{chart}</figure>'


def _run(report: ReportData) -> str:
  summary, parts = report.summary, []
  seconds = summary.get('seconds') or {}
  if seconds:
    parts.append(_pairs('Time', {name: _duration(value) for name, value in seconds.items()}))
  machine = dict(summary.get('versions') or {})
  if summary.get('peak_memory_gb') is not None:
    machine = {'peak memory': f'{summary["peak_memory_gb"]:.2f} GB', **machine}
  if machine:
    parts.append(_pairs('Memory and versions', machine))
  if summary.get('judge'):
    parts.append(_pairs('Judge of NO-RL, over all starts', _judge(summary['judge'])))
  content = f'<div class="pairs">{"".join(parts)}</div>' if parts else ''
  if report.config:
    content += (
      '<details><summary>Configuration</summary>'
      f'<pre tabindex="0">{text(report.config)}</pre></details>'
    )
  return content


def _judge(told: Mapping[str, Any]) -> dict[str, str]:
  """What asking the judge came to; repeated steps were paid again."""
  total = told['total']
  asked = total['answered'] + total['unanswered']
  reasons = sorted(total['reasons'].items(), key=lambda item: -item[1])[:_REASONS]
  rows = {
    'judge': f'{told["model"]} at {told["url"]}',
    'pictures': f'{asked}, repeated steps included; {total["cached"]} scored before',
    'unscored': '; '.join(
      [str(total['unanswered']), *(f'{count}: {reason}' for reason, count in reasons)]
    ),
    'requests': f'{total["requests"]}, {total["retries"]} of them repeated',
    'tokens': f'{total["prompt_tokens"]} read, {total["completion_tokens"]} written',
  }
  if total['unmetered']:
    rows['tokens'] += f'; of {total["unmetered"]} pictures not all were counted'
  if total['cost'] is not None:
    rows['cost'] = f'{total["cost"]:.4g}'
  return rows


def _pairs(caption: str, values: Mapping[str, str]) -> str:
  rows = ''.join(
    f'<tr><th scope="row">{text(name.replace("_", " "))}</th><td>{text(value)}</td></tr>'
    for name, value in values.items()
  )
  return table(caption, f'<tbody>{rows}</tbody>', 'plain')


def _notes(notes: Sequence[str]) -> str:
  return f'<ul>{"".join(f"<li>{text(note)}</li>" for note in notes)}</ul>' if notes else ''


def _duration(seconds: float) -> str:
  if not math.isfinite(seconds):
    return '–'
  if seconds < 60:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s'
