"""Categories whose rewards are not to be trusted, and reward anchors out of an evaluation."""

import dataclasses
import json
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_files import science_row, training_row, without_pictures, write_lines
from judge_server import JudgeServer, says, text_of
from test_evaluator import Studio
from test_judge_reward import PAIRS, _Runs

from eru_jax.benchmarks.science_t2i import read_training
from eru_jax.data.emoji_knowledge import PairTable
from eru_jax.errors import UserError
from eru_jax.evaluating.evaluator import evaluate
from eru_jax.evaluating.request import EvaluationRequest
from eru_jax.evaluating.scorers import Scorer
from eru_jax.rewards.anchors import read_anchors
from eru_jax.rewards.base import Reward
from eru_jax.rewards.doubt import believed, doubted
from eru_jax.training.stage_config import NoRlStageConfig
from eru_jax.training.stages import no_rl as stage
from eru_jax.training.variants.no_rl import ratings

LAWS = ('gravity', 'Buoyancy', 'rust', 'immiscibility')
BY_LAW = [dataclasses.replace(p, category=law) for p, law in zip(PAIRS, LAWS, strict=True)]


def test_pairs_of_doubtful_categories_go_or_weigh_less():
  table = PairTable(tuple(BY_LAW), np.arange(4, dtype=np.int32) + 7)
  left, weights = believed(table, ('buoyancy', 'immiscibility'), 0.0)
  assert [pair.category for pair in left.pairs] == ['gravity', 'rust']
  np.testing.assert_array_equal(left.index, [7, 9])
  np.testing.assert_array_equal(weights, [1, 1])
  left, weights = believed(table, ('buoyancy',), 0.25)
  assert left is table
  np.testing.assert_array_equal(weights, np.float32([1, 0.25, 1, 1]))
  left, weights = believed(PairTable(tuple(PAIRS)), ('',), 0.5)
  assert left.index is None and len(weights) == 4
  assert believed(table, (), 0.0)[0] is table


def test_what_is_left_out_is_told():
  table = PairTable(tuple(BY_LAW))
  assert doubted(table, ('buoyancy', 'Rust', 'lift'), 0.0) == (
    'of 4 training pairs, 2 are left out as doubtful (buoyancy 1, Rust 1, lift 0)'
  )
  assert 'pairs, 1 weigh 0.5 as' in doubted(table, ('rust', 'RUST'), 0.5)
  assert doubted(table, (), 0.0) == ''


def test_weights_of_ratings():
  config = NoRlStageConfig(prompts_per_step=2, images_per_prompt=2, updates_per_step=1)
  score, trust = jnp.array([0.0, 1, 0.2, 0.6]), jnp.array([1, 1, 0.25, 0.25])
  found = ratings(score, config, trust=trust)
  np.testing.assert_allclose(found['weight'], trust)
  np.testing.assert_allclose(found['r'], ratings(score, config)['r'])
  known = jnp.array([1.0, 0, 1, 0])
  np.testing.assert_allclose(ratings(score, config, known, trust)['weight'], [1, 0, 0.25, 0])


@pytest.mark.parametrize(
  'options', [{'doubtful_weight': 1.5}, {'doubtful_weight': 0.5, 'variant': 'negatives_subset'}]
)
def test_weights_that_cannot_be(options):
  with pytest.raises(UserError, match='doubtful_weight'):
    NoRlStageConfig(**options)


def test_nothing_is_drawn_or_asked_of_what_is_left_out(tmp_path, monkeypatch, capsys):
  marks = {'consistency': 0, 'realism': 1, 'aesthetics': 0}
  with JudgeServer(usual=says(marks)) as server:
    runs = _Runs(server, tmp_path, monkeypatch, BY_LAW, doubtful=('buoyancy', 'rust'), num_steps=2)
    runs.train('run', 'one')
    told = '\n'.join(text_of(request) for request in server.requests)
    assert 'answer 0' in told and 'answer 3' in told
    assert 'answer 1' not in told and 'answer 2' not in told
    assert 'no_rl: of 4 training pairs, 2 are left out as doubtful' in capsys.readouterr().out
    less = {'doubtful': ('gravity',), 'doubtful_weight': 0.01, 'num_steps': 1}
    assert np.isfinite(_Runs(server, tmp_path, monkeypatch, BY_LAW, **less).train('l', 'l')).all()
    with pytest.raises(UserError, match='every training pair is of no_rl.doubtful = gravity, Bu'):
      _Runs(server, tmp_path, monkeypatch, BY_LAW, doubtful=LAWS).train('n', 'n')


def test_weights_in_the_compiled_step(tmp_path, monkeypatch):
  def open_reward(*unused):
    return Reward(
      {},
      lambda params, images, targets: 100 * images.mean((1, 2, 3)) * (targets % 2),
      lambda table: np.array([int(pair.id[-1]) for pair in table.pairs], np.int32),
    )

  monkeypatch.setattr(stage, 'open_reward', open_reward)
  clip = dict(
    reward='clip_score', reward_model='x', reward_low=0.0, reward_high=100.0, judge={}, num_steps=2
  )

  def trained(name, **options):
    return _Runs(None, tmp_path, monkeypatch, BY_LAW, **clip, **options).train(name, name)

  whole = trained('whole')
  less = trained('less', doubtful=('gravity',), doubtful_weight=0.01)
  assert np.isfinite(less).all() and not np.allclose(less, whole, atol=1e-6)


# Anchors


def test_an_evaluation_of_the_base_gives_reward_anchors(monkeypatch, tmp_path, capsys):
  Studio(monkeypatch, tmp_path)
  rows = [training_row(i, implicit=2, explicit=2) for i in range(3)]
  data = write_lines(tmp_path / 'train.jsonl', rows)

  def score(images, questions):
    """Superficial 18, explicit 30; of the third object no better than superficial."""
    found = []
    for index, question in enumerate(questions):
      stage, red = int(images[index, 0, 0, 2]), int(images[index, 0, 0, 0])
      names = [n for n, p in question.prompts.items() if zlib.crc32(p.encode()) % 251 == red]
      name = names[0]
      high = 17.0 if question.id.startswith('00003') else 30.0
      base = {'superficial': 18.0, 'explicit': high}[name]
      found.append({'sci_score': base + 5 * stage})
    return found

  request = EvaluationRequest(('m',), str(tmp_path / 'out'), 'science_t2i_train', str(data),
    conditions=('explicit', 'superficial'),
  )  # fmt: skip
  result = evaluate(request, Scorer('sci_score', 'test', score))
  anchors = read_anchors(tmp_path / 'out' / 'reward_anchors.jsonl')
  assert anchors == {f'wording {k} of object {i}': (18.0, 30.0) for i in range(2) for k in range(2)}
  # Of the base alone, and each prompt once.
  assert result['stages']['no_rl']['superficial']['score'] == pytest.approx(28)
  assert 'Reward anchors of 4 prompts' in capsys.readouterr().out
  assert [pair.implicit for pair in read_training(str(data))][:4] == list(anchors)


def test_no_anchors_without_both_kinds(monkeypatch, tmp_path):
  Studio(monkeypatch, tmp_path)
  rows = [without_pictures(science_row(i)) for i in range(3)]
  data = write_lines(tmp_path / 'test_S.jsonl', rows)
  request = EvaluationRequest(
    ('m',), str(tmp_path / 'out'), 'science_t2i', str(data), conditions=('implicit', 'explicit')
  )
  evaluate(request, Scorer('sci_score', 't', lambda i, q: [{'sci_score': 1.0}] * len(q)))
  assert not (tmp_path / 'out' / 'reward_anchors.jsonl').exists()
  assert json.loads((tmp_path / 'out' / 'evaluation.json').read_text())['scorer'] == 'sci_score'
