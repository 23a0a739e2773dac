"""Whole tiny experiments: what they write, and that a broken-off one ends as an unbroken one."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from eru_jax.errors import UserError
from eru_jax.training.metrics import read_metrics

LORA = [{'pattern': 'attn/', 'rank': 2, 'alpha': 2.0}]
ROOT = pathlib.Path(__file__).parent.parent


def start(config, workdir):
  from eru_jax.training.run import train

  train(config, str(workdir))


def checkpoint_arrays(workdir):
  """Every array of the newest checkpoint of every stage, as it was saved."""
  from orbax.checkpoint import v1 as ocp

  found = {}
  for stage in sorted((workdir / 'checkpoints').iterdir()):
    assert '.damaged' not in stage.name
    with ocp.training.Checkpointer(str(stage)) as checkpointer:
      step = checkpointer.latest.step
      tree = checkpointer.load_pytree(step)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      found[stage.name, step, jax.tree_util.keystr(path)] = np.asarray(leaf)
  return found


def timeless(workdir):
  """metrics.jsonl without what the clock says."""
  return [
    {k: v for k, v in row.items() if not k.startswith('time')}
    for row in read_metrics(workdir / 'metrics.jsonl')
  ]


def assert_same_run(workdir, unbroken, without=()):
  """Checkpoints, metrics and scores are the same, bit for bit; `without` leaves stages out."""
  both = (workdir, unbroken)
  arrays, expected = (
    {name: array for name, array in checkpoint_arrays(w).items() if name[0] not in without}
    for w in both
  )
  assert arrays.keys() == expected.keys()
  assert any('params' in name for _, _, name in arrays)
  for name, array in expected.items():
    assert array.tobytes() == arrays[name].tobytes(), name
  rows = [[row for row in timeless(w) if row['stage'] not in without] for w in both]
  assert json.dumps(rows[0]) == json.dumps(rows[1])
  scores = [json.loads((w / 'summary.json').read_text())['stages'] for w in both]
  for stage in without:
    del scores[1][stage]
  assert scores[0] == scores[1]


@pytest.fixture(params=[(), LORA], ids=['full', 'lora'])
def finished(request, tiny_config, tmp_path):
  """(config, workdir) of a run that has come to its end. Only to be read."""
  if not request.param:
    return tiny_config, request.getfixturevalue('tiny_run')
  config = tiny_config | {'lora': request.param}
  start(config, tmp_path / 'run')
  return config, tmp_path / 'run'


def test_run_writes_all_it_promises(finished, capsys):
  config, workdir = finished
  stored = json.loads((workdir / 'config.json').read_text())
  assert stored['dk_dm']['num_steps'] == 6
  assert len(stored['lora']) == len(config.get('lora', ()))
  # Teacher's pictures, DK-DM's rollouts and evaluation are guided, as in configs/emoji.py.
  assert stored['sampling']['cfg_scale'] != 1

  rows = read_metrics(workdir / 'metrics.jsonl')
  assert [(row['stage'], row['step']) for row in rows] == [
    *(('dk_dm', step) for step in range(1, 7)), *(('no_rl', step) for step in range(1, 5))
  ]  # fmt: skip
  for row in rows:
    assert np.isfinite(row['loss']) and row['grad_norm'] > 0 and row['skipped'] == 0
  assert all('reward' in row for row in rows if row['stage'] == 'no_rl')

  summary = json.loads((workdir / 'summary.json').read_text())
  assert list(summary['stages']) == ['base', 'dk_dm', 'no_rl']
  for scores in summary['stages'].values():
    assert set(scores) == {'explicit', 'train', 'wording', 'fact', 'unrelated', 'unrelated_drift'}
    for split in set(scores) - {'unrelated_drift'}:
      value = scores[split]
      assert 1 <= value['n'] <= 4
      assert 0 <= value['ci95'][0] <= value['accuracy'] <= value['ci95'][1] <= 1
  assert summary['stages']['base']['unrelated_drift'] == 0
  assert summary['stages']['dk_dm']['unrelated_drift'] > 0
  seconds = summary['seconds']
  assert {'load', 'dk_dm', 'no_rl', 'evaluate base', 'this start'} <= set(seconds)
  assert all(value >= 0 for value in seconds.values())
  assert summary['peak_memory_gb'] > 0.05 and summary['versions']['jax'] == jax.__version__

  report = (workdir / 'report.html').read_text(encoding='utf-8')
  assert config['title'] in report
  assert 'the insect that was once a caterpillar' in report and 'the animal that purrs' in report
  for split in ('explicit', 'train', 'wording', 'fact', 'unrelated'):
    assert (workdir / 'samples' / f'{split}.png').read_bytes().startswith(b'\x89PNG')

  arrays = checkpoint_arrays(workdir)
  assert {(stage, step) for stage, step, _ in arrays} == {('dk_dm', 6), ('no_rl', 4)}
  trained = [name for _, _, name in arrays if 'params' in name]
  # An adapter has two matrices a layer and nothing else of the network.
  assert bool(config.get('lora')) == all(re.search(r"\['[ab]'\]$", name) for name in trained)
  policy = [name for stage, _, name in arrays if stage == 'no_rl' and 'behaviour' in name]
  assert policy

  before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
  capsys.readouterr()
  start(config, workdir)
  assert 'This run is finished' in capsys.readouterr().out
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == before


def test_a_model_brings_its_text_encoder(tiny_config, tiny_model_dir, tmp_path):
  """A backbone that was pretrained on sentence vectors sees them in every stage, and in samples."""
  from eru_jax.training.restore import open_model
  from eru_jax.training.sampling import SampleRequest, sample

  model = tmp_path / 'model'
  shutil.copytree(tiny_model_dir, model)
  settings = json.loads((model / 'eru_jax.json').read_text())
  (model / 'eru_jax.json').write_text(json.dumps(settings | {'text_encoder': 'minilm_sentence'}))
  tiny_config['model']['source'] = str(model)
  # Pretraining hands the choice on to the model directory it makes.
  tiny_config['stages'] = ('flow_matching', 'dk_dm')
  tiny_config['flow_matching'] = dict(num_steps=2, batch_size=2)
  tiny_config['dk_dm'] |= dict(num_steps=2)
  start(tiny_config, tmp_path / 'run')

  for path in (tmp_path / 'run', tmp_path / 'run' / 'model'):
    experiment, _, _ = open_model(str(path), ['a prompt of mine'])
    assert experiment.conditioning(['a prompt of mine']).tokens.shape == (1, 1, 384)
  request = SampleRequest(str(tmp_path / 'run'), str(tmp_path / 'out'), prompts=('red apple',))
  assert list(sample(request).glob('**/*.png'))

  (model / 'eru_jax.json').write_text(json.dumps(settings | {'text_encoder': 't6'}))
  with pytest.raises(
    UserError, match=r"eru_jax.json: text_encoder is 't6' but must be one of mini"
  ):
    start(tiny_config, tmp_path / 'other')


def test_directory_of_something_else_is_refused(tiny_config, tmp_path):
  (tmp_path / 'thesis.tex').write_text('x')
  with pytest.raises(UserError, match=r'is not empty and holds no run .* another --workdir'):
    start(tiny_config, tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']
  with pytest.raises(UserError, match='choose another --workdir'):
    start(tiny_config, tmp_path / 'thesis.tex')


def test_damaged_config_of_a_workdir(tiny_config, tmp_path):
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(UserError, match=r'config.json is damaged .* choose another --workdir'):
    start(tiny_config, tmp_path)


def test_batches_that_do_not_divide_are_refused_before_anything_is_loaded(tiny_config, tmp_path):
  tiny_config['dk_dm'] |= {'rollouts': 3, 'accumulation': 2, 'teacher_batch': 4}
  with pytest.raises(UserError, match='`teacher_batch` is 4 but must be .* a multiple of'):
    start(tiny_config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_loss_that_stays_non_finite_ends_the_run(tiny_config, tmp_path, monkeypatch):
  from eru_jax.training import loop

  monkeypatch.setattr(loop, 'MAX_SKIPPED', 3)
  tiny_config['stages'] = ('dk_dm',)
  tiny_config['dk_dm']['preservation_weight'] = 3e38 * 10
  with pytest.raises(UserError, match=r'dk_dm: .* not finite in the last 3 updates up to step 3'):
    start(tiny_config, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'summary.json').exists()


# Below, runs in processes of their own, which may be killed.


def command(tiny_config, workdir, directory):
  path = directory / 'config.py'
  path.write_text(f'def get_config():\n  return {tiny_config!r}\n')
  return [sys.executable, '-m', 'eru_jax.train', f'--config={path}', f'--workdir={workdir}']


def launch(arguments):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  return subprocess.Popen(
    arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def to_the_end(arguments):
  process = launch(arguments)
  output, _ = process.communicate(timeout=1200)
  assert process.returncode == 0, output
  return output


def interrupt(arguments, stage_directory, number, delay):
  """Sends a signal `delay` seconds after the first checkpoint of a stage is there."""
  process = launch(arguments)
  deadline = time.monotonic() + 1200
  while not any(p.name.isdigit() for p in stage_directory.glob('*')):
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
    time.sleep(0.005)
  time.sleep(delay)
  process.send_signal(number)
  output, _ = process.communicate(timeout=600)
  return process.returncode, output


def moments():
  """Random moments, others in every run of the test; pytest shows the seed if it fails."""
  seed = random.SystemRandom().randrange(2**32)
  print(f'the moments of the kills come from random.Random({seed})')
  return random.Random(seed)


def longer(tiny_config):
  """Many iterations with a checkpoint each, so that a kill hits something."""
  tiny_config['dk_dm'] |= dict(num_steps=40, save_every=4)
  tiny_config['no_rl'] |= dict(num_steps=30, save_every=3)
  tiny_config['lora'] = LORA
  return tiny_config


@pytest.fixture
def unbroken(tiny_config, tmp_path):
  """(command for a workdir, workdir of the run that nothing disturbed)."""
  config = longer(tiny_config)
  to_the_end(command(config, tmp_path / 'unbroken', tmp_path))
  return lambda workdir: command(config, workdir, tmp_path), tmp_path / 'unbroken'


KILLED = """
import os, signal, sys
from eru_jax.training import loop, run
write = loop.MetricWriter.write
def write_and_die(self, name, done, values):
  write(self, name, done, values)
  if (name, done) == ('dk_dm', 3):
    os.kill(os.getpid(), signal.SIGKILL)
loop.MetricWriter.write = write_and_die
run.train({config!r}, {workdir!r})
"""


def test_a_run_killed_between_two_checkpoints_ends_as_an_unbroken_one(
  tiny_config, tiny_run, tmp_path
):
  """The fast sibling of the next one: SIGKILL at a step that no checkpoint has."""
  tiny_config['stages'] = ('dk_dm',)
  workdir = tmp_path / 'killed'
  script = KILLED.format(config=tiny_config, workdir=str(workdir))
  process = launch([sys.executable, '-c', script])
  output, _ = process.communicate(timeout=1200)
  assert process.returncode == -signal.SIGKILL, output
  assert [p.name for p in (workdir / 'checkpoints' / 'dk_dm').glob('[0-9]*')] == ['2']
  assert not (workdir / 'summary.json').exists()
  start(tiny_config, workdir)
  assert_same_run(workdir, tiny_run, without=('no_rl',))


@pytest.mark.slow
def test_killed_run_ends_as_an_unbroken_one(unbroken, tmp_path):
  make, expected = unbroken
  chance = moments()
  workdir = tmp_path / 'killed'
  for stage in ('dk_dm', 'no_rl'):
    code, output = interrupt(
      make(workdir), workdir / 'checkpoints' / stage, signal.SIGKILL, chance.uniform(0, 0.3)
    )
    assert code == -signal.SIGKILL, output
    assert not (workdir / 'summary.json').exists()
  to_the_end(make(workdir))
  assert_same_run(workdir, expected)


@pytest.mark.slow
def test_sigterm_saves_leaves_quietly_and_resumes_exactly(unbroken, tmp_path):
  make, expected = unbroken
  workdir = tmp_path / 'stopped'
  for stage in ('dk_dm', 'no_rl'):
    code, output = interrupt(make(workdir), workdir / 'checkpoints' / stage, signal.SIGTERM, 0.05)
    assert code == 0, output
    assert 'Traceback' not in output
    # All that has been done is saved: the last line of the metrics is that of the checkpoint.
    last = read_metrics(workdir / 'metrics.jsonl')[-1]
    saved = max(int(p.name) for p in (workdir / 'checkpoints' / stage).glob('[0-9]*'))
    assert (last['stage'], last['step']) == (stage, saved)
  to_the_end(make(workdir))
  assert_same_run(workdir, expected)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_in_its_diagnosis_goes_on_there(
  number, tiny_config, tmp_path, monkeypatch
):
  """`timeout` sends SIGTERM twice, here while no loop runs that could heed it."""
  tiny_config |= dict(stages=('dk_dm',), wandb_project='p')
  # Something like W&B, where the run's processes look first.
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'wandb.py').write_text(
    'import pathlib\n'
    'class Run:\n'
    '  define_metric = log = lambda *args, **kwargs: None\n'
    f'  def finish(self): pathlib.Path({str(tmp_path / "finished")!r}).touch()\n'
    'def init(**kwargs): return Run()\n'
  )
  tiny_config['evaluation'] |= dict(diagnosis=4)
  workdir = tmp_path / 'stopped'
  arguments = command(tiny_config, workdir, tmp_path)
  # Shells' background jobs ignore Ctrl-C, and hand that on.
  code = (
    'import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); '
    'runpy.run_module("eru_jax.train", run_name="__main__")'
  )
  process = launch([sys.executable, '-c', code, *arguments[3:]])
  before = ''
  while 'diagnosis: base' not in before:
    line = process.stdout.readline()
    assert line, before
    before += line
  process.send_signal(number)
  if number == signal.SIGTERM:
    process.send_signal(number)
  output, _ = process.communicate(timeout=120)
  words = 'error: interrupted; run' if number == signal.SIGINT else 'stopped at the features of '
  assert process.returncode == (130 if number == signal.SIGINT else 0), output
  assert sum(words in line for line in output.splitlines()) == 1, output
  assert not re.search('Traceback|ignored|Fatal|Segmentation', output), output
  assert not (workdir / 'diagnosis.json').exists() and not list(workdir.rglob('*.tmp'))
  assert (tmp_path / 'finished').exists()
  assert json.loads((workdir / 'seconds.json').read_text())['knowledge structure'] > 0
  again = to_the_end(arguments)
  assert 'loss' not in again and 'diagnosis: base' in again
  assert (workdir / 'diagnosis.json').is_file() and (workdir / 'report.html').is_file()


def shipped(tiny_config):
  """The recipe of configs/emoji.py: Muon, moving averages, microbatches.

  On a few layers only: XLA's CPU compiler unrolls every product of Muon's small matrices here, and
  takes minutes for those of a whole tiny network where a real one takes seconds.
  """
  tiny_config['lora'] = [{'pattern': 'context_embedder|text_embedder', 'rank': 2, 'alpha': 2.0}]
  tiny_config['dk_dm'] |= dict(accumulation=2)
  tiny_config['dk_dm']['optimizer'] |= dict(algorithm='muon', ema_decay=0.9)
  tiny_config['no_rl'] |= dict(accumulation=2)
  return tiny_config


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['shipped', 'whole'])
def test_run_resumed_in_process_ends_as_an_unbroken_one(recipe, tiny_config, tmp_path, monkeypatch):
  """SIGTERM at a known iteration of either stage."""
  from eru_jax.training import loop

  if recipe == 'shipped':
    shipped(tiny_config)
  start(tiny_config, tmp_path / 'unbroken')
  flush = loop.MetricWriter.write
  for stage, step in (('dk_dm', 3), ('dk_dm', 6), ('no_rl', 1)):

    def write(self, name, done, values, at=(stage, step)):
      flush(self, name, done, values)
      if (name, done) == at:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.MetricWriter, 'write', write)
    with pytest.raises(SystemExit) as caught:
      start(tiny_config, tmp_path / 'stopped')
    assert caught.value.code == 0
    # Before the first iteration is over there is nothing of a stage to save.
    saved = (tmp_path / 'stopped' / 'checkpoints' / stage / str(step)).is_dir()
    assert saved == (step > 1)
  monkeypatch.setattr(loop.MetricWriter, 'write', flush)
  start(tiny_config, tmp_path / 'stopped')
  assert_same_run(tmp_path / 'stopped', tmp_path / 'unbroken')


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(tiny_config, tmp_path):
  """The shipped recipe: one stage, one kill."""
  shipped(tiny_config)
  tiny_config['stages'] = ('dk_dm',)
  tiny_config['dk_dm'] |= dict(num_steps=60, save_every=3)
  workdir = tmp_path / 'killed'
  code, output = interrupt(
    command(tiny_config, workdir, tmp_path),
    workdir / 'checkpoints' / 'dk_dm',
    signal.SIGKILL,
    moments().uniform(0, 1),
  )
  assert code == -signal.SIGKILL, output
  assert not (workdir / 'summary.json').exists()
  start(tiny_config, workdir)
  start(tiny_config, tmp_path / 'unbroken')
  assert_same_run(workdir, tmp_path / 'unbroken')


def test_crash_between_metrics_and_checkpoint_leaves_no_trace(tiny_config, tmp_path, monkeypatch):
  from eru_jax.training import loop

  tiny_config['stages'] = ('dk_dm',)
  start(tiny_config, tmp_path / 'unbroken')
  save = loop.StageCheckpoints.save

  def crash(self, step, state, position):
    if step == 4:
      raise RuntimeError('power cut')
    save(self, step, state, position)

  monkeypatch.setattr(loop.StageCheckpoints, 'save', crash)
  with pytest.raises(RuntimeError, match='power cut'):
    start(tiny_config, tmp_path / 'crashed')
  assert read_metrics(tmp_path / 'crashed' / 'metrics.jsonl')[-1]['step'] == 4
  monkeypatch.setattr(loop.StageCheckpoints, 'save', save)
  start(tiny_config, tmp_path / 'crashed')
  assert_same_run(tmp_path / 'crashed', tmp_path / 'unbroken')
