"""Commands that draw in several processes: all take part in drawing, process 0 does the rest alone.

What is alone process 0's: reading questions, deciding what is to be drawn, asking models over HTTP,
scoring, writing and printing. The others are told what to draw (`distributed.agreed`).
"""

import contextlib
from collections.abc import Iterator

from eru_jax import distributed
from eru_jax.training.watch import watching


@contextlib.contextmanager
def together(then: str = 'the same command continues') -> Iterator[None]:
  """Around such a command: `watching`, where there are several processes.

  One alone needs none: asked to end, it ends as any program does, and not with status 0.

  Args:
    then: what a user is told who has stopped the command.
  """
  if distributed.process_count() == 1:
    yield
    return
  with watching(then=then):
    yield


@contextlib.contextmanager
def by_main(what: str) -> Iterator[bool]:
  """Process 0 works alone in the block, and the others wait behind it; see `Watch.main_only`.

  Args:
    what: for people: 'the scores'.

  Yields:
    Whether this is process 0.
  """
  if distributed.process_count() == 1:
    yield True
    return
  with watching() as watch, watch.main_only(what):
    yield distributed.is_main()
    distributed.barrier()
