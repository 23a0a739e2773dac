"""A judge as the reward of NO-RL: the unscored teach nothing, and a resumed run is the same."""

import dataclasses
import json
import re
import sys
import threading
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge_server import JudgeServer, answers, fails, hangs, picture_of, says, text_of

from eru_jax import flow, sharding
from eru_jax.data.emoji_knowledge import PairTable
from eru_jax.data.pairs import KnowledgePair
from eru_jax.data.world import World
from eru_jax.errors import UserError
from eru_jax.judges.spending import read_spending
from eru_jax.losses import advantages
from eru_jax.rewards.judge import LEDGER, JudgeConfig, JudgeReward, check_judge
from eru_jax.sharding import MeshConfig
from eru_jax.training.batches import on_mesh
from eru_jax.training.config import ExperimentConfig, from_mapping
from eru_jax.training.experiment import Snapshot, TextTable
from eru_jax.training.loop import run_stage
from eru_jax.training.metrics import MetricWriter, read_metrics
from eru_jax.training.stage_config import NoRlStageConfig
from eru_jax.training.stages import no_rl as stages
from eru_jax.training.variants import no_rl
from eru_jax.types import Conditioning

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
  with JudgeServer(usual=says('Nice!')) as server:
    settings = NoRlStageConfig(reward='judge', judge=_config(server))
    with pytest.raises(UserError, match='could not judge a picture .bad reply, 3 times'):
      stages.check_reward(settings)
    server.usual = fails(401)
    with pytest.raises(UserError, match='set ERU_JAX_JUDGE_KEY'):
      stages.check_reward(settings)
    server.usual = says({'consistency': 2, 'realism': 0, 'aesthetics': 0})
    stages.check_reward(settings)
    assert picture_of(server.requests[-1]).shape == (64, 64, 3)
    with pytest.raises(UserError, match='cannot be read'):
      check_judge(_config(server, instructions=str(tmp_path / 'none')))


def test_a_run_goes_on_without_a_few_pictures_but_not_without_many(tmp_path, monkeypatch):
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

    score, known, told = ask(4)
    assert told == {'judge_tokens': 4 * 110} and told['judge_tokens'].dtype == np.float32
    assert score.dtype == known.dtype == np.float32
    np.testing.assert_allclose(score, 0.5)
    assert 'answer 3' in text_of(server.requests[-1])
    lost.add(2)
    # 13 of each four are lost: 13 of 56 and fewer before; limit 16 of 64.
    for _ in range(13):
      score, known, told = ask(4)
      assert told == {'judge_tokens': 3 * 110}
      np.testing.assert_array_equal(known, [1, 1, 0, 1])
      np.testing.assert_allclose(score, [0.5, 0.5, 0, 0.5])
    lost.update((0, 1))
    ask(4)
    with pytest.raises(UserError) as caught:
      ask(4)
    assert '19 of the last 64 pictures unscored' in str(caught.value)
    assert 'max_unscored = 0.25' in str(caught.value) and 'HTTP 500' in str(caught.value)
    # Nobody is asked about hundreds of pictures when nobody answers.
    server.script, server.usual = [fails(500)] * 16, hangs
    reward, before = JudgeReward(_config(server, concurrency=1), pairs), len(server.requests)
    with pytest.raises(UserError, match='16 questions in a row'):
      ask(200)
    assert len(server.requests) - before <= 17


# The stage, of a model that draws what noise and prompt say.

LATENT = (3, 4)
PAIRS = [KnowledgePair(f'prompt {n}', f'answer {n}', id=f'id {n}') for n in range(4)]


@dataclasses.dataclass(frozen=True)
class _Model:
  """Stands in for a DiffusionModel."""

  latent_shape = LATENT

  def velocity(self, base, trainable=None):
    del base
    return lambda x, t, text: x * trainable['scale'] + text.tokens

  def sample(self, field, noise, text, schedule):
    return flow.euler_ode(field, noise, schedule, text)

  def decode(self, params, x):
    return nn.sigmoid((x.reshape(x.shape[0], -1) @ params).reshape(-1, 8, 8, 3))


class _Runs:
  """Runs of the stage against a judge, their verdicts and checkpoints in a directory."""

  def __init__(self, server, directory, monkeypatch, pairs=PAIRS, **no_rl):
    self.server, self.directory, self._patch, self._no_rl = server, directory, monkeypatch, no_rl
    explicit = [dataclasses.replace(p, implicit=p.explicit, split='explicit') for p in pairs]
    splits = {'train': PairTable(tuple(pairs)), 'explicit': PairTable(tuple(explicit))}
    self._prompts = ['', *World(splits).all_prompts]
    self._splits = splits

  def train(self, name, verdicts, at=lambda done: None, **more):
    """Trains to the end, or as far as `at`, which is told of every line of metrics, lets it."""
    self._patch.setenv('ERU_JAX_CACHE', str(self.directory / verdicts))
    url = self.server.url if self.server else 'http://localhost'
    judge = dict(url=url, model='tiny-judge', max_unscored=0.9, attempts=1)
    no_rl = dict(
      reward='judge', num_steps=4, save_every=1, log_every=1, prompts_per_step=4,
      images_per_prompt=2, updates_per_step=2, rollout_steps=2, optimizer={'learning_rate': 0.01},
      judge=judge | more,
    ) | self._no_rl  # fmt: skip
    data = {'world': 'prompts', 'pairs': 'x.jsonl'}
    config = from_mapping(ExperimentConfig, {'stages': ('no_rl',), 'data': data, 'no_rl': no_rl})
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((len(self._prompts), *LATENT)).astype(np.float32)
    text = TextTable(
      {prompt: n for n, prompt in enumerate(self._prompts)},
      lambda rows: Conditioning(tokens[rows]),
      Conditioning(tokens[:1]),
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    experiment = types.SimpleNamespace(
      config=config,
      planned=False,
      directory=self.directory / name,
      mesh=mesh,
      world=World(self._splits),
      text=text,
      prompts=lambda split: self._splits[split].pairs,
      schedule=lambda model, steps: flow.timestep_schedule(steps),
    )
    decoder = rng.standard_normal((12, 8 * 8 * 3)).astype(np.float32)
    start = jax.device_put({'scale': np.full(LATENT, 0.1, np.float32)}, sharding.replicated(mesh))
    stage = stages.build(experiment, Snapshot(_Model(), {}, decoder, start), config.no_rl)

    class Writer(MetricWriter):
      def write(self, stage, step, metrics):
        super().write(stage, step, metrics)
        at(step)

    workdir = self.directory / name
    with Writer(workdir) as writer, sharding.use_mesh(mesh):
      key = jax.random.key(3)
      return run_stage('no_rl', stage, config.no_rl, key, mesh, workdir, writer, ('no_rl',))[
        'scale'
      ]

  def rows(self, name):
    """What was measured, without what the clock says."""
    rows = read_metrics(self.directory / name / 'metrics.jsonl')
    return [{k: v for k, v in row.items() if not k.startswith('time')} for row in rows]

  def spent(self, name):
    """Pictures scored and not, requests and tokens, over all starts of a run."""
    found = read_spending(self.directory / name / LEDGER).summary
    tokens = found.prompt_tokens, found.completion_tokens
    return found.answered, found.unanswered, found.requests, tokens

  @staticmethod
  def paid(known, requests):
    """The same of pictures that were scored or not, and of what the server was sent."""
    return sum(known), sum(not one for one in known), len(requests), (
      100 * len(requests), 10 * len(requests)
    )  # fmt: skip

  def first_asked(self):
    """Requests but for those that go back with a bad reply."""
    return [r for r in self.server.requests if len(r['body']['messages']) == 1]


def _level(picture):
  return int(picture.astype(int).sum())


def _by_level(request):
  """Judges a picture by the sum of its levels, and one in four or so not at all."""
  level = _level(picture_of(request))
  if level % 4 == 0:
    return 'I would rather not.'
  return {'consistency': level % 3, 'realism': level // 3 % 3, 'aesthetics': 0}


def test_a_run_with_a_judge_resumes_exactly_and_asks_nothing_twice(tmp_path, monkeypatch):
  with JudgeServer(usual=answers(_by_level)) as server:
    runs = _Runs(server, tmp_path, monkeypatch)
    result = runs.train('unbroken', 'one')
    asked = runs.first_asked()
    assert len(asked) == 4 * 8
    known, scores = [], []
    for request in asked:
      level, text = _level(picture_of(request)), text_of(request)
      known.append(level % 4 != 0)
      scores.append((0.7 * (level % 3) + 0.2 * (level // 3 % 3)) / 2)
      # Asked about the pair's prompt, whether it was drawn of that or of the anchor.
      number = re.search(r'Prompt: prompt (\d)\n', text)[1]
      assert f'Explanation: answer {number}\n' in text
    assert 3 < np.sum(known) < 32
    rows = runs.rows('unbroken')
    for n, row in enumerate(rows):
      part = slice(8 * n, 8 * n + 8)
      wanted = np.sum(np.multiply(scores[part], known[part])) / sum(known[part])
      assert row['reward'] == pytest.approx(wanted, rel=1e-5)
      assert row['unscored'] == pytest.approx(1 - np.mean(known[part]))
      # What is not judged is asked three times.
      assert row['judge_tokens'] == 110 * (sum(known[part]) + 3 * (8 - sum(known[part])))
      assert row['grad_norm'] > 0 and row['skipped'] == 0
    assert [row['step'] for row in rows] == [1, 2, 3, 4]
    assert runs.spent('unbroken') == runs.paid(known, server.requests)

    def stop(done):
      if done == 3:
        raise KeyboardInterrupt

    before, first = len(asked), len(server.requests)
    with pytest.raises(KeyboardInterrupt):
      runs.train('stopped', 'two', at=stop)
    resumed = runs.train('stopped', 'two', concurrency=2, timeout=9.0)
    np.testing.assert_array_equal(resumed, result)
    assert not np.array_equal(resumed, np.full(LATENT, 0.1, np.float32))
    # Step 3 was done twice, but only what had not been scored was asked about again, and paid for.
    again = sum(not one for one in known[16:24])
    rows[2]['judge_tokens'] += 3 * 110 * again
    assert runs.rows('stopped') == rows
    assert len(runs.first_asked()) - before == 4 * 8 + again
    # Of the whole stage, of both processes and the repeated step.
    assert runs.spent('stopped') == runs.paid(known + known[16:24], server.requests[first:])


def test_a_judge_that_is_lost_stops_the_run_which_then_goes_on(tmp_path, monkeypatch):
  right, seen = says({'consistency': 0, 'realism': 0, 'aesthetics': 0}), []

  def act(handler):
    seen.append(1)
    (right if len(seen) < 14 else fails(503, 'gone'))(handler)

  with JudgeServer(usual=act) as server:
    runs = _Runs(server, tmp_path, monkeypatch)
    with pytest.raises(UserError, match='pictures unscored.*HTTP 503: gone') as caught:
      runs.train('run', 'one', max_unscored=0.01)
    assert '\n' not in str(caught.value)
    assert [row['step'] for row in runs.rows('run')] == [1]
    server.usual = right
    runs.train('run', 'one', max_unscored=0.02)
  assert [(row['step'], row['unscored']) for row in runs.rows('run')] == [
    (1, 0), (2, 0), (3, 0), (4, 0)
  ]  # fmt: skip


@pytest.mark.slow
def test_a_whole_run_with_a_judge(tiny_config, tmp_path, monkeypatch):
  from eru_jax.rewards import judge
  from eru_jax.training.run import train

  monkeypatch.setattr(judge, 'cache_directory', lambda: tmp_path / 'cache')
  tiny_config['stages'] = ('no_rl',)
  tiny_config['evaluation'] |= dict(max_prompts=1, gallery=1, batch_size=1)
  tiny_config['no_rl'] |= dict(reward='judge', num_steps=2, reward_high=1.0)
  with JudgeServer(usual=says({'correct': 1})) as server:
    tiny_config['no_rl']['judge'] = dict(
      url=server.url, model='tiny-judge', protocol='wise_verified', price='2,10'
    )
    train(tiny_config, str(tmp_path / 'run'))
    # A grey picture, and two of each of two prompts a step.
    assert len(server.requests) == 1 + 2 * 4
    named = r'Explanation: (red apple|butterfly|ewe|honey pot)\n'
    assert all(re.search(named, text_of(request)) for request in server.requests[1:])
    assert picture_of(server.requests[-1]).shape == (64, 64, 3)
  rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  assert [(row['reward'], row['unscored']) for row in rows] == [(1, 0), (1, 0)]
  told = json.loads((tmp_path / 'run' / 'summary.json').read_text())['judge']
  assert (told['model'], told['url']) == ('tiny-judge', server.url)
  # All but the grey picture.
  assert told['total']['answered'] == told['total']['requests'] == 2 * 4
  assert told['total']['cost'] == pytest.approx(8 * (100 * 2 + 10 * 10) / 1e6)
  assert '8, 0 of them repeated' in (tmp_path / 'run' / 'report.html').read_text()


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


# Several processes: this file run as a script, in each of them.


def _score_in_one_of_several(url):
  from eru_jax import distributed

  distributed.initialize()
  mesh = sharding.make_mesh(MeshConfig(data=4))
  pictures = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
  rows = np.arange(8) % 4
  batch = on_mesh((pictures, rows), mesh)
  assert not batch[0].is_fully_addressable
  reward = JudgeReward(JudgeConfig(url=url, model='tiny-judge', max_unscored=0.9), PAIRS)
  score, known, told = reward.score(*batch)
  assert told['judge_tokens'] > 8 * 100
  with sharding.use_mesh(mesh):
    total = jax.jit(lambda x, found: jnp.sum(x * found[1][:, None, None, None]) + found[0][0])
    value = float(total(batch[0].astype(jnp.float32), (score, known)))
  print('found', score.tolist(), known.tolist(), value)


@pytest.mark.slow
def test_the_first_of_several_processes_asks_for_all(tmp_path):
  import processes

  pictures = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
  levels = [_level(picture) for picture in pictures]
  with JudgeServer(usual=answers(_by_level)) as server:
    cache = {'ERU_JAX_CACHE': str(tmp_path / 'cache')}
    started = processes.Processes([__file__, server.url], tmp_path / 'run', 2, 4, **cache)
    assert started.wait(300) == [0, 0], started
    asked = [r for r in server.requests if len(r['body']['messages']) == 1]
    assert sorted(_level(picture_of(request)) for request in asked) == sorted(levels)
  known = np.array([level % 4 != 0 for level in levels], np.float32)
  score = known * [(0.7 * (level % 3) + 0.2 * (level // 3 % 3)) / 2 for level in levels]
  for index in range(2):
    (line,) = [x for x in started.output(index).splitlines() if x.startswith('found')]
    numbers = [float(x) for x in re.findall(r'-?[0-9.]+', line)]
    np.testing.assert_allclose(numbers[:8], score, rtol=1e-6)
    np.testing.assert_array_equal(numbers[8:16], known)
    assert numbers[16] == pytest.approx(np.dot(levels, known) + score[0])


if __name__ == '__main__':
  _score_in_one_of_several(sys.argv[1])
