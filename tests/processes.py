"""Runs of several local processes, which share this machine as hosts would share a cluster."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import ports

from eru_jax.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).parent.parent


def small(tiny_config, stages=('dk_dm',), steps=4):
  """The tiny experiment, of `steps` iterations a stage, as several devices can share it."""
  config = tiny_config | dict(stages=tuple(stages), lora=[], mesh=dict(data=2, fsdp=-1))
  config['evaluation'] = dict(max_prompts=2, batch_size=8, gallery=1, diagnosis=0)
  config['sampling'] = dict(num_steps=1)
  every = dict(num_steps=steps, save_every=2, log_every=1)
  config['flow_matching'] = every | dict(batch_size=8, optimizer=dict(learning_rate=1e-3))
  config['dk_dm'] |= every | dict(teacher_batch=8, rollouts=8, preservation_batch=8)
  config['dk_dm'] |= dict(rollout_steps=1, preserved_names=1)
  config['no_rl'] |= every | dict(prompts_per_step=4, images_per_prompt=2, updates_per_step=1)
  config['no_rl'] |= dict(rollout_steps=1)
  return config


class Processes:
  """`count` processes of one run, of `devices` devices together."""

  def __init__(self, arguments, workdir, count, devices, own=(), **environment):
    """Starts them.

    Args:
      arguments: what each of them is told, behind `python`.
      workdir: of the run; their output goes to files beside it.
      count, devices: how many.
      own: variables of each process alone, a mapping for each.
      environment: variables of all of them.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    environment = {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices // count}',
      # Compiles in half the time, and computes the same in every process.
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'PYTHONPATH': os.pathsep.join([str(ROOT), *(p for p in sys.path if p)]),
    } | environment
    together = {
      'ERU_JAX_COORDINATOR': f'127.0.0.1:{ports.reserve()}',
      'ERU_JAX_NUM_PROCESSES': count,
    }
    self.logs = [workdir.parent / f'{workdir.name}.{index}.log' for index in range(count)]
    self.processes = []
    for index, log in enumerate(self.logs):
      given = together | {'ERU_JAX_PROCESS_ID': index} if count > 1 else {}
      given |= own[index] if own else {}
      with open(log, 'w') as output:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=os.environ | environment | {name: str(value) for name, value in given.items()},
            stdout=output,
            stderr=subprocess.STDOUT,
          )
        )

  def output(self, index=0):
    return self.logs[index].read_text(errors='replace')

  def __str__(self):
    return '\n'.join(f'--- process {i}\n{self.output(i)[-4000:]}' for i in range(len(self.logs)))

  def wait(self, timeout=600):
    """Exit statuses of all; none is left running."""
    deadline = time.monotonic() + timeout
    try:
      return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
    except subprocess.TimeoutExpired as error:
      raise AssertionError(f'processes hang\n{self}') from error
    finally:
      self.kill()

  def kill(self):
    for process in self.processes:
      if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()

  def until(self, condition, timeout=600):
    """Waits for something to happen while all of them run."""
    deadline = time.monotonic() + timeout
    while not condition():
      ended = [p for p in self.processes if p.poll() is not None]
      if ended or time.monotonic() > deadline:
        self.kill()
        raise AssertionError(f'it never came to that\n{self}')
      time.sleep(0.02)


def training(config, workdir, count, devices, **environment):
  """The command `train`, started once for each process."""
  workdir.parent.mkdir(parents=True, exist_ok=True)
  path = workdir.parent / f'{workdir.name}.config.py'
  path.write_text(f'def get_config():\n  return {config!r}\n')
  arguments = ['-m', 'eru_jax.train', f'--config={path}', f'--workdir={workdir}']
  return Processes(arguments, workdir, count, devices, **environment)


def toy(workdir, count, devices, mesh=None, **wanted):
  """A run of tests/toy_stage.py."""
  wanted['mesh'] = mesh or {'data': 2, 'fsdp': -1}
  arguments = [ROOT / 'tests' / 'toy_stage.py', workdir, json.dumps(wanted)]
  return Processes(arguments, workdir, count, devices)


def arrays(workdir):
  """Every array of the newest checkpoint of every stage."""
  from orbax.checkpoint import v1 as ocp

  found = {}
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for stage in sorted(workdir.glob('checkpoints/*[!0-9]')):
    step = max(int(path.name) for path in stage.iterdir() if path.name.isdigit())
    path = str(stage / str(step))
    shapes = ocp.metadata(path).metadata
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    tree = ocp.load_pytree(path, like)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      found[stage.name, step, jax.tree_util.keystr(path)] = np.asarray(leaf)
  return found


def rows(workdir):
  """metrics.jsonl without what the clock says."""
  return [
    {name: value for name, value in row.items() if not name.startswith('time')}
    for row in read_metrics(workdir / 'metrics.jsonl')
  ]


def assert_same(workdir, other):
  """Two runs ended with the same numbers, bit for bit."""
  mine, theirs = arrays(workdir), arrays(other)
  assert mine.keys() == theirs.keys()
  different = [name for name in mine if mine[name].tobytes() != theirs[name].tobytes()]
  assert not different
  assert json.dumps(rows(workdir)) == json.dumps(rows(other))
