"""Every set of compiler flags is one that the compilers of the pinned versions know."""

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

FLAGS = pathlib.Path(__file__).parent.parent / 'launch' / 'flags'
TOPOLOGIES = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2', 'tpu7x': 'tpu7x:2x2x1'}
GPUS = ('a100', 'h100')

# libtpu reads its flags, and the values of each, when it describes a slice.
_ON_A_SLICE = """
import sys
from jax.experimental import topologies
print(len(topologies.get_topology_desc(platform='tpu', topology_name=sys.argv[1]).devices))
"""
# jaxlib knows the flags of every platform, whichever it computes on.
_ON_THE_CPU = 'import jax; print(jax.jit(lambda x: x + 1)(1))'


def sourced(name, **environment):
  """What sourcing a set leaves in the environment."""
  script = f'set -eu; source {FLAGS / name}.sh; env'
  environment = {'PATH': os.environ['PATH']} | environment
  printed = subprocess.run(['bash', '-c', script], env=environment, capture_output=True, text=True)
  assert printed.returncode == 0 and not printed.stderr
  return dict(line.split('=', 1) for line in printed.stdout.splitlines())


def run(program, *arguments, **environment):
  environment |= {'JAX_PLATFORMS': 'cpu', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  environment |= {'TPU_SKIP_MDS_QUERY': '1'}
  return subprocess.run(
    [sys.executable, '-c', program, *arguments],
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=300,
  )


@functools.cache
def requires_libtpu():
  if not importlib.util.find_spec('libtpu'):
    pytest.skip("libtpu is missing: pip install '.[plan]'")


@pytest.mark.parametrize('name', TOPOLOGIES)
def test_libtpu_knows_the_flags(name):
  requires_libtpu()
  result = run(_ON_A_SLICE, TOPOLOGIES[name], LIBTPU_INIT_ARGS=sourced(name)['LIBTPU_INIT_ARGS'])
  assert result.returncode == 0, result.stderr[-2000:]
  assert int(result.stdout.split()[-1]) in (4, 8)  # two devices a chip on tpu7x


@pytest.mark.parametrize(
  'flag', ['--xla_tpu_no_such_flag=1', '--xla_latency_hiding_scheduler_rerun=a']
)
def test_libtpu_would_say_if_it_did_not(flag):
  requires_libtpu()
  result = run(_ON_A_SLICE, 'v5e:2x2', LIBTPU_INIT_ARGS=flag)
  assert result.returncode != 0 and flag[2:].split('=')[0] in result.stderr


@pytest.mark.parametrize('name', GPUS)
def test_jaxlib_knows_the_flags(name):
  found = sourced(name)
  result = run(_ON_THE_CPU, XLA_FLAGS=found['XLA_FLAGS'])
  assert result.returncode == 0 and result.stdout == '2\n', result.stderr[-2000:]
  assert 0.75 < float(found['XLA_PYTHON_CLIENT_MEM_FRACTION']) < 1


def test_jaxlib_would_say_if_it_did_not():
  result = run(_ON_THE_CPU, XLA_FLAGS='--xla_gpu_no_such_flag=1')
  assert result.returncode != 0 and 'xla_gpu_no_such_flag' in result.stderr


def test_every_flag_has_its_reason():
  names = sorted(path.stem for path in FLAGS.glob('*.sh'))
  assert names == sorted([*TOPOLOGIES, *GPUS, 'cpu'])
  for name in names:
    lines = (FLAGS / f'{name}.sh').read_text().splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r'\s*(--|export )', line)]
    assert settings and all(len(line) <= 100 for line in lines)
    for i in settings:
      while i in settings:
        i -= 1  # one reason for those that belong together
      assert lines[i].strip().startswith('# '), lines[i + 1]


def test_what_is_set_already_wins():
  assert sourced('v5e', LIBTPU_INIT_ARGS='--mine')['LIBTPU_INIT_ARGS'].endswith('=true --mine')
  assert sourced('h100', XLA_FLAGS='--mine')['XLA_FLAGS'].endswith('=false --mine')
  own = sourced('a100', XLA_PYTHON_CLIENT_MEM_FRACTION='.5')
  assert own['XLA_PYTHON_CLIENT_MEM_FRACTION'] == '.5'
