"""Many pictures and a judge that is not always there: verdicts, their journal, and the summary."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from absl import flags
from judge_server import (
  JudgeServer,
  after,
  answers,
  drops,
  fails,
  hangs,
  picture_of,
  says,
  sends,
  text_of,
)
from PIL import Image

from eru_jax.errors import UserError
from eru_jax.judges import patience
from eru_jax.judges.flags import define_chat
from eru_jax.judges.protocols import PROTOCOLS
from eru_jax.judges.summary import parse_price
from eru_jax.judges.verdicts import Item, judge_name, judge_pictures, open_journal

WISE, VERIFIED = PROTOCOLS['wise'], PROTOCOLS['wise_verified']


def _items(count, level=None):
  """Pictures of one grey level each, its own number."""
  return [
    Item(
      f'id {n}',
      np.full((8, 8, 3), n if level is None else level, np.uint8),
      {'prompt': f'prompt {n}', 'explanation': 'why'},
    )
    for n in range(count)
  ]


def _third(request):
  """The right verdict on such a picture: consistency is its level modulo 3."""
  return {'consistency': int(picture_of(request)[0, 0, 0]) % 3, 'realism': 1, 'aesthetics': 2}


def _scores(verdicts):
  return [None if verdict.marks is None else verdict.marks['consistency'] for verdict in verdicts]


def test_verdicts_come_in_order_from_a_pool_that_is_bounded():
  three = threading.Barrier(3)

  def together(then):
    def act(handler):
      three.wait(60)
      then(handler)

    return act

  # The first ones all at once, and then the last of them first.
  slow = [together(after(n, answers(_third))) for n in (0.3, 0.2, 0.1)]
  fast = [after(0.02, answers(_third))] * 9
  with JudgeServer(*slow, *fast) as server:
    told = []
    verdicts, summary = judge_pictures(
      server.client(concurrency=3),
      WISE,
      _items(12),
      price=(2.0, 10.0),
      told=lambda *a: told.append(a),
    )
  assert [verdict.id for verdict in verdicts] == [f'id {n}' for n in range(12)]
  assert _scores(verdicts) == [n % 3 for n in range(12)]
  assert verdicts[4].score == pytest.approx((0.7 * 1 + 0.2 * 1 + 0.1 * 2) / 2)
  assert server.most == 3 and len(server.requests) == 12
  assert sorted(told) == [(n, 12) for n in range(1, 13)]
  assert (summary.answered, summary.unanswered, summary.cached) == (12, 0, 0)
  assert (summary.requests, summary.retries) == (12, 0)
  assert (summary.prompt_tokens, summary.completion_tokens) == (1200, 120)
  assert summary.cost == pytest.approx(1200 * 2e-6 + 120 * 10e-6)
  text = summary.describe('scored')
  assert text.startswith('12 of 12 scored; 12 requests (0 repeated)') and 'cost 0.0036' in text
  asked = text_of(server.requests[0])
  assert 'prompt ' in asked and 'why' in asked and '{prompt}' not in asked


def test_bad_replies_are_asked_about_again_with_the_reason():
  wrong = {'consistency': 3, 'realism': 0, 'aesthetics': 0}
  with JudgeServer(says('hm'), says(wrong), answers(_third)) as server:
    (verdict,), summary = judge_pictures(server.client(), WISE, _items(1))
  assert verdict.marks['consistency'] == 0 and (summary.requests, summary.retries) == (3, 2)
  assert summary.prompt_tokens == 300
  first, second, third = (request['body']['messages'] for request in server.requests)
  assert len(first) == 1 and second[0] == third[0] == first[0]
  assert second[1] == {'role': 'assistant', 'content': 'hm'} and 'no JSON' in second[2]['content']
  assert len(third) == 3 and 'not from 0 to 2' in third[2]['content']


def test_what_stays_bad_is_unscored_and_never_zero():
  acts = {
    'id 0': says('I cannot.'),
    'id 1': says({'consistency': 7, 'realism': 0, 'aesthetics': 0}),
    'id 2': says('<think>so', finish='length'),
    'id 3': fails(500, 'busy'),
    'id 4': fails(400, 'too large'),
    'id 5': drops,
    'id 6': sends(b'nothing'),
    'id 7': answers(_third),
  }

  def act(handler):
    acts[f'id {picture_of(handler.request_seen)[0, 0, 0]}'](handler)

  with JudgeServer(usual=act) as server:
    verdicts, summary = judge_pictures(server.client(attempts=2), WISE, _items(8), price=(1, 1))
  assert _scores(verdicts) == [None] * 7 + [1]
  assert all(verdict.score is None for verdict in verdicts[:7])
  reasons = [verdict.reason for verdict in verdicts]
  wanted = [
    'bad reply, 3 times: it is no JSON (it says: I cannot.)',
    "bad reply, 3 times: 'consistency' is not from 0 to 2 "
    '(it says: {"consistency": 7, "realism": 0, "aesthetics": 0})',
    'bad reply, 3 times: it ends within the model’s thoughts, cut off at max_tokens (it says: '
    '<think>so)',
    'HTTP 500: busy (2 attempts)',
    'refused with HTTP 400: too large',
  ]
  assert reasons[:5] == wanted and reasons[7] == ''
  assert reasons[5].startswith('the connection failed (') and reasons[6].endswith('(2 attempts)')
  # 3 of each bad reply, 2 of what may pass, 1 of what may not, and 1 that was right.
  assert len(server.requests) == summary.requests == 3 * 3 + 3 * 2 + 1 + 1
  assert summary.retries == summary.requests - 8
  assert (summary.answered, summary.unanswered) == (1, 7) and sum(summary.reasons.values()) == 7
  # What they said is of each picture, and would keep reasons from being counted.
  assert summary.reasons['bad reply, 3 times: it is no JSON'] == 1
  assert '1 not scored: refused with HTTP 400: too large' in summary.describe('scored')
  # 1 right reply and 9 bad ones were paid for.
  assert summary.prompt_tokens == 1000 and summary.cost == pytest.approx(1100e-6)


def test_a_run_goes_on_where_it_ended_and_asks_nothing_twice(tmp_path):
  path = tmp_path / 'out' / 'verdicts.jsonl'
  with JudgeServer(usual=answers(_third)) as server:
    client = server.client()
    with open_journal(path) as journal:
      judge_pictures(client, WISE, _items(5), journal)
    with open_journal(path) as journal:
      verdicts, summary = judge_pictures(client, WISE, _items(8), journal, price=(1.0, 1.0))
      assert len(server.requests) == 8 and len(journal) == 8
    assert [verdict.cached for verdict in verdicts] == [True] * 5 + [False] * 3
    assert _scores(verdicts) == [n % 3 for n in range(8)]
    assert (summary.cached, summary.answered, summary.requests) == (5, 8, 3)
    assert (summary.prompt_tokens, summary.cached_prompt_tokens) == (300, 500)
    assert (summary.cost, summary.cached_cost) == pytest.approx((330e-6, 550e-6))
    # Another picture, prompt, model, protocol or setting is another question.
    other = [
      (client, WISE, _items(1, level=9)[0]),
      (client, WISE, Item('id 0', _items(1)[0].picture, {'prompt': 'new', 'explanation': 'why'})),
      (client, WISE, Item('id x', _items(1)[0].picture, _items(1)[0].values)),
      (server.client(temperature=0.5), WISE, _items(1)[0]),
      (server.client(detail='low'), WISE, _items(1)[0]),
      (server.client(extra='{"seed": 3}'), WISE, _items(1)[0]),
    ]
    for asked, protocol, item in other:
      before = len(server.requests)
      with open_journal(path) as journal:
        for _ in range(2):
          judge_pictures(asked, protocol, [item], journal)
      assert len(server.requests) == before + 1
    assert judge_name(client, WISE) != judge_name(client, VERIFIED)
    # How it is asked does not matter, as long as what is asked is the same.
    longer = {'max_tokens': 9, 'extra': '{"max_tokens": null, "max_completion_tokens": 9}'}
    with open_journal(path) as journal:
      same = server.client(timeout=9.0, concurrency=1, **longer)
      judge_pictures(same, WISE, _items(8), journal)
    assert len(server.requests) == before + 1
  # Nor does it where the model runs: nobody listens at the old port any more.
  with JudgeServer() as other, open_journal(path) as journal:
    verdicts, _ = judge_pictures(other.client(), WISE, _items(8), journal)
    assert all(verdict.cached for verdict in verdicts) and not other.requests
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert rows[0].keys() == {'judge', 'id', 'image', 'text', 'reply', 'tokens', 'seconds', 'model'}


def test_a_file_of_the_same_pixels_is_the_same_picture(tmp_path):
  (item,) = _items(1)
  Image.fromarray(item.picture).save(tmp_path / 'a.png')
  Image.fromarray(item.picture).convert('RGBA').save(tmp_path / 'b.png', compress_level=0)
  with JudgeServer(usual=answers(_third)) as server, open_journal(tmp_path / 'j') as journal:
    for picture in (item.picture, tmp_path / 'a.png', str(tmp_path / 'b.png')):
      judge_pictures(server.client(), WISE, [Item(item.id, picture, item.values)], journal)
  assert len(server.requests) == 1


def test_a_journal_torn_by_a_kill_is_mended(tmp_path):
  path = tmp_path / 'verdicts.jsonl'
  with JudgeServer(usual=answers(_third)) as server:
    client = server.client(concurrency=1)
    with open_journal(path) as journal:
      judge_pictures(client, WISE, _items(4), journal)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    row = json.loads(lines[1])
    # Half a line at the end; a reply that is none; a line that is no object.
    bad = json.dumps(row | {'reply': '{"consistency": 9}'}).encode() + b'\n'
    path.write_bytes(lines[0] + bad + b'[1]\n' + lines[2] + lines[3][:40])
    for _ in range(2):
      with open_journal(path) as journal:
        verdicts, _ = judge_pictures(client, WISE, _items(4), journal)
      assert _scores(verdicts) == [0, 1, 2, 0]
      assert len(server.requests) == 4 + 2
  added = path.read_bytes()
  assert (
    added.startswith(lines[0]) and added.endswith(b'}\n') and b'\n' + lines[3][:40] + b'\n' in added
  )


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_what_was_judged_before_a_kill_is_there(tmp_path, how):
  path = tmp_path / 'verdicts.jsonl'
  code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_judge_verdicts as t
from eru_jax import commands
from eru_jax.judges.chat import ChatClient
from eru_jax.judges.settings import ChatConfig
client = ChatClient(ChatConfig(sys.argv.pop(1), 'tiny-judge', concurrency=2))
journal = t.open_journal(sys.argv.pop(1))
commands.run(lambda: t.judge_pictures(client, t.WISE, t._items(30), journal))
"""
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
  stuck = []

  def never(handler):
    stuck.append(handler)
    hangs(handler)

  with JudgeServer(usual=after(0.05, answers(_third))) as server:
    process = subprocess.Popen(
      [sys.executable, '-c', code, server.url, str(path)], env=environment, stderr=subprocess.PIPE
    )
    while not path.is_file() or path.read_bytes().count(b'\n') < 5:
      assert process.poll() is None
      time.sleep(0.01)
    server.usual = never
    while len(stuck) < 2:
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(how)
    # Not held up by requests that are on their way, which have two minutes.
    _, printed = process.communicate(timeout=60)
    if how == signal.SIGINT:
      assert process.returncode == 130 and b'error: interrupted' in printed
      assert b'Traceback' not in printed
    kept = path.read_bytes().count(b'\n')
    server.usual, before = answers(_third), len(server.requests)
    with open_journal(path) as journal:
      client = server.client()
      assert len(journal) == kept >= 5
      verdicts, _ = judge_pictures(client, WISE, _items(30), journal)
    assert _scores(verdicts) == [n % 3 for n in range(30)]
    # Asked at another time-out, but of the same judge.
    assert len(server.requests) == before + 30 - kept


def _kept(path):
  """How many answers a journal holds."""
  return sum('reply' in json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize(
  'act',
  [fails(503, 'no machine'), fails(403, 'no more'), drops],
  ids=['busy', 'denied', 'dropped'],
)
def test_where_nobody_answers_the_rest_is_not_asked(act, tmp_path, monkeypatch):
  path, heard = tmp_path / 'j', threading.Event()

  def told(done, count):
    if done == 3:
      heard.set()

  def act_then(handler):
    heard.wait(60)
    act(handler)

  # Four at a time: what is sent before the third answer is known does not count.
  enough, at_once = patience.GIVE_UP + 4, 4
  with JudgeServer(*[answers(_third)] * 3, *[act_then] * enough, usual=hangs) as server:
    client = server.client(attempts=1)
    with open_journal(path) as journal:
      with pytest.raises(UserError, match='16 questions in a row unanswered') as caught:
        judge_pictures(client, WISE, _items(250), journal, told=told)
    assert _kept(path) == 3 and '\n' not in str(caught.value)
    # What is on its way when it is noticed still comes; a loaded machine notices late.
    assert 3 + patience.GIVE_UP <= len(server.requests) <= 3 + enough + at_once
    # Whoever tries again may be asked about these as well, but not about all.
    heard.clear()
    server.requests, server.script = [], [act_then] * (enough + patience.GIVE_UP)
    with open_journal(path) as journal:
      with pytest.raises(UserError, match='16 questions in a row unanswered'):
        judge_pictures(client, WISE, _items(250), journal, told=told)
    assert len(server.requests) <= enough + patience.GIVE_UP + at_once
  client, sent = server.client(), []
  complete = client.complete
  heard.clear()

  def counted(messages, halt):
    heard.wait(60)
    sent.append(messages)
    if len(sent) > patience.GIVE_UP:
      halt.wait(600)
    return complete(messages, halt)

  monkeypatch.setattr(client, 'complete', counted)
  with open_journal(path) as journal:
    with pytest.raises(UserError, match='16 questions in a row.*connection failed'):
      judge_pictures(client, WISE, _items(250), journal, told=told)
  assert patience.GIVE_UP <= len(sent) <= patience.GIVE_UP + at_once


def test_a_judge_of_whom_no_word_was_of_use_is_not_asked_on(tmp_path):
  # Four at a time; of each bad reply the client asks three times.
  for act, words, enough in (
    (says('Nice!'), 'no JSON .it says: Nice!', 3 * patience.GIVE_UP + 4 * 2),
    (fails(400, 'blind'), 'blind', patience.GIVE_UP),
  ):
    with JudgeServer(*[act] * enough, usual=hangs) as server:
      with pytest.raises(UserError, match=f'16 questions in a row.*{words}'):
        judge_pictures(server.client(), WISE, _items(250))
    assert len(server.requests) <= enough + 4
  # Of a wrong key one word is enough; the others may be of one picture.
  for status, enough in ((401, 1), (403, 4), (404, 4)):
    with JudgeServer(*[fails(status)] * enough, usual=hangs) as server:
      with pytest.raises(UserError, match=f'HTTP {status}.*(set ERU|another key|check the addr)'):
        judge_pictures(server.client(), WISE, _items(200))
    assert len(server.requests) <= enough + 4


@pytest.mark.parametrize(
  'bad, requests',
  [
    (says('I am sorry.'), 3),
    (fails(400, 'I will not'), 1),
    (fails(403, 'flagged by moderation'), 1),
    (fails(404, 'flagged by moderation'), 1),
    (fails(500, 'flagged by moderation'), 2),
  ],
  ids=['reply', '400', '403', '404', '500'],
)
def test_pictures_that_are_never_judged_do_not_keep_others_from_it(bad, requests, tmp_path):
  """Of 60 pictures 20, and in the later runs nothing else is asked about."""

  def act(handler):
    level = int(picture_of(handler.request_seen)[0, 0, 0])
    # What is known comes back before any of them does.
    (after(0.15, bad) if level % 3 == 0 else answers(_third))(handler)

  wanted = [None if n % 3 == 0 else n % 3 for n in range(60)]
  with JudgeServer(usual=act) as server:
    for run in range(2):
      server.requests = []
      client = server.client(attempts=2, concurrency=32)
      with open_journal(tmp_path / 'j') as journal:
        verdicts, summary = judge_pictures(client, WISE, _items(60), journal)
      assert _scores(verdicts) == wanted
      assert len(server.requests) == requests * 20 + (0 if run else 40)
      assert (summary.answered, summary.cached) == (40, 40 if run else 0)
  reasons = {verdict.reason.split(' (')[0] for verdict in verdicts if verdict.score is None}
  assert len(reasons) == 1 and not reasons & {''}


def test_the_first_picture_alone_may_be_denied(tmp_path):
  def act(handler):
    level = int(picture_of(handler.request_seen)[0, 0, 0])
    (after(0.1, answers(_third)) if level else fails(403, 'flagged'))(handler)

  with JudgeServer(usual=act) as server:
    # Asked at the same time as others, it is told from a wrong key.
    verdicts, _ = judge_pictures(server.client(concurrency=4), WISE, _items(6))
    assert _scores(verdicts) == [None, 1, 2, 0, 1, 2]
    assert verdicts[0].reason == 'refused with HTTP 403: flagged'
    # Asked alone, it is not, but does not stand in the way of others for ever.
    for run in range(2):
      client = server.client(concurrency=1)
      with open_journal(tmp_path / 'j') as journal:
        if run == 0:
          with pytest.raises(UserError, match='HTTP 403: flagged: this key may not use'):
            judge_pictures(client, WISE, _items(6), journal)
        else:
          assert _scores(judge_pictures(client, WISE, _items(6), journal)[0])[1:] == [1, 2, 0, 1, 2]
    # What was of use once is remembered by those who ask more patiently, or less.
    client = server.client(concurrency=1)
    judge_pictures(client.impatient(2), WISE, _items(2)[1:])
    assert _scores(judge_pictures(client, WISE, _items(2))[0]) == [None, 1]


def test_who_answered_first_is_known_even_if_all_came_back_meanwhile(monkeypatch):
  """A judge can be faster than its questions are handed out."""

  class Late(concurrent.futures.ThreadPoolExecutor):
    def submit(self, *arguments):
      future = super().submit(*arguments)
      concurrent.futures.wait([future])
      return future

  monkeypatch.setattr(concurrent.futures, 'ThreadPoolExecutor', Late)
  with JudgeServer(answers(_third), usual=fails(403, 'flagged')) as server:
    # Were a denied one taken for the first, it would mean a wrong key.
    verdicts, _ = judge_pictures(server.client(concurrency=1), WISE, _items(12))
  assert _scores(verdicts) == [0] + [None] * 11


def test_a_judge_that_hangs_on_a_few_pictures_is_not_gone(tmp_path):
  """They come back last, many in a row, when all others are long judged."""

  def act(handler):
    level = int(picture_of(handler.request_seen)[0, 0, 0])
    (after(1.5, drops) if level % 3 == 0 else answers(_third))(handler)

  with JudgeServer(usual=act) as server:
    client = server.client(attempts=1, concurrency=32)
    verdicts, _ = judge_pictures(client, WISE, _items(60))
  assert sum(verdict.score is None for verdict in verdicts) == 20


def test_a_wrong_key_is_fatal_whatever_was_answered(tmp_path):
  with JudgeServer(*[answers(_third)] * 3, fails(401), usual=hangs) as server:
    with pytest.raises(UserError, match='HTTP 401.*to a valid key'):
      judge_pictures(server.client(concurrency=1), WISE, _items(20))
  assert 4 <= len(server.requests) <= 5  # of which the last may have been on its way


def test_what_unscored_pictures_cost_is_not_forgotten(tmp_path):
  with JudgeServer(says('a'), says('b'), says('c'), usual=answers(_third)) as server:
    client, price = server.client(concurrency=1), (1.0, 2.0)
    found = []
    for count in (1, 2, 2):
      with open_journal(tmp_path / 'j') as journal:
        _, summary = judge_pictures(client, WISE, _items(count), journal, price)
      found.append((summary.unanswered, summary.cost * 1e6, summary.cached_cost * 1e6))
  # A reply costs 120: three bad ones, then a good one of each picture, then nothing.
  assert [one[0] for one in found] == [1, 0, 0]
  assert [one[1:] for one in found] == [
    pytest.approx((360, 0)), pytest.approx((240, 360)), pytest.approx((0, 600))
  ]  # fmt: skip


def test_many_reasons_are_not_all_told():
  acts = [fails(400, f'request {n}') for n in range(12)]
  with JudgeServer(answers(_third), *acts) as server:
    _, summary = judge_pictures(server.client(concurrency=1), WISE, _items(13))
  lines = summary.describe('scored').splitlines()
  assert len(lines) == 1 + 8 + 1 and lines[-1] == '  4 not scored for other reasons'


def test_a_server_that_dies_and_comes_back_leaves_nothing_unscored():
  with JudgeServer(usual=answers(_third)) as server:
    back = threading.Timer(0.4, server.start)

    def die(handler):
      server.stop()
      back.start()
      drops(handler)

    server.script = [answers(_third)] * 4 + [die]
    # Patient for far longer than the server is away, however late it is.
    client = server.client(attempts=300, first_wait=0.05, longest_wait=0.2)
    verdicts, summary = judge_pictures(client, WISE, _items(20))
    back.join()
  assert _scores(verdicts) == [n % 3 for n in range(20)]
  assert summary.retries > 0


def test_pictures_that_cannot_be_read_are_named(tmp_path):
  (tmp_path / 'bad.png').write_bytes(b'\x89PNG\r\n\x1a\nrest')
  noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
  Image.fromarray(noise).save(tmp_path / 'cut.png')
  (tmp_path / 'cut.png').write_bytes((tmp_path / 'cut.png').read_bytes()[:900])
  values = {'prompt': 'p', 'explanation': 'e'}
  with JudgeServer() as server:
    for name in ('bad.png', 'cut.png', 'none.png', ''):
      with pytest.raises(UserError, match='cannot be read'):
        judge_pictures(server.client(), WISE, [Item('a', tmp_path / name, values)])
    for array in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
      with pytest.raises(UserError, match='must be \\(H, W, 3\\) uint8'):
        judge_pictures(server.client(), WISE, [Item('a', array, values)])
    with pytest.raises(UserError, match='has no explanation'):
      judge_pictures(server.client(), WISE, [Item('a', array, {'prompt': 'p'})])
    assert judge_pictures(server.client(), WISE, [])[0] == []
  assert not server.requests


def test_without_counted_tokens_there_is_no_cost():
  with JudgeServer(usual=says({'correct': 1}, usage=None)) as server:
    (verdict,), summary = judge_pictures(server.client(), VERIFIED, _items(1), price=(1.0, 1.0))
  assert verdict.score == 1 and summary.cost is None and 'cost' not in summary.describe()
  assert json.loads(json.dumps(summary.to_json()))['cost'] is None


def test_a_journal_that_cannot_be_written_or_read_is_named(tmp_path):
  with JudgeServer(usual=answers(_third)) as server:
    (tmp_path / 'file').write_text('')
    journal = open_journal(tmp_path / 'file2')
    journal.path = tmp_path / 'file' / 'j'
    with pytest.raises(UserError, match='cannot be written'):
      judge_pictures(server.client(), WISE, _items(1), journal)
  with pytest.raises(UserError, match='cannot be read'):
    open_journal(tmp_path)


@pytest.mark.parametrize('bad', ['1', 'a,b', '1,2,3', '-1,2', 'nan,1', ''])
def test_prices_that_are_none_are_refused(bad):
  with pytest.raises(UserError, match='must be two numbers IN,OUT'):
    parse_price(bad)
  assert parse_price('2.5, 10') == (2.5, 10.0)


def test_flags(monkeypatch):
  values = flags.FlagValues()
  for name in ('string', 'integer', 'float'):
    define = getattr(flags, f'DEFINE_{name}')
    monkeypatch.setattr(
      flags, f'DEFINE_{name}', lambda *a, define=define: define(*a, flag_values=values)
    )
  found = define_chat('judge', 'judges pictures')

  def parsed(*arguments):
    values.unparse_flags()
    values(['x', *arguments])
    return found

  assert parsed().client() is None and found.price() is None
  url = '--judge=http://localhost:8000/v1'
  client = parsed(url, '--judge_model=m', '--judge_price=1,2', '--judge_timeout=9').client()
  assert (client.config.model, client.config.timeout, found.price()) == ('m', 9.0, (1.0, 2.0))
  with pytest.raises(UserError, match='no --judge_model=NAME'):
    values['judge_model'].unparse()
    parsed(url).client()
  with pytest.raises(UserError, match='--judge_model is given, but no --judge=URL'):
    values['judge'].unparse()
    parsed('--judge_model=m').client()
  for option in (
    'timeout=9',
    'concurrency=3',
    'max_tokens=9',
    'detail=low',
    'extra={}',
    'price=1,2',
  ):
    words = f'^--judge_{option.split("=")[0]} is given, but no --judge=URL: give that too, or leave'
    with pytest.raises(UserError, match=words):
      parsed(f'--judge_{option}').client()
