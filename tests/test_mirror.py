"""Workdirs on an object store, which here is a directory behind the protocol gs://."""

import pathlib

import jax.numpy as jnp
import pytest

from eru_jax.errors import UserError
from eru_jax.files import as_path
from eru_jax.training import workdir as workdir_lib
from eru_jax.training.checkpoint import StageCheckpoints
from eru_jax.training.metrics import MetricWriter, read_metrics
from eru_jax.training.mirror import Workdir
from eru_jax.training.restore import read_config

fsspec = pytest.importorskip('fsspec')


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """The directory that plays the bucket, and the cache it is mirrored in."""
  from fsspec.implementations.dirfs import DirFileSystem

  (tmp_path / 'store').mkdir()
  made = fsspec.filesystem
  store = DirFileSystem(str(tmp_path / 'store'), made('file', auto_mkdir=True))

  class Store(DirFileSystem):
    def _join(self, path):
      return super()._join(
        [self._name(p) for p in path] if isinstance(path, list) else self._name(path)
      )

    @staticmethod
    def _name(path):
      return str(path).removeprefix('gs://')

  store.__class__ = Store
  monkeypatch.setattr(
    fsspec, 'filesystem', lambda name, **options: store if name in ('gs', 'gcs') else made(name)
  )
  monkeypatch.setenv('ERU_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'store' / 'bucket'


def test_paths_of_stores_are_not_mangled(tmp_path, monkeypatch):
  assert str(as_path('gs://bucket/runs/one')) == 'gs://bucket/runs/one'
  assert str(as_path('gs://bucket/runs') / 'checkpoints' / '3') == 'gs://bucket/runs/checkpoints/3'
  monkeypatch.chdir(tmp_path)
  assert as_path('runs/one') == tmp_path / 'runs' / 'one'
  assert isinstance(as_path(tmp_path), pathlib.Path)
  assert Workdir(str(tmp_path)).local == tmp_path
  with pytest.raises(UserError, match='gs://bucket/run is not on this machine: copy it'):
    read_config('gs://bucket/run')


def test_a_run_goes_on_from_what_the_store_holds(bucket):
  config = {'title': 'one', 'adapter': '', 'data': {'pairs': '', 'others': ''}}
  first = Workdir('gs://bucket/runs/one')
  workdir_lib.join(first, config)
  assert (bucket / 'runs' / 'one' / 'config.json').is_file()
  with MetricWriter(first.local, after_flush=first.push) as writer:
    writer.write('dk_dm', 1, {'loss': 2.0})
    writer.flush()
    writer.write('dk_dm', 2, {'loss': 1.0})
    # What is not flushed was written after the last checkpoint: a killed run may lose it.
    assert [row['step'] for row in read_metrics(bucket / 'runs' / 'one' / 'metrics.jsonl')] == [1]
  assert list((bucket / 'runs' / 'one' / 'tensorboard' / 'dk_dm').iterdir())
  (bucket / 'runs' / 'one' / 'checkpoints' / 'dk_dm').mkdir(parents=True)

  # Another machine knows nothing but the store.
  (first.local / 'metrics.jsonl').write_text('of another life')
  second = Workdir('gs://bucket/runs/one')
  workdir_lib.join(second, config)
  assert [row['loss'] for row in read_metrics(second.local / 'metrics.jsonl')] == [2.0, 1.0]
  assert not (second.local / 'checkpoints').exists()
  with pytest.raises(UserError, match='belongs to a run of another config'):
    workdir_lib.join(Workdir('gs://bucket/runs/one'), config | {'seed': 1})


def test_a_store_out_of_reach_is_named(tmp_path, monkeypatch):
  def fail(self):
    raise ImportError('gcsfs is not installed')

  monkeypatch.setenv('ERU_JAX_CACHE', str(tmp_path))
  monkeypatch.setattr('etils.epath.gpath.PosixGPath.exists', fail)
  with pytest.raises(UserError, match=r'gs://other/run cannot be reached \(gcsfs is not installed'):
    workdir_lib.join(Workdir('gs://other/run'), {})


def test_checkpoints_keep_their_place_on_a_store(monkeypatch):
  opened = []

  class Checkpointer:
    checkpoints = ()

    def __init__(self, directory, **options):
      opened.append(directory)

  from eru_jax.training import checkpoint

  monkeypatch.setattr(checkpoint.ocp.training, 'Checkpointer', Checkpointer)
  monkeypatch.setattr('etils.epath.gpath.PosixGPath.mkdir', lambda self, **options: None)
  checkpoints = StageCheckpoints(as_path('gs://bucket/run') / 'checkpoints' / 'dk_dm')
  assert opened == ['gs://bucket/run/checkpoints/dk_dm']
  assert checkpoints.restore({'w': jnp.zeros(2)}) is None
