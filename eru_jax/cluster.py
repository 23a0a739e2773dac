"""Who the other processes of a run are, by the environment or by the machine, and joining them.

A process that takes itself for the only one trains apart from the others, into the same workdir,
and nobody notices. So whatever keeps the question unanswered is an error here, never a "no".
"""

import contextlib
import glob
import http.client
import os
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from jax._src import distributed as runtime

from eru_jax.errors import UserError

COORDINATOR, COUNT, INDEX = 'ERU_JAX_COORDINATOR', 'ERU_JAX_NUM_PROCESSES', 'ERU_JAX_PROCESS_ID'
START_SECONDS = 'ERU_JAX_START_SECONDS'
# Set by launchers that JAX knows; the value says how many processes or slices there are, or where.
_COUNTS = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'MEGASCALE_NUM_SLICES')
_PLACES = ('JAX_COORDINATOR_ADDRESS', 'MEGASCALE_COORDINATOR_ADDRESS')
# The workers of a slice, as GKE names them; JAX reads the second only where there is no first.
_WORKERS = ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES')
# As patient as JAX, which asks the same server for the same things later.
_TRIES, _PAUSE, _TIMEOUT = 6, 0.5, 10.0


def from_environment(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Arguments of jax.distributed.initialize, or None if our variables are not set.

  Raises:
    UserError: if they do not go together.
  """
  values = [environment.get(name, '') for name in (COORDINATOR, COUNT, INDEX)]
  if not any(values):
    return None
  address, count, index = values
  host, _, port = address.rpartition(':')
  whole = count.isdecimal() and index.isdecimal()
  valid_port = port.isdecimal() and 0 < int(port) < 2**16
  if not host or not valid_port or not whole or int(index) >= int(count):
    raise UserError(
      f'{COORDINATOR} is {address!r}, {COUNT} {count!r} and {INDEX} {index!r}: give host:port of '
      'process 0 (a port is at most 65535), the number of processes, and the index of this one, '
      'from 0.'
    )
  if int(count) == 1:
    return None
  return {
    'coordinator_address': address,
    'num_processes': int(count),
    'process_id': int(index),
    'cluster_detection_method': 'deactivate',
  }


def start_seconds(environment: Mapping[str, str]) -> float:
  """How long the processes of a run wait for each other when they start.

  Raises:
    UserError: if that is no number above 0.
  """
  given = environment.get(START_SECONDS) or '300'
  if not re.fullmatch(r'\d{1,6}(\.\d+)?', given) or float(given) == 0:
    raise UserError(f'{START_SECONDS} is {given!r}: give a number of seconds above 0.')
  return float(given)


def is_launched(environment: Mapping[str, str]) -> bool:
  """Whether the environment, or the machine, says that there are others, whom JAX will find.

  Raises:
    UserError: on a Cloud TPU VM whose metadata server does not answer.
  """
  if any(environment.get(name) for name in _PLACES):
    return True
  if any(_several(environment.get(name)) for name in _COUNTS):
    return True
  workers = next((environment[name] for name in _WORKERS if name in environment), None)
  if workers is not None:
    return ',' in workers
  # JAX sets this variable, with which it asks no metadata server, where it sees no TPU.
  if 'TPU_SKIP_MDS_QUERY' in environment:
    return False
  on_tpu = glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')
  return bool(on_tpu) and _is_part_of_more(environment)


def _several(count: str | None) -> bool:
  return bool(count) and count != '1'


def _is_part_of_more(environment: Mapping[str, str]) -> bool:
  """Whether this Cloud TPU VM has company: in its slice, or slices beside its own.

  Nothing in its environment says so, and the two are told apart: each slice lists its own workers.
  """
  if ',' in (_metadata('worker-network-endpoints', environment) or ''):
    return True
  # Lines such as: MEGASCALE_NUM_SLICES: '2'
  lines = (_metadata('tpu-env', environment) or '').splitlines()
  pairs = (line.partition(':') for line in lines)
  found = {name.strip(): value.strip().strip('\'"') for name, _, value in pairs}
  coordinator = found.get('MEGASCALE_COORDINATOR_ADDRESS')
  return bool(coordinator) or _several(found.get('MEGASCALE_NUM_SLICES'))


def _metadata(key: str, environment: Mapping[str, str]) -> str | None:
  """An attribute of this machine; None if it has none of that name, or no metadata server.

  Raises:
    UserError: if the server is there but gives no answer.
  """
  server = environment.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(
    f'http://{server}/computeMetadata/v1/instance/attributes/{key}',
    headers={'Metadata-Flavor': 'Google'},
  )
  # It is on this machine's own link: a proxy would ask about another one.
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  why = ''
  for attempt in range(_TRIES):
    time.sleep(_PAUSE if attempt else 0)
    try:
      with opener.open(request, timeout=_TIMEOUT) as response:
        return response.read().decode(errors='replace')
    except urllib.error.HTTPError as error:
      if error.code == 404:
        return None
      why = f'HTTP status {error.code}'
    except (OSError, http.client.HTTPException) as error:
      reason = getattr(error, 'reason', error)
      if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
        return None
      why = str(reason) or type(reason).__name__
  raise UserError(
    f'This machine has a TPU, but its metadata server {server} does not say whether there are '
    f'other machines to train with ({why}, {_TRIES} times): start again, or, if it is to work '
    'alone, with TPU_SKIP_MDS_QUERY=1 in its environment.'
  )


def check_port(address: str) -> None:
  """In process 0, before JAX's server takes the port of `address`: it would crash on a taken one.

  Raises:
    UserError: if another process has it.
  """
  port = int(address.rpartition(':')[2])
  try:
    socket.create_server(('', port)).close()
  except OSError as error:
    raise UserError(
      f'Process 0 cannot listen on port {port} of this machine ({os.strerror(error.errno)}): end '
      f'what uses it, such as an earlier run, or give all processes another port in {COORDINATOR}.'
    ) from error


@contextlib.contextmanager
def joining(seconds: float) -> Iterator[None]:
  """Around jax.distributed.initialize: says who is waited for, and ends the process at last.

  JAX itself would wait in silence, then abort with a dump of its stack.

  Args:
    seconds: from now until this process ends, with status 1 and one sentence.
  """
  over = threading.Event()
  thread = threading.Thread(target=_wait, args=(over, seconds), daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def _wait(over: threading.Event, seconds: float) -> None:
  deadline, said = time.monotonic() + seconds, False
  while not over.wait(0.2):
    # The client comes last of what JAX learns of the run, before it connects.
    state, known = runtime.global_state, runtime.global_state.client is not None
    if known and not said:
      said = True
      print(
        f'process {state.process_id}: waiting for {state.num_processes} processes at '
        f'{state.coordinator_address}',
        flush=True,
      )
    if time.monotonic() > deadline:
      sys.stdout.flush()
      print(f'error: {_who_is_missing(seconds)}', file=sys.stderr, flush=True)
      os._exit(1)


def _who_is_missing(seconds: float) -> str:
  state = runtime.global_state
  address, count, me = state.coordinator_address, state.num_processes, state.process_id
  if state.client is None:
    return f'JAX has not found out within {seconds:g} s which processes there are; start again'
  if me != 0 and not _answers(address):
    return (
      f'process {me}: nothing answers at {address}, where process 0 should be, after '
      f'{seconds:g} s; see whether it was started, and whether this machine may reach that port'
    )
  return (
    f'process {me}: not all of {count} processes came to {address} within {seconds:g} s; see which '
    f'was not started or has ended, and whether all have the same number of processes'
  )


def _answers(address: str) -> bool:
  host, _, port = address.rpartition(':')
  try:
    with socket.create_connection((host.strip('[]'), int(port)), timeout=5):
      return True
  except (OSError, ValueError):
    return False
