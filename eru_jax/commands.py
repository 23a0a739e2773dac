"""What the commands have in common: quick flags, one-sentence errors, no noise."""

import _thread
import contextlib
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from eru_jax import leaving
from eru_jax.errors import UserError, causes, full_disk

_OVERRIDE = 'config.'


def run(main: Callable[[], None]) -> None:
  """Runs a command: flags are parsed first, then `main` may import what is slow.

  A UserError becomes one line on stderr, with one more for each thing it lists, and exit status 2;
  so does a bad flag or config file, and a file that the system refuses to open or write. Ctrl-C
  becomes one line too, with exit status 130.

  The process is taken to be the command's own: signals may end it where it is. In a thread other
  than the main one they are left to the program that it belongs to.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)

  def wrapped(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      fail(f'unexpected argument {argv[1]!r}; every option is a --flag, see --help')
    try:
      main()
    except SystemExit as error:
      if getattr(error, 'told', False):
        leaving.leave(status=error.code)
      raise
    except BaseException as error:
      sys.excepthook = sys.__excepthook__
      # Orbax turns it into an error of its own.
      if any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):
        message, status = explain(KeyboardInterrupt())
        leaving.leave(f'error: {message}', status, sys.stderr)
      found = explain(error)
      if found is None:
        raise
      fail(*found, details=getattr(error, 'details', ()))

  if threading.current_thread() is not threading.main_thread():
    app.run(wrapped, flags_parser=_parse_flags)
    return
  with leaving.owning(), _heard_interrupts():
    app.run(wrapped, flags_parser=_parse_flags)


class _Interrupt(KeyboardInterrupt):
  """A Ctrl-C that is repeated if it comes to nothing.

  Python prints and forgets an exception that is raised in a destructor or callback, and compiled
  code may clear it. JAX has a callback for every garbage collection, and signals that arrive during
  a computation are often heard there.
  """

  def __del__(self):
    # `run` ends the process while it holds the exception. A plain thread: `threading` takes locks,
    # which the main thread may hold here.
    with contextlib.suppress(RuntimeError):
      _thread.start_new_thread(_interrupt_soon, ())


@contextlib.contextmanager
def _heard_interrupts() -> Iterator[None]:
  """Within it Ctrl-C ends the process, wherever it comes."""
  before, hooks = signal.getsignal(signal.SIGINT), (sys.unraisablehook, sys.excepthook)
  if before is not signal.default_int_handler:
    # Ignored, as in what a script's shell starts in the background: that is meant.
    yield
    return
  signal.signal(signal.SIGINT, _interrupt)
  sys.unraisablehook = _unraisable
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)
    sys.unraisablehook, sys.excepthook = hooks


def _interrupt(number: int, frame: types.FrameType | None) -> NoReturn:
  if not leaving.is_owned():  # a fork
    signal.default_int_handler(number, frame)
  # On the way out, TensorStore complains that the event loop is gone to which it would report.
  sys.excepthook = _say_nothing
  raise _Interrupt


def _interrupt_soon() -> None:
  time.sleep(0.02)
  signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def _say_nothing(*unused: Any) -> None:
  pass


def _unraisable(found: 'sys.UnraisableHookArgs') -> None:
  if found.exc_type is not _Interrupt:
    sys.__unraisablehook__(found)


def explain(error: BaseException) -> tuple[str, int] | None:
  """What to tell a user about an error, and the exit status; None if it is none of theirs."""
  if isinstance(error, KeyboardInterrupt):
    return 'interrupted; run the same command again to continue', 130
  if isinstance(error, UserError):
    return error.sentence, 2
  if isinstance(error, OSError):
    # Files that are no result, such as curves, are written by libraries that know no UserError.
    if full_disk(error) is not None:
      return f'{error}: free some space and run the same command again', 2
    # Without a file's name, nobody could tell what to mend.
    if isinstance(error.filename, str):
      return f'{error.filename}: {error.strerror}: check this path and the rights to it', 2
  return None


def define_seed() -> flags.FlagHolder[int]:
  """The flag --seed, within what a JAX key tells apart."""
  return flags.DEFINE_integer(
    'seed', 0, 'Seed of the start noise.', lower_bound=0, upper_bound=2**32 - 1
  )


def define_mesh() -> flags.FlagHolder[str | None]:
  """The flag --mesh, as `sharding.parse_mesh` reads it."""
  return flags.DEFINE_string(
    'mesh', None, 'Sizes of the axes of the device mesh, such as fsdp=4 or data=2,fsdp=-1; by '
    'default the model is copied to all devices if it is small beside the memory of one, else '
    'split over them.'
  )  # fmt: skip


def config_overrides() -> dict[str, str]:
  """The flags --config.KEY=VALUE: dotted key -> value as it was typed."""
  values = flags.FLAGS.flag_values_dict()
  return {
    name.removeprefix(_OVERRIDE): value
    for name, value in values.items()
    if name.startswith(_OVERRIDE)
  }


def _define_overrides(argv: Sequence[str]) -> None:
  """Makes a flag of every --config.KEY, for a command that has --config."""
  if 'config' not in flags.FLAGS:
    return
  for argument in argv[1:]:
    if argument == '--':
      return
    found = re.match(rf'--?({re.escape(_OVERRIDE)}[^=]+)', argument)
    if found and found[1] not in flags.FLAGS:
      flags.DEFINE_string(found[1], None, 'Override of a value of the config.')


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    _define_overrides(argv)
    return flags.FLAGS(argv)
  except flags.Error as error:
    missing = re.findall(r'Flag (--\w+) must have a value other than None', str(error))
    if missing:
      return fail(f'{" and ".join(missing)} must be given; see --help')
    return fail(f'{error}; see --help')


def fail(message: str, status: int = 2, details: Sequence[str] = ()) -> None:
  """Prints one line, or one and a line for each detail, and ends the process."""
  sys.stdout.flush()
  print(f'error: {" ".join(message.split())}', file=sys.stderr)
  for detail in details:
    print(f'  {detail}', file=sys.stderr)
  sys.exit(status)
