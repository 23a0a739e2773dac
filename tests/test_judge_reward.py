"""A judge as the reward of NO-RL: the unscored teach nothing, and a resumed run is the same."""

import os
import re
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge_server import JudgeServer, answers, fails, picture_of, says, text_of

from eru_jax.errors import UserError
from eru_jax.losses import advantages
from eru_jax.rewards.judge import JudgeConfig, JudgeReward, check_judge
from eru_jax.training.stage_config import NoRlStageConfig
from eru_jax.training.variants import no_rl

JUDGE = JudgeConfig(url='http://127.0.0.1:1/v1', model='m')


def test_pictures_without_a_reward_weigh_nothing_and_do_not_count_for_others():
  rng = np.random.default_rng(0)
  score, known = rng.random((3, 4)).astype(np.float32), np.ones((3, 4), np.float32)
  known[0, 1] = known[1, :3] = known[2] = 0
  config = dict(images_per_prompt=4, reward='judge', judge=JUDGE, drop_solved=True)
  lost = np.where(known, score, 1e6).astype(np.float32)

  def rated(score, **more):
    found = no_rl.ratings(
      jnp.asarray(score.ravel()), NoRlStageConfig(**config | more), jnp.asarray(known.ravel())
    )
    return {name: np.asarray(value).reshape(3, 4) for name, value in found.items()}

  for more in ({}, {'reward_scale': 'group', 'advantage_clip': 2.0}):
    found, other = rated(score, **more), rated(lost, **more)
    for name in found:
      # Whatever stands in their place.
      np.testing.assert_array_equal(found[name], other[name], err_msg=name)
    none = known == 0
    assert (found['weight'][none] == 0).all() and (found['r'][none] == 0.5).all()
    assert (found['advantage'][none] == 0).all() and (found['weight'][~none] == 1).all()
  np.testing.assert_allclose(rated(score)['r'][known > 0], score[known > 0])
  kept = [score[n][known[n] > 0] for n in range(3)]
  every = np.concatenate(kept)
  wanted = np.concatenate([row - row.mean() for row in kept if len(row)]) / (every.std() + 1e-4)
  np.testing.assert_allclose(found['advantage'][known > 0], np.clip(wanted, -2, 2), rtol=1e-4)
  # A prompt is solved by what is known of it.
  high = np.full((3, 4), 0.95, np.float32)
  high[0, 1] = 0
  assert rated(high)['weight'].sum() == 0
  own = advantages.group_normalized(jnp.asarray(score), std='group', known=jnp.asarray(known))
  wanted = (kept[0] - kept[0].mean()) / (kept[0].std() + 1e-4)
  np.testing.assert_allclose(own[0][known[0] > 0], wanted, rtol=1e-4)


def test_where_all_is_known_nothing_changes():
  score = jnp.asarray(np.random.default_rng(0).random(12), jnp.float32)
  for more in ({}, {'reward_scale': 'group'}):
    config = NoRlStageConfig(drop_solved=True, **more)
    plain, masked = no_rl.ratings(score, config), no_rl.ratings(score, config, jnp.ones(12))
    for name in plain:
      np.testing.assert_allclose(plain[name], masked[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'values, message',
  [
    ({'reward': 'judge'}, '`judge` is'),
    ({'judge': JUDGE}, '`judge` is'),
    ({'reward': 'judge', 'judge': JUDGE, 'reward_model': 'clip'}, '`reward_model` is'),
    ({'reward': 'judge', 'judge': JUDGE, 'reward_anchors': 'a'}, '`reward_anchors` is'),
  ],
)
def test_rewards_that_cannot_work_are_refused(values, message):
  with pytest.raises(UserError, match=message):
    NoRlStageConfig(**values)


def test_judges_that_cannot_work_are_refused(tmp_path):
  from eru_jax.training.config import ExperimentConfig, from_mapping

  for values, message in [
    ({'url': 'localhost:8000', 'model': 'm'}, 'is no http:// or https:// URL'),
    ({'url': 'http://h/v1'}, 'needs the name of a model'),
    ({'protocol': 'science_t2i'}, '`protocol` is .* one of wise, wise_verified'),
    ({'max_unscored': 1.0}, '`max_unscored` is 1.0'),
    ({'urls': 'x'}, 'unknown key `no_rl.judge.urls`'),
  ]:
    settings = {'stages': ('no_rl',), 'no_rl': {'reward': 'judge', 'judge': values}}
    with pytest.raises(UserError, match=message):
      from_mapping(ExperimentConfig, settings)
  # A judge needs no pictures of a world.
  judge = {'reward': 'judge', 'judge': {'url': 'http://h/v1', 'model': 'm'}}
  data = {'world': 'prompts', 'pairs': 'x.jsonl'}
  from_mapping(ExperimentConfig, {'stages': ('no_rl',), 'data': data, 'no_rl': judge})


def _config(server, **more):
  return JudgeConfig(url=server.url, model='tiny-judge', attempts=1, **more)


def test_a_run_tries_its_judge_before_it_begins(tmp_path):
  from eru_jax.training.stages.no_rl import check_reward

  with JudgeServer(usual=says('Nice!')) as server:
    settings = NoRlStageConfig(reward='judge', judge=_config(server))
    with pytest.raises(UserError, match='could not judge a picture .bad reply, 3 times'):
      check_reward(settings)
    server.usual = fails(401)
    with pytest.raises(UserError, match='set ERU_JAX_JUDGE_KEY'):
      check_reward(settings)
    server.usual = says({'consistency': 2, 'realism': 0, 'aesthetics': 0})
    check_reward(settings)
    assert picture_of(server.requests[-1]).shape == (64, 64, 3)
    with pytest.raises(UserError, match='cannot be read'):
      check_judge(_config(server, instructions=str(tmp_path / 'none')))


def test_a_run_goes_on_without_a_few_pictures_but_not_without_many(tmp_path, monkeypatch):
  from eru_jax.data.emoji_knowledge import PairTable
  from eru_jax.data.pairs import KnowledgePair

  monkeypatch.setenv('ERU_JAX_CACHE', str(tmp_path))
  pairs = [KnowledgePair(f'prompt {n}', f'answer {n}', id=f'id {n}') for n in range(4)]
  rng, good = np.random.default_rng(0), {'consistency': 1, 'realism': 1, 'aesthetics': 1}
  lost = set()

  def act(handler):
    number = int(text_of(handler.request_seen).partition('Prompt: prompt ')[2][0])
    (fails(500) if number in lost else says(good))(handler)

  with JudgeServer(usual=act) as server:
    reward = JudgeReward(_config(server, concurrency=1), pairs)
    rows = reward.targets(PairTable((pairs[3], pairs[1])))
    np.testing.assert_array_equal(rows, [3, 1])

    def ask(count, repeat=4):
      pictures = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
      return reward.score(pictures, np.arange(count) % repeat)

    score, known = ask(4)
    assert score.dtype == known.dtype == np.float32
    np.testing.assert_allclose(score, 0.5)
    assert 'answer 3' in text_of(server.requests[-1])
    lost.add(2)
    # 13 of each four are lost: 13 of 56 and fewer before; limit 16 of 64.
    for _ in range(13):
      score, known = ask(4)
      np.testing.assert_array_equal(known, [1, 1, 0, 1])
      np.testing.assert_allclose(score, [0.5, 0.5, 0, 0.5])
    lost.update((0, 1))
    ask(4)
    with pytest.raises(UserError) as caught:
      ask(4)
    assert '19 of the last 64 pictures unscored' in str(caught.value)
    assert 'max_unscored = 0.25' in str(caught.value) and 'HTTP 500' in str(caught.value)
    # Nobody is asked about hundreds of pictures when nobody answers.
    lost.add(3)
    reward, before = JudgeReward(_config(server, concurrency=1), pairs), len(server.requests)
    with pytest.raises(UserError, match='16 questions in a row'):
      ask(200)
    assert len(server.requests) - before <= 17


@pytest.fixture
def judged(tiny_config, tmp_path, monkeypatch):
  """A tiny run whose pictures are judged by their mean; one in eight or so is not."""
  tiny_config['stages'] = ('no_rl',)
  tiny_config['evaluation'] |= dict(max_prompts=1, gallery=1, batch_size=1)
  tiny_config['lora'] = [{'pattern': 'attn/', 'rank': 2, 'alpha': 2.0}]
  tiny_config['no_rl'] |= dict(reward='judge', num_steps=4, save_every=1, reward_high=1.0)

  def of(request):
    mean = int(picture_of(request).astype(int).sum())
    if mean % 8 == 0:
      return 'I would rather not.'
    return {'consistency': mean % 3, 'realism': mean // 3 % 3, 'aesthetics': 0}

  with JudgeServer(usual=answers(of)) as server:
    tiny_config['no_rl']['judge'] = dict(
      url=server.url, model='tiny-judge', max_unscored=0.9, timeout=20.0
    )
    yield tiny_config, server


def _keep_verdicts_in(directory, monkeypatch):
  """Another cache for the verdicts alone."""
  from eru_jax.rewards import judge

  monkeypatch.setattr(judge, 'cache_directory', lambda: directory)


@pytest.mark.slow
def test_a_run_with_a_judge_resumes_exactly_and_asks_nothing_twice(judged, tmp_path, monkeypatch):
  from test_train import assert_same_run, start

  from eru_jax.training import loop
  from eru_jax.training.metrics import read_metrics

  config, server = judged
  _keep_verdicts_in(tmp_path / 'a', monkeypatch)
  start(config, tmp_path / 'unbroken')
  rows = read_metrics(tmp_path / 'unbroken' / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2, 3, 4]
  shown, *pictures = [picture_of(r).astype(int) for r in server.requests
                      if len(r['body']['messages']) == 1]  # fmt: skip
  assert (shown == 128).all() and len(pictures) == 4 * 4
  known = [p.sum() % 8 != 0 for p in pictures]
  scores = [(0.7 * (p.sum() % 3) + 0.2 * (p.sum() // 3 % 3)) / 2 for p in pictures]
  for n, row in enumerate(rows):
    part = slice(4 * n, 4 * n + 4)
    wanted = np.sum(np.multiply(scores[part], known[part])) / max(1, sum(known[part]))
    assert row['reward'] == pytest.approx(wanted, rel=1e-5)
    assert row['unscored'] == pytest.approx(1 - np.mean(known[part]))
    assert np.isfinite(row['loss']) and row['skipped'] == 0
  # Two pictures of each of two prompts, and what they are held against.
  asked = [text_of(request) for request in server.requests[1:]]
  assert all(re.search(r'Explanation: (red apple|butterfly|ewe|honey pot)\n', a) for a in asked)

  _keep_verdicts_in(tmp_path / 'b', monkeypatch)
  write = loop.MetricWriter.write

  def stopping(self, name, done, values):
    write(self, name, done, values)
    if done == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(loop.MetricWriter, 'write', stopping)
  with pytest.raises(SystemExit):
    start(config, tmp_path / 'stopped')
  monkeypatch.setattr(loop.MetricWriter, 'write', write)
  # As if it had been killed a step later than it saved.
  shutil.rmtree(tmp_path / 'stopped' / 'checkpoints' / 'no_rl' / '2')
  before = len(server.requests)
  config['no_rl']['judge'] |= dict(timeout=30.0, concurrency=2)
  start(config, tmp_path / 'stopped')
  assert_same_run(tmp_path / 'stopped', tmp_path / 'unbroken')
  again = [r for r in server.requests[before:] if len(r['body']['messages']) == 1]
  lost = sum(not one for one in known[4:8])
  # The grey picture, what had not been scored, and steps 3 and 4.
  assert len(again) == 1 + lost + 8


@pytest.mark.slow
def test_a_judge_that_is_lost_stops_the_run_which_then_goes_on(judged, tmp_path, monkeypatch):
  from test_train import start

  from eru_jax.training.metrics import read_metrics

  config, server = judged
  _keep_verdicts_in(tmp_path / 'a', monkeypatch)
  config['no_rl']['judge'] |= dict(max_unscored=0.01, attempts=1)
  usual, seen = server.usual, []

  def act(handler):
    seen.append(1)
    (usual if len(seen) < 6 else fails(503, 'gone'))(handler)

  server.usual = act
  with pytest.raises(UserError, match='pictures unscored.*HTTP 503: gone') as caught:
    start(config, tmp_path / 'run')
  assert '\n' not in str(caught.value)
  assert [p.name for p in (tmp_path / 'run' / 'checkpoints' / 'no_rl').iterdir()]
  server.usual = says({'consistency': 0, 'realism': 0, 'aesthetics': 0})
  start(config, tmp_path / 'run')
  rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [1, 2, 3, 4] and rows[-1]['unscored'] == 0


def test_steps_wait_for_the_host():
  """A program whose host part is asked once an iteration, and whose updates see what it found."""
  import optax

  from eru_jax.training.state import init_state
  from eru_jax.training.step import StageProgram, compile_stage

  asked = []

  def host(prepared):
    asked.append((threading.current_thread(), np.asarray(prepared['x'])))
    return (np.asarray(prepared['x']) * 2,)

  program = StageProgram(
    lambda params, frozen, examples, key, step: (jnp.mean(params * examples['y']), {}),
    prepare=lambda policy, frozen, batch, key: (
      {'x': batch + policy},
      {'prepared': jnp.sum(batch)},
    ),
    host=host,
    rate=lambda prepared, found: ({'y': found[0]}, {'rated': jnp.sum(found[0])}),
    updates_per_batch=2,
  )
  optimizer = optax.sgd(1.0)
  state = init_state(jnp.float32(0.0), optimizer, behaviour=False)
  iterate = compile_stage(program, optimizer, 0.0)
  state, measured = iterate(state, {}, jnp.array([1.0, 1, 3, 3]), jax.random.key(0))
  assert [thread for thread, _ in asked] == [threading.main_thread()]
  assert (float(measured['prepared']), float(measured['rated'])) == (8, 16)
  # Updates see 2 and then 6 on average.
  assert float(state.params) == -8
  assert int(state.step) == 1
