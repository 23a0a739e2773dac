"""metrics.jsonl, TensorBoard, W&B, intervals, progress, picture grids."""

import io
import json
import math
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eru_jax.errors import UserError
from eru_jax.training import pictures
from eru_jax.training.metrics import MetricWriter, Progress, read_metrics, wilson_interval

ORDER = ('first', 'second')


# Values from the formula (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.96.
@pytest.mark.parametrize(
  'successes, n, low, high',
  [
    (0, 10, 0.0, 3.8416 / 13.8416),
    (10, 10, 10 / 13.8416, 1.0),
    (5, 10, 0.5 - 0.263405, 0.5 + 0.263405),
    (0, 0, 0.0, 1.0),
  ],
)
def test_wilson_known_values(successes, n, low, high):
  assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-5)


def test_wilson_agrees_with_scipy():
  stats = pytest.importorskip('scipy.stats')
  for successes, n in [(1, 7), (63, 224), (223, 224)]:
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method='wilson')
    assert wilson_interval(successes, n, 1.959964) == pytest.approx(tuple(expected), abs=1e-6)
  with pytest.raises(UserError, match='between 0 and n'):
    wilson_interval(11, 10)


def run(writer, first, last, stage='second'):
  for step in range(first, last + 1):
    writer.write(stage, step, {'loss': 1 / step, 'skipped': 0.0})
    if step == 4:
      writer.write(stage, step, {'accuracy': 0.5})


def without_time(path):
  return [{k: v for k, v in row.items() if k != 'time'} for row in read_metrics(path)]


def unbroken(directory):
  with MetricWriter(directory) as writer:
    run(writer, 1, 3, 'first')
    run(writer, 1, 6)
  return without_time(directory / 'metrics.jsonl')


def test_lines_are_json_even_when_values_are_not_finite(tmp_path):
  with MetricWriter(tmp_path) as writer:
    values = {'a': jnp.float32(0.25), 'b': float('nan'), 'c': -math.inf, 'd': np.inf}
    writer.write('first', 3, values)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()

  def refuse(word):
    raise AssertionError(f'{word} is not JSON')

  row = json.loads(lines[0], parse_constant=refuse)
  assert len(lines) == 1 and row.pop('time') > 0
  assert row == {'stage': 'first', 'step': 3, 'a': 0.25, 'b': 'nan', 'c': '-inf', 'd': 'inf'}
  (read,) = read_metrics(tmp_path / 'metrics.jsonl')
  assert read['stage'] == 'first' and math.isnan(read['b']) and read['c'] == -math.inf


def test_reserved_names_are_refused(tmp_path):
  with MetricWriter(tmp_path) as writer, pytest.raises(UserError, match="named 'time'"):
    writer.write('first', 1, {'time': 2.0})


# What was on disk when the run was killed: steps of the second stage, and a torn line.
@pytest.mark.parametrize('killed_at, torn', [(6, b''), (5, b'{"stage": "second", "ste'), (4, b'{')])
@pytest.mark.parametrize('checkpoint', [3, 4])
def test_resumed_run_equals_unbroken_run(tmp_path, killed_at, torn, checkpoint):
  expected = unbroken(tmp_path / 'unbroken')
  path = tmp_path / 'resumed' / 'metrics.jsonl'
  with MetricWriter(path.parent) as writer:
    run(writer, 1, 3, 'first')
    run(writer, 1, killed_at)
  with open(path, 'ab') as file:
    file.write(torn)
  with MetricWriter(path.parent) as writer:
    writer.truncate_after(ORDER, 'second', checkpoint)
    if checkpoint == 4:
      # An evaluation that was written before the checkpoint is written again by the resumed run.
      writer.write('second', 4, {'accuracy': 0.5})
    run(writer, checkpoint + 1, 6)
  assert without_time(path) == expected


def test_truncating_to_an_earlier_stage_drops_later_ones(tmp_path):
  unbroken(tmp_path)
  path = tmp_path / 'metrics.jsonl'
  with MetricWriter(tmp_path) as writer:
    writer.truncate_after(ORDER, 'first', 2)
    assert [(r['stage'], r['step']) for r in read_metrics(path)] == [('first', 1), ('first', 2)]
    writer.truncate_after(ORDER, 'first', -1)
    assert read_metrics(path) == []
    # Forgotten lines may come again.
    writer.write('first', 2, {'loss': 0.5, 'skipped': 0.0})
    assert len(read_metrics(path)) == 1
    with pytest.raises(UserError, match="'third' is not among"):
      writer.truncate_after(ORDER, 'third', 0)


def test_last_line_without_newline(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  whole = b'{"stage": "first", "step": 1, "time": 0.0, "loss": 1.0}'
  path.write_bytes(whole + b'\n' + whole[:-9])
  assert len(read_metrics(path)) == 1
  path.write_bytes(whole + b'\n' + whole)
  MetricWriter(tmp_path).close()
  assert path.read_bytes() == (whole + b'\n') * 2
  assert read_metrics(tmp_path / 'none.jsonl') == []


@pytest.mark.parametrize('damage', [b'\x00\x00', b'[1]', b'{"stage": "first"}', b''])
def test_damage_inside_the_file_names_the_line(tmp_path, damage):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"stage": "first", "step": 1}\n' + damage + b'\n')
  with pytest.raises(UserError, match='metrics.jsonl, line 2 '):
    MetricWriter(tmp_path)


def tensorboard_events(directory):
  """(step, tag or session start, value) of all event files, in the order TensorBoard reads them."""
  from tensorboardX.proto.event_pb2 import Event

  found = []
  for path in sorted(directory.glob('events.out.tfevents.*')):
    data, at = path.read_bytes(), 0
    while at < len(data):
      length = int.from_bytes(data[at : at + 8], 'little')
      event = Event.FromString(data[at + 12 : at + 12 + length])
      at += 16 + length
      if event.session_log.status:
        found.append((event.step, 'start', None))
      found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
  return found


def test_tensorboard_voids_what_is_forgotten(tmp_path):
  with MetricWriter(tmp_path) as writer:
    for stage in ORDER:
      for step in (1, 2):
        writer.write(stage, step, {'loss': 0.5 * step})
  with MetricWriter(tmp_path) as writer:
    writer.truncate_after(ORDER, 'first', 1)
    writer.write('first', 2, {'loss': 4.0})
  first = tensorboard_events(tmp_path / 'tensorboard' / 'first')
  assert first == [(1, 'loss', 0.5), (2, 'loss', 1.0), (2, 'start', None), (2, 'loss', 4.0)]
  assert tensorboard_events(tmp_path / 'tensorboard' / 'second')[-1] == (0, 'start', None)


def test_torch_is_not_imported(tmp_path):
  code = (
    'import sys\nfrom eru_jax.training.metrics import MetricWriter\n'
    f'MetricWriter({str(tmp_path)!r}).write("first", 1, {{"loss": 1.0}})\n'
    'assert "tensorboardX" in sys.modules\n'
    'assert not [m for m in sys.modules if m.split(".")[0] == "torch"]'
  )
  subprocess.run([sys.executable, '-c', code], check=True, timeout=300)


def test_wandb_missing_is_said_clearly(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match='pip install wandb'):
    MetricWriter(tmp_path, wandb_project='demo')
  assert not list(tmp_path.iterdir())


def test_wandb_continues_its_run(tmp_path, monkeypatch):
  calls = []

  class Run:
    def __getattr__(self, name):
      return lambda *args, **kwargs: calls.append((name, args, kwargs))

  def init(**kwargs):
    calls.append(('init', (), kwargs))
    return Run()

  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
  for _ in range(2):
    with MetricWriter(tmp_path, wandb_project='demo') as writer:
      writer.write('first', 1, {'loss': 0.5})
  inits = [kwargs for name, _, kwargs in calls if name == 'init']
  assert inits[0] == inits[1] and inits[0]['resume'] == 'allow' and inits[0]['project'] == 'demo'
  assert ('log', ({'first/step': 1, 'first/loss': 0.5},), {}) in calls
  assert ('define_metric', ('first/*',), {'step_metric': 'first/step'}) in calls
  assert [name for name, _, _ in calls].count('finish') == 2


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def test_progress_prints_plain_lines_sparingly():
  stream, clock = io.StringIO(), Clock()
  with Progress(60, 'dk_dm', initial=20, stream=stream, clock=clock) as progress:
    clock.now = 100.0  # compilation
    for step in range(21, 61):
      progress.update(step, loss=jnp.float32(1 / step))
      clock.now += 1.0
    progress.write('saved')
  assert stream.getvalue().splitlines() == [
    'dk_dm 21/60  loss 0.04762',
    'dk_dm 31/60  loss 0.03226  1 s/step  00:29 left',
    'dk_dm 41/60  loss 0.02439  1 s/step  00:19 left',
    'dk_dm 51/60  loss 0.01961  1 s/step  00:09 left',
    'dk_dm 60/60  loss 0.01667  1 s/step  00:00 left',
    'saved',
  ]


def test_progress_reads_values_only_when_it_shows_them():
  class Unready:
    def __float__(self):
      raise AssertionError('waited for the device')

  clock = Clock()
  progress = Progress(9, 'x', stream=io.StringIO(), clock=clock)
  progress.update(1, loss=0.5)
  progress.update(2, loss=Unready())
  clock.now = 11.0
  with pytest.raises(AssertionError, match='waited'):
    progress.update(3, loss=Unready())


def test_progress_bar_on_a_terminal():
  stream, clock = Terminal(), Clock()
  with Progress(4, 'no_rl', initial=1, stream=stream, clock=clock) as progress:
    for step in (2, 4):
      clock.now += 1.0
      progress.update(step, loss=0.125 * step, reward=0.5)
    progress.write('saved')
  shown = stream.getvalue()
  assert 'no_rl' in shown and '\r' in shown and 'saved\n' in shown
  assert '4/4' in shown and 'loss 0.5 reward 0.5' in shown


def colours(count, size=4):
  rows = np.arange(count * size * size * 3) * 37 % 256
  return rows.reshape(count, size, size, 3).astype(np.uint8)


def test_grid_enlarges_each_pixel_to_a_block():
  images = colours(3)
  grid = np.asarray(pictures.image_grid(images, columns=2, scale=3))
  assert grid.shape == (2 * (12 + 8) + 8, 2 * (12 + 8) + 8, 3)
  block = images[2].repeat(3, axis=0).repeat(3, axis=1)
  assert (grid[28:40, 8:20] == block).all()
  assert (grid[28:, 20:] == 255).all()


def test_captions_are_inside_and_wrapped():
  images = colours(2, 32)
  plain = pictures.image_grid(images, columns=9)
  short = pictures.image_grid(images, columns=2, labels=['a red apple', ''])
  labels = ['what a caterpillar becomes ' * 9, 'x' * 99]
  long = pictures.image_grid(images, columns=2, labels=labels)
  assert plain.width == 2 * 40 + 8 and short.height > plain.height
  assert short.height < long.height < short.height + 60
  ink = np.argwhere(np.asarray(long)[44:].min(-1) < 128)
  assert ink.size and 8 <= ink[:, 1].min() and ink[:, 1].max() < long.width - 8
  accents = pictures.image_grid(images, columns=2, labels=['Côte d’Ivoire', '冰'])
  folded = pictures.image_grid(images, columns=2, labels=['Cote d’Ivoire', '?'])
  assert (np.asarray(accents) == np.asarray(folded)).all()


def test_save_png(tmp_path):
  path = tmp_path / 'samples' / 'one.png'
  image = colours(1)[0]
  pictures.save_png(path, image)
  assert (np.asarray(Image.open(path)) == image).all()
  pictures.save_png(path, Image.new('RGB', (5, 6)))
  assert Image.open(path).size == (5, 6)
  assert [p.name for p in path.parent.iterdir()] == ['one.png']
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot be written'):
    pictures.save_png(tmp_path / 'file' / 'one.png', image)


@pytest.mark.parametrize(
  'images, arguments, message',
  [
    (colours(2).astype(np.float32), {'columns': 2}, 'float32'),
    (colours(2)[0], {'columns': 2}, r'\(4, 4, 3\)'),
    (colours(0), {'columns': 2}, 'not empty'),
    (colours(2), {'columns': 0}, 'columns=0'),
    (colours(2), {'columns': 1, 'labels': ['one']}, '1 labels for 2'),
  ],
)
def test_grid_says_what_does_not_fit(images, arguments, message):
  with pytest.raises(UserError, match=message):
    pictures.image_grid(images, **arguments)
