"""From scores to tables: the published formulas by hand, and intervals against closed forms."""

import itertools
import math

import numpy as np
import pytest

from eru_jax.benchmarks import science_t2i, statistics
from eru_jax.benchmarks.base import Protocol, Question, benchmark, fewer, single
from eru_jax.benchmarks.statistics import Design, Sample
from eru_jax.evaluating.aggregation import aggregate, comparisons, ratios
from eru_jax.judges import protocols

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
  protocol = benchmark('wise').protocol('wise')
  # To the last bit, and the same as what judges count with.
  assert protocol.values([score]).tolist() == [value] == [protocols.wise_score(score)]


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
  # Of two prompts a gap of 9.29 with a deviation of 1 is no gap that is known.
  assert told['oft']['ri']['ci95'] is None and told['oft']['ri']['n'] == 2
  assert ratios(protocol, asked, {}) == {}


def test_ratios_are_of_prompts_that_are_scored_in_all_their_parts():
  asked = questions(['physics'] * 4)
  values = {
    'base': {
      'implicit': column(10, 12, NAN, 90),
      'explicit': column(20, 20, 50, NAN),
      'superficial': column(4, NAN, 50, 4),
    },
    'oft': {'implicit': column(15, 17, 40, 40)},
  }
  told = ratios(single('sci_score'), asked, values)
  # Only the first has all three of its own; the first two have what RI needs.
  assert (told['base']['nd']['value'], told['base']['nd']['n']) == (pytest.approx(6 / 16), 1)
  assert (told['oft']['ri']['value'], told['oft']['ri']['n']) == (pytest.approx(5 / 9), 2)
  values['base']['superficial'] = column(NAN, NAN, 50, 4)
  assert set(ratios(single('sci_score'), asked, values)) == {'oft'}


# Intervals


@pytest.mark.parametrize(
  ('freedom', 't'), [(1, 12.7062), (2, 4.30265), (4.5, 2.65891), (30, 2.04227), (1e5, 1.95999)]
)
def test_quantiles_of_student(freedom, t):
  assert statistics.student_quantile(freedom) == pytest.approx(t, abs=1e-4)


def test_interval_of_a_mean_is_students():
  # 3, 5, 10: mean 6, deviation sqrt(13), t of two degrees of freedom.
  told = aggregate(single('x'), questions(['a'] * 3), column(3, 5, 10))
  half = 4.302653 * (13 / 3) ** 0.5
  np.testing.assert_allclose(told['ci95'], [6 - half, 6 + half], rtol=1e-6)
  # Scores have a least and a greatest value, which no interval leaves.
  told = aggregate(single('x', span=(0, 11)), questions(['a'] * 3), column(3, 5, 10))
  assert told['ci95'] == [0, 11]


def test_an_interval_that_nothing_is_known_of_is_not_told():
  protocol = Protocol(('x',), lambda s: s['x'], {'a': 0.5, 'b': 0.5})
  for names, values in (
    (['a'], [3.1]), (['a'] * 12, [0.1] * 12), (['a', 'a'], [0.3, 0.1 + 0.2]), (['a'] * 3, [0] * 3),
  ):  # fmt: skip
    assert aggregate(single('x'), questions(names), column(*values))['ci95'] is None
  # Two of one category and one of the other; then one more.
  assert aggregate(protocol, questions(['a', 'a', 'b']), column(1, 2, 3))['ci95'] is None
  assert aggregate(protocol, questions(['a', 'a', 'b', 'b']), column(1, 2, 3, NAN))['ci95'] is None
  assert aggregate(protocol, questions(['a', 'a', 'b', 'b']), column(1, 2, 3, 3))['ci95']
  # Shares of right pictures are Wilson's, of which one picture tells something.
  told = aggregate(single('x', proportion=True), questions(['a']), column(1))
  np.testing.assert_allclose(told['ci95'], [0.206549, 1], atol=1e-5)


def test_prompts_are_counted_not_pictures():
  # Four pictures of a prompt that are all alike say no more than one.
  rng = np.random.default_rng(2)
  values = rng.normal(size=(100, 1))
  one = aggregate(single('x'), questions(['a'] * 100), values)
  four = aggregate(single('x'), questions(['a'] * 100), np.repeat(values, 4, axis=1))
  np.testing.assert_allclose(one['ci95'], four['ci95'])
  assert (one['n'], four['n']) == (100, 400)


def test_weighted_scores_vary_within_categories():
  rng = np.random.default_rng(3)
  names = ['a'] * 300 + ['b'] * 100
  values = np.concatenate([rng.normal(0, 1, 300), rng.normal(10, 2, 100)])
  protocol = Protocol(('x',), lambda s: s['x'], {'a': 0.25, 'b': 0.75})
  told = aggregate(protocol, questions(names), values[:, None])
  score = 0.25 * values[:300].mean() + 0.75 * values[300:].mean()
  assert told['score'] == pytest.approx(score)
  # Var = sum of w^2 s^2 / n; of all prompts at once it would be about ten times as large.
  parts = [0.0625 * values[:300].var(ddof=1) / 300, 0.5625 * values[300:].var(ddof=1) / 100]
  freedom = sum(parts) ** 2 / (parts[0] ** 2 / 299 + parts[1] ** 2 / 99)
  half = statistics.student_quantile(freedom) * sum(parts) ** 0.5
  np.testing.assert_allclose(told['ci95'], [score - half, score + half], rtol=1e-6)
  assert 100 < freedom < 130


def test_paired_differences():
  rng = np.random.default_rng(4)
  base = rng.normal(20, 5, (200, 1))
  values = {'base': {'implicit': base}, 'same': {'implicit': base + 1.5}}
  values['noisy'] = {'implicit': base + rng.normal(0.5, 2.0, (200, 1))}
  same, noisy = comparisons(single('x'), questions(['a'] * 200), values)
  # A constant gain has no spread that could be told, but is none by chance.
  assert same['difference'] == pytest.approx(1.5) and same['ci95'] is None
  assert same['p'] == 1e-4
  gains = (values['noisy']['implicit'] - base)[:, 0]
  half = 1.971957 * gains.std(ddof=1) / 200**0.5
  np.testing.assert_allclose(noisy['ci95'], [gains.mean() - half, gains.mean() + half], rtol=1e-5)
  assert noisy['n'] == 200 and noisy['against'] == {'model': 'base', 'condition': 'implicit'}


def test_intervals_of_differences_end_where_differences_do():
  base, other = np.ones((6, 1)), np.zeros((6, 1))
  other[0] = 1
  values = {'base': {'implicit': base}, 'other': {'implicit': other}}
  wide, clipped = (
    comparisons(single('x', span=span), questions(['a'] * 6), values)[0]['ci95']
    for span in ((None, 1), (0, 1))
  )
  # 5 of 6 lost, by Student's t of 5 degrees of freedom.
  np.testing.assert_allclose(wide, -5 / 6 + 2.570582 / 6 * np.array([-1, 1]), rtol=1e-5)
  assert clipped == [-1, wide[1]]


def difference(names, base, other, weights=None):
  protocol = Protocol(('x',), lambda s: s['x'], weights)
  values = {'base': {'implicit': np.array(base)}, 'other': {'implicit': np.array(other)}}
  (told,) = comparisons(protocol, questions(names), values)
  return told


@pytest.mark.parametrize('count', range(1, 14))
def test_significance_of_a_clean_sweep_is_that_of_the_sign_test(count):
  told = difference(['a'] * count, np.ones((count, 1)), np.zeros((count, 1)))
  assert told['difference'] == -1 and told['p'] == 2 / 2**count


def test_significance_by_hand():
  # Prompts without a difference say nothing, and one winner is as likely as one loser.
  base, other = np.zeros((8, 1)), np.zeros((8, 1))
  assert difference(['a'] * 8, base, other)['p'] == 1
  other[0] = 1
  assert difference(['a'] * 8, base, other)['p'] == 1
  # Sums 1 + 2 + 4 - 8 = -1: of the 16 signs of 1, 2, 4 and 8 all give 1 or more.
  assert difference(['a'] * 4, np.zeros((4, 1)), column(1, 2, 4, -8))['p'] == 1
  # 1 + 2 - 4 + 8 = 7: 7, 9, 11, 13, 15 and their negatives are as large.
  assert difference(['a'] * 4, np.zeros((4, 1)), column(1, 2, -4, 8))['p'] == 10 / 16
  # Weights: a gain of 1 in 'a' is worth 0.9, two losses in 'b' 0.05 each; 0.8, 0.9, 0.9 and 1.
  told = difference(['a', 'b', 'b'], np.zeros((3, 1)), column(1, -1, -1), {'a': 0.9, 'b': 0.1})
  assert told['difference'] == pytest.approx(0.8) and told['p'] == 1
  told = difference(['a', 'b', 'b'], np.zeros((3, 1)), column(1, 1, 1), {'a': 0.9, 'b': 0.1})
  assert told['p'] == 2 / 8
  # Prompts have one picture or two: exchanged with their pictures, (4, 6) and 1 for 0 and (1, 1).
  told = difference(['a'] * 2, [[4, 6], [1, NAN]], [[0, NAN], [1, 1]])
  # 2/3 - 11/3 as it is, 12/4 - 1/2 with the first exchanged, and the negatives of both.
  assert told['difference'] == pytest.approx(-3) and told['p'] == 2 / 4


def test_random_exchanges_agree_with_all(monkeypatch):
  rng = np.random.default_rng(5)
  gains = rng.normal(0.4, 1, (12, 1))
  exact = difference(['a'] * 12, np.zeros((12, 1)), gains)['p']
  by_hand = np.array(list(itertools.product([-1, 1], repeat=12))) @ gains
  assert exact == np.mean(np.abs(by_hand) >= abs(gains.sum()) - 1e-9)
  monkeypatch.setattr(statistics, '_EXACT', 0)
  assert difference(['a'] * 12, np.zeros((12, 1)), gains)['p'] == pytest.approx(exact, abs=0.02)


# How often intervals hold, and how often chance is taken for a difference

WISE_SIZES = {
  'culture': 400, 'time': 167, 'space': 133, 'biology': 100, 'physics': 100, 'chemistry': 100,
}  # fmt: skip


def categories_at(limit):
  names = [name for name, size in WISE_SIZES.items() for _ in range(size)]
  return [question.category for question in fewer(questions(names), limit)]


@pytest.mark.parametrize('weighted', [True, False])
@pytest.mark.parametrize('limit', [12, 30, 120])
def test_coverage_and_size_at_few_prompts(limit, weighted, monkeypatch):
  """Of 500 evaluations a share of 0.95 is known to 0.01; bounds are nearly four times that."""
  monkeypatch.setattr(statistics, '_EXACT', 0)
  monkeypatch.setattr(statistics, '_EXCHANGES', 99)
  weights = benchmark('wise').protocol('wise').weights if weighted else None
  names, rng = categories_at(limit), np.random.default_rng(limit)
  design = Design.of(names, weights)
  # Skewed WiScores: none, some or all marks, each category with other shares of them.
  marks = np.array([0.0, 0.15, 0.5, 0.9, 1.0])
  shares = {name: rng.dirichlet([3, 2, 1, 1, 2]) for name in WISE_SIZES}
  mean = {name: share @ marks for name, share in shares.items()}
  truth = np.mean([mean[name] for name in names])
  if weighted:
    truth = sum(weights[name] * mean[name] for name in weights)
  told, significant, count = [], 0, 500
  for seed in range(count):
    drawn = np.array([rng.choice(marks, (1, 2), p=shares[name])[0] for name in names])
    first, second = Sample.of(drawn[:, :1]), Sample.of(drawn[:, 1:])
    found = statistics.compare(design, first, second, seed)
    significant += found['p'] <= 0.05
    intervals = ((statistics.interval(design, first), truth), (found['ci95'], 0))
    told += [interval[0] <= at <= interval[1] for interval, at in intervals if interval]
  # Those of categories that are all alike by chance are not told, and rare.
  assert len(told) > 1.98 * count
  assert 0.92 <= np.mean(told) <= 0.985
  assert 0.015 <= significant / count <= 0.085


def test_coverage_of_a_ratio():
  rng, count, held = np.random.default_rng(6), 400, 0
  design = Design.of(['a'] * 12, None)
  for _ in range(count):
    common = rng.normal(0, 5, 12)
    base, better, explicit = (
      Sample.of((common + mean + rng.normal(0, 1, 12))[:, None]) for mean in (22, 26, 32)
    )
    told = statistics.position(design, better, base, explicit)
    held += told['ci95'][0] <= 0.4 <= told['ci95'][1]
  assert 0.90 <= held / count <= 0.99
  # A gap that may be none has no ratio that could be bounded.
  told = statistics.position(design, better, base, base)
  assert told is None
  near = Sample(base.sums + rng.normal(0, 1, 12), base.counts)
  assert statistics.position(design, better, base, near)['ci95'] is None


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
