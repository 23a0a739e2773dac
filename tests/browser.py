"""A real headless browser, driven over its debugging pipe, for tests of pages."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

import pytest

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')


def installed():
  """The browser's command; skips the test where there is none."""
  found = next((path for name in NAMES if (path := shutil.which(name))), None)
  if found is None:
    pytest.skip('no headless browser: install chromium to check pages in one')
  return found


class Browser:
  """One page of a browser of its own."""

  def __init__(self, directory, width=1400, height=1000, timeout=120):
    """Starts it; `directory` takes its profile."""
    to_browser, from_browser = os.pipe(), os.pipe()

    def wire():
      # The browser reads commands from 3 and answers on 4.
      ends = os.dup(to_browser[0]), os.dup(from_browser[1])
      os.dup2(ends[0], 3)
      os.dup2(ends[1], 4)

    command = [
      installed(), '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
      '--no-first-run', '--disable-background-networking', '--disable-component-update',
      '--remote-debugging-pipe', f'--user-data-dir={directory}', f'--window-size={width},{height}',
      'about:blank',
    ]  # fmt: skip
    self._process = subprocess.Popen(
      command, preexec_fn=wire, close_fds=False, stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_browser[0])
    os.close(from_browser[1])
    self._write, self._read = to_browser[1], from_browser[0]
    self._buffer, self._serial, self._timeout = b'', 0, timeout
    self.events = []
    self._session = None
    try:
      target = self('Target.createTarget', url='about:blank')
      attached = self('Target.attachToTarget', targetId=target['targetId'], flatten=True)
      self._session = attached['sessionId']
      for domain in ('Page', 'Runtime', 'Network', 'Log'):
        self(f'{domain}.enable')
      self.resize(width, height)
    except BaseException:
      self.__exit__()
      raise

  def resize(self, width, height, dark=False):
    """The size of the window, and whether it is night."""
    size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
    self('Emulation.setDeviceMetricsOverride', **size)
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
    self('Emulation.setEmulatedMedia', features=[scheme])

  def __call__(self, method, **params):
    """Sends a command and returns its result."""
    self._serial += 1
    message = {'id': self._serial, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    deadline = time.monotonic() + self._timeout
    while True:
      answer = self._next(deadline)
      if answer.get('id') == self._serial:
        assert 'error' not in answer, (method, answer)
        return answer['result']
      self.events.append(answer)

  def _next(self, deadline):
    while b'\0' not in self._buffer:
      ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
      assert ready, 'the browser does not answer'
      chunk = os.read(self._read, 1 << 20)
      assert chunk, 'the browser has gone'
      self._buffer += chunk
    message, _, self._buffer = self._buffer.partition(b'\0')
    return json.loads(message)

  def open(self, path, fragment=''):
    """Opens a file and waits until it has put up its content."""
    self('Page.navigate', url='about:blank')
    self('Page.navigate', url=f'{path.absolute().as_uri()}{fragment}')
    self.until("document.documentElement?.dataset.ready === 'true'")

  def run(self, expression):
    """The value of a JavaScript expression."""
    result = self('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
    assert 'exceptionDetails' not in result, result['exceptionDetails']
    return result['result'].get('value')

  def until(self, expression):
    """Waits until a JavaScript expression holds."""
    deadline = time.monotonic() + self._timeout
    while not self.run(f'Boolean({expression})'):
      assert time.monotonic() < deadline, expression
      time.sleep(0.05)

  def expect(self, expression, value):
    """Waits until a JavaScript expression has a value, and fails if it does not come to it.

    What a page does on an event may come after the answer to what caused it, on a loaded machine
    much later.
    """
    deadline = time.monotonic() + self._timeout
    # What is not there yet may be there soon.
    caught = f'(() => {{ try {{ return {expression}; }} catch (e) {{ return `${{e}}`; }} }})()'
    while (found := self.run(caught)) != value and time.monotonic() < deadline:
      time.sleep(0.05)
    assert found == value, expression

  def press(self, key, code=None):
    """Presses a key, as somebody at the keyboard would."""
    codes = {'Enter': 13, 'Tab': 9, 'Escape': 27}
    arrows = {'ArrowLeft': 37, 'ArrowUp': 38, 'ArrowRight': 39, 'ArrowDown': 40}
    text = {'Enter': '\r'}.get(key, key if len(key) == 1 else '')
    number = (codes | arrows).get(key, ord(key.upper()) if len(key) == 1 and key.isalnum() else 0)
    options = {'key': key, 'code': code or key, 'windowsVirtualKeyCode': number}
    self('Input.dispatchKeyEvent', type='keyDown', text=text, **options)
    self('Input.dispatchKeyEvent', type='keyUp', **options)

  def screenshot(self, path):
    path.write_bytes(base64.b64decode(self('Page.captureScreenshot', format='png')['data']))

  def requests(self):
    """Addresses that were asked for, those of the page's own data left out."""
    asked = [e['params']['request']['url'] for e in self.events
             if e.get('method') == 'Network.requestWillBeSent']  # fmt: skip
    return [url for url in asked if not url.startswith('data:')]

  def complaints(self):
    """What the browser has against the page."""
    return [
      event for event in self.events
      if event.get('method') == 'Runtime.exceptionThrown'
      or (event.get('method') == 'Log.entryAdded' and event['params']['entry']['level'] == 'error')
    ]  # fmt: skip

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    with contextlib.suppress(OSError):
      os.close(self._write)
    os.close(self._read)
    self._process.terminate()
    try:
      self._process.wait(20)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
