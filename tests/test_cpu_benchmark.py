"""The speed comparison runs to its last line; what it measures is not tested."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_quick_comparison():
  """Both sides agree, are timed, and the last line is the JSON it promises."""
  pytest.importorskip('torch')
  pytest.importorskip('diffusers')
  root = pathlib.Path(__file__).parents[1]
  command = [sys.executable, 'benchmarks/cpu.py', '--quick', '--compile_limit=0', '--threads=1']
  environment = {**os.environ, 'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu'}
  run = subprocess.run(
    command, cwd=root, env=environment, capture_output=True, text=True, timeout=900
  )
  assert run.returncode == 0, run.stderr[-2000:]
  ratios = json.loads(run.stdout.splitlines()[-1])
  assert ratios.pop('quick') is True
  assert ratios.keys() == {'train_ratio', 'sample_ratio'}
  assert all(value > 0 for value in ratios.values())


def test_ratios_of_a_tiny_network_are_marked(benchmarks):
  import side_by_side

  result = {'train': {'ratio': 1.5}, 'sample': {'ratio': 2.0}, 'setting': {}}
  assert json.loads(side_by_side.last_line(result, False)) == {
    'train_ratio': 1.5,
    'sample_ratio': 2.0,
  }
  assert json.loads(side_by_side.last_line(result, True)) == {
    'quick': True,
    'train_ratio': 1.5,
    'sample_ratio': 2.0,
  }
