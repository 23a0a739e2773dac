"""Runs of several processes: the numbers of one process, and an end whatever happens to them."""

import contextlib
import dataclasses
import re
import signal
import time

import jax
import numpy as np
import processes
import pytest

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.sharding import MeshConfig
from eru_jax.training import roll_call, watch
from eru_jax.training.batches import Rows, on_mesh
from eru_jax.training.checksums import _part, checksums

STAGES = ('flow_matching', 'dk_dm', 'no_rl')


def saved(workdir):
  names = [path.name for path in (workdir / 'checkpoints' / 'toy').glob('[0-9]*')]
  return sorted(int(name) for name in names if name.isdigit())  # others are being written


def assert_close(workdir, other, tolerance=1e-5):
  """Metrics and parameters of two runs on different meshes."""
  mine, theirs = processes.rows(workdir), processes.rows(other)
  assert [row['step'] for row in mine] == [row['step'] for row in theirs]
  for row, expected in zip(mine, theirs, strict=True):
    for name, value in expected.items():
      # How far two fields are apart that were equal a step ago is what rounding leaves of them.
      near = value if name == 'stage' else pytest.approx(value, rel=tolerance, abs=1e-9)
      assert row[name] == near, name
  mine, theirs = processes.arrays(workdir), processes.arrays(other)
  assert mine.keys() == theirs.keys() and len(mine) > 10
  for name, array in theirs.items():
    distance = np.linalg.norm(np.float64(mine[name]) - array)
    assert distance <= tolerance * max(1, np.linalg.norm(array)), name


@pytest.fixture(scope='module')
def together(tmp_path_factory):
  """Workdir of a toy run in two processes of two devices each, and what it printed."""
  workdir = tmp_path_factory.mktemp('together') / 'run'
  started = processes.toy(workdir, 2, 4)
  assert started.wait() == [0, 0], started
  return workdir, [started.output(index) for index in range(2)]


def test_two_processes_train_as_one_does(together, tmp_path):
  workdir, printed = together
  alone = processes.toy(tmp_path / 'alone', 1, 4)
  assert alone.wait() == [0], alone
  assert_close(workdir, tmp_path / 'alone')
  # Each has read its own half of the 8 x 16 rows, and process 0 alone shows how far they are.
  assert all('{"rows read": 64}' in output for output in printed)
  assert 'toy 8/8' in printed[0] and 'toy 8/8' not in printed[1]
  assert not list(workdir.parent.glob('**/*.tmp'))


def test_sigterm_to_one_stops_all_at_the_same_step(together, tmp_path):
  """And a damaged checkpoint is damaged for all, whoever of them reads the wrong bytes."""
  workdir = tmp_path / 'stopped'
  stopped = processes.toy(workdir, 2, 4, event='sigterm', victim=1, step=5)
  assert stopped.wait() == [0, 0], stopped
  last = processes.rows(workdir)[-1]['step']
  assert 5 <= last < 8 and saved(workdir)[-1] == last
  sentence = f'stopped after step {last} of toy, saved; the same command continues'
  assert [stopped.output(index).count(sentence) for index in range(2)] == [1, 0]
  for damaged in (workdir / 'checkpoints' / 'toy' / str(last)).glob('**/ocdbt.process_1/d/*'):
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(content)
  resumed = processes.toy(workdir, 2, 4)
  assert resumed.wait() == [0, 0], resumed
  assert re.search(rf'Checkpoint .*/{last} is damaged', resumed.output(0) + resumed.output(1))
  assert (workdir / 'checkpoints' / f'toy.damaged-{last}').is_dir()
  processes.assert_same(workdir, together[0])


@pytest.mark.parametrize(
  'event, status, message',
  [
    ('mistake', 2, 'error: process 1: This file is not there: look for it.'),
    ('bug', 1, "error: process 1 failed with KeyError: 'no such thing'"),
  ],
)
def test_what_goes_wrong_in_one_ends_all(event, status, message, tmp_path):
  started = processes.toy(tmp_path / 'run', 2, 2, event=event, victim=1, step=3)
  assert started.wait(200) == [status, status], started
  for index in range(2):
    assert message in started.output(index)
  assert ('Traceback' in started.output(1)) == (event == 'bug')
  assert 'Traceback' not in started.output(0)


def test_a_stuck_process_is_named_and_given_up(tmp_path):
  # Until it is stuck all must be fast, so that nothing is saved meanwhile.
  wanted = dict(save_every=100, watch={'report_after': 3, 'end_after': 9})
  started = processes.toy(tmp_path / 'run', 2, 2, event='stuck', victim=1, step=4, **wanted)
  assert started.wait(300) == [1, 1], started
  for index in range(2):
    found = started.output(index)
    behind = 'process 1 is still at step 3 of toy, done, others at step 4 of toy, its batch read'
    assert re.search(rf'warning: process {index}: no iteration for \d+ s: {behind}', found), found
    assert re.search(rf'error: no iteration for \d+ s: {behind}; the run ends here', found)


@pytest.mark.parametrize(
  ('step', 'behind'),
  [
    (0, 'the start, others are waiting further on'),  # before a barrier
    (1, 'the start, others at step 1 of toy, its batch read'),
  ],
)
def test_a_process_that_is_late_at_the_start_is_named(step, behind, tmp_path):
  started = processes.toy(
    tmp_path / 'run',
    2,
    2,
    event='late',
    victim=1,
    step=step,
    barrier=True,
    watch={'start_after': 3},
    until=[str(tmp_path / 'run.0.log'), f'process 1 is still at {behind}'],
  )
  assert started.wait() == [0, 0], started
  late = rf'warning: process 0: no progress for \d+ s: process 1 is still at {behind}'
  assert re.search(late, started.output(0)), started


# Those who say nothing for five seconds are gone.
SOON = {'watch': {'report_after': 8}}


def assert_named_as_gone(victim, output):
  (line,) = (line for line in output.splitlines() if line.startswith('error: '))
  assert re.fullmatch(
    rf'error: process {victim} was last heard of \d+ s ago; it or its machine is gone; '
    'start the run again to continue',
    line,
  )
  assert 'Traceback' not in output and 'Fatal Python error' not in output


def test_the_one_that_is_gone_is_named(tmp_path):
  started = processes.toy(tmp_path / 'run', 2, 2, event='sigkill', victim=1, step=4, **SOON)
  statuses = started.wait(200)
  assert statuses == [1, -signal.SIGKILL], started
  assert_named_as_gone(1, started.output(0))


def test_without_process_0_nobody_goes_on(tmp_path):
  """JAX's own client aborts the others, unless the watch is faster."""
  started = processes.toy(tmp_path / 'run', 2, 2, event='sigkill', victim=0, step=4, **SOON)
  statuses = started.wait(200)
  assert statuses[0] == -signal.SIGKILL and statuses[1] in (1, -signal.SIGABRT), started


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_four_to_two(tmp_path):
  workdir, options = tmp_path / 'moving', dict(steps=14, event='sigterm')
  start = processes.toy
  stopped = start(workdir, 4, 8, {'data': 2, 'fsdp': 4}, victim=2, step=3, **options)
  assert stopped.wait() == [0] * 4, stopped
  first = saved(workdir)[-1]
  moved = start(workdir, 2, 4, {'data': 1, 'fsdp': 4}, victim=0, step=1, **options)
  assert moved.wait() == [0, 0], moved
  assert 3 <= first < saved(workdir)[-1] < 14
  last = start(workdir, 1, 2, {'data': 2, 'fsdp': 1}, steps=14)
  assert last.wait() == [0], last
  alone = start(tmp_path / 'alone', 1, 1, {'data': 1, 'fsdp': 1}, steps=14)
  assert alone.wait() == [0], alone
  assert_close(workdir, tmp_path / 'alone')


@pytest.mark.slow
def test_one_of_four_is_killed(tmp_path):
  workdir = tmp_path / 'killed'
  killed = processes.toy(workdir, 4, 4, event='sigkill', victim=2, step=6)
  statuses = killed.wait(300)
  assert statuses[2] == -signal.SIGKILL and 0 not in statuses, killed
  for index in (0, 1, 3):
    assert_named_as_gone(2, killed.output(index))
  assert saved(workdir)[-1] == 4
  for name in (workdir, tmp_path / 'unbroken'):
    started = processes.toy(name, 4, 4)
    assert started.wait() == [0] * 4, started
  processes.assert_same(workdir, tmp_path / 'unbroken')


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_a_stage_in_several_processes_is_that_of_one(stage, tiny_config, tmp_path):
  config = processes.small(tiny_config, (stage,))
  for count in (1, 2, 4):
    started = processes.training(config, tmp_path / str(count), count, 4)
    assert started.wait(1500) == [0] * count, started
  for count in (2, 4):
    assert_close(tmp_path / str(count), tmp_path / '1')
    for index in range(1, count):
      printed = (tmp_path / f'{count}.{index}.log').read_text()
      assert stage not in printed and 'Report' not in printed


@pytest.mark.slow
def test_chaos(tmp_path):
  """Ten kills at random moments, SIGKILL and SIGTERM mixed, of one of two processes."""
  workdir, rng = tmp_path / 'chaos', np.random.default_rng(7)
  options = dict(steps=60, pause=0.1)
  unbroken = processes.toy(tmp_path / 'unbroken', 2, 2, **options)
  assert unbroken.wait() == [0, 0], unbroken
  ended = []
  for _ in range(10):
    number = [signal.SIGKILL, signal.SIGTERM][rng.integers(2)]
    before = saved(workdir) if workdir.exists() else []
    started = processes.toy(workdir, 2, 2, **options)
    # After a step or two of its own, so that ten starts get somewhere; then at any moment.
    started.until(lambda before=before: workdir.exists() and saved(workdir)[-1:] != before[-1:])
    time.sleep(rng.uniform(0, 0.5))
    started.processes[rng.integers(2)].send_signal(number)
    ended.append((number, started.wait(300)))
    assert number != signal.SIGTERM or ended[-1][1] == [0, 0], started
    assert number != signal.SIGKILL or 0 not in ended[-1][1], started
  assert {number for number, _ in ended} == {signal.SIGKILL, signal.SIGTERM}
  assert saved(workdir)[-1] < 60
  last = processes.toy(workdir, 2, 2, **options)
  assert last.wait() == [0, 0], last
  processes.assert_same(workdir, tmp_path / 'unbroken')


# Below, in this process alone.


def test_a_checksum_does_not_depend_on_how_an_array_is_split():
  rng = np.random.default_rng(0)
  for shape, dtype in (((6, 4, 10), np.float32), ((7,), np.int8), ((), np.int32), ((0, 3), bool)):
    array = (100 * rng.standard_normal(shape)).astype(dtype)
    whole = _part(array, (0,) * array.ndim, array.shape)
    assert checksums({'a': jax.numpy.asarray(array)}) == {"['a']": f'{whole % 2**64:016x}'}
    for axis in range(array.ndim):
      total, first = 0, 0
      for part in np.array_split(array, [1, 3], axis):
        starts = [0] * array.ndim
        starts[axis] = first
        first += part.shape[axis]
        total += _part(part, tuple(starts), array.shape)
      assert total % 2**64 == whole % 2**64
  large = np.arange(300_000, dtype=np.float32).reshape(3, 100_000)
  expected = _part(large, (0, 0), large.shape)
  halves = _part(large[:, :70_000], (0, 0), large.shape) + _part(
    large[:, 70_000:], (0, 70_000), large.shape
  )
  assert halves % 2**64 == expected
  swapped = large.copy()
  swapped[0, :2] = large[0, 1::-1]
  assert _part(swapped, (0, 0), large.shape) != expected
  large[2, 99_999] += 1
  assert _part(large, (0, 0), large.shape) != expected


@pytest.mark.parametrize(
  ('words', 'broken'),
  [
    ('FAILED_PRECONDITION: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:1', True),
    ('UNAVAILABLE: failed to connect to all addresses', True),
    ('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes', False),
  ],
)
def test_only_broken_connections_are_laid_on_others(words, broken):
  error = jax.errors.JaxRuntimeError(words)
  assert roll_call.is_broken_connection(error) == broken
  raised = ValueError('the array is deleted')
  raised.__cause__ = error
  assert roll_call.is_broken_connection(raised) == broken
  assert not roll_call.is_broken_connection(OSError(words))
  # So says a program that ran before.
  assert roll_call.is_broken_connection(ValueError(words)) == broken
  assert not roll_call.is_broken_connection(ValueError(f'no file {words}'))


def test_rows_are_read_once_and_lie_where_the_batch_does():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  table, asked = np.arange(20.0, dtype=np.float32).reshape(10, 2), []

  def take(rows):
    asked.append(rows)
    return {'x': table[rows], 'none': None}

  rows = np.array([7, 0, 3])
  batch = on_mesh({'text': Rows(take, rows), 'index': rows}, mesh)
  np.testing.assert_array_equal(batch['text']['x'], table[rows])
  np.testing.assert_array_equal(batch['index'], rows)
  assert [list(one) for one in asked] == [[7, 0, 3]]
  assert batch['text']['x'].sharding.spec == sharding.P(('data', 'fsdp'))


def test_sigterm_stops_what_another_program_runs(capsys):
  """It is not ours to end: it may have more to do, and to tidy up."""
  before, tidied = signal.getsignal(signal.SIGTERM), []
  with pytest.raises(SystemExit) as caught:
    try:
      with watch.watching():
        watch.mark('load')
        signal.raise_signal(signal.SIGTERM)
    finally:
      tidied.append(1)
  assert caught.value.code == 0 and tidied
  assert capsys.readouterr().out == 'stopped at load; the same command continues\n'
  with pytest.raises(SystemExit), watch.watching() as outer, watch.watching() as inner:
    assert inner is outer and not inner.tick('step 1')
    signal.raise_signal(signal.SIGTERM)  # noticed, and heeded at the next tick
    assert capsys.readouterr().out == ''
    watch.tick('step 2')
  assert signal.getsignal(signal.SIGTERM) == before
  assert capsys.readouterr().out == 'stopped after step 2; the same command continues\n'
  with pytest.raises(SystemExit) as caught, watch.watching() as outer:
    outer.tick('step 3, done')
    signal.raise_signal(signal.SIGTERM)
    outer.rest()  # there is no tick to heed it any more
  assert caught.value.code == 0 and caught.value.told
  assert capsys.readouterr().out == 'stopped after step 3; the same command continues\n'


@pytest.mark.parametrize('heeds', ['tick', 'mark', 'rest', 'the end'])
def test_a_stop_that_is_forgotten_is_heeded_next(heeds, capsys):
  with pytest.raises(SystemExit) as caught, watch.watching():
    watch.mark('load')
    with contextlib.suppress(BaseException):
      signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # the echo is not raised
    match heeds:
      case 'tick':
        watch.tick('step 1')
      case 'mark':
        watch.mark('the next')
      case 'rest':
        watch.rest()
    assert heeds == 'the end'
  assert caught.value.code == 0
  where = 'after step 1' if heeds == 'tick' else 'at load'
  assert capsys.readouterr().out == f'stopped {where}; the same command continues\n'


def test_what_goes_wrong_on_the_way_out_is_told_unless_it_is_the_stop_itself(capsys):
  with pytest.raises(SystemExit), watch.watching():
    try:
      signal.raise_signal(signal.SIGTERM)
    except BaseException as error:
      raise KeyError('incompatible handler') from error
  assert capsys.readouterr().out == 'stopped at the start; the same command continues\n'
  with pytest.raises(UserError, match='disk'), watch.watching():
    try:
      signal.raise_signal(signal.SIGTERM)
    finally:
      raise UserError('No space on this disk: make some.')
  assert capsys.readouterr().out == ''


def test_time_outs_are_checked():
  with pytest.raises(UserError, match='`end_after` is 1 but must be at least report_after'):
    watch.WatchConfig(report_after=2, end_after=1)
  with pytest.raises(UserError, match='`start_after` is 0 but must be positive'):
    watch.WatchConfig(start_after=0)
  times = {'report_after': 300.0, 'end_after': 1800.0, 'start_after': 900.0}
  assert dataclasses.asdict(watch.WatchConfig()) == times
