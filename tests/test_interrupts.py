"""SIGTERM and Ctrl-C end a command at once, with the words and the status that are promised."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
INTERRUPTED = (130, '', 'error: interrupted; run the same command again to continue\n')
STOPPED = (0, 'stopped at the start; the same command continues\n', '')
# What happens to a command; `send` is the signal that arrives in that very moment.
BODIES = {
  'while it works': 'send()',
  # As JAX's own callback, where Python forgets the exception.
  'while garbage is collected': """
    import gc
    sent = []
    gc.callbacks.append(lambda *_: sent or (sent.append(1), send()))
    gc.collect()
  """,
  # As compiled code that clears errors which it takes for its own.
  'while errors are dropped': """
    try:
      send()
    except BaseException:
      pass
  """,
  # Python would wait for it at its end.
  'while a computation runs': """
    import jax
    from jax.numpy import ones, tanh
    # So large that it does not run within the call.
    go = jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 2, lambda x: tanh(x @ x), x))
    endless = go(ones((300, 300)))
    send()
  """,
  # As Orbax and TensorStore where a checkpoint is read.
  'while others make an error of it': """
    try:
      send()
    except BaseException as error:
      closed = RuntimeError('Event loop is closed')
      sys.excepthook(RuntimeError, closed, None)
      raise KeyError('incompatible handler') from error
  """,
  # As libraries are that print what is of no interest.
  'while nothing may be printed': """
    import contextlib, os
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
      send()
  """,
  'while a file is written': """
    from eru_jax.files import replacing
    with replacing(pathlib.Path('file')) as path:
      path.write_bytes(b'half')
      assert path.exists()
      send()
  """,
}


def ended(body, number, directory, *, watched):
  """Runs a command; returns its status, stdout and stderr, or fails if it does not end."""
  inner = f'with watching():\n{textwrap.indent(textwrap.dedent(body), "  ")}\n  time.sleep(60)'
  unwatched = f'{textwrap.dedent(body)}\ntime.sleep(60)'
  code = f"""
import pathlib, signal, sys, time
from eru_jax import commands
from eru_jax.training.watch import watching
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def send():
  signal.raise_signal({int(number)})

def main():
{textwrap.indent(inner if watched else unwatched, '  ')}

commands.run(main)
"""
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  result = subprocess.run(
    [sys.executable, '-c', code],
    env=environment,
    cwd=directory,
    capture_output=True,
    text=True,
    timeout=40,
  )
  return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize('when', BODIES)
def test_sigterm_ends_a_single_process_at_once(when, tmp_path):
  assert ended(BODIES[when], signal.SIGTERM, tmp_path, watched=True) == STOPPED
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('when', BODIES)
def test_ctrl_c_ends_a_command_at_once(when, tmp_path):
  assert (
    ended(BODIES[when], signal.SIGINT, tmp_path, watched=when != 'while it works') == INTERRUPTED
  )
  assert not list(tmp_path.iterdir())


def test_a_second_sigterm_changes_nothing(tmp_path):
  """`timeout` sends two, to the command and to its group."""
  twice = """
    try:
      send()
    finally:
      send()
  """
  assert ended(twice, signal.SIGTERM, tmp_path, watched=True) == STOPPED


def test_a_loop_that_was_asked_to_stop_says_so_without_waiting_for_what_is_queued(tmp_path):
  body = """
    import jax
    from eru_jax.training.watch import tick
    tick('step 1')
    from jax.numpy import ones, tanh
    # So large that it does not run within the call.
    go = jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 2, lambda x: tanh(x @ x), x))
    endless = go(ones((300, 300)))
    send()
    tick('step 2')
  """
  status, out, error = ended(body, signal.SIGTERM, tmp_path, watched=True)
  assert (status, out, error) == (0, 'stopped after step 2; the same command continues\n', '')


def test_the_words_are_printed_from_within_a_print(monkeypatch):
  """A handler that comes in the middle of a print may not use the same stream."""
  from eru_jax import commands

  read, write = os.pipe()

  class Busy:
    def write(self, text):
      raise RuntimeError('reentrant call inside <_io.BufferedWriter>')

    def flush(self):
      pass

    def fileno(self):
      return write

  class Ended(BaseException):
    pass

  def end(status):
    raise Ended(status)

  monkeypatch.setattr(commands.os, '_exit', end)
  monkeypatch.setattr(commands.signal, 'signal', lambda *_: None)
  with pytest.raises(Ended, match='3'):
    commands.leave('the words', 3, Busy())
  os.close(write)
  with os.fdopen(read) as file:
    assert file.read() == 'the words\n'
