"""One POST over HTTP that ends in time: it answers, fails, or is given up at its deadline."""

import base64
import contextlib
import http.client
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping

from eru_jax import __version__
from eru_jax.judges.settings import is_local

# A chat completion has kilobytes; what has more is none.
LARGEST = 8 << 20


class Lost(Exception):
  """A request that was not answered, or not as it should have been; the message says how.

  Attributes:
    connected: whether somebody was there to take it.
  """

  def __init__(self, reason: str, connected: bool):
    self.connected = connected
    super().__init__(reason)


class Halt:
  """Ends what other threads wait for: pauses, and requests that are on their way."""

  def __init__(self):
    self._event, self._lock = threading.Event(), threading.Lock()
    self._open: set[socket.socket] = set()

  def now(self) -> None:
    with self._lock:
      self._event.set()
      for connection in self._open:
        _shut(connection)

  def is_set(self) -> bool:
    return self._event.is_set()

  def wait(self, seconds: float) -> bool:
    """Waits, and says whether it was ended."""
    return self._event.wait(max(0.0, seconds))

  @contextlib.contextmanager
  def over(self, connection: socket.socket, seconds: float) -> Iterator[threading.Event]:
    """Shuts a connection down when the time is over; the event says that it was."""
    expired = threading.Event()

    def expire() -> None:
      expired.set()
      _shut(connection)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    with self._lock:
      self._open.add(connection)
      if self._event.is_set():
        _shut(connection)
    timer.start()
    try:
      yield expired
    finally:
      timer.cancel()
      with self._lock:
        self._open.discard(connection)


def _shut(connection: socket.socket) -> None:
  """Wakes the thread that reads from a connection, encrypted or not."""
  with contextlib.suppress(OSError):
    socket.socket.shutdown(connection, socket.SHUT_RDWR)


def post(
  url: str, body: bytes, headers: Mapping[str, str], timeout: float, halt: Halt
) -> tuple[int, Mapping[str, str], bytes]:
  """Sends one request. Redirections are not followed: they would take the key along.

  Args:
    url: http:// or https://; proxies are those of the environment (https_proxy, no_proxy).
    body: JSON.
    headers: besides the usual ones.
    timeout: seconds in all, from the connection to the last byte, names looked up aside.
    halt: ends it from another thread.

  Returns:
    The status, the headers, and the answer.

  Raises:
    Lost: if there is none.
  """
  connection, target, more = _open(url, timeout)
  expired, connected = threading.Event(), False
  try:
    connection.connect()
    connected = True
    with halt.over(connection.sock, timeout) as expired:
      sent = {'User-Agent': f'eru_jax/{__version__}', **more, **headers}
      connection.request('POST', target, body, sent)
      response = connection.getresponse()
      data = response.read(LARGEST + 1)
  except (OSError, http.client.HTTPException, ValueError) as error:
    if expired.is_set() or isinstance(error, TimeoutError):
      raise Lost(f'no answer within {timeout:g} s', connected) from error
    name = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    raise Lost(f'the connection failed ({name})', connected) from error
  finally:
    connection.close()
  if expired.is_set():
    raise Lost(f'no answer within {timeout:g} s', connected)
  if len(data) > LARGEST:
    raise Lost(f'the answer has more than {LARGEST >> 20} MiB', connected)
  return response.status, response.headers, data


def _open(url: str, timeout: float) -> tuple[http.client.HTTPConnection, str, Mapping[str, str]]:
  """A connection, not yet made, to a server or to the proxy before it; what to ask it for, and how.

  Raises:
    Lost: if the environment names a proxy that is none.
  """
  parts = urllib.parse.urlsplit(url)
  secure = parts.scheme == 'https'
  make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
  proxy = urllib.request.getproxies().get(parts.scheme)
  if not proxy or is_local(url) or urllib.request.proxy_bypass(parts.netloc):
    return make(parts.hostname, parts.port, timeout=timeout), parts.path, {}
  try:
    found = urllib.parse.urlsplit(proxy if '://' in proxy else f'http://{proxy}')
    host, port = found.hostname, found.port or 80
  except ValueError:
    host = None
  if not host or found.scheme != 'http':
    raise Lost(f'{parts.scheme}_proxy in the environment is no http:// address', False)
  rights = {}
  if found.username is not None:
    pair = f'{urllib.parse.unquote(found.username)}:{urllib.parse.unquote(found.password or "")}'
    rights = {'Proxy-Authorization': 'Basic ' + base64.b64encode(pair.encode()).decode()}
  connection = make(host, port, timeout=timeout)
  if not secure:
    return connection, url, rights
  connection.set_tunnel(parts.hostname, parts.port or 443, rights)
  return connection, parts.path, {}
