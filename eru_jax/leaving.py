"""The end of a process that cannot wait for Python's own."""

import _thread
import contextlib
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

from eru_jax.files import remove_unfinished

# What is sent to a process and to its group, as `timeout` does, arrives twice.
ECHO = 1.0
# What is open has so long to be closed, and the end is to come so long after it was asked for.
_CLOSING, _PATIENCE = 5.0, 8.0

# The process that is a command's own; a fork of it is not.
_own: int | None = None
# What is open, and in which process.
_open: list[tuple[int, Callable[[], None]]] = []


@contextlib.contextmanager
def owning() -> Iterator[None]:
  """Within it this process is ours to end: it does nothing else than what runs in the block."""
  global _own
  before, _own = _own, os.getpid()
  try:
    yield
  finally:
    _own = before


def is_owned() -> bool:
  """Whether a signal may end this process without unwinding what others have called us from."""
  return _own == os.getpid()


@contextlib.contextmanager
def at_leave(close: Callable[[], None]) -> Iterator[None]:
  """Has `leave` call a function that otherwise would run when the block is over.

  Args:
    close: called in a thread of its own, which a few seconds later is waited for no more; its
      errors are dropped.
  """
  entry = os.getpid(), close
  _open.append(entry)
  try:
    yield
  finally:
    _open.remove(entry)


def leave(
  message: str = '', status: int = 0, stream: TextIO | None = None, *, close: bool = True
) -> NoReturn:
  """Ends the process where it is: nothing is unwound or waited for, and no exit handler runs.

  Python's own end first waits for every computation that JAX has queued, minutes for a large model,
  and takes down what they still use: that may end in a crash instead of the status. What `at_leave`
  knows of is closed and half-written files of this process are removed; if that, or printing to
  somebody who does not read, takes more than seconds, the process ends nevertheless. SIGTERM or
  Ctrl-C ends it without that wait. May be called in a signal handler.

  Args:
    message: for people, on a line of its own.
    status: of the process.
    stream: where to print, by default the stdout that the process began with: the one of the moment
      may be silenced.
    close: whether to close what is open; not where another thread still works with it.
  """
  began = time.monotonic()

  def again(number: int, frame: types.FrameType | None) -> None:
    del number, frame
    if time.monotonic() - began > ECHO:
      remove_unfinished()
      os._exit(status)

  for number in (signal.SIGINT, signal.SIGTERM):
    with contextlib.suppress(ValueError):  # not the main thread
      signal.signal(number, again)
  _start(_end_anyway, status)
  closing = _thread.allocate_lock()
  closing.acquire()
  if close:
    _start(_close_all, closing)
  _say(message, sys.__stdout__ if stream is None else stream)
  if close:
    closing.acquire(timeout=_CLOSING)
  remove_unfinished()
  os._exit(status)


def _start(run: Callable[..., None], *arguments: object) -> None:
  """Runs a function beside. `threading` takes locks, which the main thread may hold here."""
  with contextlib.suppress(RuntimeError):
    _thread.start_new_thread(run, arguments)


def _end_anyway(status: int) -> None:
  time.sleep(_PATIENCE)
  # Beside: a file system may be what does not answer.
  _start(remove_unfinished)
  time.sleep(0.2)
  os._exit(status)


def _close_all(done: _thread.LockType) -> None:
  for process, close in reversed(_open):
    if process == os.getpid():
      with contextlib.suppress(BaseException):
        close()
  done.release()


def _say(message: str, stream: TextIO | None) -> None:
  try:
    if message and stream is not None:
      print(message, file=stream, flush=True)
  except RuntimeError:  # The handler came in the middle of such a call.
    with contextlib.suppress(OSError, ValueError):
      os.write(stream.fileno(), f'{message}\n'.encode())
  except (OSError, ValueError):
    pass  # Nobody listens any more.
  for each in (sys.stdout, sys.stderr):
    with contextlib.suppress(AttributeError, RuntimeError, OSError, ValueError):
      each.flush()
