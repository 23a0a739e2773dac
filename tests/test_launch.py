"""The launch scripts install once for each state of their lists, and with a Python that fits."""

import configparser
import os
import pathlib
import shutil
import stat
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
LISTS = ('setup.cfg', 'pyproject.toml', 'requirements.txt')
OUR_LISTS = ('constraints', 'requirements-emoji', 'requirements-test')


@pytest.fixture
def clone(tmp_path):
  """A clone with an environment whose pip only notes what it is asked for."""
  directory = tmp_path / 'clone'
  shutil.copytree(ROOT / 'launch', directory / 'launch')
  for name in LISTS:
    shutil.copy(ROOT / name, directory)
  place = directory / '.venv' / 'bin'
  place.mkdir(parents=True)
  (place / 'activate').write_text(f'PATH="{place}:$PATH"\n')
  interpreter(place, f'[ "$1 $2" = "-m pip" ] && echo "$*" >>{tmp_path}/asked && exit')
  return directory


def interpreter(place, first):
  """A Python of which the shell's line `first` may take over."""
  (place / 'python').write_text(f'#!/bin/sh\n{first}\nexec {sys.executable} "$@"\n')
  (place / 'python').chmod(stat.S_IRWXU)


def install(clone, check=True):
  """Runs install.sh as local.sh does; returns what pip was asked for, and the process."""
  asked = clone.parent / 'asked'
  asked.unlink(missing_ok=True)
  result = subprocess.run(
    ['bash', '-euo', 'pipefail', '-c', 'VENV=.venv; source launch/install.sh'],
    env=os.environ | {'PYTHONPATH': ''},
    cwd=clone,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert not check or result.returncode == 0, result.stderr
  return asked.read_text().splitlines() if asked.exists() else [], result


def test_a_second_start_asks_nothing_of_the_network(clone):
  asked, _ = install(clone)
  assert len(asked) == 3 and any('requirements-emoji.txt' in line for line in asked)
  assert install(clone)[0] == []
  for name in (*LISTS, *(f'launch/{name}.txt' for name in OUR_LISTS)):
    with open(clone / name, 'a') as file:
      file.write('# another list\n')
    assert len(install(clone)[0]) == 3, name
    assert install(clone)[0] == []


def test_a_failed_installation_is_repeated(clone):
  place = clone / '.venv' / 'bin'
  works = (place / 'python').read_text()
  interpreter(place, '[ "$1 $2" = "-m pip" ] && exit 1')
  assert install(clone, check=False)[1].returncode == 1
  (place / 'python').write_text(works)
  assert len(install(clone)[0]) == 3


def test_an_environment_of_an_old_python_is_refused(clone):
  interpreter(
    clone / '.venv' / 'bin',
    '[ "$1" = -c ] && exit 1\n[ "$1" = --version ] && echo Python 3.9.1 && exit',
  )
  asked, result = install(clone, check=False)
  assert result.returncode == 2 and asked == []
  (line,) = result.stderr.splitlines()
  assert '.venv/bin/python is Python 3.9.1; remove .venv, or' in line


def test_machines_of_one_run_have_versions_that_are_allowed():
  lines = (ROOT / 'launch' / 'constraints.txt').read_text().splitlines()
  pins = {}
  for line in lines:
    if not line.startswith('#'):
      name, version = line.split('==')
      pins[name.lower().replace('-', '_')] = version
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  extras = setup['options.extras_require']
  wanted = setup['options']['install_requires'] + extras['tpu'] + extras['plan']
  found = [Requirement(line) for line in wanted.splitlines() if line and not line.startswith('#')]
  assert len(found) > 20
  for requirement in found:
    version = pins[requirement.name.lower().replace('-', '_')]
    assert requirement.specifier.contains(version), requirement
  assert {'libtpu', 'gcsfs', 'jaxlib'} < set(pins)
