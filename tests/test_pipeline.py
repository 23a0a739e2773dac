"""Index batches: every row once an epoch, the same on any number of processes, exact resume."""

import json

import numpy as np
import pytest

from eru_jax.data.pipeline import batches, mixture_batches
from eru_jax.errors import UserError

_SOURCES = {'pairs': (23, 4), 'preservation': (7, 6), 'off': (0, 0)}


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _equal(a, b):
  return all(np.array_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


def test_each_epoch_holds_each_row_once_in_a_new_order():
  stream = np.concatenate(_take(batches(50, 8, seed=3), 25))
  epochs = stream.reshape(4, 50)
  for epoch in epochs:
    assert sorted(epoch) == list(range(50))
  assert len({tuple(epoch) for epoch in epochs}) == 4
  assert not any(np.array_equal(epoch, np.arange(50)) for epoch in epochs)


def test_batches_are_int32_and_may_be_larger_than_the_table():
  batch = next(batches(3, 8, seed=0))
  assert batch.dtype == np.int32 and batch.shape == (8,)
  assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]
  assert next(batches(1, 2, seed=0)).tolist() == [0, 0]


def test_neighbouring_seeds_are_unrelated():
  first, second = (np.concatenate(_take(batches(50, 10, seed), 20)) for seed in (0, 1))
  assert not np.array_equal(first, second)
  assert not np.array_equal(first[50:100], second[:50])


@pytest.mark.parametrize('process_count', [2, 4])
def test_processes_together_see_the_batches_of_one_process(process_count):
  whole = _take(batches(30, 8, seed=1), 12)
  parts = [_take(batches(30, 8, 1, p, process_count), 12) for p in range(process_count)]
  assert all(part.shape == (8 // process_count,) for part in parts[0])
  assert np.array_equal(whole, [np.concatenate(step) for step in zip(*parts, strict=True)])


def test_mixture_draws_fixed_numbers_and_sources_do_not_disturb_each_other():
  taken = _take(mixture_batches(_SOURCES, seed=2), 23)
  assert {name: rows.shape for name, rows in taken[0].items()} == {
    'pairs': (4,),
    'preservation': (6,),
    'off': (0,),
  }
  assert all(rows.dtype == np.int32 for rows in taken[0].values())
  counts = np.bincount(np.concatenate([batch['pairs'] for batch in taken]))
  assert counts.tolist() == [4] * 23
  alone = _take(mixture_batches({'pairs': (23, 4)}, seed=2), 23)
  assert all(np.array_equal(a['pairs'], b['pairs']) for a, b in zip(taken, alone, strict=True))


@pytest.mark.parametrize('position', [0, 1, 5, 6, 17])
def test_resume_is_exact_at_any_position_and_on_other_processes(position):
  iterator = mixture_batches(_SOURCES, seed=5)
  _take(iterator, position)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = _take(iterator, 9)

  used = mixture_batches(_SOURCES, seed=5)
  _take(used, 3)
  used.set_state(state)
  assert _equal(_take(used, 9), expected)

  halves = [mixture_batches(_SOURCES, 5, p, 2) for p in range(2)]
  for half in halves:
    half.set_state(state)
  for batch in expected:
    left, right = map(next, halves)
    assert _equal([{n: np.concatenate([left[n], right[n]]) for n in left}], [batch])


def test_single_source_resumes_exactly():
  iterator = batches(11, 4, seed=9)
  _take(iterator, 4)
  state = iterator.get_state()
  expected = _take(iterator, 5)
  fresh = batches(11, 4, seed=9)
  fresh.set_state(state)
  assert np.array_equal(_take(fresh, 5), expected)


def test_a_state_of_another_run_is_refused():
  state = batches(11, 4, seed=9).get_state()
  for other in (batches(12, 4, 9), batches(11, 2, 9), batches(11, 4, 8)):
    with pytest.raises(UserError, match='saved data position'):
      other.set_state(state)
  with pytest.raises(UserError, match='saved data position'):
    batches(11, 4, 9).set_state({**state, 'step': None})


def test_impossible_requests_are_refused():
  with pytest.raises(UserError, match='3 processes'):
    batches(10, 4, 0, 0, 3)
  with pytest.raises(UserError, match="no examples of 'pairs'"):
    mixture_batches({'pairs': (0, 4)}, 0)
  with pytest.raises(UserError, match='process_index is 2'):
    batches(10, 4, 0, 2, 2)
