"""Several processes as one run: starting JAX's runtime, moving arrays, and agreeing on decisions.

Every process runs the same program, so what depends on files or on the clock must be decided once:
`agreed` takes process 0's answer, `all_true` asks everybody. In a single process nothing here costs
anything, and `jax.distributed` is never started.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax._src import distributed as runtime
from jax.experimental import multihost_utils

from eru_jax import cluster
from eru_jax.errors import UserError

PyTree = Any
T = TypeVar('T')
# Between two spells of waiting, in milliseconds, Python hears signals.
_SPELL = 1000
# Joint decisions so far: all processes take them in the same order.
_decisions = 0


def initialize() -> None:
  """Joins the other processes of a run, if there are any; before JAX computes anything.

  ERU_JAX_COORDINATOR (host:port of process 0), ERU_JAX_NUM_PROCESSES and ERU_JAX_PROCESS_ID name
  them. Without these, JAX finds the others by itself on TPU slices and under Slurm or Open MPI. A
  process that waits for the others longer than ERU_JAX_START_SECONDS ends with status 1.

  Raises:
    UserError: if the variables do not go together, or the others cannot be found.
  """
  given = cluster.from_environment(os.environ)
  if given is None and (os.environ.get(cluster.COUNT) or not cluster.is_launched(os.environ)):
    return
  # Our own watch agrees on where to stop: JAX's would take SIGTERM away, and Orbax asks it too.
  jax.config.update('jax_enable_preemption_service', False)
  seconds = cluster.start_seconds(os.environ)
  if given is not None and given['process_id'] == 0:
    cluster.check_port(given['coordinator_address'])
  try:
    with cluster.joining(seconds):
      # JAX's own patience must not end first.
      jax.distributed.initialize(**given or {}, initialization_timeout=int(seconds) + 60)
  except (RuntimeError, ValueError, OSError) as error:
    lines = str(error).strip().splitlines()
    raise UserError(
      f'This process could not join the others of the run ({lines[0] if lines else error}): start '
      f'one process a host, each with the same {cluster.COORDINATOR} (host:port of process 0) '
      f'and {cluster.COUNT}, and with an {cluster.INDEX} of its own.'
    ) from error


def process_index() -> int:
  return jax.process_index()


def process_count() -> int:
  return jax.process_count()


def is_main() -> bool:
  """Whether this is the process that prints and writes what a run leaves behind."""
  return process_index() == 0


def announce(text: str) -> None:
  """Prints a line once for all processes."""
  if is_main():
    print(text, flush=True)


def client() -> Any:
  """The key-value store and barriers of JAX's runtime; None in a single process."""
  # JAX has no public name for it; Orbax takes it from here too.
  return runtime.global_state.client


def decisions() -> int:
  """Joint decisions and barriers that this process has come to; who has fewer is waited for."""
  return _decisions


def _count() -> int:
  global _decisions
  _decisions += 1
  return _decisions


def _waited_for(key: str) -> str:
  """A value, once there is one; that there will be none ends the process, see `training.watch`."""
  while True:
    try:
      return client().blocking_key_value_get(key, _SPELL)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise


def agreed(decide: Callable[[], Any]) -> Any:
  """What process 0 decides, as JSON data; the others wait for it and never ask themselves."""
  if process_count() == 1:
    return decide()
  # Made before it is counted: until then, the others wait for process 0.
  decision = json.dumps(decide()) if is_main() else None
  key = f'eru_jax/agreed/{_count()}'
  if is_main():
    client().key_value_set(key, decision)
  return json.loads(_waited_for(key))


def of_main(values: T) -> T:
  """Process 0's values in every process: a dataclass of JSON data, whose lists are tuples."""
  found = agreed(lambda: dataclasses.asdict(values))
  if is_main():
    return values
  return type(values)(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


def all_true(value: bool) -> bool:
  """Whether the value is true in every process."""
  if process_count() == 1:
    return value
  key = f'eru_jax/all_true/{_count()}'
  client().key_value_set(f'{key}/{process_index()}', json.dumps(bool(value)))
  found = [_waited_for(f'{key}/{index}') for index in range(process_count())]
  return all(json.loads(one) for one in found)


def barrier() -> None:
  """Waits until every process is here."""
  all_true(True)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
  """Process 0 goes through the block before the others do.

  For caches: on a disk that all share the others find them filled; where each host has its own,
  they fill theirs, all at once.
  """
  if is_main():
    yield
    barrier()
  else:
    barrier()
    yield


def to_host(tree: PyTree, *, keep: bool = True) -> PyTree:
  """The tree as numpy arrays, wherever its parts are; every process must call it.

  Args:
    tree: arrays.
    keep: False where this process takes part only: it gets None for each array.
  """
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def one(x: Any) -> Any:
    spread = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    found = multihost_utils.process_allgather(x, tiled=True) if spread else x
    return jax.device_get(found) if keep else None

  return jax.tree.map(one, tree)
