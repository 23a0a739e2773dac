"""Several processes as one run: starting JAX's runtime, moving arrays, and agreeing on decisions.

Every process runs the same program, so what depends on files or on the clock must be decided once:
`agreed` takes process 0's answer, `all_true` asks everybody. In a single process nothing here costs
anything, and `jax.distributed` is never started.
"""

import contextlib
import glob
import itertools
import json
import os
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed as runtime
from jax.experimental import multihost_utils

from eru_jax.errors import UserError

PyTree = Any
COORDINATOR, COUNT, INDEX = 'ERU_JAX_COORDINATOR', 'ERU_JAX_NUM_PROCESSES', 'ERU_JAX_PROCESS_ID'
# Set by launchers that JAX knows; the value says how many processes there are, or where.
_COUNTS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
_PLACES = ('JAX_COORDINATOR_ADDRESS', 'MEGASCALE_COORDINATOR_ADDRESS')
# A Cloud TPU VM learns from here which machines belong to its slice; nothing in its environment
# says so.
_METADATA = (
  'http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints'
)
# Waiting ends earlier where a process fails, see `training.watch`.
_LONG = 7 * 24 * 3600 * 1000
_serial = itertools.count()


def initialize() -> None:
  """Joins the other processes of a run, if there are any; before JAX computes anything.

  ERU_JAX_COORDINATOR (host:port of process 0), ERU_JAX_NUM_PROCESSES and ERU_JAX_PROCESS_ID name
  them. Without these, JAX finds the others by itself on TPU slices and under Slurm or Open MPI.

  Raises:
    UserError: if the three variables do not go together, or the others cannot be reached.
  """
  given = _from_environment(os.environ)
  if given is None and not _is_launched(os.environ):
    return
  # Our own watch agrees on where to stop: JAX's would take SIGTERM away, and Orbax asks it too.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(**given or {})
  except (RuntimeError, ValueError) as error:
    lines = str(error).strip().splitlines()
    raise UserError(
      f'This process could not join the others of the run ({lines[0] if lines else error}): start '
      f'one process a host, each with the same {COORDINATOR} (host:port of process 0) and '
      f'{COUNT}, and with an {INDEX} of its own.'
    ) from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Arguments of jax.distributed.initialize, or None if the variables are not set."""
  values = [environment.get(name, '') for name in (COORDINATOR, COUNT, INDEX)]
  if not any(values):
    return None
  address, count, index = values
  whole = count.isdecimal() and index.isdecimal()
  if not address.rpartition(':')[2].isdecimal() or not whole or int(index) >= int(count):
    raise UserError(
      f'{COORDINATOR} is {address!r}, {COUNT} {count!r} and {INDEX} {index!r}: give host:port of '
      'process 0, the number of processes, and the index of this one, from 0.'
    )
  if int(count) == 1:
    return None
  return {
    'coordinator_address': address,
    'num_processes': int(count),
    'process_id': int(index),
    'cluster_detection_method': 'deactivate',
  }


def _is_launched(environment: Mapping[str, str]) -> bool:
  """Whether the environment, or the machine, says that there are other processes."""
  if any(environment.get(name) for name in _PLACES):
    return True
  if any(int(environment.get(name, '1') or 1) > 1 for name in _COUNTS):
    return True
  if ',' in environment.get('TPU_WORKER_HOSTNAMES', ''):
    return True
  return bool(glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')) and _tpu_hosts() > 1


def _tpu_hosts() -> int:
  """Machines of the slice that this Cloud TPU VM belongs to; 1 anywhere else."""
  request = urllib.request.Request(_METADATA, headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(request, timeout=2) as response:
      return response.read().decode().count(',') + 1
  except OSError:
    return 1


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


def agreed(decide: Callable[[], Any]) -> Any:
  """What process 0 decides, as JSON data; the others wait for it and never ask themselves."""
  if process_count() == 1:
    return decide()
  key = f'eru_jax/agreed/{next(_serial)}'
  if is_main():
    client().key_value_set(key, json.dumps(decide()))
  return json.loads(client().blocking_key_value_get(key, _LONG))


def all_true(value: bool) -> bool:
  """Whether the value is true in every process."""
  if process_count() == 1:
    return value
  key = f'eru_jax/all_true/{next(_serial)}'
  client().key_value_set(f'{key}/{process_index()}', json.dumps(bool(value)))
  found = [
    client().blocking_key_value_get(f'{key}/{index}', _LONG) for index in range(process_count())
  ]
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
