"""A chat-completions server on this machine that behaves as a test wants, however badly."""

import base64
import contextlib
import http.server
import io
import json
import socket
import struct
import threading
import time

import numpy as np
import ports
from PIL import Image

from eru_jax.judges.chat import ChatClient
from eru_jax.judges.settings import ChatConfig

USAGE = {'prompt_tokens': 100, 'completion_tokens': 10}


def completion(text, usage=USAGE, finish='stop'):
  """What a server answers; `text` may be data that becomes JSON."""
  text = text if isinstance(text, str) or text is None else json.dumps(text)
  choice = {'index': 0, 'message': {'role': 'assistant', 'content': text}, 'finish_reason': finish}
  return {'object': 'chat.completion', 'choices': [choice], 'usage': usage}


def says(text, **more):
  return lambda handler: handler.send_json(200, completion(text, **more))


def answers(of):
  """Says what a function makes of the request."""
  return lambda handler: handler.send_json(200, completion(of(handler.request_seen)))


def fails(status, said='no', **headers):
  named = {name.replace('_', '-'): str(value) for name, value in headers.items()}
  return lambda handler: handler.send_json(status, {'error': {'message': said}}, named)


def sends(data, status=200):
  """Bytes that need not be JSON."""
  return lambda handler: handler.send_bytes(status, data)


def drops(handler):
  """Resets the connection without a word."""
  linger = struct.pack('ii', 1, 0)
  handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
  handler.close_connection = True


def breaks_off(handler):
  """Promises more than it sends."""
  handler.send_response(200)
  handler.send_header('Content-Length', '1000')
  handler.end_headers()
  handler.wfile.write(b'{"choices": [')
  handler.close_connection = True


def trickles(handler):
  """A byte now and then, so that no single read takes long."""
  handler.send_response(200)
  handler.send_header('Content-Length', '10000')
  handler.end_headers()
  with contextlib.suppress(OSError):
    for _ in range(9999):
      handler.wfile.write(b' ')
      handler.wfile.flush()
      time.sleep(0.05)


def hangs(handler):
  """Says nothing as long as the test lasts: no client may wait for that."""
  handler.server.owner.over.wait(600)
  handler.close_connection = True


def after(seconds, then):
  def act(handler):
    time.sleep(seconds)
    then(handler)

  return act


def text_of(request):
  """What a request asks."""
  content = request['body']['messages'][0]['content']
  return content if isinstance(content, str) else content[0]['text']


def picture_of(request):
  """The picture that a request shows, (H, W, 3)."""
  url = request['body']['messages'][0]['content'][1]['image_url']['url']
  head, _, data = url.partition(',')
  assert head == 'data:image/png;base64'
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *unused):
    pass

  def send_json(self, status, value, headers=()):
    self.send_bytes(status, json.dumps(value).encode(), headers)

  def send_bytes(self, status, data, headers=()):
    self.send_response(status)
    for name, value in dict(headers).items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(data)))
    self.no_longer_busy()  # The client may ask again before this thread is next.
    self.end_headers()
    self.wfile.write(data)

  def no_longer_busy(self):
    with self.server.owner.lock:
      self.server.owner.busy -= self.busy
      self.busy = 0

  def do_POST(self):
    body = self.rfile.read(int(self.headers['Content-Length']))
    request = {'path': self.path, 'headers': dict(self.headers), 'body': json.loads(body)}
    owner = self.server.owner
    with owner.lock:
      owner.requests.append(request)
      owner.times.append(time.monotonic())
      self.busy = 1
      owner.busy += 1
      owner.most = max(owner.most, owner.busy)
      act = owner.script.pop(0) if owner.script else owner.usual
    try:
      with contextlib.suppress(OSError):
        self.request_seen = request
        act(self)
    finally:
      self.no_longer_busy()


class _Listener(http.server.ThreadingHTTPServer):
  # The usual five would drop connections of a client that opens many at once.
  request_queue_size = 128


class JudgeServer:
  """Acts on requests one after the other as `script` says, and then as `usual`.

  Attributes:
    requests: what was asked, as dicts of path, headers and body.
    times: when.
    most: requests that were in work at a time.
    over: set when the test is.
  """

  def __init__(self, *script, usual=None):
    self.script, self.usual = list(script), usual or says('hello')
    self.requests, self.times, self.busy, self.most = [], [], 0, 0
    self.lock, self.over, self._port = threading.Lock(), threading.Event(), ports.reserve()
    self.start()

  def start(self):
    self._server = _Listener(('127.0.0.1', self._port), _Handler)
    self._server.daemon_threads, self._server.owner = True, self
    threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

  def stop(self):
    """Nobody listens any more."""
    self._server.shutdown()
    self._server.server_close()

  @property
  def url(self):
    return f'http://127.0.0.1:{self._port}/v1'

  def client(self, environment=None, **settings):
    # No answer is waited for so long, unless a test is about that.
    usual = dict(timeout=60.0, attempts=4, first_wait=0.01, longest_wait=0.02, concurrency=4)
    config = ChatConfig(self.url, 'tiny-judge', **usual | settings)
    return ChatClient(config, environment or {})

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.over.set()
    self.stop()
