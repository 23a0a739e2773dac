"""Prompt files: what is read, what is refused, and in which words."""

import dataclasses
import json

import pytest

from eru_jax.data import pairs
from eru_jax.data.pairs import KnowledgePair
from eru_jax.errors import UserError

_APPLE = {'implicit': 'the fruit that keeps the doctor away', 'explicit': 'red apple'}
_BUTTERFLY = {'implicit': 'what a caterpillar becomes', 'explicit': 'butterfly'}


@pytest.fixture
def write(tmp_path):
  def _write(*rows):
    path = tmp_path / 'prompts.jsonl'
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text('\n'.join(lines), encoding='utf-8')
    return path

  return _write


def test_reads_pairs_and_fills_what_is_missing(write):
  full = {**_BUTTERFLY, 'category': 'biology', 'split': 'test', 'id': 'b', 'subject_span': [7, 18]}
  got = pairs.read_prompt_file(write(_APPLE, '', {**full, 'image': None}))
  assert got == [
    KnowledgePair(**_APPLE, id='prompts:1'),
    KnowledgePair(**_BUTTERFLY, category='biology', split='test', id='b', subject_span=(7, 18)),
  ]
  assert got[0].split == 'train' and got[0].category is None


def test_reads_a_byte_order_mark_windows_newlines_and_line_separators(tmp_path):
  path = tmp_path / 'p.jsonl'
  text = json.dumps(_APPLE) + '\r\n' + '{"implicit": "a\u2028b", "explicit": "c"}\r\n'
  path.write_bytes(b'\xef\xbb\xbf' + text.encode('utf-8'))
  assert [pair.implicit for pair in pairs.read_prompt_file(path)][1] == 'a\u2028b'


@pytest.mark.parametrize(
  'rows, words',
  [
    (['{"implicit": "a", "explicit": "b"', _APPLE], ['line 1', 'malformed JSON']),
    ([_APPLE, '"text"'], ['line 2', 'expected a JSON object']),
    ([_APPLE, '[{"implicit": "a", "explicit": "b"}]'], ['line 2', 'JSON Lines']),
    (['[', '{"implicit": "a", "explicit": "b"}', ']'], ['line 1', 'JSON Lines']),
    (['[{"implicit": "a", "explicit": "b"},'], ['line 1', 'JSON Lines']),
    ([_APPLE, {'implicit': 'a'}], ['line 2', "'explicit' is missing"]),
    ([{**_APPLE, 'implicit': None}], ['line 1', "'implicit' is missing"]),
    ([{**_APPLE, 'explicit': '  '}], ['line 1', "'explicit' is empty"]),
    ([{**_APPLE, 'explicit': ['x']}], ['line 1', "'explicit' is ['x']", 'a string']),
    ([{**_APPLE, 'id': 7}], ['line 1', "'id' is 7", 'a string']),
    ([{**_APPLE, 'catgory': 'x'}], ['line 1', "'catgory'", 'implicit, explicit', 'category']),
    (['{"implicit": "a", "implicit": "b", "explicit": "c"}'], ["'implicit' occurs twice"]),
    ([{**_APPLE, 'subject_span': [4, 99]}], ['line 1', 'subject_span', '<= 36']),
    ([{**_APPLE, 'subject_span': [True, 2]}], ['line 1', 'subject_span']),
    ([{**_APPLE, 'explicit': '\ud83d'}], ['line 1', 'surrogate']),
    (['[' * 100_000], ['line 1']),
    (['{"implicit": ' + '1' * 5000 + '}'], ['line 1']),
    ([{**_APPLE, 'id': 'a'}, '', {**_BUTTERFLY, 'id': 'a'}], ['line 3', "'a'", 'line 1']),
    ([{**_APPLE, 'id': 'prompts:2'}, _BUTTERFLY], ['line 2', 'line 1']),
    (
      [_APPLE, {**_APPLE, 'implicit': 'The fruit  that keeps the DOCTOR away', 'split': 'test'}],
      ['line 2', "'test'", 'line 1', "'train'"],
    ),
    ([''], ['holds no prompts']),
  ],
)
def test_refuses_in_one_sentence_that_names_file_and_line(write, rows, words):
  path = write(*rows)
  with pytest.raises(UserError) as error:
    pairs.read_prompt_file(path)
  message = str(error.value)
  assert str(path) in message and '\n' not in message
  for word in words:
    assert word in message


def test_refuses_files_that_cannot_be_read(tmp_path):
  with pytest.raises(UserError, match='no prompt file .*absent.jsonl'):
    pairs.read_prompt_file(tmp_path / 'absent.jsonl')
  with pytest.raises(UserError, match='cannot be read'):
    pairs.read_prompt_file(tmp_path)
  path = tmp_path / 'latin.jsonl'
  path.write_bytes(json.dumps(_APPLE).encode() + b'\n\n"caf\xe9"')
  with pytest.raises(UserError, match='latin.jsonl, line 3: not UTF-8'):
    pairs.read_prompt_file(path)


def test_the_same_prompt_twice_in_one_split_is_allowed(write):
  assert len(pairs.read_prompt_file(write(_APPLE, {**_APPLE, 'explicit': 'apple'}))) == 2


def test_a_prompt_with_two_anchors_is_warned_of_once(write, monkeypatch):
  told = []
  monkeypatch.setattr(pairs.logging, 'warning', lambda text, *args: told.append(text % args))
  other = {'implicit': 'What a  caterpillar becomes', 'explicit': 'a moth'}
  pairs.read_prompt_file(write(_BUTTERFLY, {**_BUTTERFLY, 'explicit': 'A butterfly'}))
  assert not told
  assert len(pairs.read_prompt_file(write(_BUTTERFLY, other, other))) == 3
  assert len(told) == 1 and '2 lines give' in told[0], told
  assert "line 2: 'What a  caterpillar becomes' is 'butterfly' and 'a moth'." in told[0]


def test_written_files_read_back_equal(tmp_path):
  path = tmp_path / 'out.jsonl'
  written = [
    KnowledgePair('crêpe weather', 'snow', 'culture', 'test', 'a/1', (0, 5), 'x/y.png'),
    KnowledgePair(**_BUTTERFLY, id='b'),
  ]
  pairs.write_prompt_file(path, written)
  assert pairs.read_prompt_file(path) == written
  assert 'crêpe' in path.read_text(encoding='utf-8')
  assert sorted(tmp_path.iterdir()) == [path]


def test_a_refused_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'out.jsonl'
  pairs.write_prompt_file(path, [KnowledgePair(**_APPLE, id='a')])
  before = path.read_bytes()
  with pytest.raises(UserError, match='Not written.*out.jsonl, line 2.*already'):
    pairs.write_prompt_file(path, [KnowledgePair(**_APPLE, id='a')] * 2)
  assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == [path]
  with pytest.raises(UserError, match='cannot be written'):
    pairs.write_prompt_file(path / 'x.jsonl', [KnowledgePair(**_APPLE)])


def test_a_fold_is_a_category_or_a_fact_and_names_are_none():
  items = [
    KnowledgePair('i1', 'x', 'culture', 'train', 'a/0'),
    KnowledgePair('i2', 'x', 'culture', 'wording', 'a/unseen/0'),
    KnowledgePair('i3', 'y', None, 'train', 'b'),
    KnowledgePair('y', 'y', 'objects', 'explicit', 'explicit/y'),
  ]
  assert pairs.folds(items, 'category') == ['culture']
  assert pairs.folds(items, 'fact') == ['a', 'b']


def test_what_is_held_out_leaves_nothing_of_it_behind():
  apple = KnowledgePair('what fell on Newton', 'a red apple', 'physics', 'train', 'a/0')
  kept = KnowledgePair('what bees make', 'honey pot', 'food', 'train', 'd/0')
  items = [
    apple,
    KnowledgePair('it hit Newton', 'Red Apple', 'physics', 'test', 'a/1'),
    # Of another fact, but with the same answer or the same prompt.
    KnowledgePair('the doctor hates it', 'red apple', 'culture', 'wording', 'b/0'),
    KnowledgePair('What fell  on newton', 'green apple', 'culture', 'train', 'c/0'),
    KnowledgePair('red apple', 'red apple', 'physics', 'explicit', 'explicit/red-apple'),
    kept,
    KnowledgePair('it purrs', 'cat', 'biology', 'fact', 'e/0'),
  ]
  expected = [dataclasses.replace(pair, split='fact') for pair in items[:2]]
  for what in ('physics', 'a'):
    assert pairs.hold_out(items, what, 'here') == [*expected, kept]
  assert pairs.hold_out(items, 'a/0', 'here') == [expected[0], kept]
  assert pairs.hold_out(items, 'e', 'here') == [pair for pair in items if pair.id != 'f']


def test_what_cannot_be_held_out_is_said_in_one_sentence():
  items = [
    KnowledgePair('what bees make', 'honey pot', 'food', 'train', 'honey/0'),
    KnowledgePair('it purrs', 'cat', 'animals', 'fact', 'cat/0'),
  ]
  for what, near in (('hony', 'nearest: honey, cat'), ('honey/1', 'nearest: honey/0, cat/0')):
    with pytest.raises(UserError, match=f"here: leave_out is '{what}'.*animals, food.*{near}") as e:
      pairs.hold_out(items, what, 'here')
    assert '\n' not in str(e.value)
  with pytest.raises(UserError, match='here: without .food. no pair of split "train" is left'):
    pairs.hold_out(items, 'food', 'here')
  bare = [KnowledgePair('what bees make', 'honey pot', id='honey')]
  with pytest.raises(UserError, match='the pairs have none'):
    pairs.hold_out(bare, 'food', 'here')


def test_by_split_keeps_order():
  items = [KnowledgePair(str(i), 'x', split='ab'[i % 2]) for i in range(4)]
  assert pairs.by_split(items) == {'a': items[::2], 'b': items[1::2]}
