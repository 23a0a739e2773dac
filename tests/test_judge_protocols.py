"""What judges are asked and how strictly their replies are read."""

import subprocess
import sys
import time

import pytest

from eru_jax.errors import UserError
from eru_jax.judges.protocols import PROTOCOLS, protocol, read_instructions
from eru_jax.judges.replies import BadReply, integers, json_object

WISE = PROTOCOLS['wise']
MARKS = {'consistency': 2, 'realism': 1, 'aesthetics': 0}


@pytest.mark.parametrize(
  'reply',
  [
    '{"consistency": 2, "realism": 1, "aesthetics": 0}',
    '\n {"Consistency":2,"REALISM":1,"Aesthetic Quality":0} ',
    '```json\n{"consistency": 2, "realism": 1, "aesthetic_quality": 0}\n```',
    '```\n{"consistency": 2, "realism": 1, "aesthetics": 0}```',
    '<think>Perhaps {"consistency": 0}?\n</think>\n{"consistency": 2, "realism": 1, '
    '"aesthetics": 0, "reason": "so"}',
    'Consistency: 2\nRealism: 1\nAesthetic Quality: 0',
    '**Consistency:** 2\n\n**Realism**: 1\n- Aesthetic Quality = 0.\n',
    # Of a chat template that opens the thoughts itself.
    'Hm, </think> or {"consistency": 1}?\n</think>\n\nConsistency: 2\nRealism: 1\nAesthetics: 0',
    'Consistency: 2/2\nRealism: 1 / 2\n**Aesthetic Quality:** 0/2',
    '{"consistency": "2", "realism": " 1 ", "aesthetics": "0/2"}',
    'Here is what I see.\n```json\n{"consistency": 2, "realism": 1, "aesthetics": 0}\n```\nSo '
    'consistency is 2, as 9 apples are there.',
  ],
)
def test_a_reply_in_either_form_is_read(reply):
  assert WISE.read(reply) == MARKS


@pytest.mark.parametrize(
  'reply, reason',
  [
    ('', 'it is empty'),
    ('I cannot judge this picture.', 'no JSON'),
    ('{"consistency": 2, "realism": 1', 'no JSON'),
    ("{'consistency': 2, 'realism': 1, 'aesthetics': 0}", 'no JSON'),
    ('[2, 1, 0]', 'no JSON object'),
    ('2', 'no JSON object'),
    ('[' * 100_000, 'no JSON'),
    ('{"consistency": 2, "realism": 1}', "'aesthetics' is missing"),
    ('{"consistency": 3, "realism": 1, "aesthetics": 0}', "'consistency' is not from 0 to 2"),
    ('{"consistency": -1, "realism": 1, "aesthetics": 0}', "'consistency' is not from 0 to 2"),
    ('{"consistency": 2, "realism": 1.0, "aesthetics": 0}', "'realism' is no whole number"),
    ('{"consistency": 2, "realism": "1.0", "aesthetics": 0}', "'realism' is no whole number"),
    ('{"consistency": 2, "realism": "1 or 2", "aesthetics": 0}', "'realism' is no whole number"),
    ('{"consistency": 2, "realism": "one", "aesthetics": 0}', "'realism' is no whole number"),
    ('{"consistency": "٢", "realism": 1, "aesthetics": 0}', "'consistency' is no whole number"),
    ('{"consistency": "3", "realism": 1, "aesthetics": 0}', "'consistency' is not from 0 to 2"),
    ('{"consistency": "2/5", "realism": 1, "aesthetics": 0}', 'out of 5, not out of 2'),
    ('{"consistency": ["2"], "realism": 1, "aesthetics": 0}', 'no whole number'),
    ('Consistency: 2/3\nRealism: 1\nAesthetics: 0', 'out of 3, not out of 2'),
    ('Consistency: 3/2\nRealism: 1\nAesthetics: 0', 'not from 0 to 2'),
    ('{"consistency": 2, "realism": true, "aesthetics": 0}', "'realism' is no whole number"),
    ('{"consistency": 2, "realism": null, "aesthetics": 0}', "'realism' is no whole number"),
    ('{"consistency": 2, "realism": NaN, "aesthetics": 0}', "'realism' is no whole number"),
    ('{"consistency": 2, "consistency": 0, "realism": 1, "aesthetics": 0}', 'twice'),
    ('{"consistency": 2, "realism": 1, "aesthetics": 0, "aesthetic quality": 0}', 'twice'),
    ('Sure! {"consistency": 2, "realism": 1, "aesthetics": 0}', 'no JSON'),
    (
      'Consistency: 1\n```json\n{"consistency": 2, "realism": 1, "aesthetics": 0}\n```',
      "'consistency' is another around",
    ),
    (
      '```json\n{"consistency": 2, "realism": 1, "aesthetics": 0}\n```\nor aesthetic quality is 2',
      "'aesthetics' is another around",
    ),
    (
      '{"consistency": 1}\n```json\n{"consistency": 2, "realism": 1, "aesthetics": 0}\n```',
      'more than text around',
    ),
    ('```\n{"a": 1}\n```\n```\n{"b": 1}\n```', 'several fenced blocks'),
    ('<think>{"consistency": 2, "realism": 1, "aesthetics": 0}', 'within the model’s thoughts'),
    ('Consistency: 2\nRealism: 1\nAesthetic Quality: 0\nA fine picture.', 'no JSON'),
    ('Consistency: 2\nRealism: 1\nAesthetic Quality: 9', "'aesthetics' is not from 0 to 2"),
    ('Consistency: 2\nConsistency: 1\nRealism: 1\nAesthetics: 1', 'twice'),
    ('{"consistency": 2' + '0' * 5000 + ', "realism": 1, "aesthetics": 0}', 'no JSON|not from'),
  ],
)
def test_anything_else_is_a_bad_reply(reply, reason):
  with pytest.raises(BadReply, match=reason):
    WISE.read(reply)


def test_long_replies_are_read_in_no_time():
  for text in (
    '*' * 200_000,
    'a ' * 10**5,
    '```\n' * 50_000,
    '<think>' * 30_000,
    ' ' * 200_000,
    'a' + ' ' * 200_000 + ':',
    'realism ' * 30_000 + '```{}```' + 'realism: ' * 30_000,
    '{"consistency": "' + '2' * 200_000 + '"}',
    '</think>' * 30_000,
    '```\n' + ' \n' * 10**5,
    ('a' + ' ' * 190 + 'b\n') * 10_000,
  ):
    began = time.process_time()
    with pytest.raises(BadReply):
      WISE.read(text)
    assert time.process_time() - began < 1


def test_scores_by_hand():
  assert WISE.score({'consistency': 2, 'realism': 2, 'aesthetics': 2}) == 1
  assert WISE.score(dict.fromkeys(MARKS, 0)) == 0
  assert WISE.score(MARKS) == pytest.approx((0.7 * 2 + 0.2 * 1) / 2, abs=1e-15)
  assert WISE.score({'consistency': 0, 'realism': 0, 'aesthetics': 1}) == pytest.approx(0.05)
  verified, science = PROTOCOLS['wise_verified'], PROTOCOLS['science_t2i']
  assert [verified.score(verified.read(f'{{"score": {n}}}')) for n in (0, 1)] == [0, 1]
  with pytest.raises(BadReply):
    verified.read('{"correct": 2}')
  found = [science.score({'scene': s, 'reality': r}) for s in (0, 1) for r in range(4)]
  assert found == pytest.approx([0, 0, 0, 0, 0, 1 / 3, 2 / 3, 1])
  reply = '{"description": "ice", "scene score": 1, "reality score": 2}'
  assert science.read(reply) == {'scene': 1, 'reality': 2}


def test_every_protocol_asks_with_all_that_it_is_told():
  values = {
    'prompt': 'a {explanation} of {x}', 'explanation': 'because {prompt}', 'scene': 'SCENE',
    'reality': 'REALITY',
  }  # fmt: skip
  for found in PROTOCOLS.values():
    text = found.ask(values)
    # What a value says is not taken for a placeholder.
    assert all(text.count(values[name]) == 1 for name in found.fields)
    for name in found.fields:
      with pytest.raises(UserError, match=f'has no {name}, which the judge must be told'):
        found.ask(values | {name: ' '})
    for name in found.marks:
      assert f'"{name}"' in found.instructions


def test_instructions_of_ones_own(tmp_path):
  path = tmp_path / 'official.txt'
  path.write_text('PROMPT: "{prompt}" EXPLANATION: "{explanation}" reply {"a": {"b": 1}} {}')
  found = protocol('wise', path)
  asked = found.ask({'prompt': 'p', 'explanation': 'e'})
  assert asked == 'PROMPT: "p" EXPLANATION: "e" reply {"a": {"b": 1}} {}'
  assert found.identity() != WISE.identity() and found.read is not None
  bad = {
    '{prompt} {explanaton}': 'unknown placeholder {explanaton}; did you mean {explanation}?',
    '{prompt} {explanation} {zzz}': 'there are {prompt}, {explanation}.',
    '{prompt} is all': 'lacks {explanation}',
    'x' * 70_000: 'at most 65536',
  }
  for text, message in bad.items():
    path.write_text(text)
    with pytest.raises(UserError) as caught:
      protocol('wise', path)
    assert message in str(caught.value) and str(path) in str(caught.value)
  path.write_bytes(b'\xff{prompt}')
  with pytest.raises(UserError, match='not UTF-8'):
    protocol('wise', path)
  with pytest.raises(UserError, match='cannot be read'):
    read_instructions(tmp_path / 'none', ('prompt',))
  with pytest.raises(UserError, match="Unknown protocol 'wize'"):
    protocol('wize')


def test_names_of_a_json_reply_are_compared_plainly():
  assert json_object('{"Scene-Score": 1}') == {'scene_score': 1}
  assert integers('x y: 3', {'x_y': (0, 5)}, {}) == {'x_y': 3}


def test_the_words_beside_the_marks_are_one_short_line():
  verified, science = PROTOCOLS['wise_verified'], PROTOCOLS['science_t2i']
  assert verified.words('{"reason": "two\\n  wings", "correct": 1}') == 'two wings'
  reply = 'So:\n```json\n{"Description": "ice", "scene": 1, "reality": 2}\n```'
  assert science.words(reply) == 'ice'
  for reply in ('{"reason": 3, "correct": 1}', '{"correct": 1}', 'correct: 1', '{"reason": " "}'):
    assert verified.words(reply) == ''
  found = verified.words('{"reason": "\\u001b[31m\\ud800\\u202e' + 'x' * 1000 + '", "correct": 1}')
  assert found.startswith('?[31m??xxx') and len(found) == 300 and found.endswith('x…')


def test_judges_need_no_jax():
  code = (
    'import sys, pkgutil, importlib, eru_jax.judges as j\n'
    'for m in pkgutil.iter_modules(j.__path__): importlib.import_module(f"eru_jax.judges.{m.name}")'
    '\nprint([n for n in ("jax", "flax", "tensorflow") if n in sys.modules])'
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == '[]'
