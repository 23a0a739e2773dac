"""How far a stage is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
  """Shows a stage's progress on stderr, with its measurements and the time left.

  On a terminal that is a bar; elsewhere (a log file, a notebook's cell, a cluster's console) a
  line at the first step, at most every `interval` seconds after it, and at the last one.
  Measurements may be device scalars: they are waited for only when they are shown.
  """

  def __init__(
    self,
    total: int,
    stage: str,
    initial: int = 0,
    *,
    quiet: bool = False,
    interval: float = 10.0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts to show progress.

    Args:
      total: iterations of the stage.
      stage: its name.
      initial: iterations done before, for a resumed run.
      quiet: show nothing, as in processes that leave it to another.
      interval: seconds between plain lines.
      stream: where to show it, by default stderr.
      clock: seconds since some moment; for tests.
    """
    self._total, self._stage, self._step = total, stage, initial
    self._stream = sys.stderr if stream is None else stream
    self._clock = clock
    self._bar = None
    self._quiet, self._interval = quiet, interval
    if self._stream.isatty() and not quiet:
      self._interval = 0.2
      self._bar = tqdm(
        total=total,
        initial=initial,
        desc=stage,
        file=self._stream,
        dynamic_ncols=True,
        unit='step',
      )
    self._shown_at: float | None = None
    self._first: tuple[int, float] | None = None

  def update(self, step: int, **values: Any) -> None:
    """Moves on.

    Args:
      step: iterations that are done.
      **values: floats or () arrays to show beside it, for example loss=loss.
    """
    if self._quiet:
      return
    advance, self._step = step - self._step, step
    now = self._clock()
    # The first iteration compiles: it tells nothing about the time that the others take.
    self._first = self._first or (step, now)
    due = self._shown_at is None or now - self._shown_at >= self._interval or step >= self._total
    if due:
      self._shown_at = now
    if self._bar is not None:
      if due and values:
        self._bar.set_postfix_str(_describe(values, ' '), refresh=False)
      self._bar.update(advance)
    elif due:
      self._print_line(now, values)

  def write(self, message: str) -> None:
    """Prints a line without tearing the bar."""
    if self._bar is not None:
      tqdm.write(message, file=self._stream)
    else:
      print(message, file=self._stream, flush=True)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def _print_line(self, now: float, values: Mapping[str, Any]) -> None:
    parts = [f'{self._stage} {self._step:>{len(str(self._total))}}/{self._total}']
    if values:
      parts.append(_describe(values, '  '))
    steps = self._step - self._first[0]
    if steps > 0:
      pace = (now - self._first[1]) / steps
      left = tqdm.format_interval(round(pace * max(0, self._total - self._step)))
      parts += [f'{pace:.3g} s/step', f'{left} left']
    print('  '.join(parts), file=self._stream, flush=True)


def _describe(values: Mapping[str, Any], gap: str) -> str:
  return gap.join(f'{name} {float(value):.4g}' for name, value in values.items())
