"""Evaluations with a judge and a rewriter over HTTP, from the benchmark's files to the gallery.

The models are stand-ins, or the tiny one of the package; the servers are real, on this machine.
"""

import collections
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import zlib

import pytest
from benchmark_files import science_row, write_lines, write_wise
from judge_server import JudgeServer, after, answers, fails, hangs, picture_of, says, text_of
from test_evaluator import Studio

from eru_jax.errors import UserError
from eru_jax.evaluating.evaluator import evaluate
from eru_jax.evaluating.request import EvaluationRequest
from eru_jax.judges.service import Service

MARKS = ('consistency', 'realism', 'aesthetics')


@pytest.fixture
def studio(monkeypatch, tmp_path):
  return Studio(monkeypatch, tmp_path)


def is_check(request):
  """Whether a request is the grey picture that comes before everything."""
  return 'a grey square' in text_of(request)


def marks(request):
  """Marks as high as the blue that a stage's pictures have: base 0, dk_dm 1, no_rl 2."""
  level = 0 if is_check(request) else int(picture_of(request)[0, 0, 2])
  return dict.fromkeys(MARKS, level)


def service(server, price=(2.0, 10.0), **settings):
  return Service(server.client(**settings), price=price)


def judged(server, **settings):
  return {'judge': service(server, **settings)}


def run(data, output, benchmark='wise', **options):
  request = EvaluationRequest(('m',), str(output), benchmark, str(data), **options)
  return evaluate(request)


def asked(server):
  """(prompt of the instructions, the picture's bytes) of all requests but the grey one."""
  return [
    (text_of(request), picture_of(request).tobytes())
    for request in server.requests
    if not is_check(request)
  ]


def test_a_judge_scores_wise_and_is_asked_nothing_twice(studio, tmp_path, capsys):
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'
  with JudgeServer(usual=answers(marks)) as server:
    result = run(data, out, **judged(server))
    assert json.loads((out / 'evaluation.json').read_text()) == result
    # Marks of 0, 1 and 2 are WiScores of 0, 0.5 and 1, in every category.
    scores = [found['implicit']['score'] for found in result['stages'].values()]
    assert scores == pytest.approx([0, 0.5, 1])
    told = result['judge']
    assert (told['model'], told['url'], told['protocol']) == ('tiny-judge', server.url, 'wise')
    total = told['total']
    assert (total['answered'], total['unanswered'], total['cached']) == (78, 0, 0)
    assert (total['requests'], total['retries']) == (78, 0)
    assert (total['prompt_tokens'], total['completion_tokens']) == (7800, 780)
    assert total['cost'] == pytest.approx((7800 * 2 + 780 * 10) / 1e6)
    assert {name: one['answered'] for name, one in told['models'].items()} == {
      'base': 26, 'dk_dm': 26, 'no_rl': 26
    }  # fmt: skip
    # The judge is told the implicit prompt and the explanation, whatever was drawn.
    seen = asked(server)
    assert len(seen) == len(set(seen)) == 78
    assert all('riddle number' in text and 'This refers to' in text for text, _ in seen)
    assert not any('Answer2.' in text for text, _ in seen)
    printed = capsys.readouterr().out
    assert '78 of 78 scored; 78 requests (0 repeated)' in printed and 'cost 0.0234' in printed
    html = (out / 'gallery.html').read_text()
    assert 'judge tiny-judge at' in html and 'cost 0.0234' in html
    before = len(server.requests)
    again = run(data, out, **judged(server))
    assert len(server.requests) == before
    total = again['judge']['total']
    assert (total['cached'], total['requests'], total['cost']) == (78, 0, 0)
    assert total['cached_cost'] == pytest.approx(0.0234)
    assert again['stages'] == result['stages']
    # Without a price there is no cost, and the verdicts are the same.
    assert run(data, out, **judged(server, price=None))['judge']['total']['cost'] is None
    assert len(server.requests) == before
  assert 'verdicts.jsonl' in {path.name for path in out.iterdir()}
  assert not (out / 'scores.jsonl').exists()


def test_unscored_pictures_are_told_and_never_zero(studio, tmp_path, capsys):
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'

  def act(handler):
    text = text_of(handler.request_seen)
    if 'riddle number 2\n' in text:
      return fails(400, 'it is not shown')(handler)
    if 'riddle number 700\n' in text:
      return says('lovely')(handler)
    return answers(marks)(handler)

  with JudgeServer(usual=act) as server:
    result = run(data, out, stages=('no_rl',), **judged(server))
    told = result['stages']['no_rl']['implicit']
    assert (told['n'], told['unscored']) == (11, 2) and told['score'] == pytest.approx(1)
    total = result['judge']['total']
    assert (total['answered'], total['unanswered']) == (22, 4)
    assert sorted(total['reasons'].values()) == [2, 2]
    assert any('it is not shown' in reason for reason in total['reasons'])
    # A bad reply is asked about twice more; that is told, too.
    assert total['retries'] == 2 * 2
    printed = capsys.readouterr().out
    assert '2 not scored: refused with HTTP 400: it is not shown' in printed
    assert '11 pictures, 2 unscored and left out' in printed
    page = (out / 'gallery.html').read_text()
    assert '2 not scored: refused' in page and '"refused with HTTP 400: it is not shown"' in page
    # Marks by name stand under each picture, and what a bad reply was.
    assert '"consistency 2, realism 2, aesthetics 2"' in page and '(it says: lovely)"' in page
    rows = list(csv.DictReader((out / 'pictures.csv').open()))
    assert {row['reason'] for row in rows} == {''}
    why = {(row['id'], row['unscored'].split(':')[0]) for row in rows if not row['value']}
    assert why == {('2', 'refused with HTTP 400'), ('700', 'bad reply, 3 times')}
    assert {row['unscored'] for row in rows if row['value']} == {''}
    # They, and only they, are asked about again.
    server.usual, server.requests = answers(marks), []
    result = run(data, out, stages=('no_rl',), **judged(server))
    assert len(server.requests) == 4 and result['judge']['total']['unanswered'] == 0
    assert result['stages']['no_rl']['implicit']['n'] == 13


def test_the_judges_reasons_are_shown_and_are_only_text(studio, tmp_path):
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'
  reason = '=1+1 </script><b>&\n two\ud800 wings ' + 'x' * 5000

  def verdict(request):
    return {'correct': 1, 'reason': reason}

  with JudgeServer(usual=answers(verdict)) as server:
    for _ in range(2):  # and what is known has it as well
      run(data, out, benchmark='wise_verified', stages=('base',), **judged(server))
      page = (out / 'gallery.html').read_text()
      shown = 'correct 1: =1+1 \\u003c/script\\u003e\\u003cb\\u003e\\u0026 two? wings xxx'
      assert shown in page and '<b>&' not in page and 'x' * 301 not in page
      rows = list(csv.DictReader((out / 'pictures.csv').open()))
      assert {row['reason'][:32] for row in rows} == {"'=1+1 </script><b>& two? wings xx"[:32]}
      assert {len(row['reason']) for row in rows} == {301} and rows[0]['correct'] == '1'


def test_science_t2i_by_its_rubrics_and_wise_verified(studio, tmp_path):
  rows = [science_row(i, scene_scoring=f'scene of {i}') for i in range(6)]
  write_lines(tmp_path / 'data' / 'test_S.jsonl', rows)

  def rubric(request):
    level = 0 if is_check(request) else int(picture_of(request)[0, 0, 2])
    return {'description': 'x', 'scene': int('scene of 3' not in text_of(request)),
            'reality': level + 1}  # fmt: skip

  with JudgeServer(usual=answers(rubric)) as server:
    result = run(
      tmp_path / 'data', tmp_path / 'out', benchmark='science_t2i', conditions=('implicit',),
      **judged(server)
    )  # fmt: skip
    assert result['scorer'] == 'science_t2i'
    # Two pictures of six prompts, one of whose scenes is incomplete: 5 / 6 of 33, 67 and 100 %.
    scores = [found['implicit']['score'] for found in result['stages'].values()]
    assert scores == pytest.approx([100 * 5 / 18, 200 * 5 / 18, 300 * 5 / 18])
    assert all('scene of' in text for text, _ in asked(server))
  del rows[2]['real_scoring']
  write_lines(tmp_path / 'data' / 'test_S.jsonl', rows)
  with JudgeServer() as server:
    with pytest.raises(UserError, match='has no reality, which the judge must be told'):
      run(tmp_path / 'data', tmp_path / 'o', benchmark='science_t2i', **judged(server))
    assert not server.requests
  with JudgeServer(usual=says({'correct': 1})) as server:
    data = write_wise(tmp_path / 'WISE')
    result = run(
      data, tmp_path / 'verified', benchmark='wise_verified', stages=('base',), **judged(server)
    )
  assert result['stages']['base']['implicit']['score'] == pytest.approx(1)


@pytest.mark.parametrize(
  ('act', 'words'),
  [
    (fails(401, 'bad key'), 'HTTP 401: bad key: set ERU_JAX_JUDGE_KEY to a valid key'),
    (fails(404, 'no model'), 'HTTP 404'),
    (fails(400, 'no pictures, please'), 'could not judge a picture .*no pictures, please'),
    (says('grey'), 'could not judge a picture .*bad reply'),
    (None, 'could not judge a picture .*connection'),
  ],
)
def test_a_judge_that_cannot_is_told_before_anything_is_drawn(act, words, studio, tmp_path):
  data = write_wise(tmp_path / 'WISE')
  with JudgeServer(usual=act) as server:
    if act is None:
      server.stop()
    with pytest.raises(UserError, match=words) as caught:
      run(data, tmp_path / 'out', **judged(server))
  assert '\n' not in str(caught.value)
  assert studio.opened == [] and studio.drawn == []


def test_flags_of_judges_that_do_not_go_together(studio, tmp_path):
  data = write_wise(tmp_path / 'WISE')
  emoji = tmp_path / 'mine.jsonl'
  emoji.write_text('{"implicit": "a", "explicit": "b"}\n')
  with JudgeServer() as server:
    for options, words in (
      ({'scorer': 'none'}, '--judge is given, but --scorer=none asks none'),
      ({'scorer': 'sci_score'}, '--judge is given, but --scorer=sci_score asks none'),
      ({'scorer': 'science_t2i'}, "--scorer=science_t2i: benchmark 'wise' can be scored by wise"),
      ({'scorer_model': 'x'}, '--scorer_model is given, but a --judge looks'),
      ({'benchmark': 'emoji'}, "--judge is given, but benchmark 'emoji' is scored by emoji"),
    ):
      with pytest.raises(UserError, match=words):
        run(emoji if 'benchmark' in options else data, tmp_path / 'out', **judged(server),
            **options)  # fmt: skip
    own = tmp_path / 'own.txt'
    own.write_text('Mark {prompt}')
    with pytest.raises(UserError, match='own.txt lacks {explanation}'):
      run(data, tmp_path / 'out', judge=Service(server.client(), str(own)))
    assert not server.requests and studio.opened == []


def explicitly(request):
  """Rewrites 'riddle number N' as 'thing N', but not 701."""
  number = re.search(r'riddle number (\d+)', text_of(request))[1]
  return 'no idea' if number == '701' else {'rewrite': f'thing {number}'}


def test_rewriting_is_a_rival_in_the_same_table(studio, tmp_path, capsys):
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'

  def better(request):
    """Right where the picture's red says that it was drawn of 'thing N'."""
    number = re.search(r'riddle number (\d+)|grey', text_of(request))[1]
    red = int(picture_of(request)[0, 0, 0])
    right = number and red == zlib.crc32(f'thing {number}'.encode()) % 251
    return dict.fromkeys(MARKS, 2 if right else 1)

  with (
    JudgeServer(usual=answers(better)) as judge,
    JudgeServer(usual=after(0.02, answers(explicitly))) as writer,
  ):
    options = {'rewriter': service(writer, price=(1.0, 2.0), role='rewriter')}
    result = run(data, out, **judged(judge), **options)
    base = result['stages']['base']
    assert list(base) == ['implicit', 'explicit', 'rewritten']
    assert list(result['stages']['no_rl']) == ['implicit', 'explicit']
    assert base['implicit']['score'] == pytest.approx(0.5)
    assert base['rewritten']['categories']['culture']['score'] == pytest.approx(1)
    # The one that could not be rewritten has no picture; no other prompt stands in for it.
    assert (base['rewritten']['n'], base['implicit']['n']) == (12, 13)
    rival = [
      one for one in result['comparisons']
      if one['against'] == {'model': 'base', 'condition': 'rewritten'}
    ]  # fmt: skip
    assert [one['model'] for one in rival] == ['base', 'dk_dm', 'no_rl']
    assert rival[0]['difference'] == pytest.approx(-0.5)
    told = result['rewriter']
    assert (told['total']['answered'], told['total']['unanswered']) == (12, 1)
    each = told['per_prompt']
    assert each['seconds'] >= 0.02 and each['median_seconds'] >= 0.02
    assert (each['prompt_tokens'], each['completion_tokens']) == (100, 10)
    assert each['cost'] == pytest.approx(120 / 1e6)
    pairs = {pair['id']: pair for pair in result['pairs']}
    assert pairs['2']['rewritten'] == 'thing 2' and pairs['2']['rewriting']['seconds'] >= 0.02
    assert 'rewriting' not in pairs['701']
    printed = capsys.readouterr().out
    assert '12 of 13 rewritten' in printed and 's (median' in printed
    assert 'cost 0.00012, for each rewritten prompt' in printed
    assert 'rewritten prompts' in (out / 'gallery.html').read_text()
    # Only what is open is asked again, and the pictures stay.
    before, drawn = len(writer.requests), len(studio.drawn)
    run(data, out, **judged(judge), **options)
    assert len(writer.requests) == before + 3 and len(studio.drawn) == drawn
  assert collections.Counter(map(text_of, writer.requests)).most_common(2)[1][1] == 1


@pytest.mark.parametrize('first', [0, 1])
def test_costs_of_rewrites_are_of_those_that_were_counted(first, studio, tmp_path, capsys):
  """Of a server that counts tokens now and then."""
  data = write_wise(tmp_path / 'WISE')

  def act(handler):
    number = int(re.search(r'riddle number (\d+)', text_of(handler.request_seen))[1])
    usage = {'prompt_tokens': number, 'completion_tokens': 0} if number % 2 == first else None
    says({'rewrite': f'thing {number}'}, usage=usage)(handler)

  with JudgeServer(usual=act) as writer:
    rewriter = service(writer, price=(1.0, 2.0), role='rewriter')
    result = run(data, tmp_path / 'out', scorer='none', stages=('base',), rewriter=rewriter)
  pairs = result['pairs']
  numbers = [int(pair['id']) for pair in pairs]
  counted = [number for number in numbers if number % 2 == first]
  assert 0 < len(counted) < len(numbers)
  each = result['rewriter']['per_prompt']
  assert (each['metered'], each['prompts']) == (len(counted), len(numbers))
  assert each['prompt_tokens'] == pytest.approx(sum(counted) / len(counted))
  assert each['cost'] == pytest.approx(sum(counted) / len(counted) / 1e6)
  for pair, number in zip(pairs, numbers, strict=True):
    told = pair['rewriting']
    assert (told['prompt_tokens'], told['cost']) == (
      (number, pytest.approx(number / 1e6)) if number in counted else (None, None)
    )
  said = f'rewritten prompt (tokens of {len(counted)} of {len(numbers)} were counted), at every use'
  assert said in capsys.readouterr().out


def test_a_rewriter_that_counts_nothing_has_no_cost(studio, tmp_path, capsys):
  data = write_wise(tmp_path / 'WISE')
  with JudgeServer(usual=says({'rewrite': 'a thing'}, usage=None)) as writer:
    rewriter = service(writer, price=(1.0, 2.0), role='rewriter')
    result = run(data, tmp_path / 'out', scorer='none', stages=('base',), rewriter=rewriter)
  assert result['rewriter']['per_prompt'].keys() == {
    'seconds', 'median_seconds', 'prompts', 'metered'
  }  # fmt: skip
  assert 'tokens that nobody counted for each rewritten prompt' in capsys.readouterr().out


def test_a_rewriter_that_cannot_is_told_before_anything_is_drawn(studio, tmp_path):
  data = write_wise(tmp_path / 'WISE')
  for act, words in ((says('no'), "rewriter 'tiny-judge' at .* rewrote none of 3 prompts .*bad re"),
                     (fails(401, 'bad'), 'set ERU_JAX_REWRITER_KEY to a valid key')):  # fmt: skip
    with JudgeServer(usual=act) as server, pytest.raises(UserError, match=words):
      rewriter = service(server, role='rewriter')
      run(data, tmp_path / 'out', scorer='none', limit=3, rewriter=rewriter)
  assert studio.opened == []


def test_a_judges_key_does_not_go_to_a_rewriter():
  environment = {'ERU_JAX_JUDGE_KEY': 'for-the-judge', 'ERU_JAX_REWRITER_KEY': 'for-the-rewriter'}
  with JudgeServer(usual=says({'rewrite': 'x'})) as server:
    for role in ('judge', 'rewriter'):
      server.client(environment, role=role).complete([{'role': 'user', 'content': 'x'}])
    del environment['ERU_JAX_REWRITER_KEY']
    server.client(environment, role='rewriter').complete([{'role': 'user', 'content': 'x'}])
  keys = [request['headers'].get('Authorization') for request in server.requests]
  assert keys == ['Bearer for-the-judge', 'Bearer for-the-rewriter', None]


def test_the_command_killed_while_judging_and_given_again(tmp_path):
  """The whole program, with the model of the package that draws anything: emoji_base."""
  data, out = write_wise(tmp_path / 'WISE'), tmp_path / 'out'
  enough = threading.Event()
  judged_ones = []

  def slowly(handler):
    request = handler.request_seen
    if not is_check(request):
      judged_ones.append(text_of(request))
      if len(judged_ones) > 6:
        enough.set()
        return hangs(handler)  # nothing more comes back, however late the kill is
    answers(lambda _: dict.fromkeys(MARKS, 1))(handler)

  with JudgeServer(usual=slowly) as server:
    command = [
      sys.executable, '-m', 'eru_jax.evaluate', '--model=emoji_base', '--benchmark=wise',
      f'--data={data}', f'--output={out}', f'--judge={server.url}', '--judge_model=m',
      '--judge_concurrency=1', '--judge_price=1,1', '--conditions=implicit', '--steps=1',
    ]  # fmt: skip
    killed = subprocess.Popen(
      command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    assert enough.wait(300)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(60)
    kept = [json.loads(line) for line in (out / 'verdicts.jsonl').read_text().splitlines()]
    assert len(kept) == 6 and not (out / 'evaluation.json').exists()
    times = {path: path.stat().st_mtime_ns for path in out.rglob('*.png')}
    assert len(times) == 13
    server.usual, server.requests = answers(lambda _: dict.fromkeys(MARKS, 1)), []
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    # Seven pictures were open; no grey one is sent, as nothing had to be drawn.
    assert len(server.requests) == 7 and not any(map(is_check, server.requests))
  assert {path: path.stat().st_mtime_ns for path in out.rglob('*.png')} == times
  result = json.loads((out / 'evaluation.json').read_text())
  assert result['stages']['base']['implicit']['score'] == pytest.approx(0.5)
  total = result['judge']['total']
  assert (total['cached'], total['answered'], total['unanswered']) == (6, 13, 0)
  assert total['cached_cost'] == pytest.approx(660e-6) and total['cost'] == pytest.approx(770e-6)
  assert '13 of 13 scored, 6 of them before' in done.stdout
  assert (out / 'gallery.html').stat().st_size > 1000
