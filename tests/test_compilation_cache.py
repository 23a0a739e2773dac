"""A second start compiles nothing, and what the user has set is left alone."""

import json

import jax
import processes
import pytest

from eru_jax.files import cache_directory
from eru_jax.training import run

_COUNTING = """
import json, pathlib, sys
import jax
from eru_jax import commands
events = {'compile_requests_use_cache': 0, 'cache_hits': 0}
def count(event, **unused):
  name = event.rpartition('/')[2]
  if event.startswith('/jax/compilation_cache/') and name in events:
    events[name] += 1
jax.monitoring.register_event_listener(count)
from eru_jax.training.run import enable_compilation_cache, train
"""
_TOY = """
sys.path.insert(0, sys.argv[3])
import toy_stage
enable_compilation_cache()
toy_stage.main(sys.argv[1], json.loads(sys.argv[2]))
"""
_TRAIN = 'train(json.loads(sys.argv[2]), sys.argv[1])'


def start(workdir, body, values, cache):
  """(programs compiled, programs read) of a start with a cache of its own."""
  script = f'{_COUNTING}\n{body}\nprint(json.dumps(events))'
  arguments = ['-c', script, workdir, json.dumps(values), processes.ROOT / 'tests']
  started = processes.Processes(arguments, workdir, 1, 1, JAX_COMPILATION_CACHE_DIR=str(cache))
  assert started.wait(1500) == [0], started
  found = json.loads(started.output().strip().splitlines()[-1])
  return found['compile_requests_use_cache'] - found['cache_hits'], found['cache_hits']


def test_a_second_start_compiles_nothing(tmp_path):
  wanted = {'mesh': {'data': 1}, 'steps': 2}
  compiled, _ = start(tmp_path / 'first', _TOY, wanted, tmp_path / 'cache')
  assert compiled > 10
  again, hits = start(tmp_path / 'second', _TOY, wanted, tmp_path / 'cache')
  assert again == 0 and hits >= compiled


@pytest.mark.slow
def test_a_second_start_of_a_whole_run_compiles_nothing(tiny_config, tmp_path):
  compiled, _ = start(tmp_path / 'first', _TRAIN, tiny_config, tmp_path / 'cache')
  again, hits = start(tmp_path / 'second', _TRAIN, tiny_config, tmp_path / 'cache')
  print(f'{compiled} programs compiled at first, then {again}; {hits} read')
  assert again == 0 and hits >= compiled > 50


@pytest.fixture
def settings():
  """The cache's settings, put back afterwards."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_the_users_settings_win(settings, monkeypatch, tmp_path):
  monkeypatch.setenv('ERU_JAX_CACHE', str(tmp_path))
  jax.config.update('jax_compilation_cache_dir', None)
  run.enable_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(cache_directory() / 'xla')
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
  jax.config.update('jax_compilation_cache_dir', 'elsewhere')  # as its variable would
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 3.0)
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '3')
  run.enable_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == 'elsewhere'
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 3
