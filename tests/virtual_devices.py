"""One iteration of a stage on any mesh, and processes with eight virtual devices to run it in."""

import os
import pathlib
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

from eru_jax import sharding
from eru_jax.sharding import MeshConfig

MESHES = {
  'data': MeshConfig(data=8),
  'fsdp': MeshConfig(data=1, fsdp=-1),
  'all': MeshConfig(data=2, fsdp=2, tensor=2),
  'data and tensor': MeshConfig(data=4, tensor=2),
  'sequence': MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
}


class Memory:
  """Stands in for checkpoints and metrics: keeps what the loop hands over."""

  def restore(self, like):
    del like

  def save(self, step, state, position):
    del step, position
    self.state = state

  def truncate_after(self, *unused):
    pass

  def write(self, stage, step, values):
    del stage, step
    self.values = values

  def flush(self):
    pass

  close = flush


def mesh_named(name):
  """One of MESHES, or 'one': the first device alone."""
  if name == 'one':
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  return sharding.make_mesh(MESHES[name])


def one_iteration(stage, settings, key, mesh):
  """What the first iteration of `run_stage` does on a mesh, everything on the host.

  Args:
    stage: a `loop.Stage`.
    settings: its config.
    key: its randomness.
    mesh: where.

  Returns:
    `values` measured, FLOPs of every compiled program, and by path: the state's `arrays`, their
    `specs`, and the share of each that the first device holds.
  """
  from eru_jax.training import loop, step

  memory, flops, jit = Memory(), [], jax.jit

  def counted(function, **options):
    jitted = jit(function, **options)

    def call(*inputs):
      compiled = jitted.lower(*inputs).compile()
      flops.append(compiled.cost_analysis()['flops'])
      return compiled(*inputs)

    return call

  def compile_stage(*arguments):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(jax, 'jit', counted)
      return step.compile_stage(*arguments)

  with pytest.MonkeyPatch.context() as patch, sharding.use_mesh(mesh):
    patch.setattr(loop, 'StageCheckpoints', lambda directory: memory)
    patch.setattr(loop, 'compile_stage', compile_stage)
    loop.run_stage('tiny', stage, settings, key, mesh, pathlib.Path(), memory, ('tiny',))
  state = memory.state
  trees = {
    'params': state.params,
    'ema': state.ema,
    'optimizer': state.opt_state,
    'behaviour': state.behaviour,
  }
  flat = {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in jax.tree_util.tree_leaves_with_path(trees)
  }
  return {
    'values': memory.values,
    'flops': flops,
    'arrays': {name: np.asarray(x) for name, x in flat.items()},
    'specs': {name: x.sharding.spec for name, x in flat.items()},
    'shares': {name: x.addressable_shards[0].data.size / x.size for name, x in flat.items()},
  }


def run_shares(script, directory, shares):
  """Runs a script once for every share, all at a time, each with eight devices of its own.

  Args:
    script: path; its command line is the file to pickle what it finds into, and its share.
    directory: where the files go.
    shares: names.

  Returns:
    What they found, merged.
  """
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    # Compiles in half the time, and computes the same.
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'PYTHONPATH': os.pathsep.join(p for p in sys.path if p),
  }
  files = [directory / share for share in shares]
  processes = [
    subprocess.Popen([sys.executable, script, str(file), file.name], env=environment)
    for file in files
  ]
  assert [process.wait() for process in processes] == [0] * len(files)
  found = {}
  for file in files:
    found |= pickle.loads(file.read_bytes())
  return found
