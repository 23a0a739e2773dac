"""From scores to tables: the published formulas by hand, and intervals against closed forms."""

import itertools
import math

import numpy as np
import pytest

from eru_jax.benchmarks import science_t2i, statistics, wise
from eru_jax.benchmarks.base import Protocol, Question, benchmark, single
from eru_jax.benchmarks.statistics import Design, Sample
from eru_jax.evaluating.aggregation import aggregate, comparisons, ratios

NAN = math.nan


def questions(categories, subcategories=None):
  subcategories = subcategories or [''] * len(categories)
  return [
    Question(str(i), category, {'implicit': f'prompt {i}'}, finer)
    for i, (category, finer) in enumerate(zip(categories, subcategories, strict=True))
  ]


def column(*values):
  return np.array(values, np.float64)[:, None]


# The published formulas


@pytest.mark.parametrize(
  ('marks', 'value'),
  [((2, 2, 2), 1.0), ((0, 0, 0), 0.0), ((2, 1, 0), 0.8), ((1, 2, 1), 0.6), ((0, 2, 2), 0.3)],
)
def test_wi_score(marks, value):
  score = dict(zip(('consistency', 'realism', 'aesthetics'), marks, strict=True))
  assert wise.wi_score(score) == pytest.approx(value, abs=1e-12)


def test_wise_overall_by_hand():
  protocol = benchmark('wise').protocol('wise')
  asked = questions(['culture', 'culture', 'time', 'space', 'biology', 'physics', 'chemistry'])
  marks = [(2, 1, 0), (1, 1, 1), (0, 2, 1), (2, 2, 2), (1, 0, 0), (2, 0, 2), (0, 0, 0)]
  keys = ('consistency', 'realism', 'aesthetics')
  values = protocol.values([dict(zip(keys, mark, strict=True)) for mark in marks])
  np.testing.assert_allclose(values, [0.8, 0.5, 0.25, 1.0, 0.35, 0.8, 0.0])
  told = aggregate(protocol, asked, values[:, None])
  # 0.4 x 0.65 + 0.167 x 0.25 + 0.133 x 1 + 0.1 x (0.35 + 0.8 + 0)
  assert told['score'] == pytest.approx(0.26 + 0.04175 + 0.133 + 0.115, abs=1e-12)
  assert told['categories']['culture']['score'] == pytest.approx(0.65)
  assert told['missing'] == [] and (told['n'], told['unscored'], told['prompts']) == (7, 0, 7)


def test_unscored_pictures_are_left_out_and_counted_never_zero():
  protocol = benchmark('wise').protocol('wise')
  whole = {'consistency': 2, 'realism': 2, 'aesthetics': 2}
  broken = [
    None, {}, {'consistency': 2, 'realism': 2}, whole | {'realism': NAN}, whole | {'realism': '2'},
    whole | {'realism': None}, whole | {'realism': math.inf},
  ]  # fmt: skip
  values = protocol.values([whole, *broken])
  assert values[0] == pytest.approx(1) and np.isnan(values[1:]).all()
  told = aggregate(protocol, questions(['culture'] * 8), values[:, None])
  culture = told['categories']['culture']
  assert (culture['score'], culture['n'], culture['unscored']) == (pytest.approx(1), 1, 7)
  # Numbers of numpy are numbers.
  assert protocol.values([{key: np.float32(2) for key in whole}])[0] == pytest.approx(1)
  # As the published script: no overall score while a category has none.
  assert told['score'] is None and told['ci95'] is None
  assert told['missing'] == ['time', 'space', 'biology', 'physics', 'chemistry']


def test_wise_verified_overall_by_hand():
  protocol = benchmark('wise_verified').protocol('wise_verified')
  names = ['culture'] * 4 + ['time', 'time', 'space', 'biology', 'physics', 'chemistry']
  values = protocol.values([{'correct': s} for s in (1, 1, 1, 0, 1, 0, 1, 0, 1, 1)])
  told = aggregate(protocol, questions(names), values[:, None])
  # 0.4 x 3/4 + 0.12 x (1/2 + 1 + 0 + 1 + 1)
  assert told['score'] == pytest.approx(0.3 + 0.42, abs=1e-12)
  # Wilson (1927) for 3 of 4, by hand.
  np.testing.assert_allclose(told['categories']['culture']['ci95'], [0.300636, 0.954413], atol=1e-5)


def test_the_weights_are_the_published_ones():
  legacy, verified = (benchmark(name).protocol(name).weights for name in ('wise', 'wise_verified'))
  order = ['culture', 'time', 'space', 'biology', 'physics', 'chemistry']
  assert [legacy[name] for name in order] == [0.4, 0.167, 0.133, 0.1, 0.1, 0.1]
  assert [verified[name] for name in order] == [0.4, 0.12, 0.12, 0.12, 0.12, 0.12]
  # METHODS' published row of FLUX.1-dev comes out: 0.48 .58 .62 .42 .51 .35 -> 0.50.
  row = [0.48, 0.58, 0.62, 0.42, 0.51, 0.35]
  told = aggregate(benchmark('wise').protocol('wise'), questions(order), column(*row))
  assert round(told['score'], 2) == 0.50
  row = [0.6275, 0.525, 0.5583, 0.3417, 0.4833, 0.25]  # Qwen-Image, 0.5100
  protocol = benchmark('wise_verified').protocol('wise_verified')
  told = aggregate(protocol, questions(order), column(*row))
  assert round(told['score'], 3) == 0.510


@pytest.mark.parametrize(
  ('scene', 'marks', 'value'), [(1, 3, 100), (1, 2, 200 / 3), (0, 3, 0), (1, 0, 0), (0, 0, 0)]
)
def test_reality_counts_only_in_a_complete_scene(scene, marks, value):
  assert science_t2i.reality({'scene': scene, 'reality': marks}) == pytest.approx(value)


def test_sci_score_is_the_mean_of_all_pictures():
  protocol = benchmark('science_t2i').protocol('sci_score')
  values = np.array([[20.0, 22.0], [30.0, NAN], [NAN, NAN]])
  asked = questions(['physics', 'physics', 'biology'], ['gravity', 'melting', 'ripeness'])
  told = aggregate(protocol, asked, values)
  assert told['score'] == 24.0
  assert (told['n'], told['unscored'], told['prompts']) == (3, 3, 2)
  assert told['subcategories']['gravity']['score'] == 21.0
  assert told['subcategories']['ripeness']['score'] is None
  assert told['subcategories']['ripeness']['ci95'] is None


def test_nd_and_ri_reproduce_the_published_table():
  protocol = single('sci_score')
  asked = questions(['physics'] * 2)
  # Means of FLUX.1-dev on S: 17.69 superficial, 32.85 explicit, 23.56 implicit; 28.52 after OFT.
  values = {
    'base': {
      'implicit': column(22.56, 24.56),
      'explicit': column(32.85, 32.85),
      'superficial': column(16.69, 18.69),
    },
    'oft': {'implicit': column(27.52, 29.52)},
  }
  told = ratios(protocol, asked, values)
  assert told['base']['nd']['value'] == pytest.approx(0.3872, abs=5e-5)
  assert told['oft']['ri']['value'] == pytest.approx(0.5339, abs=5e-5)
  assert set(told['base']) == {'nd'} and set(told['oft']) == {'ri'}
  # Improvement is the same for both prompts: every resample gives (almost) the same ratio.
  low, high = told['oft']['ri']['ci95']
  assert low <= told['oft']['ri']['value'] <= high < 0.66
  assert ratios(protocol, asked, {}) == {}


# Intervals


def test_resampling_is_the_bootstrap_distribution_itself():
  values = column(0.0, 1.0, 5.0)
  design = Design.of(['a'] * 3, None)
  times = design.resamples(0, 40000)
  assert times.shape == (40000, 3) and (times.sum(axis=1) == 3).all()
  means = design.overall(Sample.of(values), times)
  # All 27 ways to draw three of three, each as likely as any other.
  exact = [np.mean(draw) for draw in itertools.product([0.0, 1.0, 5.0], repeat=3)]
  for mean in set(np.round(exact, 9)):
    share = np.isclose(exact, mean).mean()
    assert np.isclose(means, mean).mean() == pytest.approx(share, abs=0.012)


def test_interval_of_a_mean_is_the_normal_one():
  rng = np.random.default_rng(1)
  values = rng.normal(3.0, 2.0, (400, 1))
  told = aggregate(single('x'), questions(['a'] * 400), values, seed=7)
  half = 1.959964 * values.std() / 400**0.5
  np.testing.assert_allclose(told['ci95'], [values.mean() - half, values.mean() + half], atol=0.02)
  assert told == aggregate(single('x'), questions(['a'] * 400), values, seed=7)
  assert told != aggregate(single('x'), questions(['a'] * 400), values, seed=8)


def test_prompts_are_drawn_not_pictures():
  # Four pictures of a prompt that are all alike say no more than one.
  rng = np.random.default_rng(2)
  values = rng.normal(size=(100, 1))
  one = aggregate(single('x'), questions(['a'] * 100), values, seed=0)
  four = aggregate(single('x'), questions(['a'] * 100), np.repeat(values, 4, axis=1), seed=0)
  np.testing.assert_allclose(one['ci95'], four['ci95'])
  assert (one['n'], four['n']) == (100, 400)


def test_weighted_scores_are_drawn_within_categories():
  rng = np.random.default_rng(3)
  names = ['a'] * 300 + ['b'] * 100
  values = np.concatenate([rng.normal(0, 1, 300), rng.normal(10, 2, 100)])
  protocol = Protocol(('x',), lambda s: s['x'], {'a': 0.25, 'b': 0.75})
  told = aggregate(protocol, questions(names), values[:, None])
  score = 0.25 * values[:300].mean() + 0.75 * values[300:].mean()
  assert told['score'] == pytest.approx(score)
  # Var = sum of w^2 s^2 / n; drawn from all prompts at once it would be about ten times as large.
  deviation = (0.0625 * values[:300].var() / 300 + 0.5625 * values[300:].var() / 100) ** 0.5
  low, high = told['ci95']
  assert (high - low) / (2 * 1.959964) == pytest.approx(deviation, rel=0.08)


def test_paired_differences():
  rng = np.random.default_rng(4)
  base = rng.normal(20, 5, (200, 1))
  values = {'base': {'implicit': base}, 'same': {'implicit': base + 1.5}}
  values['noisy'] = {'implicit': base + rng.normal(0.5, 2.0, (200, 1))}
  same, noisy = comparisons(single('x'), questions(['a'] * 200), values)
  # A constant gain has no spread, whatever the prompts' own is.
  assert same['difference'] == pytest.approx(1.5)
  np.testing.assert_allclose(same['ci95'], [1.5, 1.5])
  assert same['p'] == 2 / (statistics.RESAMPLES + 1)
  gains = (values['noisy']['implicit'] - base)[:, 0]
  half = 1.959964 * gains.std() / 200**0.5
  np.testing.assert_allclose(noisy['ci95'], [gains.mean() - half, gains.mean() + half], atol=0.05)
  assert noisy['n'] == 200 and noisy['against'] == {'model': 'base', 'condition': 'implicit'}


def test_significance_is_that_of_the_sign_test_for_single_winners():
  # Of 8 prompts one is won: a resample misses it with (7/8)^8, and no resample is below 0.
  base, other = np.zeros((8, 1)), np.zeros((8, 1))
  other[0] = 1
  values = {'base': {'implicit': base}, 'other': {'implicit': other}}
  (told,) = comparisons(single('x'), questions(['a'] * 8), values)
  assert told['p'] == pytest.approx(2 * (7 / 8) ** 8, abs=0.04)
  assert comparisons(single('x'), questions(['a'] * 8), {'base': {'implicit': base}}) == []
  assert statistics.two_sided(np.zeros(10)) == 1.0


def test_comparisons_take_the_prompts_that_both_have():
  values = {
    'base': {'implicit': column(1, 2, NAN, 4), 'explicit': column(5, 5, 5, 5)},
    'later': {'implicit': column(2, NAN, 9, 6)},
  }
  found = comparisons(single('x'), questions(['a'] * 4), values)
  told = {(t['model'], t['against']['condition']): (t['difference'], t['n']) for t in found}
  assert told == {
    ('later', 'implicit'): (1.5, 2),
    ('base', 'explicit'): (pytest.approx(7 / 3 - 5), 3),
    ('later', 'explicit'): (pytest.approx(17 / 3 - 5), 3),
  }
  # Nothing in common is no difference of 0.
  values = {'base': {'implicit': column(1, NAN)}, 'later': {'implicit': column(NAN, 1)}}
  assert comparisons(single('x'), questions(['a'] * 2), values) == []
