"""What `gpu.py` found: the file of runs, rates, who is faster, and the table in Markdown."""

import json
import os
import pathlib

from gpu_rows import ROWS, SIDES, row_named
from side_by_side import FORMULAS

# Dense bfloat16 of the SXM parts, NVIDIA's data sheets.
PUBLISHED_TFLOPS = {'NVIDIA H200': 989.0, 'NVIDIA H100 80GB HBM3': 989.0}
# Euler steps of a picture.
PICTURE_STEPS = 28
# Where the last line's figures are read.
_HEADLINE = 1024
_TASKS = {'sample': 'sampling', 'lora': 'training adapters', 'full': 'training everything'}
_KEY = ('date', 'device', 'versions', 'environment', 'published_tflops')


def load_runs(path):
  """All runs of a file; none of one that is not there."""
  path = pathlib.Path(path)
  if not path.exists():
    return []
  return json.loads(path.read_text())['runs']


def open_run(runs, key):
  """The last run if it was begun on this very day, machine and software, else a new one."""
  if runs and all(runs[-1][name] == key[name] for name in _KEY):
    return runs[-1]
  runs.append({**key, 'formulas': FORMULAS, 'rows': {}})
  return runs[-1]


def save(path, runs):
  """Replaces the file of runs and the table beside it, so that neither is ever half written."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  for target, text in (
    (path, json.dumps({'runs': runs}, indent=1) + '\n'),
    (path.with_suffix('.md'), '\n'.join(table(run) for run in reversed(runs))),
  ):
    part = target.with_name(target.name + '.part')
    part.write_text(text)
    os.replace(part, target)


def measured_peak(run):
  """TFLOP/s of the faster side's matrix product, or None."""
  rates = [run['rows'].get(f'peak-{side}', {}).get('matmul_tflops') for side in SIDES]
  return max((rate for rate in rates if rate), default=None)


def derive(run):
  """Adds rates and shares of the peaks to every measured batch, in place."""
  top, published = measured_peak(run), run['published_tflops']
  for name, found in run['rows'].items():
    steps = PICTURE_STEPS if row_named(name).task == 'sample' else 1
    for batch, entry in found.get('batches', {}).items():
      rate = entry['tflop'] / entry['seconds']
      entry['tflops'] = rate
      entry['mfu'] = rate / published if published else None
      entry['share_of_measured_peak'] = rate / top if top else None
      entry['pictures_per_second'] = int(batch) / (entry['seconds'] * steps)


def best(run, task, pixels, side):
  """(row name, batch, entry) with the most pictures a second, or None; NaN shows no speed."""
  found = [
    (row.name, batch, entry)
    for row in ROWS
    if (row.task, row.pixels, row.side) == (task, pixels, side)
    for batch, entry in run['rows'].get(row.name, {}).get('batches', {}).items()
    if entry['finite']
  ]
  return max(found, key=lambda item: item[2]['pictures_per_second'], default=None)


def compare(run, task, pixels):
  """{'mfu': ours, 'ratio': PyTorch's seconds a picture over ours}, each None if not measured."""
  ours, theirs = (best(run, task, pixels, side) for side in SIDES)
  rates = [item and item[2]['pictures_per_second'] for item in (ours, theirs)]
  return {
    'mfu': ours and ours[2]['mfu'],
    'ratio': rates[0] / rates[1] if all(rates) else None,
  }


def summary(run):
  """The last line: training means all parameters, and both are read at 1024 pixels."""
  train, sample = (compare(run, task, _HEADLINE) for task in ('full', 'sample'))
  return {
    'rows': run['rows'],
    'train_mfu': train['mfu'],
    'sample_mfu': sample['mfu'],
    'train_ratio': train['ratio'],
    'sample_ratio': sample['ratio'],
  }


def _figure(value, form):
  return '' if value is None else format(value, form)


def _line(cells):
  return '| ' + ' | '.join(str(cell) for cell in cells) + ' |'


def _lines(head, rows):
  return [_line(head), '|' + '---|' * len(head), *map(_line, rows), '']


def table(run):
  """One run in Markdown."""
  versions = ', '.join(f'{name} {version}' for name, version in run['versions'].items())
  top, published = measured_peak(run), run['published_tflops']
  lines = [
    f'## {run["device"]}, {run["date"]}',
    '',
    f'{versions}. Peak in TFLOP/s: published {_figure(published, ".0f") or "unknown"}, measured '
    f'{_figure(top, ".0f") or "not yet"}. MFU is of the published one. Sampling leaves out text '
    f'encoders and autoencoder; a picture has {PICTURE_STEPS} steps.',
    '',
  ]
  measured = [
    (
      name,
      batch,
      f'{entry["seconds"]:.4f}',
      f'{entry["pictures_per_second"]:.3f}',
      f'{entry["tflops"]:.1f}',
      _figure(entry['mfu'], '.1%'),
      _figure(entry['share_of_measured_peak'], '.1%'),
      _figure(entry.get('peak_gib'), '.1f'),
      _figure(entry.get('compile_seconds'), '.0f'),
      entry.get('attention', ''),
    )
    for name, found in run['rows'].items()
    for batch, entry in found.get('batches', {}).items()
    if entry['finite']
  ]
  head = 'row, batch, s a step, pictures a second, TFLOP/s, MFU, of measured peak, peak GiB, '
  lines += _lines((head + 'compile s, attention').split(', '), measured)
  lines += _lines(
    ('', 'pixels', 'our best', "diffusers' best", 'their time over ours', 'our MFU'),
    [_compared(run, task, pixels) for task in _TASKS for pixels in (1024, 512)],
  )
  lines += _lines(
    ('attention', 'pixels', 'forward, ms', 'forward and backward, ms'),
    _attention_rows(run),
  )
  problems = [f'* {name}: {told}' for name, told in _problems(run)]
  return '\n'.join([*lines, *problems, *([''] if problems else [])])


def _compared(run, task, pixels):
  sides = [best(run, task, pixels, side) for side in SIDES]
  names = [f'{item[0]}, batch {item[1]}' if item else 'not measured' for item in sides]
  found = compare(run, task, pixels)
  return (
    _TASKS[task], pixels, *names, _figure(found['ratio'], '.2f'), _figure(found['mfu'], '.1%')
  )  # fmt: skip


def _attention_rows(run):
  for side in SIDES:
    for pixels, kinds in run['rows'].get(f'attention-{side}', {}).get('attention', {}).items():
      for kind, found in kinds.items():
        if isinstance(found, dict):
          times = [found.get(name) for name in ('forward', 'forward and backward')]
          cells = [f'{t["milliseconds"]:.3f}' if isinstance(t, dict) else 'not run' for t in times]
          yield (f'{side}, {kind}', pixels, *cells)
        else:
          yield (f'{side}, {kind}', pixels, found if isinstance(found, str) else f'{found:.1e}', '')


def _problems(run):
  for name, found in run['rows'].items():
    if 'failed' in found:
      yield name, found['failed']
    for batch, told in found.get('skipped', {}).items():
      yield f'{name}, batch {batch}', told
    for batch, entry in found.get('batches', {}).items():
      if not entry['finite']:
        yield f'{name}, batch {batch}', 'not finite'
