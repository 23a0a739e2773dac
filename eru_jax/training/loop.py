"""Runs one stage to its end: batches in, checkpoints and metrics out, resumable at any step."""

import collections
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from eru_jax import distributed, sharding
from eru_jax.errors import UserError
from eru_jax.training.batches import on_mesh
from eru_jax.training.checkpoint import StageCheckpoints
from eru_jax.training.metrics import MetricWriter, Progress
from eru_jax.training.stage_config import StageConfig
from eru_jax.training.state import init_state
from eru_jax.training.step import StageProgram, compile_stage
from eru_jax.training.watch import Stopped, watching

PyTree = Any
# Updates in a row that may be skipped for non-finite values before the run gives up.
MAX_SKIPPED = 20


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage, ready to run.

  Attributes:
    program: its pure functions.
    trainable: initial trainable parameters, laid out over the mesh as they are to stay.
    make_frozen: makes what the program only reads (teacher pictures and the like). Called only
      if there is anything left to train.
    batches: iterator of index batches, with `get_state` and `set_state`.
    assemble: index batch -> arrays for the program, or `batches.Rows` of what is read row by row.
    consumes: whether nobody needs `trainable` once there is a state: a large network's room is then
      given back before training.
    note: what users are told when it begins, if anything.
  """

  program: StageProgram
  trainable: PyTree
  make_frozen: Callable[[], PyTree]
  batches: Iterator[Any]
  assemble: Callable[[Any], PyTree]
  consumes: bool = False
  note: str = ''


def run_stage(
  name: str,
  stage: Stage,
  config: StageConfig,
  key: jax.Array,
  mesh: Mesh,
  workdir: pathlib.Path,
  writer: MetricWriter | None,
  stage_order: tuple[str, ...],
) -> PyTree:
  """Trains a stage, continuing from its newest checkpoint if it has one.

  Args:
    name: the stage's name, also of its checkpoint directory.
    stage: what to run.
    config: how long, how fast, how often to save.
    key: the stage's randomness; each iteration folds its step in.
    mesh: devices; the optimiser's state is laid out over it like the parameters.
    workdir: checkpoints go to workdir/checkpoints/<name>.
    writer: metrics go here; None in processes that write none.
    stage_order: all stages of the run, to cut metrics that a killed run wrote too many.

  Returns:
    The moving average of the trained parameters.

  Raises:
    UserError: if too many updates in a row are not finite, or the disk is full.
    Stopped: with status 0, after saving, on SIGTERM in any process.
  """
  program = stage.program
  optimizer, start, like = initialiser(stage, config, mesh)
  layout = jax.tree.map(lambda x: x.sharding, like)
  checkpoints = StageCheckpoints(workdir / 'checkpoints' / name)
  restored = checkpoints.restore(like)
  if restored is None:
    state = jax.jit(start, out_shardings=layout)(stage.trainable)
  else:
    state, position = restored
    stage.batches.set_state(position)
  first = int(state.step)
  if stage.consumes:
    jax.block_until_ready(state)
    for array in {id(leaf): leaf for leaf in jax.tree.leaves(stage.trainable)}.values():
      array.delete()

  if first < config.num_steps:
    if stage.note:
      distributed.announce(f'{name}: {stage.note}')
    # What a killed run wrote after this checkpoint will be written again.
    if writer is not None:
      writer.truncate_after(stage_order, name, first)
    frozen = stage.make_frozen()
    iterate = compile_stage(program, optimizer, config.optimizer.ema_decay, layout)
    progress = None
    if writer is not None:
      progress = Progress(config.num_steps, name, initial=first)
    logged, logged_at = first, time.monotonic()
    queued: collections.deque[PyTree] = collections.deque()
    with watching() as watch:
      for step in range(first, config.num_steps):
        batch = on_mesh(stage.assemble(next(stage.batches)), mesh)
        watch.mark(f'step {step + 1} of {name}, its batch read')
        state, measurements = iterate(state, frozen, batch, key)
        # One iteration is queued while another one runs: more would have to be waited for when a
        # machine is about to be taken away, and hide where a run is.
        queued.append(measurements)
        if len(queued) > 1:
          jax.block_until_ready(queued.popleft())
        done = step + 1
        if done % config.log_every == 0 or done in (1, config.num_steps):
          values = {k: float(np.asarray(v)) for k, v in measurements.items()}
          # Read once the values are here: iterations are queued long before they are done.
          now = time.monotonic()
          values['time_per_step'] = (now - logged_at) / (done - logged)
          logged, logged_at = done, now
          if writer is not None:
            writer.write(name, done, values)
          _check_health(name, done, values, config)
          if progress is not None:
            progress.update(done, loss=values['loss'])
        stops = watch.tick(f'step {done} of {name}, done')
        if done % config.save_every == 0 or done == config.num_steps or stops:
          if writer is not None:
            writer.flush()
          checkpoints.save(done, state, stage.batches.get_state())
        if stops:
          if progress is not None:
            progress.close()
          checkpoints.close()
          raise Stopped(f'after step {done} of {name}, saved')
      watch.rest()
    if progress is not None:
      progress.close()
  checkpoints.close()
  return state.ema


def initialiser(stage: Stage, config: StageConfig, mesh: Mesh) -> tuple[Any, Callable, PyTree]:
  """The optimiser, params -> fresh state, and the state's shapes, dtypes and shardings."""
  program = stage.program
  updates = config.num_steps * program.updates_per_batch
  optimizer = program.optimizer(config.optimizer, updates)

  def start(params):
    return init_state(params, optimizer, behaviour=program.behaviour_rate is not None)

  fresh = jax.eval_shape(start, stage.trainable)
  placed = jax.tree.map(lambda x: x.sharding, stage.trainable)
  layout = sharding.shardings_like(fresh, stage.trainable, placed, mesh)
  like = jax.tree.map(
    lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), fresh, layout
  )
  return optimizer, start, like


def load_result(
  name: str, stage: Stage, config: StageConfig, mesh: Mesh, workdir: pathlib.Path
) -> PyTree | None:
  """The averaged parameters a stage has reached in a workdir, or None; only reads there.

  Raises:
    UserError: if the stage's checkpoints are damaged.
  """
  directory = workdir / 'checkpoints' / name
  if not distributed.agreed(directory.is_dir):
    return None
  checkpoints = StageCheckpoints(directory)
  restored = checkpoints.restore(initialiser(stage, config, mesh)[2], repair=False)
  checkpoints.close()
  if restored is None:
    return None
  state, step = restored[0], int(restored[0].step)
  if step < config.num_steps and distributed.is_main():
    logging.warning('%s: stage %s is at step %d of %d.', workdir, name, step, config.num_steps)
  return state.ema


def _check_health(name: str, step: int, values: dict[str, float], config: StageConfig) -> None:
  if values['skipped'] >= MAX_SKIPPED:
    raise UserError(
      f'{name}: the loss or its gradient was not finite in the last {int(values["skipped"])} '
      f'updates up to step {step}, so none of them was applied; lower '
      f'{name}.optimizer.learning_rate ({config.optimizer.learning_rate:g}) or clip_norm.'
    )
