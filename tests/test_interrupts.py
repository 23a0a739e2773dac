"""SIGTERM and Ctrl-C end a command at once, with the words and the status that are promised."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from eru_jax import leaving

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
# SIGTERM ends a command where it is: it raises nothing that others could get hold of.
AT_ONCE = [
  when
  for when in BODIES
  if when not in ('while errors are dropped', 'while others make an error of it')
]


def script(body, number, *, watched, command=True):
  """A program that sends a signal to itself, and would run on for a minute."""
  inner = textwrap.indent(textwrap.dedent(body) + '\ntime.sleep(60)', '  ')
  if watched:
    inner = f'  with watching():\n{textwrap.indent(inner, "  ")}'
  return f"""
import os, pathlib, signal, sys, time
from eru_jax import commands, leaving
from eru_jax.training.watch import mark, rest, tick, watching
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def send():
  signal.raise_signal({int(number)})

def main():
{inner}

{'commands.run(main)' if command else 'main()'}
"""


def start(code, directory, **options):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  return subprocess.Popen(
    [sys.executable, '-c', code],
    env=environment,
    cwd=directory,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def ended(body, number, directory, **options):
  """Runs a command; returns its status, stdout and stderr, or fails if it does not end."""
  with start(script(body, number, **options), directory) as process:
    try:
      out, error = process.communicate(timeout=40)
    finally:
      process.kill()
  return process.returncode, out, error


@pytest.mark.parametrize('when', AT_ONCE)
def test_sigterm_ends_a_single_process_at_once(when, tmp_path):
  assert ended(BODIES[when], signal.SIGTERM, tmp_path, watched=True) == STOPPED
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('when', BODIES)
def test_ctrl_c_ends_a_command_at_once(when, tmp_path):
  assert (
    ended(BODIES[when], signal.SIGINT, tmp_path, watched=when != 'while it works') == INTERRUPTED
  )
  assert not list(tmp_path.iterdir())


def test_what_is_open_is_closed_and_a_second_sigterm_changes_nothing(tmp_path):
  """`timeout` sends two, to the command and to its group. No W&B here: something like it."""
  (tmp_path / 'wandb.py').write_text("""
import os, pathlib, signal, time
class Run:
  def define_metric(self, *args, **kwargs): pass
  def log(self, row): pass
  def finish(self):
    os.kill(os.getpid(), signal.SIGTERM)  # to the process: the main thread hears it at once
    time.sleep(0.3)
    pathlib.Path('finished').touch()
def init(**kwargs): return Run()
""")
  body = """
    sys.path.insert(0, '.')
    from eru_jax.training.metrics import MetricWriter
    from eru_jax.training.run import _Stopwatch
    with MetricWriter('.', 'project') as writer, leaving.at_leave(writer.close):
      writer.write('dk_dm', 1, {'loss': 1.0})
      with _Stopwatch(pathlib.Path('seconds.json'))('load'):
        time.sleep(0.2)
        send()
  """
  out = 'stopped at load; the same command continues\n'
  assert ended(body, signal.SIGTERM, tmp_path, watched=True) == (0, out, '')
  assert (tmp_path / 'finished').exists()
  assert 0.2 <= json.loads((tmp_path / 'seconds.json').read_text())['load'] < 20


HANGS = """
    lock = threading.Lock()
    lock.acquire()
    with leaving.at_leave(lock.acquire):
      print('here', file=sys.stderr, flush=True)
      send()
"""


@pytest.mark.parametrize('asked', ['once', 'twice'])
def test_what_cannot_be_closed_is_not_waited_for_long(asked, tmp_path):
  code = 'import threading\n' + script(HANGS, signal.SIGTERM, watched=True)
  with start(code, tmp_path) as process:
    assert process.stdout.readline() == STOPPED[1]
    told = time.monotonic()
    if asked == 'twice':
      time.sleep(leaving.ECHO + 0.3)
      process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    limit = leaving.ECHO + 2 if asked == 'twice' else leaving._CLOSING + 2
    assert time.monotonic() - told < limit


@pytest.mark.parametrize('asked', ['once', 'twice'])
def test_a_stdout_that_nobody_reads_holds_up_the_end_for_seconds_only(asked, tmp_path):
  body = """
    from eru_jax.files import replacing
    # Full: not a byte more goes in.
    os.set_blocking(1, False)
    try:
      while True:
        os.write(1, b'x')
    except BlockingIOError:
      os.set_blocking(1, True)
    with replacing(pathlib.Path('file')) as path, leaving.at_leave(pathlib.Path('closed').touch):
      path.write_bytes(b'half')
      print('here', file=sys.stderr, flush=True)
      send()
  """
  with start(script(body, signal.SIGTERM, watched=True), tmp_path) as process:
    assert process.stderr.readline() == 'here\n'
    began = time.monotonic()
    if asked == 'twice':
      time.sleep(leaving.ECHO + 0.5)
      assert process.poll() is None
      process.send_signal(signal.SIGTERM)
    try:
      assert process.wait(20) == 0
    finally:
      process.kill()
    limit = leaving.ECHO + 2 if asked == 'twice' else leaving._PATIENCE + 2
    assert time.monotonic() - began < limit
  assert [path.name for path in tmp_path.iterdir()] == ['closed']


def test_a_program_that_is_no_command_unwinds(tmp_path):
  """Its own ends are met: `finally`, and what it does at exit."""
  code = script(BODIES['while it works'], signal.SIGTERM, watched=True, command=False)
  code = code.replace(
    '\nmain()',
    """
import atexit
atexit.register(print, 'at exit')
try:
  main()
finally:
  print('finally')
""",
  )
  with start(code, tmp_path) as process:
    out, error = process.communicate(timeout=40)
  assert (process.returncode, out, error) == (0, STOPPED[1] + 'finally\nat exit\n', '')


def test_a_forked_child_dies_of_its_signal_and_takes_nothing_of_its_parent_along(tmp_path):
  body = """
    import multiprocessing, warnings
    from eru_jax.files import remove_unfinished, replacing
    warnings.simplefilter('ignore')  # JAX warns of forks
    def work(ready):
      remove_unfinished()
      ready.set()
      time.sleep(60)
    fork = multiprocessing.get_context('fork')
    with replacing(pathlib.Path('file')) as path:
      path.write_bytes(b'whole')
      ready = fork.Event()
      child = fork.Process(target=work, args=(ready,))
      child.start()
      ready.wait()
      child.terminate()
      child.join()
      print(child.exitcode, path.exists(), flush=True)
    send()
  """
  out = f'{-signal.SIGTERM} True\n' + STOPPED[1]
  assert ended(body, signal.SIGTERM, tmp_path, watched=True) == (0, out, '')
  assert (tmp_path / 'file').read_bytes() == b'whole'


def test_a_command_may_run_in_any_thread(tmp_path):
  code = """
import threading
from eru_jax import commands
thread = threading.Thread(target=commands.run, args=[lambda: print('ran', flush=True)])
thread.start()
thread.join()
"""
  with start(code, tmp_path) as process:
    out, error = process.communicate(timeout=40)
  assert (process.returncode, out, error) == (0, 'ran\n', '')


def test_a_loop_that_was_asked_to_stop_says_so_without_waiting_for_what_is_queued(tmp_path):
  body = """
    import jax
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

  monkeypatch.setattr(leaving.os, '_exit', end)
  monkeypatch.setattr(leaving, '_end_anyway', lambda status: None)
  monkeypatch.setattr(leaving.signal, 'signal', lambda *_: None)
  with pytest.raises(Ended, match='3'):
    leaving.leave('the words', 3, Busy())
  os.close(write)
  with os.fdopen(read) as file:
    assert file.read() == 'the words\n'
