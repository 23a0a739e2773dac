"""Who else takes part in a run: no process may take itself for the only one, or wait in silence."""

import contextlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time

import ports
import processes
import pytest
from jax._src.clusters import cloud_tpu_cluster

from eru_jax import cluster
from eru_jax.errors import UserError

PATH = '/computeMetadata/v1/instance/attributes/'


@contextlib.contextmanager
def metadata(attributes, statuses=()):
  """A metadata server on this machine; its first answers are `statuses`. Yields its address."""
  failures, asked = list(statuses), []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path)
      found = attributes.get(self.path.removeprefix(PATH))
      if self.headers['Metadata-Flavor'] != 'Google':
        found = None
      status = failures.pop(0) if failures else 200 if found is not None else 404
      self.send_response(status)
      self.end_headers()
      self.wfile.write((found if status == 200 else '<title>Error</title>').encode())

    def log_message(self, *unused):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02})
  thread.start()
  try:
    yield f'127.0.0.1:{server.server_port}', asked
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def on_tpu(monkeypatch):
  """As on a machine with a TPU, whose metadata server is asked without long pauses."""
  monkeypatch.setattr(cluster.glob, 'glob', lambda pattern: ['/dev/accel0'])
  monkeypatch.setattr(cluster, '_PAUSE', 0.01)


def tpu_env(**values):
  return "ACCELERATOR_TYPE: 'v5litepod-8'\n" + ''.join(f"{k}: '{v}'\n" for k, v in values.items())


SLICES = dict(
  MEGASCALE_NUM_SLICES=2, MEGASCALE_SLICE_ID=1, MEGASCALE_COORDINATOR_ADDRESS='10.0.0.2:8080'
)


@pytest.mark.parametrize(
  ('workers', 'values', 'count'),
  [
    ('host-0', {}, 1),
    ('a:0:10.0.0.1', {'MEGASCALE_NUM_SLICES': 1}, 1),
    ('host-0,host-1,host-2,host-3', {}, 4),
    ('host-0', SLICES, 2),  # two slices of one host each
    ('host-0,host-1', SLICES, 4),
    ('host-0', {'MEGASCALE_NUM_SLICES': 3}, 3),
  ],
)
def test_jax_counts_as_many_machines(workers, values, count, on_tpu, monkeypatch):
  """JAX's own reading of the same server is the oracle."""
  attributes = {
    'worker-network-endpoints': workers,
    'tpu-env': tpu_env(**values),
    'agent-worker-number': '0',
  }
  for name in ('MEGASCALE_NUM_SLICES', 'MEGASCALE_COORDINATOR_ADDRESS'):
    monkeypatch.delenv(name, raising=False)
  with metadata(attributes) as (server, asked):
    monkeypatch.setenv('GCE_METADATA_IP', server)
    assert cloud_tpu_cluster.GceTpuCluster.get_process_count() == count
    assert cluster.is_launched({'GCE_METADATA_IP': server}) == (count > 1)
    # Where JAX asks no metadata server, neither do we.
    asked.clear()
    assert not cluster.is_launched({'GCE_METADATA_IP': server, 'TPU_SKIP_MDS_QUERY': '1'})
    assert asked == []


def unknown_names(code):
  """A resolver that knows no name, for a reason of `socket`."""

  def getaddrinfo(*unused, **more):
    raise socket.gaierror(code, 'no such name')

  return getaddrinfo


def test_a_metadata_server_without_these_attributes_means_one_machine(on_tpu, monkeypatch):
  with metadata({}) as (server, asked):
    assert not cluster.is_launched({'GCE_METADATA_IP': server})
  assert [path.removeprefix(PATH) for path in asked] == ['worker-network-endpoints', 'tpu-env']
  # Not asked of a real resolver, which may be out of order itself.
  monkeypatch.setattr(socket, 'getaddrinfo', unknown_names(socket.EAI_NONAME))
  assert not cluster.is_launched({'GCE_METADATA_IP': 'no-such-host.invalid'})
  monkeypatch.setattr(socket, 'getaddrinfo', unknown_names(socket.EAI_AGAIN))
  with pytest.raises(UserError, match=r'\(.*no such name, 6 times\)'):
    cluster.is_launched({'GCE_METADATA_IP': 'no-such-host.invalid'})


def test_a_metadata_server_that_hiccups_is_asked_again(on_tpu, monkeypatch):
  with metadata({'worker-network-endpoints': 'a,b'}, [503, 500, 429, 503, 503]) as (server, asked):
    assert cluster.is_launched({'GCE_METADATA_IP': server})
    assert len(asked) == 6
  with metadata({'worker-network-endpoints': 'a,b'}, [503] * 6) as (server, _):
    with pytest.raises(UserError, match=r'metadata server .*\(HTTP status 503, 6 times\)'):
      cluster.is_launched({'GCE_METADATA_IP': server})
  # Nobody listens where the last one was.
  with pytest.raises(UserError, match=r'\(.*refused, 6 times\): start again, or'):
    cluster.is_launched({'GCE_METADATA_IP': server})
  monkeypatch.setattr(cluster, '_TIMEOUT', 0.05)
  with socket.create_server(('127.0.0.1', 0)) as silent:
    address = f'127.0.0.1:{silent.getsockname()[1]}'
    with pytest.raises(UserError, match=r'\(timed out, 6 times\)'):
      cluster.is_launched({'GCE_METADATA_IP': address})


def test_the_environment_names_processes(monkeypatch):
  names = (cluster.COORDINATOR, cluster.COUNT, cluster.INDEX)

  def read(*values):
    return cluster.from_environment(dict(zip(names, values, strict=True)))

  assert cluster.from_environment({}) is None and read('host:1234', '1', '0') is None
  assert read('host:65535', '4', '3') == {
    'coordinator_address': 'host:65535',
    'num_processes': 4,
    'process_id': 3,
    'cluster_detection_method': 'deactivate',
  }
  for wrong in (
    ('host', '4', '3'),
    ('host:1', '4', '4'),
    ('host:1', '', ''),
    ('', '2', '0'),
    ('host:65536', '4', '3'),
    ('host:0', '4', '3'),
    (':1234', '4', '3'),
  ):
    with pytest.raises(UserError, match='ERU_JAX_COORDINATOR is .*: give host:port'):
      read(*wrong)
  assert cluster.start_seconds({}) == 300 and cluster.start_seconds({cluster.START_SECONDS: '2.5'})
  for wrong in ('0', 'soon', '-1', 'nan'):
    with pytest.raises(UserError, match=f"ERU_JAX_START_SECONDS is '{wrong}': give"):
      cluster.start_seconds({cluster.START_SECONDS: wrong})

  def fail(*unused):
    raise AssertionError('asked')

  monkeypatch.setattr(cluster, '_metadata', fail)
  monkeypatch.setattr(cluster.glob, 'glob', lambda pattern: ['/dev/vfio/0'])
  for alone in (
    {'SLURM_STEP_NUM_TASKS': '1', 'TPU_WORKER_HOSTNAMES': 'a'},
    {'TPU_PROCESS_ADDRESSES': 'a:1', 'TPU_WORKER_HOSTNAMES': 'a,b'},  # JAX prefers the first
    {'MEGASCALE_NUM_SLICES': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'},
  ):
    assert not cluster.is_launched(alone), alone
  for name, value in (
    ('SLURM_STEP_NUM_TASKS', '2'),
    ('OMPI_COMM_WORLD_SIZE', '8'),
    ('JAX_COORDINATOR_ADDRESS', 'host:1'),
    ('MEGASCALE_COORDINATOR_ADDRESS', 'host'),
    ('MEGASCALE_NUM_SLICES', '2'),
    ('TPU_WORKER_HOSTNAMES', 'a,b'),
    ('TPU_PROCESS_ADDRESSES', 'a:1,b:1'),
  ):
    assert cluster.is_launched({name: value}), name


def test_a_laptop_asks_nobody(monkeypatch):
  monkeypatch.setattr(cluster.urllib.request, 'build_opener', None)
  monkeypatch.setattr(cluster.glob, 'glob', lambda pattern: [])
  assert not cluster.is_launched({})


def start(index, port, **environment):
  code = 'from eru_jax import commands, distributed; commands.run(distributed.initialize)'
  given = {
    cluster.COORDINATOR: f'127.0.0.1:{port}',
    cluster.COUNT: 3,
    cluster.INDEX: index,
    cluster.START_SECONDS: 5,
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': os.pathsep.join([str(processes.ROOT), *(p for p in sys.path if p)]),
  }
  given |= environment
  return subprocess.Popen(
    [sys.executable, '-c', code],
    env=os.environ | {name: str(value) for name, value in given.items()},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_those_who_wait_for_others_say_so_and_end_with_one_sentence():
  port, elsewhere = ports.reserve(), ports.reserve()
  began = time.monotonic()
  # Of three, process 2 never comes; another one looks for process 0 where nobody is.
  started = [start(0, port), start(1, port), start(1, elsewhere)]
  results = [(process.communicate(timeout=250), process.returncode) for process in started]
  assert time.monotonic() - began < 200  # where JAX would take five minutes
  missing = f'not all of 3 processes came to 127.0.0.1:{port} within 5 s; see which was not'
  expected = [
    (0, port, missing),
    (1, port, '(nothing answers|not all of 3 processes)'),  # process 0 may have left before it
    (1, elsewhere, f'nothing answers at 127.0.0.1:{elsewhere}, where process 0 should be, after 5'),
  ]
  for ((output, errors), status), (index, where, sentence) in zip(results, expected, strict=True):
    assert status == 1
    assert f'process {index}: waiting for 3 processes at 127.0.0.1:{where}\n' in output
    (line,) = errors.splitlines()
    assert re.match(f'error: process {index}: {sentence}', line), line


def test_a_port_that_is_taken_is_one_sentence():
  with socket.create_server(('0.0.0.0', 0)) as taken:
    process = start(0, taken.getsockname()[1])
    _, errors = process.communicate(timeout=300)
  assert process.returncode == 2
  (line,) = errors.splitlines()
  assert re.match(r'error: Process 0 cannot listen on port \d+ of this machine \(.*in use\)', line)
