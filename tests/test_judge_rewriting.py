"""Prompts rewritten by a language model, the rival that trains nothing."""

import pytest
from judge_server import JudgeServer, after, answers, fails, says, text_of

from eru_jax.errors import UserError
from eru_jax.judges.rewriting import latency, rewrite_prompts
from eru_jax.judges.verdicts import open_journal

PROMPTS = ['what a caterpillar becomes', 'water left in a freezer', 'what a caterpillar becomes']


def _explicit(request):
  text = text_of(request)
  return {'rewrite': 'a\n butterfly' if 'caterpillar' in text else 'a block of ice'}


def test_prompts_are_rewritten_once_each_in_order_with_what_it_took(tmp_path):
  with JudgeServer(usual=answers(_explicit)) as server:
    client = server.client()
    with open_journal(tmp_path / 'j') as journal:
      found, summary = rewrite_prompts(client, PROMPTS, journal, price=(1.0, 2.0))
    assert [one.prompt for one in found] == PROMPTS
    assert [one.text for one in found] == ['a butterfly', 'a block of ice', 'a butterfly']
    assert len(server.requests) == summary.requests == 2
    assert summary.cost == pytest.approx((200 * 1 + 20 * 2) / 1e6)
    seconds = [one.seconds for one in found]
    assert min(seconds) > 0 and (found[0].prompt_tokens, found[0].completion_tokens) == (100, 10)
    assert latency(found)['seconds'] == pytest.approx(sum(seconds) / 3)
    assert latency(found)['completion_tokens'] == 10
    with open_journal(tmp_path / 'j') as journal:
      again, summary = rewrite_prompts(client, PROMPTS[:2], journal)
    assert len(server.requests) == 2 and summary.cached == 2
    # The latency is that of the request, then as now.
    assert [one.seconds for one in again] == pytest.approx(seconds[:2], abs=1e-3)
    # Text only, and the answer is not told.
    assert isinstance(server.requests[0]['body']['messages'][0]['content'], str)


@pytest.mark.parametrize(
  'reply', ['a butterfly', {'rewrite': ''}, {'rewrite': 3}, {}, {'rewrite': 'x' * 2001},
            {'rewrite': 'a\x00b'}, {'rewrite': '\ud800'}],
)  # fmt: skip
def test_what_is_no_rewrite_is_reported_and_not_drawn(reply):
  with JudgeServer(usual=says(reply)) as server:
    (one,), summary = rewrite_prompts(server.client(), PROMPTS[:1])
  assert one.text is None and one.reason.startswith('bad reply, 3 times')
  assert summary.unanswered == 1 and latency([one])['seconds'] == 0


@pytest.mark.parametrize('bad', [says('no JSON'), fails(503)])
def test_the_latency_has_repeated_requests_and_waits(bad, tmp_path):
  with JudgeServer(after(0.3, bad), usual=answers(_explicit)) as server:
    client = server.client(first_wait=0.2, longest_wait=0.2)
    with open_journal(tmp_path / 'j') as journal:
      (one,), _ = rewrite_prompts(client, PROMPTS[:1], journal)
    with open_journal(tmp_path / 'j') as journal:
      (again,), _ = rewrite_prompts(client, PROMPTS[:1], journal)
  assert 0.3 <= one.seconds < 60 and again.seconds == pytest.approx(one.seconds, abs=1e-3)


def test_instructions_of_ones_own(tmp_path):
  path = tmp_path / 'own.txt'
  path.write_text('Say {prompt} otherwise, as {"rewrite": ...}')
  with JudgeServer(usual=answers(_explicit)) as server:
    rewrite_prompts(server.client(), PROMPTS[:1], instructions=path)
    assert text_of(server.requests[0]) == f'Say {PROMPTS[0]} otherwise, as {{"rewrite": ...}}'
    path.write_text('Say it otherwise')
    with pytest.raises(UserError, match='lacks {prompt}'):
      rewrite_prompts(server.client(), PROMPTS, instructions=path)
  with JudgeServer(usual=fails(404)) as server:
    with pytest.raises(UserError, match='HTTP 404'):
      rewrite_prompts(server.client(), PROMPTS)
