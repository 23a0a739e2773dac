"""What JAX's runtime does when process 0 is gone: it aborts, and this has the last word.

The runtime's client ends its process from a thread of its own, at the very moment its connection
breaks, and takes no Python function to call instead. What can still be done is done where the
signal of that abort arrives.
"""

import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def heeded(last_word: Callable[[], None]) -> Iterator[None]:
  """Within it, `last_word` is called when the process aborts, from whatever thread.

  Python's own handlers would wait for the main thread, which may be waiting in compiled code.

  Args:
    last_word: may end the process with another status. If it returns, the abort takes its course.
  """
  library = ctypes.CDLL(None)
  library.signal.restype = ctypes.c_void_p
  library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]

  def handle(number: int) -> None:
    # Also for another abort in here.
    library.signal(number, before)
    last_word()
    signal.raise_signal(number)

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
  before = library.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
  try:
    yield
  finally:
    library.signal(signal.SIGABRT, before)
