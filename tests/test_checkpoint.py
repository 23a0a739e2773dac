"""Checkpoints: exact, atomic, checked when read; the last good one wins."""

import contextlib
import errno
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eru_jax.errors import UserError
from eru_jax.training import checkpoint
from eru_jax.training.checkpoint import StageCheckpoints
from eru_jax.training.state import OptimizerConfig, init_state


def state_at(step, shape=(3, 5), behaviour=True):
  """A state of odd values: NaN, infinities, negative zero and denormals survive too."""
  rng = np.random.default_rng(step)
  w = rng.standard_normal(shape).astype(np.float32)
  w.flat[:4] = [np.nan, -np.inf, -0.0, 1e-42]
  params = {'layer': {'w': jnp.array(w), 'b': jnp.array(rng.standard_normal(2), jnp.bfloat16)}}
  state = init_state(params, OptimizerConfig().build(5), behaviour=behaviour)
  return state.replace(step=jnp.int32(step), updates=jnp.int32(2 * step))


def like(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_bits(a, b):
  def check(x, y):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())

  jax.tree.map(check, a, b)


def position(step):
  return {'step': step, 'seed': 7, 'sources': {'pairs': [9, 2]}}


@pytest.fixture
def directory(tmp_path):
  """checkpoints/stage with checkpoints of steps 1, 2 and 3, of which 2 and 3 are kept."""
  directory = tmp_path / 'checkpoints' / 'stage'
  checkpoints = StageCheckpoints(directory)
  for step in (1, 2, 3):
    checkpoints.save(step, state_at(step), position(step))
  checkpoints.close()
  return directory


def reopened(directory, wanted=None):
  """(checkpoints, what they restore)."""
  checkpoints = StageCheckpoints(directory)
  return checkpoints, checkpoints.restore(like(state_at(0) if wanted is None else wanted))


def test_round_trip_is_exact_and_keeps_the_newest_two(directory):
  checkpoints, (state, where) = reopened(directory)
  assert checkpoints.steps == [2, 3]
  assert sorted(p.name for p in directory.iterdir() if p.is_dir()) == ['2', '3']
  assert_bits(state, state_at(3))
  assert where == position(3)
  checkpoints.close()


def test_no_checkpoint_is_none(tmp_path):
  checkpoints, restored = reopened(tmp_path / 'new')
  assert restored is None
  checkpoints.close()


def test_saving_a_step_twice_keeps_the_first(directory):
  checkpoints = StageCheckpoints(directory)
  checkpoints.save(3, state_at(9), position(9))
  state, where = checkpoints.restore(like(state_at(0)))
  assert_bits(state, state_at(3))
  assert where == position(3)
  checkpoints.close()


def files(directory, step):
  return sorted(p for p in (directory / str(step)).rglob('*') if p.is_file())


def largest(directory, step):
  """The file that holds most of the arrays."""
  found = [p for p in files(directory, step) if p.parent.name == 'd']
  return max(found, key=lambda p: p.stat().st_size)


def flip(path):
  data = bytearray(path.read_bytes())
  for place in range(len(data) // 3, len(data), max(1, len(data) // 7)):
    data[place] ^= 0x5A
  path.write_bytes(data)


def truncate_arrays(directory):
  for path in files(directory, 3):
    if path.parent.name == 'd':
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_everything(directory):
  for path in files(directory, 3):
    path.write_bytes(b'')


def flip_arrays(directory):
  for path in files(directory, 3):
    if path.parent.name == 'd':
      flip(path)


def delete_arrays(directory):
  shutil.rmtree(directory / '3' / 'state')


def damage_metadata(directory):
  (directory / '3' / '_CHECKPOINT_METADATA').write_bytes(b'{"item_handlers": ')


def delete_metadata(directory):
  (directory / '3' / '_CHECKPOINT_METADATA').unlink()


def exchange_arrays(directory):
  """Whole files, but of another step."""
  shutil.rmtree(directory / '3' / 'state')
  shutil.copytree(directory / '2' / 'state', directory / '3' / 'state')


def test_missing_metadata_is_said_once_and_in_words(directory, caplog):
  delete_metadata(directory)
  checkpoints, _ = reopened(directory)
  checkpoints.close()
  (said,) = (record.getMessage() for record in caplog.records)
  assert said.endswith('stage/3 is damaged (its metadata is missing); trying the one before it.')


@pytest.mark.parametrize(
  'damage',
  [
    truncate_arrays,
    empty_everything,
    flip_arrays,
    delete_arrays,
    damage_metadata,
    delete_metadata,
    exchange_arrays,
  ],
)
def test_damage_is_noticed_and_the_checkpoint_before_is_used(directory, damage, caplog):
  damage(directory)
  checkpoints, (state, where) = reopened(directory)
  assert 'stage/3 is damaged' in caplog.text
  assert_bits(state, state_at(2))
  assert where == position(2)
  assert checkpoints.steps == [2]
  assert (directory.parent / 'stage.damaged-3').is_dir()
  # Training comes by that step again.
  checkpoints.save(3, state_at(3), position(3))
  checkpoints.close()
  checkpoints, (state, _) = reopened(directory)
  assert_bits(state, state_at(3))
  checkpoints.close()


@pytest.mark.parametrize('share', np.linspace(0.02, 0.98, 6))
def test_one_flipped_byte_in_the_arrays_is_noticed_or_harmless(directory, share):
  path = largest(directory, 3)
  data = bytearray(path.read_bytes())
  data[int(share * len(data))] ^= 0xFF
  path.write_bytes(data)
  checkpoints, (state, where) = reopened(directory)
  assert_bits(state, state_at(where['step']))
  checkpoints.close()


def test_checksums_notice_what_storage_does_not(directory, monkeypatch, caplog):
  """Arrays that are read without an error, but with other bytes."""
  checkpoints = StageCheckpoints(directory)
  load = checkpoint.ocp.load_pytree

  def silently_wrong(path, wanted):
    state = load(path, wanted)
    return state.replace(updates=state.updates + 1) if path.endswith('/3') else state

  monkeypatch.setattr(checkpoint.ocp, 'load_pytree', silently_wrong)
  state, _ = checkpoints.restore(like(state_at(0)))
  assert '.updates have changed' in caplog.text
  assert_bits(state, state_at(2))
  checkpoints.close()


def test_all_damaged_is_one_error_and_the_next_start_is_fresh(directory):
  for step in (2, 3):
    shutil.rmtree(directory / str(step) / 'state')
  checkpoints = StageCheckpoints(directory)
  with pytest.raises(UserError, match=r'None of the checkpoints \[2, 3\] .* start this stage anew'):
    checkpoints.restore(like(state_at(0)))
  checkpoints.close()
  checkpoints, restored = reopened(directory)
  assert restored is None
  checkpoints.close()
  assert {p.name for p in directory.parent.iterdir()} == {
    'stage', 'stage.damaged-2', 'stage.damaged-3'
  }  # fmt: skip


def everything(directory):
  """Paths below a directory, and when they were changed."""
  return {path: path.stat().st_mtime_ns for path in directory.rglob('*')}


def test_only_reading_falls_back_but_changes_nothing(directory, caplog):
  delete_arrays(directory)
  before = everything(directory.parent)
  checkpoints = StageCheckpoints(directory)
  state, where = checkpoints.restore(like(state_at(0)), repair=False)
  checkpoints.close()
  assert 'stage/3 is damaged' in caplog.text
  assert_bits(state, state_at(2))
  assert where == position(2)
  assert everything(directory.parent) == before


def test_only_reading_what_is_all_damaged(directory):
  for step in (2, 3):
    shutil.rmtree(directory / str(step) / 'state')
  before = everything(directory.parent)
  checkpoints = StageCheckpoints(directory)
  with pytest.raises(UserError, match=r'None of the checkpoints \[2, 3\] .* run `train` again'):
    checkpoints.restore(like(state_at(0)), repair=False)
  checkpoints.close()
  assert everything(directory.parent) == before


def caused(error, cause):
  """An error raised from another, as Orbax raises whatever happens while it reads."""
  error.__cause__ = cause
  return error


def wrapped(cause):
  return caused(KeyError('Failed to load checkpointable'), cause)


@pytest.mark.parametrize(
  ('error', 'raised', 'words'),
  [
    (PermissionError(errno.EACCES, 'x'), UserError, 'Permission denied'),
    (wrapped(PermissionError(errno.EPERM, 'x')), UserError, 'Operation not permitted'),
    (OSError(errno.EIO, 'x'), UserError, 'Input/output error'),
    (wrapped(OSError(errno.ENOMEM, 'x')), UserError, 'Cannot allocate memory'),
    (
      wrapped(ValueError("RESOURCE_EXHAUSTED: Too many open files [os_error_code='24']")),
      UserError,
      'Too many open files',
    ),
    (MemoryError(), MemoryError, None),
    (wrapped(MemoryError()), KeyError, None),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: x'), jax.errors.JaxRuntimeError, None),
    (wrapped(jax.errors.JaxRuntimeError('INTERNAL: device lost')), KeyError, None),
    (wrapped(ValueError('RESOURCE_EXHAUSTED: Out of memory')), KeyError, None),
    (wrapped(KeyboardInterrupt()), KeyboardInterrupt, None),
    (TypeError('a bug'), TypeError, 'a bug'),
    (AttributeError('another Orbax'), AttributeError, 'another Orbax'),
  ],
)
def test_what_is_no_evidence_of_damage_leaves_the_checkpoints_alone(
  directory, error, raised, words, monkeypatch
):
  before = everything(directory.parent)
  checkpoints = StageCheckpoints(directory)

  def fail(*unused):
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp, 'load_pytree', fail)
    with pytest.raises(raised, match=words) as caught:
      checkpoints.restore(like(state_at(0)))
  assert '\n' not in str(caught.value)
  assert everything(directory.parent) == before
  state, where = checkpoints.restore(like(state_at(0)))
  assert_bits(state, state_at(3))
  assert where == position(3)
  checkpoints.close()


@pytest.mark.parametrize('which', ['metadata', 'arrays'])
def test_files_that_really_cannot_be_opened_are_no_damage(directory, which):
  """Not simulated: a link to itself, which not even root can open. Orbax takes it for empty."""
  path = directory / '3' / '_CHECKPOINT_METADATA' if which == 'metadata' else largest(directory, 3)
  aside = path.rename(directory.parent / 'aside')
  path.symlink_to(path)
  checkpoints = StageCheckpoints(directory)
  with pytest.raises(UserError, match='stage/3 cannot be read .Too many .* nothing was changed'):
    checkpoints.restore(like(state_at(0)))
  checkpoints.close()
  aside.replace(path)
  assert [p.name for p in directory.parent.iterdir()] == ['stage']
  checkpoints, (state, _) = reopened(directory)
  assert_bits(state, state_at(3))
  checkpoints.close()


def test_checkpoints_of_earlier_versions_are_checked_by_their_crc(directory, monkeypatch, caplog):
  monkeypatch.setattr(checkpoint, 'checksums', checkpoint._crcs)
  checkpoints = StageCheckpoints(directory)
  checkpoints.save(4, state_at(4), position(4))
  monkeypatch.undo()
  state, _ = checkpoints.restore(like(state_at(0)))
  assert_bits(state, state_at(4))
  monkeypatch.setattr(checkpoint.zlib, 'crc32', lambda data: 1)
  state, _ = checkpoints.restore(like(state_at(0)))
  assert 'stage/4 is damaged (the bytes of' in caplog.text
  assert_bits(state, state_at(3))
  checkpoints.close()


def test_same_step_may_be_damaged_twice(directory):
  for name in ('stage.damaged-3', 'stage.damaged-3.1'):
    delete_arrays(directory)
    checkpoints, _ = reopened(directory)
    assert (directory.parent / name).is_dir()
    checkpoints.save(3, state_at(3), position(3))
    checkpoints.close()


@pytest.mark.parametrize(
  ('wanted', 'named'),
  [
    (state_at(0, shape=(4, 5)), r"\['layer'\]\['w'\] is float32\[3, 5\] there and float32\[4, 5\]"),
    (state_at(0, behaviour=False), r'behaviour.* absent here'),
    (state_at(0).replace(ema={'other': jnp.zeros(3)}), r"ema\['other'\] is absent there"),
    (state_at(0).replace(step=jnp.float32(0)), r'step is int32\[\] there and float32\[\] here'),
  ],
)
def test_state_of_another_shape_is_an_error_that_leaves_the_checkpoints_alone(
  directory, wanted, named
):
  checkpoints = StageCheckpoints(directory)
  with pytest.raises(UserError, match=named) as caught:
    checkpoints.restore(like(wanted))
  assert '\n' not in str(caught.value)
  checkpoints.close()
  assert [p.name for p in directory.parent.iterdir()] == ['stage']
  checkpoints, (state, _) = reopened(directory)
  assert_bits(state, state_at(3))
  checkpoints.close()


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.ENOSPC, 'No space left on device'),
    OSError(errno.EROFS, 'Read-only file system'),
    ValueError('RESOURCE_EXHAUSTED: Error writing "d/0": [os_error: No space left on device]'),
    OSError(errno.EDQUOT, 'Disk quota exceeded'),
  ],
)
def test_full_disk_is_an_error_and_the_earlier_checkpoint_is_intact(directory, monkeypatch, error):
  checkpoints = StageCheckpoints(directory)

  def full(*args, **kwargs):
    raise RuntimeError('Saving failed') from error

  monkeypatch.setattr(checkpoints._checkpointer, 'save_pytree', full)
  with pytest.raises(UserError, match='step 4 .* of step 3 is intact; free some space') as caught:
    checkpoints.save(4, state_at(4), position(4))
  assert '\n' not in str(caught.value)
  checkpoints.close()
  checkpoints, (state, _) = reopened(directory)
  assert_bits(state, state_at(3))
  checkpoints.close()


@contextlib.contextmanager
def file_size_limit(size):
  """The kernel itself refuses to let a file of this process grow beyond `size` bytes."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Slow, that is, run alone: the limit is the whole process's, so that whatever else a long session
# writes in the meantime meets it too.
@pytest.mark.slow
def test_writes_that_really_fail_leave_one_sentence_and_no_debris(tmp_path, capfd, caplog):
  """Not simulated: TensorStore's own error, from several threads, after a part was written."""
  directory, shape = tmp_path / 'checkpoints' / 'stage', (200, 200)
  checkpoints = StageCheckpoints(directory)
  for step in (1, 2):
    checkpoints.save(step, state_at(step, shape), position(step))
  words = 'step 3 in .*: File too large. .* step 2 is intact'
  with file_size_limit(60_000), pytest.raises(UserError, match=words) as caught:
    checkpoints.save(3, state_at(3, shape), position(3))
  assert '\n' not in str(caught.value)
  out, err = capfd.readouterr()
  assert 'Traceback' not in out + err + caplog.text
  assert checkpoints.steps == [1, 2]
  assert sorted(p.name for p in directory.iterdir() if p.is_dir()) == ['1', '2']
  # With space again, the same process can go on ...
  checkpoints.save(3, state_at(3, shape), position(3))
  checkpoints.close()
  # ... and so can another.
  checkpoints, (state, where) = reopened(directory, state_at(0, shape))
  assert_bits(state, state_at(3, shape))
  assert where == position(3)
  checkpoints.close()


@pytest.mark.slow
def test_a_full_disk_at_the_first_checkpoint(tmp_path):
  checkpoints = StageCheckpoints(tmp_path / 'stage')
  with file_size_limit(60_000), pytest.raises(UserError, match='there is none yet; free some'):
    checkpoints.save(1, state_at(1, (200, 200)), position(1))
  assert checkpoints.restore(like(state_at(0, (200, 200)))) is None
  checkpoints.close()


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_the_checkpoints_own_sentence(
  tiny_config, tmp_path, monkeypatch
):
  """Nothing else can be written either, and must not speak in its place."""
  from eru_jax.training import loop, run
  from eru_jax.training.metrics import read_metrics

  tiny_config['stages'] = ('dk_dm',)
  save, replace_file = loop.StageCheckpoints.save, run.replace_file

  def full(path, *args):
    raise UserError(f'{path} cannot be written: No space left on device.')

  def save_until_full(self, step, state, where):
    if step == 4:
      monkeypatch.setattr(run, 'replace_file', full)
      monkeypatch.setattr(self._checkpointer, 'save_pytree', full_disk)
    save(self, step, state, where)

  def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(loop.StageCheckpoints, 'save', save_until_full)
    with pytest.raises(UserError, match='the checkpoint of step 4 .* the one of step 2 is intact'):
      run.train(tiny_config, str(tmp_path / 'run'))
  monkeypatch.setattr(run, 'replace_file', replace_file)
  assert not (tmp_path / 'run' / 'summary.json').exists()
  run.train(tiny_config, str(tmp_path / 'run'))
  assert (tmp_path / 'run' / 'summary.json').exists()
  rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
  'error',
  [TypeError('a bug'), RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')],
)
def test_other_errors_of_saving_are_not_disguised(directory, monkeypatch, error):
  checkpoints = StageCheckpoints(directory)

  def broken(*args, **kwargs):
    raise error

  monkeypatch.setattr(checkpoints._checkpointer, 'save_pytree', broken)
  with pytest.raises(type(error), match=str(error)):
    checkpoints.save(4, state_at(4), position(4))
  checkpoints.close()


def test_half_written_checkpoint_of_a_killed_run_does_not_count(directory):
  """Orbax writes aside and renames; what a kill leaves behind has another name."""
  checkpoints = StageCheckpoints(directory)
  checkpoints.close()
  shutil.copytree(directory / '3', directory / '4.orbax-checkpoint-tmp')
  (directory / '4.orbax-checkpoint-tmp' / 'commit_success.txt').unlink(missing_ok=True)
  checkpoints, (state, _) = reopened(directory)
  assert_bits(state, state_at(3))
  checkpoints.save(4, state_at(4), position(4))
  assert checkpoints.steps == [3, 4]
  checkpoints.close()
  assert isinstance(directory, pathlib.Path)
