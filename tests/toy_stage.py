"""A stage of a linear model, for tests of what has nothing to do with models; see `Toy`.

    python tests/toy_stage.py WORKDIR JSON

is one process of such a run; JSON holds what the test wants of it.
"""

import json
import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from eru_jax import distributed, sharding
from eru_jax.data import pipeline
from eru_jax.errors import UserError
from eru_jax.training.batches import Rows
from eru_jax.training.loop import Stage, run_stage
from eru_jax.training.metrics import MetricWriter
from eru_jax.training.stage_config import StageConfig
from eru_jax.training.step import StageProgram
from eru_jax.training.watch import WatchConfig, watching

# No run is given up for being slow, unless a test is about that.
WATCH = {'report_after': 120, 'end_after': 600}


class Toy:
  """A stage whose parameters and batches lie on a mesh as those of large models do."""

  def __init__(self, mesh_config, config, workdir):
    self.mesh = sharding.make_mesh(mesh_config)
    self.config, self.workdir = config, workdir
    rng = np.random.default_rng(0)
    self.table = rng.standard_normal((40, 16)).astype(np.float32)
    self.read = []

  def stage(self, at):
    def take(rows):
      self.read.append(len(rows))
      return {'x': self.table[rows], 'y': self.table[rows].sum(1)}

    steps = iter(range(1, 10**6))

    def assemble(index):
      at(next(steps))
      return {'rows': Rows(take, index['first']), 'shift': index['second'].astype(np.float32)}

    def prepare(policy, frozen, batch, key):
      noise = jax.random.normal(key, batch['rows']['x'].shape)
      return {**batch, 'noise': 0.1 * noise + frozen['offset']}, {'policy': jnp.sum(policy['w'])}

    def loss(params, frozen, batch, key, step):
      x = batch['rows']['x'] + batch['noise'] + 0.01 * jax.random.normal(key, ())
      found = jnp.tanh(x @ params['w']).sum(1) + params['b'][0] + 0.01 * batch['shift']
      return jnp.mean((found - batch['rows']['y']) ** 2), {}

    where = NamedSharding(self.mesh, P('fsdp')), sharding.replicated(self.mesh)
    rng = np.random.default_rng(1)
    weights = 0.1 * rng.standard_normal((16, 64)).astype(np.float32)
    start = {'w': weights, 'b': np.zeros(1, np.float32)}
    return Stage(
      program=StageProgram(
        loss, prepare=prepare, updates_per_batch=2, behaviour_rate=lambda step: 0.5
      ),
      trainable={name: jax.device_put(start[name], s) for name, s in zip('wb', where, strict=True)},
      make_frozen=lambda: {'offset': np.float32(0.01)},
      batches=pipeline.mixture_batches({'first': (40, 16), 'second': (7, 16)}, seed=3),
      assemble=assemble,
    )

  def run(self, at):
    """Trains to the end, or as far as `at`, which is called before every iteration, lets it."""
    writer = MetricWriter(self.workdir) if distributed.is_main() else None
    with sharding.use_mesh(self.mesh):
      key = jax.random.key(5)
      run_stage('toy', self.stage(at), self.config, key, self.mesh, self.workdir, writer, ('toy',))
    if writer is not None:
      writer.close()


def main(workdir, wanted):
  """Does what a test wants of this process; `victim` is the process that something happens to."""
  distributed.initialize()
  me = jax.process_index()
  toy = Toy(
    sharding.MeshConfig(**wanted['mesh']),
    StageConfig(
      num_steps=wanted.get('steps', 8), save_every=wanted.get('save_every', 2), log_every=1
    ),
    pathlib.Path(workdir),
  )

  def at(step):
    if wanted.get('pause'):
      time.sleep(wanted['pause'])
    if step != wanted.get('step') or me != wanted.get('victim', me):
      return
    match wanted['event']:
      case 'sigterm':
        os.kill(os.getpid(), signal.SIGTERM)
        # Steps are short here: without this the run could be over before they have agreed.
        agreed_by = time.monotonic() + 60
        while jax.process_count() > 1 and watch._stop_at is None and time.monotonic() < agreed_by:
          time.sleep(0.05)
      case 'sigkill':
        os.kill(os.getpid(), signal.SIGKILL)
      case 'mistake':
        raise UserError('This file is not there: look for it.')
      case 'bug':
        raise KeyError('no such thing')
      case 'stuck':
        time.sleep(600)
      case 'late':
        deadline = time.monotonic() + 300
        log, words = wanted['until']
        while words not in pathlib.Path(log).read_text() and time.monotonic() < deadline:
          time.sleep(0.05)

  with watching(WatchConfig(**WATCH | wanted.get('watch', {}))) as watch:
    if wanted.get('barrier'):
      at(0)
      distributed.barrier()
    toy.run(at)
  print(json.dumps({'rows read': sum(toy.read)}))


if __name__ == '__main__':
  from eru_jax import commands

  sys.argv, arguments = sys.argv[:1], sys.argv[1:]
  commands.run(lambda: main(arguments[0], json.loads(arguments[1])))
