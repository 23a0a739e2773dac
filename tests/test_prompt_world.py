"""A world of prompts only: no pictures are known, and no judge looks."""

import json

import numpy as np
import pytest

from eru_jax.data.pairs import KnowledgePair
from eru_jax.data.world import load_prompt_world
from eru_jax.errors import UserError
from eru_jax.training import config as config_lib
from eru_jax.training.evaluation import mean_distance, pixel_distance

PAIRS = [
  {'implicit': 'the fruit that fell on Newton', 'explicit': 'a red apple'},
  {'implicit': 'what a caterpillar becomes', 'explicit': 'a butterfly'},
  {'implicit': 'what Newton is said to have seen fall', 'explicit': 'a red apple'},
  {'implicit': 'an unripe apple', 'explicit': 'a green apple', 'split': 'wording'},
  {'implicit': 'a bridge at night', 'explicit': 'a bridge at night', 'split': 'unrelated'},
]


@pytest.fixture
def files(tmp_path):
  """A prompt file, and one of prompts that are to stay as they are."""
  pairs, others = tmp_path / 'pairs.jsonl', tmp_path / 'others.txt'
  pairs.write_text(''.join(json.dumps(row) + '\n' for row in PAIRS))
  others.write_text('a chair\n\na street in the rain\na chair\n')
  return str(pairs), str(others)


def test_it_holds_what_the_files_say(files):
  pairs, others = files
  world = load_prompt_world(pairs, others=others)
  assert world.pictures is None and world.others == ('a chair', 'a street in the rain')
  asked = {split: [p.implicit for p in table.pairs] for split, table in world.splits.items()}
  assert asked == {
    'train': [row['implicit'] for row in PAIRS[:3]],
    'wording': ['an unripe apple'],
    'unrelated': ['a bridge at night'],
    'explicit': ['a red apple', 'a butterfly'],
  }
  assert all(table.index is None for table in world.splits.values())
  assert {'a chair', 'a bridge at night', 'a green apple'} <= set(world.all_prompts)
  assert load_prompt_world('').all_prompts == []


def test_a_distance_has_an_interval():
  white, grey = (np.full((4, 2, 2, 3), value, np.uint8) for value in (255, 204))
  grey[0] = 255
  distances = pixel_distance(white, grey)
  np.testing.assert_allclose(distances, [0, 0.2, 0.2, 0.2], rtol=1e-5)
  found = mean_distance(distances, [KnowledgePair(name, name) for name in 'abcd'])
  assert found['n'] == 4 and found['anchor_distance'] == pytest.approx(0.15)
  half = 3.182446 * 0.1 / 2  # Student's t of three degrees of freedom
  assert found['ci95'] == pytest.approx([0.15 - half, 0.15 + half], abs=1e-6)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'data': {'world': 'prompts'}}, '`pairs` is .emoji_knowledge.'),
    ({'data': {'world': 'photos'}}, 'one of emoji, prompts'),
    ({'data': {'others': 'prompts.txt'}}, "`others` is .* '' in the emoji world"),
    (
      {'data': {'world': 'prompts', 'pairs': 'x'}, 'stages': ('reward', 'dk_dm')},
      "data.world is 'prompts', but stage reward learns from the pictures",
    ),
    (
      {'data': {'world': 'prompts', 'pairs': 'x'}, 'dk_dm': {'variant': 'supervised'}},
      "dk_dm.variant 'supervised' learns from the pictures",
    ),
  ],
)
def test_what_needs_pictures_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    config_lib.from_mapping(config_lib.ExperimentConfig, {'stages': ('dk_dm',)} | changes)


def test_a_run_learns_and_reports_without_a_judge(tiny_config, files, tmp_path):
  from eru_jax.training.run import train

  pairs, others = files
  data = {'world': 'prompts', 'pairs': pairs, 'others': others}
  config = tiny_config | {'data': data, 'stages': ('dk_dm',)}
  del config['no_rl']
  config['dk_dm']['num_steps'] = 2
  train(config, str(tmp_path / 'run'))
  stages = json.loads((tmp_path / 'run' / 'summary.json').read_text())['stages']
  assert list(stages) == ['base', 'dk_dm']
  for scores in stages.values():
    assert set(scores) == {'train', 'wording', 'unrelated_drift'}
    assert scores['train']['n'] == 3 and 0 < scores['train']['anchor_distance'] < 1
  assert stages['base']['unrelated_drift'] == 0 < stages['dk_dm']['unrelated_drift']
  report = (tmp_path / 'run' / 'report.html').read_text()
  assert 'Distance from what the base draws of the explicit anchor' in report
  assert 'No judge looked at these pictures' in report
  assert 'Share of right pictures' not in report and 'judged' not in report
  grids = {path.name for path in (tmp_path / 'run' / 'samples').iterdir()}
  assert grids == {'train.png', 'wording.png', 'explicit.png', 'unrelated.png'}
  # One that was stopped, of a version with other intervals: they come of its pictures anew.
  kept = tmp_path / 'run' / 'evaluations' / 'base.json'
  kept.write_text(json.dumps({'train': {'anchor_distance': 0.5, 'n': 3, 'ci95': [0, 9]}}))
  (tmp_path / 'run' / 'summary.json').unlink()
  train(config, str(tmp_path / 'run'))
  again = json.loads((tmp_path / 'run' / 'summary.json').read_text())['stages']
  assert again == stages and 'clusters' in again['base']['train']
  # The same files, and nothing left to do; with another one it is another run.
  train(config, str(tmp_path / 'run'))
  with open(others, 'a') as file:
    file.write('a horse\n')
  with pytest.raises(UserError, match='others.txt has changed'):
    train(config, str(tmp_path / 'run'))
