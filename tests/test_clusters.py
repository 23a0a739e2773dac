"""Prompts about one thing count once: closed forms, coverage by simulation, and who is of whom."""

import json
import math

import numpy as np
import pytest

from eru_jax.benchmarks import emoji, science_t2i, statistics
from eru_jax.benchmarks.base import Protocol, Question, benchmark, single
from eru_jax.benchmarks.proportions import proportion_interval
from eru_jax.benchmarks.statistics import Design, Sample
from eru_jax.data.clusters import clusters_of
from eru_jax.data.pairs import KnowledgePair
from eru_jax.evaluating import gallery_summary, results
from eru_jax.evaluating.aggregation import aggregate, comparisons, ratios
from eru_jax.training.evaluation import accuracy, mean_distance
from eru_jax.training.metrics import wilson_interval
from eru_jax.training.report_scores import accuracy_table, distance_table

ACCURACY = single('x', span=(0, 1), proportion=True)


def questions(clusters, categories=None):
  categories = categories or ['a'] * len(clusters)
  return [
    Question(str(i), category, {'implicit': f'prompt {i}'}, cluster=cluster)
    for i, (cluster, category) in enumerate(zip(clusters, categories, strict=True))
  ]


def column(*values):
  return np.array(values, np.float64)[:, None]


def told_of(clusters, values, protocol=None, categories=None):
  return aggregate(protocol or single('x'), questions(clusters, categories), column(*values))


def difference(clusters, base, other):
  values = {'base': {'implicit': column(*base)}, 'other': {'implicit': column(*other)}}
  (told,) = comparisons(single('x'), questions(clusters), values)
  return told


# By hand


def test_interval_of_clusters_by_hand():
  told = told_of(['x', 'x', '', 'y', 'y'], (1, 3, 5, 3, 3))
  # Mean 3; without a cluster 11/3, 10/4 and 3: the jackknife's variance is 2/3 of their squared
  # distances. Clusters of 2, 1 and 2 are 25/9 alike, one more than t has degrees of freedom.
  half = 4.861473 * math.sqrt(2 / 3 * (4 / 9 + 1 / 4))
  assert told['score'] == 3
  np.testing.assert_allclose(told['ci95'], [3 - half, 3 + half], atol=1e-5)
  assert (told['n'], told['prompts'], told['clusters']) == (5, 5, 3)
  # An unscored prompt is none of its cluster, and a cluster of such is none.
  told = told_of(['x', 'x', '', 'y', 'z'], (1, math.nan, 5, 3, math.nan))
  half = 4.302653 * math.sqrt(4 / 3)
  np.testing.assert_allclose(told['ci95'], [3 - half, 3 + half], rtol=1e-6)
  assert (told['n'], told['unscored'], told['prompts'], told['clusters']) == (3, 2, 3, 3)
  # Of one cluster no spread is known, however many prompts it has.
  assert told_of(['x'] * 9, range(9))['ci95'] is None


def test_whole_clusters_are_exchanged():
  clusters = [name for name in 'abcd' for _ in range(3)]
  told = difference(clusters, [0] * 12, [1] * 12)
  assert told['p'] == 2 / 2**4 and (told['n'], told['clusters']) == (12, 4)
  assert difference([''] * 12, [0] * 12, [1] * 12)['p'] == 2 / 2**12
  # What a cluster wins and loses again is no difference of it: three that win are left.
  told = difference([*clusters, 'e', 'e'], [0] * 14, [1] * 9 + [2, -1, -1] + [1, -1])
  assert told['p'] == 2 / 2**3
  # 3 + 4 - 1 = 6: of the eight signs of 3, 4 and 1 four make 6 or more.
  told = difference(['a', 'a', 'b', 'b', 'c'], [0] * 5, [1, 2, 4, 0, -1])
  assert told['p'] == 4 / 8


def test_prompts_of_a_cluster_are_as_pictures_of_a_prompt():
  """Which `test_benchmark_scores` holds against closed forms."""
  rng = np.random.default_rng(1)
  pictures = {
    name: rng.normal(mean, 1, (12, 3)) + rng.normal(0, 1, (12, 1))
    for name, mean in (('implicit', 1.0), ('superficial', 0.0), ('explicit', 9.0))
  }
  pictures['implicit'][3, 1] = pictures['implicit'][4] = math.nan
  categories = ['a'] * 6 + ['b'] * 6
  protocol = Protocol(('x',), lambda s: s['x'], {'a': 0.3, 'b': 0.7})
  together = questions([''] * 12, categories)
  apart = questions(
    [str(row) for row in range(12) for _ in range(3)], np.repeat(categories, 3).tolist()
  )
  told, other = (
    aggregate(protocol, asked, pictures['implicit'].reshape(len(asked), -1))
    for asked in (together, apart)
  )
  assert (told['score'], *told['ci95']) == pytest.approx((other['score'], *other['ci95']))
  assert (told['prompts'], other['prompts'], other['clusters']) == (11, 32, 11)
  scored = np.isfinite(pictures['implicit'])
  # Both sides of a pair are of the same pictures, as common prompts are.
  known = {name: np.where(scored, array, math.nan) for name, array in pictures.items()}
  for find in (lambda *a: comparisons(*a)[0], lambda *a: ratios(*a)['base']['nd']):
    first, second = (
      find(
        protocol,
        asked,
        {'base': {name: array.reshape(len(asked), -1) for name, array in known.items()}},
      )
      for asked in (together, apart)
    )
    assert second['clusters'] == first['clusters'] == first['n'] == 11 and second['n'] == 32
    for name in ('difference', 'value', 'p'):
      assert first.get(name) == pytest.approx(second.get(name))
    assert first['ci95'] == pytest.approx(second['ci95'])


def test_clusters_of_one_prompt_change_nothing():
  rng = np.random.default_rng(2)
  categories = ['a'] * 20 + ['b'] * 10
  first, second = (Sample.of(rng.normal(size=(30, 2))) for _ in range(2))
  for weights in (None, {'a': 0.5, 'b': 0.5}):
    plain = Design.of(categories, weights)
    named = Design.of(categories, weights, [f'c{row}' for row in range(30)])
    assert statistics.interval(plain, first) == statistics.interval(named, first)
    assert statistics.compare(plain, first, second) == statistics.compare(named, first, second)
    position = statistics.position(plain, first, second, second.where(first.counts > 0))
    assert position == statistics.position(named, first, second, second.where(first.counts > 0))
  # Wilson's to the last bit where every cluster has one picture.
  for right in range(8):
    values = [1.0] * right + [0.0] * (7 - right)
    told = told_of(list('abcdefg'), values, ACCURACY)
    assert told['ci95'] == list(wilson_interval(right, 7))


def test_categories_that_share_clusters_are_one_stratum():
  weights = {'a': 0.5, 'b': 0.5}
  protocol = Protocol(('x',), lambda s: s['x'], weights)
  categories = ['a', 'a', 'a', 'b', 'b', 'b']
  told = told_of(list('xyzxyz'), (1, 3, 5, 2, 6, 4), protocol, categories)
  # Off the categories' means 3 and 4: x by -2 and -2, y by 0 and 2, z by 2 and 0, each times 1/6;
  # three clusters less two means leave one degree of freedom.
  half = 12.7062 * math.sqrt(3 * (16 + 4 + 4) / 36)
  assert told['score'] == 3.5
  np.testing.assert_allclose(told['ci95'], [3.5 - half, 3.5 + half], rtol=1e-5)
  # A third category with clusters of its own stays a stratum of its own.
  weights |= {'c': 1.0}
  design = Design.of([*categories, 'c', 'c'], weights, [*'xyzxyz', '', ''])
  spread = statistics._Spread.of(design, np.ones(8, bool))
  assert spread.freedom.tolist() == [1, 1] and spread.members.sum(axis=0).tolist() == [3, 2]
  # Linked by a third one, as a chain.
  design = Design.of(list('abcaab'), weights, ['x', 'x', 'y', 'y', '', ''])
  assert statistics._Spread.of(design, np.ones(6, bool)).freedom.tolist() == [4 - 3]
  # A prompt that is not scored links nothing.
  scored = np.array([True, False, True, False, True, True])
  assert len(statistics._Spread.of(design, scored).freedom) == 3


def share(sums, counts):
  """The interval of clusters with so many right pictures of so many."""
  values = [float(k < right) for right, n in zip(sums, counts, strict=True) for k in range(n)]
  names = [str(row) for row, n in enumerate(counts) for _ in range(n)]
  return told_of(names, values, ACCURACY)['ci95']


def test_shares_that_are_all_right_or_all_wrong_have_an_interval():
  # Ten clusters and two more, one of them wrong: 1/12 x 11/12 of independent pictures, by
  # 12 x (11/12)^2 as many. Student's quantile is of 11 degrees of freedom.
  size = 11**2 / 12
  np.testing.assert_allclose(share([2] * 10, [2] * 10), [size / (size + 2.200985**2), 1], rtol=1e-5)
  low, high = share([0] * 10, [2] * 10)
  assert low == 0 and high == pytest.approx(2.200985**2 / (size + 2.200985**2), rel=1e-5)
  # Several pictures of a prompt likewise.
  told = aggregate(ACCURACY, questions([''] * 10), np.ones((10, 2)))
  np.testing.assert_allclose(told['ci95'], [size / (size + 2.200985**2), 1], rtol=1e-5)
  # Clusters of 1 and 3 pictures, and two of (1 + 9) / 4: 6.5 of 9 are right. They say as much as
  # 16/10 alike, so t has 2.6 degrees of freedom.
  wrong = 2.5 / 9
  variance = np.sum(
    (np.array([1, 3, 2.5]) * wrong / [8, 6, 6.5]) ** 2
  ) + (2.5 * (1 - wrong) / 6.5) ** 2  # fmt: skip
  size = wrong * (1 - wrong) / variance
  np.testing.assert_allclose(share([1, 3], [1, 3]), [size / (size + 3.478182**2), 1], rtol=1e-5)


def test_one_more_right_picture_never_lowers_a_bound():
  bounds = [share([2] * k + [1] * one + [0] * (20 - k - one), [2] * 20)
            for k in range(21) for one in (0, 1) if k + one <= 20]  # fmt: skip
  assert (np.diff(bounds, axis=0) > -1e-12).all()
  rng, verified = np.random.default_rng(3), benchmark('wise_verified').protocol('wise_verified')
  sizes = {'proportional': (48, 15, 15, 14, 14, 14), 'equal': (20,) * 6, 'few': (2,) * 6}
  for counts in sizes.values():
    names = np.repeat(list(verified.weights), counts).tolist()
    design = Design.of(names, verified.weights)
    for _ in range(3):
      values, bounds = np.zeros((len(names), 1)), []
      for row in rng.permutation(len(names)):
        bounds.append(proportion_interval(design, Sample.of(values)))
        values[row] = 1
      bounds.append(proportion_interval(design, Sample.of(values)))
      assert (np.diff(bounds, axis=0) > -1e-12).all()
      assert bounds[0][0] == 0 and bounds[-1][1] == 1
  # Clusters of any sizes tell most where all are right, or all wrong.
  sizes = [8, 2, 4, 20, 1]
  best, worst = share(sizes, sizes)[0], share([0] * 5, sizes)[1]
  for row in range(5):
    right = [size - (at == row) for at, size in enumerate(sizes)]
    wrong = [size - one for size, one in zip(sizes, right, strict=True)]
    assert share(right, sizes)[0] <= best + 1e-12
    assert share(wrong, sizes)[1] >= worst - 1e-12


def test_the_effective_number_of_pictures_by_hand():
  # Clusters (1 of 2), (1 of 2), and the two added: each of these is off by 1/8, and the jackknife
  # has it 8/6 as large. So the four would say as much as 4.5, and say no more than all pictures.
  expected = wilson_interval(2, 4, 3.182446)
  np.testing.assert_allclose(share([1, 1], [2, 2]), expected, rtol=1e-5)
  # Pictures that are alike: six clusters off by 1/12, the jackknife's 12/10 as large.
  size, t = 0.25 / (6 / 100), 2.570582
  expected = wilson_interval(size / 2, size, t)
  np.testing.assert_allclose(share([2, 0, 2, 0], [2] * 4), expected, rtol=1e-5)
  # Those of opposites in each cluster say no more than all.
  expected = wilson_interval(200, 400, 2.007584)
  np.testing.assert_allclose(share([4] * 50, [8] * 50), expected, rtol=1e-5)


def test_weighted_shares_by_hand():
  protocol = single('x', weights={'a': 0.4, 'b': 0.6}, span=(0, 1), proportion=True)
  # One picture a cluster: all 20 of 'a' are right and 2 of 4 of 'b', so 21 of 22 and 3 of 6 with
  # the two that are added. The jackknife's variance of a mean is a picture's x n / (n - 1)^2.
  # Shares of the score, 20 of 0.02 and 4 of 0.15, are those of 10.2 clusters, and t has one more.
  told = told_of([''] * 24, [1] * 22 + [0] * 2, protocol, ['a'] * 20 + ['b'] * 4)
  variance = 0.16 * 21 / 22**2 * 22 / 21**2 + 0.36 / 4 * 6 / 5**2
  right = 0.4 * 21 / 22 + 0.3
  size = right * (1 - right) / variance
  np.testing.assert_allclose(told['ci95'], wilson_interval(0.7 * size, size, 2.196104), rtol=1e-5)
  # All right: 4 of 5 and 3 of 4.
  told = told_of([''] * 5, [1] * 5, protocol, list('aaabb'))
  size = 0.77 * 0.23 / (0.16 * 0.16 * 5 / 16 + 0.36 * 0.1875 * 4 / 9)
  np.testing.assert_allclose(told['ci95'], [size / (size + 2.529346**2), 1], rtol=1e-5)
  # Clusters of 2 and 1 of 'a', two more of 5/3: 14 of 19 are right.
  told = told_of(['x', 'x', '', '', ''], [1] * 5, protocol, list('aaabb'))
  of_a = np.array([6 / 13 * 5, 3 / 16 * 5, 5 / 14 * 5, 5 / 14 * 14]) / 19
  variance = 0.16 * np.sum(of_a**2) + 0.36 * (3 / 144 + 1 / 16)
  right = 0.4 * 14 / 19 + 0.6 * 3 / 4
  size = right * (1 - right) / variance
  # Shares of the score of 4/15, 2/15, 3/10 and 3/10 are those of 3.719 clusters.
  np.testing.assert_allclose(told['ci95'], [size / (size + 2.617310**2), 1], rtol=1e-5)
  assert proportion_interval(Design.of(['a'], {'a': 1}), Sample.of(column(math.nan))) is None


# By simulation: facts with four wordings each, half of whose spread is the fact's.

FACTS, WORDINGS = 30, 4
NAMES = [str(fact) for fact in range(FACTS) for _ in range(WORDINGS)]


def wordings(rng, right):
  """(Q,) right or wrong, a share `right` of them, correlated within facts."""
  common = np.repeat(rng.random(FACTS) < right, WORDINGS)
  return np.where(rng.random(len(NAMES)) < 0.7, common, rng.random(len(NAMES)) < right)


@pytest.mark.parametrize('right', [0.5, 0.8, 0.95])
def test_coverage_of_correlated_wordings(right):
  rng, count = np.random.default_rng(7), 500
  held = {'clusters': 0, 'prompts': 0}
  for _ in range(count):
    values = column(*wordings(rng, right))
    for unit, names in (('clusters', NAMES), ('prompts', None)):
      design = Design.of([''] * len(NAMES), None, names)
      low, high = proportion_interval(design, Sample.of(values))
      held[unit] += low <= right <= high
  assert 0.93 <= held['clusters'] / count <= 0.995
  # Which prompts as units do not reach: the test can fail.
  assert held['prompts'] / count < 0.88


UNEQUAL = {
  'two of twenty, ten single': [20] * 2 + [1] * 10,
  'five of eight, 25 single': [8] * 5 + [1] * 25,
  'one to twelve': list(range(1, 13)),
}


@pytest.mark.parametrize('alike', [0.3, 1])
@pytest.mark.parametrize('sizes', UNEQUAL.values(), ids=UNEQUAL)
def test_coverage_of_clusters_of_different_sizes(sizes, alike):
  """Shares, scores and differences of clusters whose pictures are of one draw with chance `alike`.

  Intervals of independent pictures hold in 40 to 80 %.
  """
  rng, count = np.random.default_rng(11), 200
  rows = np.repeat(np.arange(len(sizes)), sizes)
  design = Design.of([''] * len(rows), None, [str(row) for row in rows])

  def drawn(of):
    values = np.where(rng.random(len(rows)) < alike, of(len(sizes))[rows], of(len(rows)))
    return Sample.of(column(*values))

  held = {'share 0.5': 0, 'share 0.9': 0, 'score': 0, 'difference': 0}
  for _ in range(count):
    for right in (0.5, 0.9):
      low, high = proportion_interval(design, drawn(lambda n: rng.random(n) < right))  # noqa: B023
      held[f'share {right}'] += low <= right <= high
    low, high = statistics.interval(design, drawn(lambda n: rng.normal(size=n)))
    held['score'] += low <= 0 <= high
    first, second = (drawn(lambda n: rng.random(n) < 0.6).sums for _ in range(2))
    low, high = statistics.interval(design, Sample(second - first, np.ones(len(rows))))
    held['difference'] += low <= 0 <= high
  # Of 200, a share of 0.95 is known to 0.015.
  assert all(0.9 <= one / count for one in held.values()), held


@pytest.mark.parametrize('right', [0.02, 0.05, 0.95, 0.98])
@pytest.mark.parametrize('counts', [(48, 15, 15, 14, 14, 14), (20,) * 6], ids=['limit', 'equal'])
def test_coverage_of_weighted_shares_near_none_and_all(counts, right):
  weights = benchmark('wise_verified').protocol('wise_verified').weights
  rng, held, count = np.random.default_rng(12), 0, 400
  design = Design.of(np.repeat(list(weights), counts).tolist(), weights)
  for _ in range(count):
    low, high = proportion_interval(design, Sample.of(rng.random((sum(counts), 1)) < right))
    held += low <= right <= high
  assert 0.92 <= held / count <= 0.995


def test_coverage_of_weighted_shares_that_differ_by_category():
  weights = benchmark('wise_verified').protocol('wise_verified').weights
  rng, held, count = np.random.default_rng(13), 0, 400
  design = Design.of(np.repeat(list(weights), 20).tolist(), weights)
  right = np.array([0.9, 0.2, 0.5, 0.5, 0.3, 0.8])
  for _ in range(count):
    values = rng.random((120, 1)) < np.repeat(right, 20)[:, None]
    low, high = proportion_interval(design, Sample.of(values))
    held += low <= np.array(list(weights.values())) @ right <= high
  assert 0.92 <= held / count <= 0.98


def test_coverage_and_size_of_differences_of_correlated_wordings(monkeypatch):
  monkeypatch.setattr(statistics, '_EXACT', 0)
  monkeypatch.setattr(statistics, '_EXCHANGES', 99)
  rng, count = np.random.default_rng(8), 400
  held, significant = {'clusters': 0, 'prompts': 0}, {'clusters': 0, 'prompts': 0}
  for seed in range(count):
    first, second = (Sample.of(column(*wordings(rng, 0.6))) for _ in range(2))
    for unit, names in (('clusters', NAMES), ('prompts', None)):
      design = Design.of([''] * len(NAMES), None, names)
      found = statistics.compare(design, first, second, seed)
      held[unit] += found['ci95'][0] <= 0 <= found['ci95'][1]
      significant[unit] += found['p'] <= 0.05
  assert 0.92 <= held['clusters'] / count <= 0.98
  assert 0.02 <= significant['clusters'] / count <= 0.085
  assert held['prompts'] / count < 0.85 and significant['prompts'] / count > 0.15


def test_coverage_where_clusters_have_prompts_of_several_categories():
  rng, held, count = np.random.default_rng(9), 0, 500
  for _ in range(count):
    rows = []
    for number in range(15):
      common = rng.normal()
      for name in 'ab' if rng.random() < 0.3 else 'ab'[number % 2]:
        shift = 2 * (name == 'b')
        rows += [(name, str(number), common + shift + 0.5 * rng.normal()) for _ in range(2)]
    categories, clusters, values = zip(*rows, strict=True)
    design = Design.of(categories, {'a': 0.4, 'b': 0.6}, clusters)
    low, high = statistics.interval(design, Sample.of(column(*values)))
    held += low <= 0.6 * 2 <= high
  assert 0.92 <= held / count <= 0.98


# Who is of whom


def pair(name, explicit, split='wording'):
  return KnowledgePair(f'prompt {name} {split}', explicit, 'c', split, name)


def test_pairs_of_a_fact_or_with_an_answer_are_about_one_thing():
  pairs = [
    pair('doctor/unseen/0', 'red apple'), pair('doctor/unseen/1', 'A  Red apple'),
    pair('teacher/unseen/0', 'red apple', 'fact'), pair('moth/0', 'butterfly'),
    # The anchors of a row of Science-T2I's training set are worded in several ways.
    pair('00001/0', 'a rusty nail'), pair('00001/1', 'a nail full of rust'),
    pair('mine:7', 'A butterfly'), pair('mine:8', 'cat'),
    # Bare names have ids that are no facts.
    pair('explicit/cat', 'cat', 'explicit'), pair('explicit/dog', 'dog', 'explicit'),
    pair('', 'dog', 'train'), pair('', 'cow', 'train'),
  ]  # fmt: skip
  found = clusters_of(pairs)
  numbers = [found.index(name) for name in found]
  assert numbers == [0, 0, 0, 3, 4, 4, 3, 7, 7, 9, 9, 11]
  assert found[0] == 'red apple' and found[3] == 'butterfly'
  assert [question.cluster for question in emoji.from_pairs(pairs)] == found
  # Numbered within a kind of knowledge, two wordings of each, they are nothing but their answers.
  kinds = [pair(f'animals/{n}', f'animal {n // 2}') for n in range(40)]
  assert clusters_of(kinds) == [f'animal {n // 2}' for n in range(40)]
  assert len(set(clusters_of(kinds[:3]))) == 1  # two of three
  assert len(set(clusters_of([kinds[0], kinds[2]]))) == 2
  # Chains, too, whatever the order.
  chain = [pair('1/0', 'x'), pair('2/0', 'y'), pair('1/1', 'z'), pair('2/1', 'z'), pair('3/0', 'w')]
  for pairs in (chain, chain[::-1]):
    assert len(set(clusters_of(pairs))) == 2
  assert clusters_of([]) == []


def test_rows_of_science_t2i_for_training_are_clusters_and_for_testing_on_their_own(tmp_path):
  row = {'category': 'physics', 'law': 'gravity'}
  one = {f'{name}_prompt': f'a {name} ball' for name in ('implicit', 'explicit', 'superficial')}
  several = {name: [text, f'{text}, falling'] for name, text in one.items()}
  for name, texts in (('train', several), ('S', one)):
    lines = json.dumps(row | texts) + '\n'
    (tmp_path / f'{name}.jsonl').write_text(lines * 2)
  trained = science_t2i.read_training_questions(str(tmp_path))
  assert [question.cluster for question in trained] == ['00001', '00001', '00002', '00002']
  assert [question.cluster for question in science_t2i.read_questions(str(tmp_path))] == ['', '']


def test_clusters_are_told_where_they_are_fewer_than_prompts():
  told = told_of(['x', 'x', 'y', 'y'], (1, 0, 1, 1), ACCURACY)
  assert results._line(ACCURACY, told).endswith('4 pictures in 2 clusters')
  assert gallery_summary._range(ACCURACY, told).endswith('4 pictures in 2 clusters')
  (row, *_) = results._summary_rows({'stages': {'m': {'implicit': told}}})
  assert (row['pictures'], row['prompts'], row['clusters']) == (4, 4, 2)
  told = difference(['x', 'x', 'y', 'y'], [0] * 4, [1, 0, 1, 1])
  assert 'p = 0.5, 4 prompts in 2 clusters"' in gallery_summary._difference(ACCURACY, told, True)
  told = told_of([''] * 4, (1, 0, 1, 1), ACCURACY)
  assert results._line(ACCURACY, told).endswith('4 pictures')
  told = told_of(['x'] * 4, (1, 0, 1, 1), ACCURACY)
  assert results._line(ACCURACY, told).endswith('4 pictures in 1 cluster')


def test_a_run_counts_things_not_wordings():
  pairs = [pair(f'fact {n // 2}/unseen/{n % 2}', f'thing {n // 2}') for n in range(20)]
  found = accuracy(np.ones(20, bool), pairs)
  assert (found['accuracy'], found['n'], found['clusters']) == (1, 20, 10)
  assert found['ci95'] == share([2] * 10, [2] * 10)
  distances = np.repeat(np.arange(10) / 10, 2).astype(np.float32)
  distance = mean_distance(distances, pairs)
  assert (distance['n'], distance['clusters']) == (20, 10)
  # Deviation of ten clusters, t of nine degrees of freedom.
  half = 2.262157 * np.std(np.arange(10) / 10, ddof=1) / math.sqrt(10)
  np.testing.assert_allclose(distance['ci95'], [0.45 - half, 0.45 + half], rtol=1e-4)
  assert mean_distance(distances[:2], pairs[:2])['ci95'] is None
  page = accuracy_table({'base': {'fact': {**found, 'clusters': 1}}})
  assert page.count('in 1 cluster<') == 1
  page = accuracy_table({'base': {'wording': found, 'fact': {**found, 'clusters': 20}}})
  assert page.count('in 10 clusters') == 1 and page.count('n\u00a0=\u00a020') == 2
  rows = {'wording': distance, 'fact': {**distance, 'ci95': None}}
  page = distance_table({'base': rows})
  assert page.count('in 10 clusters') == 2 and page.count('0.450') == 2
