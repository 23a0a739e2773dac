"""Keeps the processes of a run together: they stop at the same step, and none waits for the dead.

SIGTERM, which announces that a machine will be taken away, reaches one process and stops them all
after the same iteration. A process that fails tells the others why before it leaves, and so all
end with its sentence instead of waiting for it. One that no longer gets on is named, and so is one
that is gone without a word, as after a kill or with its machine.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator

import jax

from eru_jax import commands, distributed, leaving
from eru_jax.errors import causes
from eru_jax.training.checks import require
from eru_jax.training.roll_call import SAY_EVERY, RollCall, Store, is_broken_connection

_POLL = 0.5
# So long the others have to learn why a process fails, before its connections break.
_FAREWELL = 10.0
_AGREEMENT_MS = 120_000
_IS_GONE = 'it or its machine is gone; start the run again to continue'
_ARE_GONE = 'they or their machines are gone; start the run again to continue'
_serial = itertools.count()


@dataclasses.dataclass(frozen=True)
class WatchConfig:
  """When processes of a run that do not get on are named, and given up.

  Steps that take long are given three times as long as the longest of them so far, and ten times.

  Attributes:
    report_after: seconds without an iteration after which every process says who is behind.
    end_after: seconds after which it ends the run, with exit status 1.
    start_after: seconds without any progress, where no iteration is expected soon (models are
      loaded, programs compiled), after which every process says who is behind; it ends nothing.
  """

  report_after: float = 300.0
  end_after: float = 1800.0
  start_after: float = 900.0

  def __post_init__(self):
    require(
      self,
      report_after=(self.report_after > 0, 'positive'),
      end_after=(self.end_after >= self.report_after, 'at least report_after'),
      start_after=(self.start_after > 0, 'positive'),
    )


class Stopped(SystemExit):
  """Ends a program where it was asked to, with status 0; `watching` tells the user.

  Attributes:
    where: what the program stopped after or before, for people.
    told: whether nothing is left to do: the user knows, and no other process waits for this one.
  """

  told = False

  def __init__(self, where: str):
    super().__init__(0)
    self.where = where


@dataclasses.dataclass
class _Position:
  """How far a process is.

  Attributes:
    serial: ticks so far, which all processes count alike.
    marks: ticks and marks so far, likewise.
    where: what the last of them said of itself.
    done: whether that is done, as after a tick.
    since: when the last tick was.
    armed: whether the next one is expected soon.
    slowest: longest time between two ticks of one loop.
  """

  serial: int = 0
  marks: int = 0
  where: str = 'the start'
  done: bool = False
  since: float = 0.0
  armed: bool = False
  slowest: float = 0.0


class Watch:
  """Made by `watching`; `tick` after every iteration, `rest` when a loop is over.

  `mark` tells of a process's own work within an iteration, before it needs the others: of those
  who wait for each other, the one that waits for nobody is behind.
  """

  def __init__(self, config: WatchConfig, then: str):
    self._config, self._then = config, then
    self._position = _Position(since=time.monotonic())
    # Held while the processes agree on where to stop: none may go on meanwhile.
    self._lock = threading.Lock()
    # Taken by the first thread that ends this process, and never given back.
    self._leaving = threading.Lock()
    # No event: a signal may come while the handler of another one would hold the event's lock.
    self._requested = False
    self._process = os.getpid()
    # What the handler has raised, and when.
    self._raised: tuple[Stopped | None, float] = (None, -math.inf)
    self._over = threading.Event()
    self._stop_at: int | None = None
    self._main_does: str | None = None
    self._alone = jax.process_count() == 1
    self._me, self._reported = jax.process_index(), 0.0
    # What this process had come to when the thread last found it further, and when that was.
    self._seen, self._seen_at = (0, 0), time.monotonic()
    self._heard = time.monotonic()  # of process 0, which keeps the store
    self._store = Store(f'eru_jax/watch {next(_serial)}')
    self._roll_call = RollCall(self._store)
    self._missed: set[int] = set()

  def tick(self, where: str) -> bool:
    """Says that an iteration is done; returns whether all processes are to stop after it.

    Args:
      where: the iteration, for people: 'step 12 of dk_dm'.
    """
    with self._lock:
      now, position = time.monotonic(), self._position
      if position.armed:
        position.slowest = max(position.slowest, now - position.since)
      position.serial += 1
      position.marks += 1
      position.where, position.done = where, True
      position.since, position.armed = now, True
      if self._alone:
        return self._requested
      return position.serial == self._stop_at

  def mark(self, where: str) -> None:
    """Says how far this process is within an iteration, or what it does between the loops.

    Raises:
      Stopped: if it was asked to stop between the loops, and what told it so was dropped.
    """
    if not self._position.armed:
      self._heed_request()
    self._position.marks += 1
    self._position.where, self._position.done = where, False

  def rest(self) -> None:
    """Says that the next iteration may take its time: a loop is over.

    Raises:
      Stopped: if this process was asked to stop, and is the only one.
    """
    with self._lock:
      self._position.armed = False
    self._heed_request()

  def _heed_request(self) -> None:
    if self._alone and self._requested:
      raise Stopped(self._place())

  def _place(self) -> str:
    position = self._position
    if position.done:
      return f'after {position.where.removesuffix(", done")}'
    return f'at {position.where}'

  @contextlib.contextmanager
  def main_only(self, what: str) -> Iterator[None]:
    """Process 0 does something alone in the block, for as long as that takes; the others wait.

    There is no iteration after which all could stop: SIGTERM ends them at once, with status 0, so
    what is done here must be such that nothing is lost by that.

    Args:
      what: for people: 'the scores'.
    """
    self.rest()
    self.mark(what)
    self._main_does = what
    try:
      yield
    finally:
      self._main_does = None

  def stopped(self, where: str) -> None:
    """Tells the user that the program was asked to stop, and did."""
    distributed.announce(self._farewell(where))

  def _farewell(self, where: str) -> str:
    return f'stopped {where}; {self._then}'

  def _notice(self, number: int, frame: types.FrameType | None) -> None:
    del frame
    if os.getpid() != self._process:
      # A fork has inherited this handler, but none of what it is for.
      signal.signal(number, signal.SIG_DFL)
      signal.raise_signal(number)
      return
    self._requested = True
    if not self._alone or self._position.armed:
      return
    # Between the loops everything is saved.
    if leaving.is_owned():
      # An exception could end in a callback, where Python forgets it.
      leaving.leave(self._farewell(self._place()))
    # The program is not ours to end. One that forgets the exception is stopped at the next `mark`,
    # `tick` or `rest`; a second signal may cut short its way out, but not one that is an echo.
    now = time.monotonic()
    if now - self._raised[1] > leaving.ECHO:
      stopped = Stopped(self._place())
      self._raised = stopped, now
      raise stopped

  def _was_stopped(self, error: BaseException) -> bool:
    """Whether an error is nothing but what others have made of the one that the handler raised."""
    if isinstance(error, SystemExit) or commands.explain(error) is not None:
      return False
    return any(cause is self._raised[0] for cause in causes(error))

  def _run(self) -> None:
    """The thread that listens, in runs of several processes."""
    said = 0.0
    while not self._over.wait(_POLL):
      try:
        self._heed_failure()
        self._heard = time.monotonic()
        self._agree_on_stop()
        self._stop_what_main_does()
        if time.monotonic() - said > self._interval:
          said = time.monotonic()
          self._say_where()
          self._look_for_the_silent()
        self._look_for_the_stuck()
      except jax.errors.JaxRuntimeError as error:
        # Process 0, which keeps the store, is gone; or JAX's own heartbeat found somebody dead.
        if not self._over.is_set():
          self._end_without_store(error)

  def _heed_failure(self) -> None:
    """Ends this process if another one has failed, as that one has ended."""
    failure = self._store.get('failure')
    if failure is not None:
      self._leaving.acquire()
      self._leave(**json.loads(failure))

  def fail(self, message: str, status: int) -> None:
    """Ends all processes; the first to fail is the one that is heard."""
    self._leaving.acquire()
    found = {'message': message, 'status': status}
    try:
      self._store.set('failure', json.dumps(found), overwrite=False)
    except jax.errors.JaxRuntimeError:
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        found = json.loads(self._store.get('failure') or json.dumps(found))
    self._leave(**found)

  @property
  def _interval(self) -> float:
    config = self._config
    return min(SAY_EVERY, config.report_after / 4, config.start_after / 4)

  def lost(self) -> None:
    """Ends all processes because a connection broke, and names those that are gone.

    A process that failed and said so is heard instead. Returns only if all still answer.
    """
    interval = self._interval
    try:
      gone = self._roll_call.gone(2 * interval + 2 * _POLL, self._heed_failure)
    except jax.errors.JaxRuntimeError as store_error:
      self._end_without_store(store_error)
    if not gone:
      return
    message = f'{"; ".join(gone)}; {_IS_GONE if len(gone) == 1 else _ARE_GONE}'
    self.fail(message, 1)

  def _end_without_store(self, error: BaseException) -> None:
    """Ends this process: process 0 keeps the store through which all of them speak."""
    self._leaving.acquire()
    if self._me == 0 or 'heartbeat' in str(error):
      _end(f"JAX's runtime ends the run ({_first_line(error)}); start it again to continue", 1)
    self._end_without_process_0()

  def _end_without_process_0(self) -> None:
    silent = time.monotonic() - self._heard
    _end(f'process 0 was last heard of {silent:.0f} s ago; {_IS_GONE}', 1)

  def _leave(self, message: str, status: int) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._store.set(f'seen/{self._me}', '1')
      self._wait_for_all()
    _end(message, status)

  def _wait_for_all(self) -> None:
    """Waits until all have learnt of a failure, and process 0, which they ask, until they left."""
    deadline = time.monotonic() + _FAREWELL
    while time.monotonic() < deadline:
      if len(self._store.list('seen')) == jax.process_count():
        break
      time.sleep(0.05)
    if self._me == 0:
      time.sleep(2 * _POLL)

  def _agree_on_stop(self) -> None:
    """Sets where all stop: an iteration that none of them has reached yet."""
    if self._stop_at is not None:
      return
    if self._requested:
      self._store.set('stop', '1')
    if self._store.get('stop') is None:
      return
    with self._lock:
      self._store.set(f'stop at/{self._me}', str(self._position.serial))
      keys = [f'stop at/{index}' for index in range(jax.process_count())]
      serials = [int(self._store.wait(key, _AGREEMENT_MS)) for key in keys]
      self._stop_at = max(serials) + 1

  def _stop_what_main_does(self) -> None:
    what = self._main_does
    if self._me == 0 and self._stop_at is not None and what is not None:
      self.stopped(f'at {what}')
      self.fail('', 0)

  def _say_where(self) -> None:
    position = self._position
    done = position.marks + distributed.decisions()
    self._roll_call.say(done, position.where)

  def _look_for_the_silent(self) -> None:
    """Names those of whom nothing has been heard for a while, before JAX ends the run for it."""
    for index, words in self._roll_call.silent():
      if index not in self._missed:
        self._missed.add(index)
        self._warn(f'{words}; if it or its machine is gone, the run ends soon')

  def _look_for_the_stuck(self) -> None:
    position, now = dataclasses.replace(self._position), time.monotonic()
    seen = position.marks, distributed.decisions()
    if seen != self._seen:
      self._seen, self._seen_at = seen, now
    if not position.armed:
      self._look_for_the_late(now - self._seen_at, now)
      return
    waited = now - position.since
    if waited < max(self._config.report_after, 3 * position.slowest):
      return
    ends = waited >= max(self._config.end_after, 10 * position.slowest)
    if not ends and now - self._reported < self._config.report_after:
      return
    self._reported = now
    report = self._report(waited)
    if ends:
      self.fail(f'{report}; the run ends here, start it again to continue', 1)
    self._warn(report)

  def _look_for_the_late(self, waited: float, now: float) -> None:
    """Says who is waited for where no iteration is expected soon."""
    limit = self._config.start_after
    if self._main_does is not None:
      return  # process 0 shows itself how far it is
    if waited < limit or now - self._reported < limit:
      return
    self._reported = now
    self._warn(self._report(waited))

  def _warn(self, text: str) -> None:
    print(f'warning: process {self._me}: {text}', file=sys.stderr, flush=True)

  def _report(self, waited: float) -> str:
    """Who is behind, in words."""
    self._say_where()
    words = list(self._roll_call.behind(self._config.report_after))
    if not words:
      where = self._roll_call.where()
      words = [f'all processes are at {where}, waiting for their devices or for each other']
    what = 'no iteration' if self._position.armed else 'no progress'
    return f'{what} for {waited:.0f} s: {"; ".join(words)}'


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return lines[0][:200] if lines else type(error).__name__


def _end(message: str, status: int) -> None:
  """Leaves at once: the main thread may wait, in compiled code, for what will never come."""
  text = f'error: {" ".join(message.split())}' if message else ''
  # The main thread may as well still write metrics.
  leaving.leave(text, status, sys.stderr, close=False)


_current: Watch | None = None


@contextlib.contextmanager
def watching(
  config: WatchConfig | None = None, then: str = 'the same command continues'
) -> Iterator[Watch]:
  """The watch of this run; within another one's scope, that one.

  A single process that SIGTERM reaches between loops ends there if it is a command's own
  (`commands.run`); in any other program, Stopped leaves the scope, and what happens is its affair.

  In a run of several processes, an exception that leaves the scope ends all of them: those that
  did not raise it print its message as if they had.

  Args:
    config: time-outs.
    then: what a user is told who has stopped the program.
  """
  global _current
  if _current is not None:
    yield _current
    return
  watch = Watch(config or WatchConfig(), then)
  thread = threading.Thread(target=watch._run, daemon=True, name='eru_jax watch')
  in_main_thread = threading.current_thread() is threading.main_thread()
  previous = signal.signal(signal.SIGTERM, watch._notice) if in_main_thread else None
  _current = watch
  try:
    if not watch._alone:
      thread.start()
    yield watch
    watch._heed_request()
    if not watch._alone:
      distributed.barrier()  # Until all are here, somebody may have to be told something.
  except BaseException as error:
    if watch._was_stopped(error):
      error = Stopped(watch._raised[0].where)
    if isinstance(error, Stopped):
      watch.stopped(error.where)
      error.told = watch._alone
    if not watch._alone:
      _tell(watch, error)
    raise error
  finally:
    _current, watch._raised = None, (None, -math.inf)  # its traceback holds the run's arrays
    watch._over.set()
    if thread.is_alive():
      thread.join()
    if in_main_thread:
      signal.signal(signal.SIGTERM, previous)


def _tell(watch: Watch, error: BaseException) -> None:
  """Passes an exception on to the other processes, and ends this one; not if all stop anyway."""
  if isinstance(error, SystemExit) and not error.code:
    return
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    watch._heed_failure()  # This error may be a consequence of what happened there.
  found = commands.explain(error)
  index = jax.process_index()
  if found is not None:
    watch.fail(f'process {index}: {found[0]}', found[1])
  if is_broken_connection(error):
    watch.lost()
  traceback.print_exception(error)
  watch.fail(f'process {index} failed with {type(error).__name__}: {_first_line(error)}', 1)


def tick(where: str) -> None:
  """`Watch.tick` of the run, if there is one; leaves the program where it is to stop.

  For loops in which there is nothing to save.

  Raises:
    Stopped: with status 0.
  """
  if _current is not None and _current.tick(where):
    raise Stopped(f'after {where}')


def mark(where: str) -> None:
  """`Watch.mark` of the run, if there is one."""
  if _current is not None:
    _current.mark(where)


def rest() -> None:
  """`Watch.rest` of the run, if there is one."""
  if _current is not None:
    _current.rest()
