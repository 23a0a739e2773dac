"""The client of chat completions against a server that is slow, wrong, rude or not there."""

import email.utils
import http.server
import json
import socket
import threading
import time

import numpy as np
import pytest
from judge_server import (
  JudgeServer,
  breaks_off,
  completion,
  drops,
  fails,
  hangs,
  picture_of,
  says,
  sends,
  trickles,
)

from eru_jax.errors import UserError
from eru_jax.judges.chat import ChatClient, Unanswered, message
from eru_jax.judges.connection import LARGEST, Halt
from eru_jax.judges.pictures import png
from eru_jax.judges.settings import ChatConfig

KEY = 'sk-very-secret-123'
HELLO = [message('hello')]


class Watched(Halt):
  """Notes the pauses that a client takes.

  Attributes:
    pauses: their seconds, as they begin.
    paused: set by the first of them.
  """

  def __init__(self, then=lambda pauses: None):
    """`then` is told of all pauses so far when another one begins."""
    super().__init__()
    self.pauses, self.paused, self._then = [], threading.Event(), then

  def wait(self, seconds):
    if seconds > 0:
      self.pauses.append(seconds)
      self._then(self.pauses)
      self.paused.set()
    return super().wait(seconds)


def test_a_request_is_what_the_interface_wants_and_its_answer_is_read():
  image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  with JudgeServer(says('fine')) as server:
    client = server.client({'ERU_JAX_JUDGE_KEY': KEY}, detail='low', max_tokens=7)
    reply = client.complete([message('what is this?', png(image), 'low')])
  (request,) = server.requests
  assert request['path'] == '/v1/chat/completions'
  assert request['headers']['Authorization'] == f'Bearer {KEY}'
  body = request['body']
  assert (body['model'], body['temperature'], body['max_tokens']) == ('tiny-judge', 0.0, 7)
  (said,) = body['messages']
  assert said['role'] == 'user' and said['content'][0] == {'type': 'text', 'text': 'what is this?'}
  assert said['content'][1]['image_url']['detail'] == 'low'
  np.testing.assert_array_equal(picture_of(request), image)
  assert (reply.text, reply.cut, reply.requests) == ('fine', False, 1)
  assert (reply.prompt_tokens, reply.completion_tokens) == (100, 10)


def test_extra_fields_are_added_and_null_leaves_one_out():
  extra = {'max_tokens': None, 'max_completion_tokens': 9, 'temperature': None}
  with JudgeServer() as server:
    server.client(extra=json.dumps(extra)).complete(HELLO)
  assert server.requests[0]['body'] == {
    'model': 'tiny-judge', 'messages': HELLO, 'max_completion_tokens': 9
  }  # fmt: skip


@pytest.mark.parametrize(
  'bad',
  [
    fails(500), fails(503), fails(429), fails(408), drops, breaks_off, sends(b'<html>busy</html>'),
    sends(b''), sends(b'\xff\xfe'), sends(b'[' * 100_000), sends(b'{"choices": []}'),
    sends(b'{"choices": [{"message": {"content": 3}}]}'), sends(b'{"error": "odd"}'),
    sends(b'x' * (LARGEST + 1)),
  ],
  ids=[
    '500', '503', '429', '408', 'drops', 'breaks off', 'html', 'empty', 'no UTF-8', 'deep',
    'no choice', 'a number', 'an error', 'huge',
  ],
)  # fmt: skip
def test_what_passes_by_itself_is_tried_again_and_no_more_often_than_allowed(bad):
  with JudgeServer(bad, bad, says('at last')) as server:
    reply = server.client().complete(HELLO)
  assert (reply.text, reply.requests, len(server.requests)) == ('at last', 3, 3)
  with JudgeServer(usual=bad) as server:
    with pytest.raises(Unanswered, match=r'\(4 attempts\)$') as caught:
      server.client().complete(HELLO)
  assert caught.value.requests == len(server.requests) == 4
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 300


def test_waits_double_and_end_at_the_longest():
  halt = Watched()
  with JudgeServer(usual=fails(500)) as server:
    with pytest.raises(Unanswered):
      server.client(attempts=5, first_wait=0.1, longest_wait=0.2).complete(HELLO, halt)
  assert len(halt.pauses) == 4
  # Between half of each and all of it; a busy machine is late, but never early.
  for pause, longest in zip(halt.pauses, (0.1, 0.2, 0.2, 0.2), strict=True):
    assert longest / 2 <= pause <= longest
  assert (np.diff(server.times) >= halt.pauses).all()


@pytest.mark.parametrize('as_date', [False, True])
def test_retry_after_is_obeyed(as_date):
  halt, clock = Watched(), []

  def refuses(handler):
    clock.append(time.time())
    wanted = email.utils.formatdate(clock[0] + 2, usegmt=True) if as_date else 1
    fails(429, Retry_After=wanted)(handler)

  def accepts(handler):
    clock.append(time.time())
    says('fine')(handler)

  with JudgeServer(refuses, accepts) as server:
    assert server.client().complete(HELLO, halt).requests == 2
  if as_date:
    # A date has whole seconds, and some of its time may be over when the client reads it.
    assert halt.pauses[0] <= 2 and clock[1] >= int(clock[0] + 2) - 0.01
  else:
    assert halt.pauses[0] == 1 and np.diff(server.times)[0] >= 1


def test_where_one_is_told_to_wait_all_do():
  with JudgeServer(fails(429, Retry_After=1)) as server:
    client, halt = server.client(), Watched()
    first = threading.Thread(target=client.complete, args=(HELLO, halt))
    first.start()
    assert halt.paused.wait(60)
    client.complete(HELLO)
    first.join()
  assert (np.array(server.times[1:]) - server.times[0] >= 0.9).all()


def test_a_server_that_asks_for_an_hour_is_not_waited_for():
  with JudgeServer(usual=fails(429, Retry_After=3600)) as server:
    with pytest.raises(Unanswered, match='asks to wait 3600 s'):
      server.client().complete(HELLO)
  assert len(server.requests) == 1


@pytest.mark.parametrize(
  'wanted, length', [('junk', 2), ('-5', 2), ('1e9999', 2), ('Fri, 99 Foo', 2), ('nan', 2)]
)
def test_a_retry_after_that_is_none_counts_for_nothing(wanted, length):
  with JudgeServer(fails(429, Retry_After=wanted)) as server:
    server.client().complete(HELLO)
  assert len(server.requests) == length


@pytest.mark.parametrize('slow', [hangs, trickles], ids=['silent', 'trickling'])
def test_no_request_takes_longer_than_its_time_out(slow):
  halt, began = Watched(), time.monotonic()
  with JudgeServer(usual=slow) as server:
    with pytest.raises(Unanswered, match=r'no answer within 0.3 s \(2 attempts\)'):
      server.client(timeout=0.3, attempts=2).complete(HELLO, halt)
  assert time.monotonic() - began < 60  # where the server takes minutes
  # On a busy machine the time can be over before the server has seen a request.
  assert len(halt.pauses) == 1 and len(server.requests) <= 2


def test_a_server_that_is_killed_and_comes_back():
  with JudgeServer() as server:
    server.stop()
    halt = Watched(lambda pauses: len(pauses) == 3 and server.start())
    client = server.client(attempts=10, first_wait=0.05, longest_wait=0.2)
    reply = client.complete(HELLO, halt)
  assert reply.text == 'hello' and len(server.requests) == 1 and reply.requests == 4


@pytest.mark.parametrize(
  'status, what',
  [
    (401, 'set ERU_JAX_JUDGE_KEY to a valid key'),
    (403, "may not use the model 'tiny-judge'"),
    (404, 'usually ends in /v1'),
    (405, 'usually ends in /v1'),
    (307, 'leads to another one'),
  ],
)
def test_what_does_not_pass_is_said_at_once_with_what_to_do(status, what):
  said = f'wrong key {KEY}\nor \x1b[31m so'
  with JudgeServer(usual=fails(status, said, Location='http://127.0.0.1:1/v1')) as server:
    with pytest.raises(UserError, match=what) as caught:
      server.client({'ERU_JAX_JUDGE_KEY': KEY}).complete(HELLO)
  text = str(caught.value)
  assert len(server.requests) == 1 and server.url in text and f'HTTP {status}' in text
  assert KEY not in text and text.isprintable()


@pytest.mark.parametrize('status', [400, 413, 422])
def test_a_request_that_is_refused_is_not_sent_again(status):
  with JudgeServer(fails(status, 'this picture is too large'), says('fine')) as server:
    client = server.client()
    with pytest.raises(Unanswered, match=f'refused with HTTP {status}: this picture is too large'):
      client.complete(HELLO)
    assert client.complete(HELLO).text == 'fine'


def test_an_error_with_the_status_of_an_answer_says_what_it_is():
  said = {'error': {'message': f'the model\n is overloaded {KEY}', 'code': 502}}
  with JudgeServer(usual=sends(json.dumps(said).encode())) as server:
    client = server.client({'ERU_JAX_JUDGE_KEY': KEY}, attempts=2)
    with pytest.raises(Unanswered, match=r'completion: the model is overloaded \*\*\* \(2 att'):
      client.complete(HELLO)
  assert len(server.requests) == 2


def test_what_went_wrong_is_told_from_nobody_being_there():
  acts = {'busy': (fails(500), drops, sends(b'odd'), hangs), 'refused': (fails(400),)}
  for kind, several in acts.items():
    for act in several:
      with JudgeServer(usual=act) as server:
        with pytest.raises(Unanswered) as caught:
          server.client(attempts=1, timeout=0.3 if act is hangs else 60.0).complete(HELLO)
      assert caught.value.kind == kind
  with pytest.raises(Unanswered) as caught:
    server.client(attempts=1).complete(HELLO)  # nobody listens there any more
  assert caught.value.kind == 'lost'


def test_a_spent_account_is_told_from_too_many_requests():
  quota = {'error': {'message': 'You exceeded your quota', 'code': 'insufficient_quota'}}
  with JudgeServer(usual=lambda handler: handler.send_json(429, quota)) as server:
    with pytest.raises(UserError, match='no credit left'):
      server.client().complete(HELLO)
  assert len(server.requests) == 1


@pytest.mark.parametrize(
  'url, message',
  [
    ('', 'no http'), ('127.0.0.1:8000/v1', 'no http'), ('ftp://host/v1', 'no http'),
    ('file:///etc/passwd', 'no http'), ('http:///v1', 'no http'), ('http://a b/v1', 'no http'),
    ('http://host:99999/v1', 'no URL'), ('http://[::1/v1', 'no URL'), ('http://hö.st', 'no http'),
    ('http://host/v1\r\nX: y', 'no http'), ('https://me:secret@host/v1', 'no user, password'),
    ('https://host/v1?key=secret', 'no user, password'), ('https://host/v1#a', 'no user, password'),
  ],
)  # fmt: skip
def test_addresses_that_are_none_fail_early_in_one_sentence(url, message):
  with pytest.raises(UserError, match=message) as caught:
    ChatConfig(url, 'model')
  assert str(caught.value).isprintable() and 'secret' not in str(caught.value)


def test_addresses_are_brought_into_one_form():
  for url in ('http://h:1/v1', 'http://h:1/v1/', 'http://h:1/v1/chat/completions/'):
    assert ChatConfig(url, 'm').url == 'http://h:1/v1'


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'model': ' '}, 'needs the name of a model'),
    ({'timeout': 0.0}, 'timeout is 0.0'),
    ({'timeout': float('nan')}, 'timeout is nan'),
    ({'attempts': 0}, 'attempts is 0'),
    ({'concurrency': 0}, 'concurrency is 0'),
    ({'detail': 'huge'}, "detail is 'huge'"),
    ({'extra': '[1]'}, 'must be a JSON object'),
    ({'extra': '{'}, 'must be a JSON object'),
    ({'extra': '{"model": "other"}'}, 'without model'),
  ],
)
def test_settings_out_of_range_fail_early(settings, message):
  with pytest.raises(UserError, match=message):
    ChatConfig(**{'url': 'http://host/v1', 'model': 'm'} | settings)


def test_the_key_is_the_judges_or_openais_and_is_not_shown():
  both = {'ERU_JAX_JUDGE_KEY': 'own', 'OPENAI_API_KEY': 'shared'}

  def sent(environment):
    with JudgeServer() as server:
      server.client(environment).complete(HELLO)
    return server.requests[0]['headers'].get('Authorization')

  assert sent(both) == 'Bearer own'
  assert sent({'OPENAI_API_KEY': ' shared\n'}) == 'Bearer shared'
  assert sent({}) is None
  for environment in ({'ERU_JAX_JUDGE_KEY': 'a b'}, {'OPENAI_API_KEY': 'ké'}):
    with pytest.raises(UserError, match='holds characters that no key has') as caught:
      ChatClient(ChatConfig('https://host', 'm'), environment)
    assert 'a b' not in str(caught.value) and 'ké' not in str(caught.value)
  # OpenAI's key does not go over a network in clear.
  for url, key in [('http://10.0.0.1/v1', ''), ('https://h', 'shared'), ('http://[::1]', 'shared')]:
    client = ChatClient(ChatConfig(url, 'm'), {'OPENAI_API_KEY': 'shared'})
    assert client._key == key
    assert 'shared' not in repr(client) + repr(client.config)


def test_halt_ends_pauses_and_requests():
  for act in (hangs, fails(429, Retry_After=200)):
    halt, asked, began = Watched(), threading.Event(), time.monotonic()

    def act_and_tell(handler, act=act, asked=asked):
      asked.set()
      act(handler)

    def end(halt=halt, waited_for=asked if act is hangs else halt.paused):
      waited_for.wait(60)
      halt.now()

    with JudgeServer(usual=act_and_tell) as server:
      threading.Thread(target=end).start()
      with pytest.raises(Unanswered, match='interrupted'):
        server.client(timeout=200).complete(HELLO, halt)
    assert time.monotonic() - began < 100
    assert bool(halt.pauses) == (act is not hangs)


def test_proxies_of_the_environment_are_used(monkeypatch):
  with JudgeServer(says('from the proxy')) as proxy:
    address = proxy.url.removesuffix('/v1')
    monkeypatch.setenv('http_proxy', address.replace('//', '//me:pass@'))
    monkeypatch.delenv('no_proxy', raising=False)
    config = ChatConfig('http://far.example/v1', 'm', attempts=1)
    assert ChatClient(config, {}).complete(HELLO).text == 'from the proxy'
    (request,) = proxy.requests
    assert request['path'] == 'http://far.example/v1/chat/completions'
    assert request['headers']['Proxy-Authorization'] == 'Basic bWU6cGFzcw=='
    monkeypatch.setenv('no_proxy', 'far.example')
    with pytest.raises(Unanswered, match='the connection failed'):
      ChatClient(config, {}).complete(HELLO)
  monkeypatch.setenv('http_proxy', 'socks5://x')
  monkeypatch.delenv('no_proxy')
  with pytest.raises(Unanswered, match='http_proxy in the environment is no http:// address'):
    ChatClient(config, {}).complete(HELLO)


def test_the_key_does_not_reach_a_proxy_before_a_tunnel(monkeypatch):
  seen = []

  class Proxy(http.server.BaseHTTPRequestHandler):
    def do_CONNECT(self):
      seen.append((self.path, str(self.headers)))
      self.send_error(502)

    def log_message(self, *unused):
      pass

  server = http.server.HTTPServer(('127.0.0.1', 0), Proxy)
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  monkeypatch.setenv('https_proxy', f'127.0.0.1:{server.server_port}')
  monkeypatch.delenv('no_proxy', raising=False)
  config = ChatConfig('https://far.example/v1', 'm', attempts=1)
  with pytest.raises(Unanswered, match='502'):
    ChatClient(config, {'ERU_JAX_JUDGE_KEY': KEY}).complete(HELLO)
  server.shutdown()
  server.server_close()
  ((path, headers),) = seen
  assert path == 'far.example:443' and KEY not in headers


def test_an_https_address_at_which_nobody_speaks_it():
  with JudgeServer() as server:
    url = server.url.replace('http:', 'https:')
    with pytest.raises(Unanswered, match='the connection failed'):
      ChatClient(ChatConfig(url, 'm', attempts=1), {}).complete(HELLO)
  assert not server.requests


def test_parts_and_thoughts_and_missing_counts_are_read():
  parts = [{'type': 'text', 'text': 'a'}, {'type': 'other'}, {'type': 'text', 'text': 'b'}]
  value = completion('') | {'usage': {'prompt_tokens': -1, 'completion_tokens': 'x'}}
  value['choices'][0]['message']['content'] = parts
  with JudgeServer(sends(json.dumps(value).encode()), says(None, finish='length')) as server:
    client = server.client()
    first, second = client.complete(HELLO), client.complete(HELLO)
  assert (first.text, first.prompt_tokens, first.completion_tokens) == ('ab', None, None)
  assert (second.text, second.cut) == ('', True)


def test_a_name_that_nobody_has():
  config = ChatConfig('http://no-such-host.invalid/v1', 'm', attempts=1)
  with pytest.raises(Unanswered, match='the connection failed'):
    ChatClient(config, {}).complete(HELLO)


def test_a_port_at_which_nobody_listens():
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    config = ChatConfig(f'http://127.0.0.1:{taken.getsockname()[1]}', 'm', attempts=1)
    with pytest.raises(Unanswered, match='the connection failed'):
      ChatClient(config, {}).complete(HELLO)
