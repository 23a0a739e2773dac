"""`sample` and `evaluate` on meshes and in several processes: as one process on one device."""

import csv
import json
import re
import signal
import threading

import numpy as np
import processes
import pytest
from benchmark_files import write_wise
from judge_server import JudgeServer, answers
from PIL import Image
from test_evaluate_judged import explicitly, is_check, marks
from test_evaluator import Studio

from eru_jax.evaluating.evaluator import evaluate
from eru_jax.evaluating.request import EvaluationRequest
from eru_jax.training.run import train
from eru_jax.weights.tiny_models import write_tiny_flux

PROGRAM = processes.ROOT / 'tests' / 'drawing_process.py'


def start(wanted, place, count, devices=4, **more):
  return processes.Processes([PROGRAM, json.dumps(wanted)], place, count, devices, **more)


def pixels(directory):
  return {
    str(path.relative_to(directory)): np.asarray(Image.open(path).convert('RGB')).astype(int)
    for path in sorted(directory.rglob('*.png'))
  }


def assert_same_pictures(directory, other, count):
  mine, theirs = pixels(directory), pixels(other)
  assert mine.keys() == theirs.keys() and len(mine) >= count
  for name in mine:
    # Sums are taken in another order, which may turn the last bit of a pixel.
    assert name.endswith('grid.png') or np.abs(mine[name] - theirs[name]).max() <= 1, name


# With a model that has all that FLUX.1 has, but is tiny.


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  place = tmp_path_factory.mktemp('drawing')
  write_wise(place / 'WISE')
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  Image.fromarray(noise).save(place / 'given.png')
  return place


def commands(place, name, mesh):
  """Both commands, each with what only it can be given; one compiled program draws for both."""
  drawn = dict(height=64, width=64, batch_size=4, mesh=mesh)
  sampled = dict(model='tiny_flux', prompts=['a red apple', 'a hat'], num_images=2, steps=2)
  image = dict(image=str(place / 'given.png'), strength=0.5)
  asked = dict(models=['tiny_flux'], benchmark='wise', data=str(place / 'WISE'), limit=3, steps=1)
  scorer = dict(scorer='clip_score', scorer_model='tiny_clip')
  return [
    ['sample', {**drawn, **sampled, **image, 'output': str(place / name / 'sampled')}],
    ['evaluate', {**drawn, **asked, **scorer, 'output': str(place / name / 'evaluated')}],
  ]


@pytest.fixture(scope='module')
def alone(place):
  """What one process makes of them on one device."""
  started = start(commands(place, 'alone', None), place / 'alone', 1, 1)
  assert started.wait() == [0], started
  return place / 'alone'


@pytest.mark.parametrize(('count', 'mesh'), [(2, 'data=1,fsdp=-1'), (1, 'data=2,fsdp=2')])
def test_the_same_pictures_and_scores_on_four_devices(count, mesh, place, alone):
  name = f'{count} processes'
  started = start(commands(place, name, mesh), place / name, count)
  assert started.wait() == [0] * count, started
  assert_same_pictures(place / name, alone, 4 + 1 + 6)
  found, expected = (
    [float(row['clip_score']) for row in csv.DictReader((root / 'evaluated/pictures.csv').open())]
    for root in (place / name, alone)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)
  assert len(set(np.round(found, 2))) > 3
  for index in range(1, count):
    printed = started.output(index)
    assert not re.search('Scores|picture|clip_score|error|warning', printed), printed
  assert not list(place.rglob('*.tmp'))


def test_what_one_process_cannot_read_ends_all(tmp_path):
  write_wise(tmp_path / 'WISE')
  homes = [{'HOME': tmp_path / str(index)} for index in range(2)]
  for home in homes:
    home['HOME'].mkdir()
  write_tiny_flux(tmp_path / '0' / 'model')
  arguments = [
    '-m', 'eru_jax.evaluate', '--model=~/model', '--benchmark=wise', f'--data={tmp_path / "WISE"}',
    f'--output={tmp_path / "out"}', '--scorer=none',
  ]  # fmt: skip
  started = processes.Processes(arguments, tmp_path / 'run', 2, 2, own=homes)
  assert started.wait(200) == [2, 2], started
  for index in range(2):
    (line,) = (line for line in started.output(index).splitlines() if 'error' in line)
    assert line.startswith('error: process 1: --model=~/model is neither the workdir'), started
    assert 'Traceback' not in started.output(index)


# With stand-ins: what becomes of files, servers and processes.


def test_killed_then_stopped_then_given_again(tmp_path, monkeypatch):
  """Two processes, of which process 0 alone has questions, a disk, keys and a network."""
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'
  request = dict(models=['m'], benchmark='wise', conditions=['implicit'], data=str(data))
  hold, held = threading.Event(), threading.Event()

  def judge(asked):
    if hold.is_set() and not is_check(asked) and len(judging.requests) > 6:
      held.set()
      judging.over.wait(600)
    return marks(asked)

  keys = dict.fromkeys(('ERU_JAX_JUDGE_KEY', 'ERU_JAX_REWRITER_KEY'), 'the-key')
  with (
    JudgeServer(usual=answers(judge)) as judging,
    JudgeServer(usual=answers(explicitly)) as writing,
  ):
    wanted = {'place': str(tmp_path), 'judge': judging.url, 'rewriter': writing.url}
    wanted['request'] = request | {'output': str(out)}

    def run(name, **more):
      return start(wanted | more, tmp_path / name, 2, 2, own=[keys, {}])

    killed = run('killed', kill_at=18)
    assert killed.wait(200) == [1, -signal.SIGKILL], killed
    assert re.search(r'error: process 1 was last heard of \d+ s ago', killed.output(0)), killed
    kept = {path: path.stat().st_mtime_ns for path in out.rglob('*.png')}
    assert len(kept) in (16, 20) and not (out / 'evaluation.json').exists()

    hold.set()
    stopped = run('stopped')
    assert held.wait(200), stopped
    stopped.processes[1].send_signal(signal.SIGTERM)
    assert stopped.wait(200) == [0, 0], stopped  # where the judge would take minutes
    assert 'stopped at the scores; the same command continues' in stopped.output(0)
    assert not re.search('error|stopped', stopped.output(1)) and 'error' not in stopped.output(0)
    verdicts = len((out / 'verdicts.jsonl').read_text().splitlines())
    assert verdicts >= 3

    hold.clear()
    judging.requests = []
    ended = run('ended')
    assert ended.wait(200) == [0, 0], ended
    # Three stages of 13 pictures, and 12 of rewritten prompts.
    assert len(judging.requests) == 3 * 13 + 12 - verdicts
    # One prompt cannot be rewritten: at each of three starts it is asked about three times.
    assert len(writing.requests) == 12 + 3 * 3
    headers = [asked['headers'] for asked in (*judging.requests, *writing.requests)]
    assert {found['Authorization'] for found in headers} == {'Bearer the-key'}
  assert [ended.output(index).splitlines()[-1] for index in range(2)] == ['0 drawn', '0 drawn']
  assert {path: path.stat().st_mtime_ns for path in kept} == kept
  found = json.loads((out / 'evaluation.json').read_text())['stages']
  assert {name: one['implicit']['score'] for name, one in found.items()} == pytest.approx(
    {'base': 0, 'dk_dm': 0.5, 'no_rl': 1}
  )
  # The pictures are those of one process to which nothing has happened.
  Studio(monkeypatch, tmp_path)

  def rewrite(prompts):
    found = [prompt.rpartition(' ')[2] for prompt in prompts]
    return [None if number == '701' else f'thing {number}' for number in found]

  whole = str(tmp_path / 'whole')
  evaluate(
    EvaluationRequest(
      **request | {'models': ('m',), 'conditions': ('implicit',)}, output=whole, scorer='none',
      rewriters={'rewritten': rewrite},
    )
  )  # fmt: skip
  mine, theirs = pixels(out), pixels(tmp_path / 'whole')
  assert mine.keys() == theirs.keys() and len(mine) == 3 * 13 + 12
  assert all((mine[name] == theirs[name]).all() for name in mine)


@pytest.mark.slow
def test_the_stages_of_a_run(tiny_config, tiny_pairs, tmp_path):
  """Restored from checkpoints in two processes, stopped while they draw, judged, adapted."""
  config = processes.small(tiny_config, steps=2)
  run = tmp_path / 'run'
  train(config | dict(lora=[dict(pattern='.*', rank=2, alpha=4.0)], mesh={}), str(run))

  def wanted(name):
    place = tmp_path / name
    asked = dict(models=[str(run)], data=str(tiny_pairs), batch_size=4, images_per_prompt=16)
    drawn = dict(model=str(run), prompts=['red apple', 'cat'], mesh='data=1,fsdp=-1')
    adapter = dict(lora=[str(run / 'adapters' / 'dk_dm.safetensors')], lora_scale=[0.5])
    return [
      ['evaluate', asked | dict(output=str(place / 'evaluated'))],
      ['sample', drawn | adapter | dict(output=str(place / 'sampled'))],
    ]

  out = tmp_path / 'two'
  stopped = start(wanted('two'), out, 2)
  stopped.until(lambda: len(list(out.rglob('implicit/*.png'))) > 8)
  stopped.processes[1].send_signal(signal.SIGTERM)
  assert stopped.wait() == [0, 0], stopped
  found = re.search(r'stopped after (\d+) of (\d+) pictures of (\w+); the', stopped.output(0))
  drawn = list((out / 'evaluated' / 'pictures' / found[3]).rglob('*.png'))
  assert len(drawn) == int(found[1]) < int(found[2]) == 6 * 2 * 16
  assert 'stopped' not in stopped.output(1)
  kept = {path: path.stat().st_mtime_ns for path in drawn}
  for name, count, devices in (('two', 2, 4), ('one', 1, 1)):
    started = start(wanted(name), tmp_path / name, count, devices)
    assert started.wait() == [0] * count, started
  assert {path: path.stat().st_mtime_ns for path in kept} == kept
  assert_same_pictures(out, tmp_path / 'one', 2 * 192 + 2)
  mine, theirs = (
    json.loads((tmp_path / name / 'evaluated' / 'evaluation.json').read_text())
    for name in ('two', 'one')
  )
  assert list(mine['stages']) == ['base', 'dk_dm']
  assert mine['pairs'] == theirs['pairs'] and mine['stages'] == theirs['stages']
