"""What judging has cost over all starts of a run: against what a server has counted."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from judge_server import USAGE, JudgeServer, after, completion, fails, says, text_of

from eru_jax.errors import UserError
from eru_jax.judges.protocols import PROTOCOLS
from eru_jax.judges.spending import Ledger, Spending, read_spending
from eru_jax.judges.summary import Answer, Spent
from eru_jax.judges.verdicts import Item, judge_pictures, open_journal
from eru_jax.rewards.judge import JudgeConfig, describe_spending, judge_spending
from eru_jax.training.report import ReportData, write_report

WISE = PROTOCOLS['wise']
GOOD = {'consistency': 1, 'realism': 1, 'aesthetics': 1}


def items(numbers):
  return [
    Item(f'{n}', np.full((4, 4, 3), n, np.uint8), {'prompt': f'prompt {n}', 'explanation': 'e'})
    for n in numbers
  ]


def judged(server, directory, numbers, **client):
  """As an iteration of a run that has just begun."""
  ledger = Ledger(directory / 'judge_spent.jsonl')
  with open_journal(directory / 'verdicts.jsonl') as journal:
    client = server.client(**client)
    _, summary = judge_pictures(client, WISE, items(numbers), journal, kept=ledger.add)
  ledger.settle(summary.seconds)


def spent(directory):
  return read_spending(directory / 'judge_spent.jsonl')


def test_every_request_of_every_start_is_counted_once(tmp_path):
  def act(handler):
    number = int(text_of(handler.request_seen).partition('Prompt: prompt ')[2].split()[0])
    (fails(503, 'gone') if number == 3 else says(GOOD))(handler)

  with JudgeServer(usual=act) as server:
    judged(server, tmp_path, range(4), attempts=2)
    found = spent(tmp_path).to_json()
    assert found.pop('seconds') > 0
    assert found == {
      'answered': 3, 'unanswered': 1, 'cached': 0, 'requests': 3 + 2, 'retries': 1,
      'prompt_tokens': 300, 'completion_tokens': 30, 'unmetered': 0,
      'reasons': {'HTTP 503: gone (2 attempts)': 1},
    }  # fmt: skip
    # The same step again, and one more: verdicts that are kept cost nothing, lost ones anew.
    judged(server, tmp_path, range(6), attempts=2)
    found = spent(tmp_path).to_json()
    assert (found['answered'], found['cached'], found['unanswered']) == (3 + 5, 3, 2)
    assert found['requests'] == len(server.requests) == 5 + 4
    assert (found['prompt_tokens'], found['completion_tokens']) == (500, 50)
    assert found['reasons'] == {'HTTP 503: gone (2 attempts)': 2}


def test_bad_replies_are_paid_and_uncounted_tokens_have_no_price(tmp_path):
  with JudgeServer(says('Nice!'), usual=says(GOOD)) as server:
    judged(server, tmp_path, [0])
    found = spent(tmp_path)
    assert (found.summary.requests, found.summary.prompt_tokens, found.unmetered) == (2, 200, 0)
    # By hand: 200 read at 2.5 and 20 written at 10 for a million.
    assert found.priced((2.5, 10.0)).cost == pytest.approx((200 * 2.5 + 20 * 10) / 1e6)
    assert found.priced(None).cost is None
    server.usual = lambda handler: handler.send_json(200, completion(GOOD, usage=None))
    judged(server, tmp_path, [1])
  found = spent(tmp_path)
  assert found.unmetered == 1 and found.priced((2.5, 10.0)).cost is None
  assert found.summary.prompt_tokens == 200 and found.summary.requests == 3


def test_what_was_paid_before_a_judge_is_lost_is_counted(tmp_path):
  with JudgeServer(*[says(GOOD)] * 5, usual=fails(500)) as server:
    ledger = Ledger(tmp_path / 'judge_spent.jsonl')
    with pytest.raises(UserError, match='in a row unanswered'):
      client = server.client(concurrency=1, attempts=1)
      judge_pictures(client, WISE, items(range(40)), kept=ledger.add)
    found = spent(tmp_path).summary
    assert found.answered == 5 and found.prompt_tokens == 500
    # Those that nobody was asked about are not unscored. The last may be interrupted as it begins.
    assert found.requests == 5 + found.unanswered < 40
    assert found.requests - 1 <= len(server.requests) <= found.requests


def test_what_was_paid_before_a_kill_is_counted(tmp_path):
  code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import pathlib
import test_judge_spending as t
from eru_jax.judges.chat import ChatClient
from eru_jax.judges.settings import ChatConfig
class Server:
  client = lambda self: ChatClient(ChatConfig(sys.argv[1], 'tiny-judge', concurrency=2))
t.judged(Server(), pathlib.Path(sys.argv[2]), range(30))
"""
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
  with JudgeServer(usual=after(0.02, says(GOOD))) as server:
    command = [sys.executable, '-c', code, server.url, str(tmp_path)]
    process = subprocess.Popen(command, env=environment)
    while spent(tmp_path).summary.answered < 7:
      assert process.poll() is None
      time.sleep(0.01)
    stuck = []
    server.usual = lambda handler: (stuck.append(1), server.over.wait(60))
    # Both threads of the client have written down what they were told before.
    while len(stuck) < 2:
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    before, server.usual = spent(tmp_path).summary, says(GOOD)
    # All but the two that were under way.
    assert before.answered == before.requests == len(server.requests) - 2 >= 7
    judged(server, tmp_path, range(30))
  found = spent(tmp_path).summary
  assert found.requests == len(server.requests) - 2 == 30
  assert (found.answered, found.cached) == (before.answered + 30, before.answered)
  assert found.prompt_tokens == 30 * USAGE['prompt_tokens']


def test_a_ledger_that_is_torn_or_damaged_loses_those_lines_only(tmp_path):
  path = tmp_path / 'ledger.jsonl'
  assert read_spending(path) == Spending()
  path.write_bytes(
    b'{"answered": 2, "requests": 3, "reasons": {"a": 1}}\n[1]\n7\n{"requests": "x"}\n'
    b'{"requests": null}\n{"reasons": [1]}\n\xff\n{"requests": 1e999}\n{"answered": -4}\n'
    b'{"seconds": 1e999}\n{"answered": 4, "requ'
  )
  ledger = Ledger(path)
  ledger.add(Answer('p', None, 'b', spent=Spent(2, 10, 1), before=Spent(0, 500, 500)))
  whole = Spending.from_json(
    {'answered': 2, 'unanswered': 1, 'requests': 5, 'retries': 1, 'prompt_tokens': 10,
     'completion_tokens': 1, 'reasons': {'a': 1, 'b': 1}}
  )  # fmt: skip
  assert read_spending(path) == whole
  ledger.settle(1.5)
  assert read_spending(path).summary.seconds == 1.5
  # Nothing takes a line from another process, as of a run that was thought dead.
  other = Ledger(path)
  other.add(Answer('q', None, 'b', spent=Spent(1, 10, 1)))
  ledger.add(Answer('r', None, 'b', spent=Spent(1, 10, 1)))
  ledger.settle(0.5)
  assert read_spending(path).summary.requests == 7 and read_spending(path).summary.seconds == 2
  # A directory in its place is told.
  with pytest.raises(UserError, match='cannot be read'):
    read_spending(tmp_path)
  (tmp_path / 'full').write_text('')
  with pytest.raises(UserError):
    Ledger(tmp_path / 'full' / 'x').add(Answer('p', 1))
  # A server that words each refusal anew does not make the line grow without end.
  found = Spending()
  for n in range(200):
    found = found.plus(Spending.from_json({'unanswered': 1, 'reasons': {f'no {n}': 1}}))
  assert len(found.summary.reasons) <= 51 and sum(found.summary.reasons.values()) == 200


def test_what_a_run_tells_of_its_judge(tmp_path):
  config = JudgeConfig(url='http://h/v1/', model='m<b>', price='2,10')
  line = {
    'answered': 7, 'unanswered': 3, 'cached': 2, 'requests': 12, 'retries': 4,
    'prompt_tokens': 1000, 'completion_tokens': 100, 'reasons': {'<i>timed out</i>': 3},
  }  # fmt: skip
  (tmp_path / 'judge_spent.jsonl').write_text(json.dumps(line) + '\n')
  told = judge_spending(config, tmp_path)
  assert (told['model'], told['url'], told['price']) == ('m<b>', 'http://h/v1', [2, 10])
  assert told['total'] == line | {'unmetered': 0, 'seconds': 0, 'cost': pytest.approx(0.003)}
  text = describe_spending(told)
  assert '7 of 10 scored, 2 of them before; 12 requests (4 repeated)' in text
  assert 'cost 0.003' in text and '3 not scored: <i>timed out</i>' in text
  page = write_report(tmp_path, ReportData('t', {'judge': told})).read_text()
  for part in ('m&lt;b&gt; at http://h/v1', '12, 4 of them repeated', '1000 read, 100 written',
               '>0.003<', '3; 3: &lt;i&gt;timed out', '10, repeated steps included'):  # fmt: skip
    assert part in page
  # Without a price there is no cost; with other tokens than counted, neither.
  free = judge_spending(JudgeConfig(url='http://h/v1', model='m'), tmp_path)
  assert free['price'] is free['total']['cost'] is None
  assert '>cost<' not in write_report(tmp_path, ReportData('t', {'judge': free})).read_text()
  (tmp_path / 'judge_spent.jsonl').write_text(json.dumps(line | {'unmetered': 2}) + '\n')
  told = judge_spending(config, tmp_path)
  assert told['total']['cost'] is None and 'tokens of 2 were not all' in describe_spending(told)
  with pytest.raises(UserError, match='two numbers IN,OUT'):
    JudgeConfig(url='http://h/v1', model='m', price='cheap')

  # Nor was anything spent where nobody was asked.
  told = judge_spending(config, tmp_path / 'none')
  assert told['total']['requests'] == told['total']['cost'] == 0
