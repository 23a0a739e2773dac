"""The toy laboratory: its world against closed forms, and the statements it stands for."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eru_jax import flow

BENCHMARKS = pathlib.Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture(scope='module')
def results(benchmarks):
  """One seed of the statements' variants, with fewer steps of all but NO-RL."""
  import toy
  import toy_variants

  budget = toy_variants.Budget(pretraining=2000, dk_dm=(400, 200), samples=500)
  dk_dm, no_rl = ('a', 'b1', 'd', 'mix'), ('N1', 'negatives subset', 'N0')
  return toy.laboratory(1, budget, (dk_dm, no_rl, ()))


def test_prompts_are_as_right_as_they_claim(benchmarks):
  """The data's shares, and the exact field's samples against them."""
  import toy_world as world

  assert np.allclose(world.WEIGHTS.sum(1), 1)
  for k in range(world.CONCEPTS):
    # A neighbour's answers and the superficial one are never right by accident.
    wrong = jnp.asarray(np.delete(world.CENTRES, [2 * k, 2 * k + 1], axis=0), jnp.float32)
    assert not jnp.any(world.shown(wrong, jnp.full(len(wrong), k)))
    right = jnp.asarray(world.RIGHT[k], jnp.float32)
    np.testing.assert_array_equal(world.shown(right, jnp.full(2, k)), np.eye(2))
  scores = jax.jit(lambda key: world.evaluate(world.exact_velocity, key, 1000))(jax.random.key(0))
  # Five standard errors, and two points for ten solver steps.
  for name, share in (('correct', 0.1), ('explicit', 0.82)):
    error = 5 * (share * (1 - share) / 6000) ** 0.5 + 0.02
    assert abs(scores[name] - share) < error
  assert scores['worst'] <= scores['correct'] and 0.5 < scores['balance'] <= 1


def test_exact_velocity_is_the_conditional_mean(benchmarks):
  """At t = 1 it is E[noise - x_0 | noise] = noise - mean; elsewhere its score is that of p_t."""
  import toy_world as world

  prompt = jnp.arange(world.PROMPTS)
  x = jax.random.normal(jax.random.key(0), (world.PROMPTS, 2))
  c = world.conditioning(prompt)
  np.testing.assert_allclose(
    world.exact_velocity(x, jnp.ones(world.PROMPTS), c),
    x - world.WEIGHTS @ world.CENTRES,
    atol=1e-4,
  )

  def log_density(x, time, weights):
    variance = (1 - time) ** 2 * world.STD**2 + time**2
    away = x - (1 - time) * world.CENTRES
    return jax.nn.logsumexp(jnp.log(weights) - jnp.sum(away**2, -1) / (2 * variance))

  for time in (0.3, 0.8):
    t = jnp.full(world.PROMPTS, time)
    expected = jax.vmap(jax.grad(log_density), (0, None, 0))(x, time, jnp.asarray(world.WEIGHTS))
    found = flow.score(x, world.exact_velocity(x, t, c), t)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_measures_of_a_field_that_draws_two_concepts_only(benchmarks):
  """Concept 0 always its first mode, concept 1 the mode on the noise's side, others the origin."""
  import toy_world as world

  right = jnp.asarray(world.RIGHT, jnp.float32)
  across = right[1, 1] - right[1, 0]

  def field(x, t, c):
    # Straight lines: a side of concept 1's axis is never left, since its modes lie on either side.
    concept = (jnp.argmax(c.tokens[:, 0], -1) % world.CONCEPTS)[:, None]
    sided = jnp.where((x @ across > 0)[:, None], right[1, 1], right[1, 0])
    goal = jnp.where(concept == 0, right[0, 0], jnp.where(concept == 1, sided, 0.0))
    return (x - goal) / t[:, None]

  scores = jax.jit(lambda key: world.evaluate(field, key, 1000))(jax.random.key(0))
  for name in ('correct', 'explicit'):
    np.testing.assert_allclose(scores[name], 2 / 6, atol=1e-6)
  # One concept in balance, up to five standard errors of a fair coin.
  assert scores['worst'] == 0 and 0.7 / 6 < scores['balance'] <= 1 / 6


def test_dk_dm_reaches_the_explicit_ceiling(results):
  """Of the base, on whatever states, without weight or critic; it was nowhere near."""
  base = results['base']['end']
  ceiling = base['explicit'][0]
  assert base['correct'][0] < 0.15 and ceiling > 0.6
  for name in ('a', 'b1', 'd', 'mix'):
    scores = results[name]['end']
    assert abs(scores['correct'][0] - ceiling) < 0.06, name
    assert abs(scores['explicit'][0] - ceiling) < 0.06, name


def test_n1_passes_the_ceiling_and_stays_where_the_controls_collapse(results):
  """After 300 epochs; over the first 60 even the controls improve."""
  start, n1 = results['mix']['end'], results['N1']
  for scores in (n1['early'], n1['end']):
    assert scores['correct'][0] > start['correct'][0] + 0.05
    # Nothing is lost on the way; the smallest share of 500 samples has an error of two points.
    for name in ('worst', 'explicit'):
      assert scores[name][0] > start[name][0] - 0.05, name
  for name in ('negatives subset', 'N0'):
    assert results[name]['end']['correct'][0] < n1['end']['correct'][0] - 0.25, name


def test_summary_and_table(results):
  import toy
  import toy_variants

  summary = toy.summarise({k: [0.2, 0.4] for k in ('correct', 'worst', 'balance', 'explicit')})
  assert summary['correct'] == 0.3 and summary['sd'] == 0.1414 and summary['lowest_seed'] == 0.2
  assert json.loads(json.dumps(summary)) == summary
  lines = toy.table(results, toy_variants.Budget()).splitlines()
  # Two lines a variant, one for the base, two of head.
  assert len(lines) == 2 + 1 + 2 * 7
  assert all(line.count('|') == 8 for line in lines)


@pytest.mark.parametrize(
  ('given', 'variants', 'seeds', 'wanted'),
  [
    (None, [], 5, 'benchmarks/results/toy'),
    (None, [], 1, 'runs/toy'),
    (None, ['a'], 5, 'runs/toy'),
    ('mine', [], 5, 'mine'),
    ('mine', ['a'], 1, 'mine'),
  ],
)
def test_only_a_whole_run_replaces_what_was_measured(benchmarks, given, variants, seeds, wanted):
  import toy

  assert toy.output_directory(given, variants, seeds) == pathlib.Path(wanted)


def test_pictures_hold_what_ran_and_where_it_began(benchmarks):
  import toy

  names = ['base', 'a', 'mix', 'N1', 'N1, from the base']
  assert toy.groups(names, ['N1', 'N4']) == {
    'dk_dm': ['base', 'a', 'mix'],
    'no_rl': ['mix', 'N1'],
    'from_base': ['base', 'N1, from the base'],
  }
  assert toy.groups(names[:2], []) == {'dk_dm': ['base', 'a']}


def test_one_variant_runs_to_the_last_line(benchmarks, tmp_path, capsys):
  import toy
  import toy_variants

  budget = toy_variants.Budget(pretraining=2, dk_dm=(2, 1), samples=10)
  toy.run(1, budget, (['a'], [], []), tmp_path / 'out')
  files = {'results.json', 'results.md', 'dk_dm.png'}
  assert {path.name for path in (tmp_path / 'out').iterdir()} == files
  summary = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert summary.keys() == {'base', 'a'}
  assert summary == json.loads((tmp_path / 'out' / 'results.json').read_text())['summary']
