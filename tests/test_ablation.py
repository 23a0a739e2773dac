"""The ablation's bookkeeping; whether its rows train is the slow test's question."""

import importlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture(scope='module')
def modules(benchmarks):
  del benchmarks
  return importlib.import_module('ablation_results'), importlib.import_module('ablation_rows')


def _alone(results, prompts):
  """Every prompt of every split is about something else."""
  return dict.fromkeys(results.SPLITS, range(prompts))


def test_every_row_is_a_config_of_its_own(modules):
  """Names and directories are unique, starts exist before they are needed, values are valid."""
  from eru_jax.training.config import to_json
  from eru_jax.training.variants import dk_dm, no_rl

  _, rows = modules
  names = [row.name for row in rows.ROWS]
  assert len({rows.slug(name) for name in names}) == len(names)
  seen, variants = {}, {'dk_dm': set(), 'no_rl': set()}
  for i, row in enumerate(rows.ROWS):
    config = rows.config_of(row, seed=3)
    assert config.seed == 3
    assert row.start == 'base' or row.start in names[:i]
    if row.group != 'base':
      key = json.dumps(to_json(config), sort_keys=True)
      assert key not in seen, (row.name, seen[key])
      seen[key] = row.name
    for stage in config.stages:
      variants[stage].add(config.stage(stage).variant)
  assert variants == {'dk_dm': set(dk_dm.VARIANTS), 'no_rl': set(no_rl.VARIANTS)}


def test_quick_is_quick(modules):
  _, rows = modules
  config = rows.config_of(rows.ROWS[1], seed=0, quick=True)
  assert config.dk_dm.num_steps == 2 and config.data.max_facts == 8


def test_intervals_resample_seeds_and_prompts(modules):
  results, _ = modules
  rng = np.random.default_rng(1)
  verdicts = (rng.random((3, 400)) < 0.3).astype(int)
  mean, low, high = results.resampled(verdicts, range(400))
  assert mean == verdicts.mean() and low < mean < high
  # Independent verdicts: seeds and prompts resampled together, at most twice the binomial's width.
  width = 2 * 1.96 * (0.3 * 0.7 / 1200) ** 0.5
  assert 0.9 * width < high - low < 2.2 * width
  # What one seed learnt and the others did not is uncertain, however many prompts there are.
  split = np.repeat([[1], [0], [0]], 400, 1)
  assert results.resampled(split, range(400))[1:] == (0.0, 1.0)
  assert results.resampled(np.ones((2, 5)), range(5)) == (1.0, 1.0, 1.0)
  # Wordings that are right together say no more than one of them.
  facts, alike = np.repeat(np.arange(100), 4), np.repeat(verdicts[:, :100], 4, axis=1)
  once = results.resampled(verdicts[:, :100], range(100))
  assert results.resampled(alike, facts) == pytest.approx(once)
  # A fact counts by its prompts: three of four here.
  uneven = results.resampled(np.array([[1, 1, 1, 0]]), ['a', 'a', 'a', 'b'])
  assert uneven == (0.75, 0.0, 1.0)


def test_summary_and_table(modules):
  results, rows = modules
  right = {split: '0110' for split in results.SPLITS}
  one = {'right': right, 'drift': 0.1, 'diversity': 0.2, 'seconds': 9.0}
  two = {'right': {**right, 'wording': '1111'}, 'drift': 0.3, 'diversity': 0.2, 'seconds': 4.0}
  found = results.summarise([one, two], _alone(results, 4))
  assert found['wording'][0] == 0.75 and abs(found['wording'][3] - 0.5 / 2**0.5) < 1e-12
  assert found['seconds'] == 4.0 and abs(found['drift'] - 0.2) < 1e-12 and found['seeds'] == 2
  text = results.table(
    rows.ROWS, {'mixture': found, 'base': results.summarise([one], _alone(results, 4))}
  )
  assert '| mixture | 2 | 75.0 ± 35.4 (' in text and '| base | 1 | 50.0 (' in text
  assert ') |  | 50.0 (' in text  # neither is compared with anything
  assert '**NO-RL**' not in text


def test_gains_are_of_the_same_prompts(modules):
  results, rows = modules

  def scores(*verdicts):
    right = [{split: one for split in results.SPLITS} for one in verdicts]
    return [{'right': one, 'drift': 0.0, 'diversity': 0.0, 'seconds': 1.0} for one in right]

  alone, two = _alone(results, 4), _alone(results, 2)
  # One prompt won by each seed: of shares alone nobody could tell.
  mean, low, high = results.summarise(scores('0111', '1110'), alone, scores('0011', '1100'))['gain']
  assert mean == 0.25 and 0 <= low < mean < high
  # The base has one seed, another row may have fewer.
  assert results.summarise(scores('11', '11'), two, scores('00'))['gain'] == (1.0, 1.0, 1.0)
  assert results.summarise(scores('11'), two, scores('11', '00'))['gain'] == (0.0, 0.0, 0.0)
  start = {row.name: rows.compared_with(row) for row in rows.ROWS}
  assert start['N1'] == start['b1, on-policy'] == start['1 wording'] == 'mixture'
  assert start['N1 from the base'] == 'base' and start['N1 from 40 steps'] == 'mixture, 40 steps'
  assert start['N1, biased anchors'] == 'mixture, biased anchors'
  assert start['base'] is start['biased base'] is start['mixture'] is start['12 facts'] is None
  found = {'N1': results.summarise(scores('0111', '1110'), alone, scores('0011', '1100'))}
  assert '| +25.0 (' in results.table(rows.ROWS, found)


def test_several_pictures_of_a_prompt_are_a_share(modules):
  results, rows = modules
  one = {'right': dict.fromkeys(results.SPLITS, '04'), 'drift': 0.0, 'diversity': 0.0,
         'seconds': 1.0, 'copies': 4}  # fmt: skip
  better = {**one, 'right': {**one['right'], 'explicit': '24'}}
  found = results.summarise([better], _alone(results, 2), [one])
  assert found['wording'][0] == 0.5 and found['explicit'][0] == 0.75
  assert found['gain'][0] == 0 and found['gain explicit'][0] == 0.25
  name = 'N1, biased anchors'
  head, _, row = results.table(rows.ROWS, {name: found}).splitlines()[2:]
  assert head.count('gain') == 2 and '| 75.0 (50-100) | +25.0 (+0 to +50) |' in row
  assert head.count('|') == row.count('|')
  assert results.table(rows.ROWS, {'mixture': found}).count('gain') == 1


def test_wordings_go_with_their_facts(modules, emoji_cache):
  del modules, emoji_cache
  from eru_jax.training.config import DataConfig

  ablation = importlib.import_module('ablation')
  facts = ablation.facts_of(DataConfig(max_facts=12), 48)
  assert {split: len(found) for split, found in facts.items()} == {
    'train': 48, 'wording': 24, 'fact': 48, 'explicit': 12, 'unrelated': 48,
  }  # fmt: skip
  assert len(set(facts['wording'])) == len(set(facts['train'])) == 12
  assert set(facts['wording']) == set(facts['explicit'])
  assert len(set(facts['unrelated'])) == 48


def test_biased_names_lead_as_often_elsewhere(modules):
  del modules
  bias = importlib.import_module('ablation_bias')
  pairs = bias.biased_pairs(['cat', 'dog', 'owl'])
  shown = {
    name: [p.explicit for p in pairs if p.implicit == name] for name in ('cat', 'dog', 'owl')
  }
  assert shown == {'cat': ['cat', 'dog'], 'dog': ['dog', 'owl'], 'owl': ['owl', 'cat']}
  assert len({pair.id for pair in pairs}) == 6


def test_models_that_rows_begin_with_are_rows(modules):
  _, rows = modules
  by_name = {row.name: row for row in rows.ROWS}
  for row in rows.ROWS:
    start = rows.config_of(by_name[row.start], seed=0)
    mine = rows.config_of(row, seed=0)
    if row.start != 'base':
      assert row.biased == by_name[row.start].biased
      assert mine.dk_dm == start.dk_dm and mine.data == start.data, row.name


def test_unknown_rows_are_refused(modules):
  from absl import app

  _, rows = modules
  assert rows.chosen_rows([]) == rows.ROWS
  assert len(rows.chosen_rows(['c'])) == 2
  assert [row.name for row in rows.chosen_rows(['mixture', 'a, path velocity'])] == [
    'mixture', 'a, path velocity',
  ]  # fmt: skip
  with pytest.raises(app.UsageError, match=r"No row begins with \['N7'\]; there are 'base'"):
    rows.chosen_rows(['N7'])


def test_scores_of_other_settings_are_refused(modules, tmp_path):
  from absl import app

  ablation = importlib.import_module('ablation')
  _, rows = modules
  row = rows.ROWS[0]
  made = ablation.made_with(rows.config_of(row, 0), row)
  (tmp_path / 'base-0').mkdir()
  (tmp_path / 'base-0' / 'scores.json').write_text('{"drift": 7}')
  for settings, quick in ((None, False), (made, True), ({**made, 'facts': 'others'}, False)):
    if settings is not None:
      (tmp_path / 'base-0' / 'settings.json').write_text(json.dumps(settings))
    with pytest.raises(app.UsageError, match='base-0 was made with other settings or facts'):
      ablation.Runner(tmp_path, quick)(row, 0)
  (tmp_path / 'base-0' / 'settings.json').write_text(json.dumps(made))
  assert ablation.Runner(tmp_path, False)(row, 0) == {'drift': 7}


@pytest.mark.slow
def test_rows_train_and_are_not_trained_twice(emoji_cache, tmp_path):
  del emoji_cache
  command = [
    sys.executable,
    str(BENCHMARKS / 'ablation.py'),
    f'--workdir={tmp_path / "work"}',
    f'--output={tmp_path / "out"}',
    '--quick',
    '--seeds=1',
    '--rows=base,mixture,"mixture, 40 steps",c,N1 from,N5 from,'
    '"biased base","mixture, biased anchors","N1, biased anchors"',
  ]
  first = subprocess.run(command, capture_output=True, text=True, check=True)
  scores = {p: p.read_bytes() for p in (tmp_path / 'work').glob('*/scores.json')}
  assert len(scores) == 11
  second = subprocess.run(command, capture_output=True, text=True, check=True)
  assert json.loads(first.stdout.splitlines()[-1]) == json.loads(second.stdout.splitlines()[-1])
  assert all(path.read_bytes() == old for path, old in scores.items())
  assert (tmp_path / 'out' / 'curves.png').stat().st_size > 1000
