"""The directory of a run: whose it is, what it keeps, and that only training changes it."""

import json
import os
import shutil
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eru_jax.errors import UserError
from eru_jax.training import loop, run
from eru_jax.training import workdir as workdir_lib
from eru_jax.training.config import ExperimentConfig, StageConfig, from_mapping, to_json
from eru_jax.training.experiment import resolve
from eru_jax.training.restore import open_model, read_config, snapshots

RESULTS = ('checkpoints', 'evaluations', 'metrics.jsonl', 'summary.json', 'model')


def claim(config, workdir):
  workdir_lib.claim(workdir, to_json(resolve(from_mapping(ExperimentConfig, config))))


def stored(workdir):
  return json.loads((workdir / 'config.json').read_text())


class OpenedError(Exception):
  """Stands for all that happens after a workdir has been claimed."""


@pytest.fixture
def start(monkeypatch):
  """Starts a run that ends where it would begin to load things."""

  def opened(*unused):
    raise OpenedError

  monkeypatch.setattr(run.experiment_lib, 'open_experiment', opened)

  def start(config, workdir):
    with pytest.raises(OpenedError):
      run.train(config, str(workdir))

  return start


def test_a_judge_that_moves_is_the_same_judge(tiny_config, tmp_path):
  def with_judge(**judge):
    values = {'url': 'http://127.0.0.1:8000/v1', 'model': 'm'} | judge
    return tiny_config | {'no_rl': {'reward': 'judge', 'judge': values}}

  claim(with_judge(), tmp_path / 'run')
  (tmp_path / 'run' / 'metrics.jsonl').write_text('{}\n')
  claim(with_judge(url='http://127.0.0.1:8001/v1', max_tokens=4096), tmp_path / 'run')
  with pytest.raises(UserError, match='another config .no_rl.judge.model was'):
    claim(with_judge(model='n'), tmp_path / 'run')


def test_a_failed_first_start_leaves_the_workdir_free(tiny_config, tiny_pairs, tmp_path):
  workdir = tmp_path / 'run'
  wrong = tiny_config | {'data': {'pairs': str(tmp_path / 'nosuch.jsonl')}}
  with pytest.raises(UserError, match='There is no prompt file'):
    run.train(wrong, str(workdir))
  # Timings and curves are no results either.
  assert {path.name for path in workdir.iterdir()} == {'config.json', 'seconds.json'}
  (workdir / 'tensorboard').mkdir()
  claim(tiny_config, workdir)
  assert stored(workdir)['data']['pairs'] == str(tiny_pairs)
  # A model that is not there, or a mesh no machine has, is noticed as early or earlier.
  missing = tiny_config | {'model': {'source': str(tmp_path / 'nosuch')}}
  with pytest.raises(UserError, match='There is no model directory'):
    run.train(missing, str(workdir))
  with pytest.raises(UserError, match='device'):
    run.train(tiny_config | {'mesh': {'data': 97}}, str(tmp_path / 'other'))
  claim(tiny_config | {'seed': 3}, tmp_path / 'other')


@pytest.mark.parametrize('name', RESULTS)
def test_results_of_another_config_are_not_continued(name, tiny_config, tmp_path):
  workdir = tmp_path / 'run'
  claim(tiny_config, workdir)
  (workdir / name).mkdir()
  before = (workdir / 'config.json').read_bytes()
  other = tiny_config | {'no_rl': tiny_config['no_rl'] | {'beta': 0.5}}
  with pytest.raises(UserError, match=r'another config \(no_rl.beta was 1.0 and is now 0.5\)'):
    claim(other, workdir)
  # What no number depends on may change.
  claim(tiny_config | {'title': 'New'}, workdir)
  assert (workdir / 'config.json').read_bytes() == before


def test_changed_prompts_are_not_continued_with(tiny_config, tiny_pairs, tmp_path, start):
  pairs = tmp_path / 'pairs.jsonl'
  shutil.copy(tiny_pairs, pairs)
  tiny_config['data']['pairs'] = str(pairs)
  workdir = tmp_path / 'run'
  start(tiny_config, workdir)
  # Nothing has been learnt from the file yet.
  pairs.write_bytes(tiny_pairs.read_bytes() + b'\n')
  start(tiny_config, workdir)
  (workdir / 'metrics.jsonl').touch()
  start(tiny_config, workdir)
  shutil.copy(tiny_pairs, pairs)
  with pytest.raises(UserError, match=r'pairs.jsonl has changed since the run in .* began: ') as e:
    run.train(tiny_config, str(workdir))
  assert '\n' not in str(e.value)
  pairs.write_bytes(tiny_pairs.read_bytes() + b'\n')
  start(tiny_config, workdir)


def test_a_run_is_found_from_another_directory(
  tiny_config, tiny_model_dir, tiny_pairs, tmp_path, start, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  tiny_config['model']['source'] = os.path.relpath(tiny_model_dir)
  tiny_config['data']['pairs'] = os.path.relpath(tiny_pairs)
  start(tiny_config, tmp_path / 'run')
  (tmp_path / 'run' / 'metrics.jsonl').touch()
  (tmp_path / 'elsewhere').mkdir()
  monkeypatch.chdir(tmp_path / 'elsewhere')
  config, workdir = read_config('../run')
  assert workdir.samefile(tmp_path / 'run')
  assert os.path.samefile(config.model.source, tiny_model_dir)
  assert os.path.samefile(config.data.pairs, tiny_pairs)
  assert os.path.isabs(config.model.source) and os.path.isabs(config.data.pairs)


def test_a_workdir_states_the_text_encoder_that_is_used(
  tiny_config, tiny_model_dir, tmp_path, start
):
  model = tmp_path / 'model'
  shutil.copytree(tiny_model_dir, model)
  settings = json.loads((model / 'eru_jax.json').read_text())
  own = {'text_encoder': 'minilm_sentence', 'text_length': 30}
  (model / 'eru_jax.json').write_text(json.dumps(settings | own))
  tiny_config['model'] = {'source': str(model)}
  workdir = tmp_path / 'run'
  start(tiny_config, workdir)
  found = stored(workdir)['model']
  assert {name: found[name] for name in own} == own and found['resolution'] == 64
  assert read_config(str(workdir))[0].model.text_encoder == 'minilm_sentence'
  tiny_config['model']['text_encoder'] = 'minilm'
  with pytest.raises(UserError, match=r"model.text_encoder is 'minilm', but the model in "):
    run.train(tiny_config, str(tmp_path / 'other'))
  assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize('named', [{}, {'text_encoder': 'minilm'}])
def test_workdirs_of_earlier_versions_go_on(
  named, tiny_config, tiny_model_dir, tmp_path, start, monkeypatch
):
  """They kept paths as typed, no hashes, and another text encoder than they used, or none."""
  monkeypatch.chdir(tmp_path)
  shutil.copytree(tiny_model_dir, tmp_path / 'model')
  settings = json.loads((tmp_path / 'model' / 'eru_jax.json').read_text())
  settings['text_encoder'] = 'minilm_sentence'
  (tmp_path / 'model' / 'eru_jax.json').write_text(json.dumps(settings))
  tiny_config['model']['source'] = 'model'
  old = to_json(from_mapping(ExperimentConfig, tiny_config))
  for name in ('text_encoder', 'text_length', 'resolution'):
    del old['model'][name]
  old['model'] |= {'text_length': 24, 'resolution': 64, **named}
  workdir = tmp_path / 'run'
  (workdir / 'checkpoints').mkdir(parents=True)
  (workdir / 'config.json').write_text(json.dumps(old))
  assert read_config('run')[0].model.text_encoder == 'minilm_sentence'
  start(tiny_config, workdir)
  with pytest.raises(UserError, match='another config .seed was 0 and is now 1'):
    run.train(tiny_config | {'seed': 1}, str(workdir))


def test_training_needs_the_resolution_of_the_world(tiny_config, tiny_model_dir, tmp_path):
  tiny_config['model']['resolution'] = 128
  words = 'model.resolution is 128, but the pictures of the world are of 64 x 64 pixels: set it to'
  with pytest.raises(UserError, match=words):
    run.train(tiny_config, str(tmp_path / 'run'))
  # Pictures can be drawn at another size.
  model = tmp_path / 'model'
  shutil.copytree(tiny_model_dir, model)
  settings = json.loads((model / 'eru_jax.json').read_text())
  (model / 'eru_jax.json').write_text(json.dumps(settings | {'resolution': 32}))
  _, snapshot, _ = open_model(str(model), ['red apple'])
  assert (snapshot.model.height, snapshot.model.width) == (32, 32)


def everything(directory):
  """Paths below a directory, and when they were changed."""
  return {path: path.stat().st_mtime_ns for path in directory.rglob('*')}


def test_a_run_is_only_read_by_what_draws_from_it(tiny_run, tmp_path, caplog):
  workdir = tmp_path / 'run'
  shutil.copytree(tiny_run, workdir)
  shutil.rmtree(workdir / 'checkpoints' / 'no_rl' / '4')
  shutil.rmtree(workdir / 'checkpoints' / 'dk_dm' / '6' / 'state')
  before = everything(workdir)
  experiment, base, directory = open_model(str(workdir), ['red apple'])
  assert [label for label, _ in snapshots(experiment, base, directory)] == [
    'base', 'dk_dm', 'no_rl'
  ]  # fmt: skip
  assert everything(workdir) == before
  # A damaged checkpoint and a stage that is not at its end are both told.
  assert 'dk_dm/6 is damaged' in caplog.text
  assert 'stage dk_dm is at step 4 of 6' in caplog.text
  assert 'stage no_rl is at step 2 of 4' in caplog.text


def test_time_per_step_is_that_of_all_steps_since_the_last_line(tmp_path, monkeypatch):
  """Iterations return at once; what they take is waited for where their measurements are read."""
  clock = types.SimpleNamespace(now=100.0, queued=0)

  class Measurement:
    def __array__(self, dtype=None, copy=None):
      clock.now, clock.queued = clock.now + 2.0 * clock.queued, 0
      return np.zeros((), dtype)

  def iterate(state, frozen, batch, key):
    clock.queued += 1
    return state, {'loss': Measurement(), 'skipped': Measurement()}

  written = {}
  writer = types.SimpleNamespace(
    write=lambda name, step, values: written.update({step: values['time_per_step']}),
    truncate_after=lambda *unused: None,
    flush=lambda: None,
  )
  state = types.SimpleNamespace(step=0, ema=None)
  checkpoints = types.SimpleNamespace(
    restore=lambda like: (state, {}), save=lambda *unused: None, close=lambda: None
  )
  batches = mock.MagicMock()
  stage = loop.Stage(None, jnp.zeros(1), dict, batches, lambda batch: batch)
  monkeypatch.setattr(loop, 'time', types.SimpleNamespace(monotonic=lambda: clock.now))
  monkeypatch.setattr(loop, 'initialiser', lambda *unused: (None, None, jnp.zeros(1)))
  monkeypatch.setattr(loop, 'StageCheckpoints', lambda *unused: checkpoints)
  monkeypatch.setattr(loop, 'compile_stage', lambda *unused: iterate)
  monkeypatch.setattr(loop, 'on_mesh', lambda batch, mesh: batch)
  config = StageConfig(num_steps=11, log_every=5)
  loop.run_stage('s', stage, config, jax.random.key(0), None, tmp_path, writer, ('s',))
  assert written == {1: 2.0, 5: 2.0, 10: 2.0, 11: 2.0}
