"""Every program that a run compiles, with described arguments: the very functions that it calls."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eru_jax import sharding
from eru_jax.data import flux_text
from eru_jax.models.clip import ClipTextModel
from eru_jax.models.t5 import T5Encoder
from eru_jax.training import evaluation, loop
from eru_jax.training.batches import Rows
from eru_jax.training.experiment import Experiment, Snapshot
from eru_jax.training.planning_model import Planned
from eru_jax.training.stages import STAGES, dk_dm, evaluated_as, flow_matching
from eru_jax.training.step import CompiledStage, compile_stage, policy_of

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to be compiled.

  Attributes:
    name: of the phase and what it does there, '<phase>.<what>'.
    function: jitted.
    arguments: of it, described on the mesh; static ones as they are.
    mesh: what it runs on.
    kinds: class ('parameters', 'optimizer') -> arguments of that class; the rest is input.
    resident: what else is on the devices while it runs.
    passes: how often it reads the backbone's weights.
  """

  name: str
  function: Any
  arguments: tuple
  mesh: Mesh
  kinds: Mapping[str, PyTree]
  resident: PyTree = ()
  passes: int = 1


def programs(planned: Planned) -> Iterator[Program]:
  """The programs of a run, in the order in which they are needed."""
  experiment, snapshot = planned.experiment, planned.snapshot
  config = experiment.config
  yield from _encoders(planned)
  if config.model.source != 'scratch':
    yield _evaluation(experiment, snapshot, 'evaluate')
  for name in config.stages:
    module, settings = STAGES[name], config.stage(name)
    stage = module.build(experiment, snapshot, settings)
    optimizer, _, state = loop.initialiser(stage, settings, experiment.mesh)
    yield from _stage(experiment, snapshot, name, stage, optimizer, state)
    snapshot = module.absorb(experiment, snapshot, state.ema)
    if evaluated_as(name, config.model.source):
      yield _evaluation(experiment, snapshot, f'evaluate_{name}')


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
  return sharding.described(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh))


def _batch(tree: PyTree, mesh: Mesh) -> PyTree:
  """A batch's arrays, rows shared by the devices where they can be."""
  share = sharding.batch_share(mesh)

  def is_rows(part: Any) -> bool:
    return isinstance(part, Rows)

  tree = jax.tree.map(lambda p: p.take(p.rows) if is_rows(p) else p, tree, is_leaf=is_rows)

  def where(x: Any) -> jax.sharding.Sharding:
    rows = x.shape[0] if x.ndim else 1
    return sharding.replicated(mesh) if rows % share else sharding.split_first(mesh)

  return sharding.described(tree, jax.tree.map(where, tree))


def _encoders(planned: Planned) -> Iterator[Program]:
  """Text encoders are split over the mesh, prompts over the devices that share a batch."""
  if planned.t5 is None:
    return
  settings, mesh = planned.experiment.config.model, planned.experiment.mesh
  dtype, share = jnp.dtype(settings.dtype), sharding.batch_share(mesh)
  halves = {
    'clip': (
      ClipTextModel(planned.clip, dtype),
      flux_text.CLIP_BATCH,
      planned.clip.max_position_embeddings,
    ),
    't5': (
      T5Encoder(planned.t5, dtype),
      flux_text.T5_BATCH,
      settings.text_length,
    ),
  }
  for name, (module, batch, length) in halves.items():
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
    layout = sharding.logical_shardings(boxed, mesh)
    params = jax.tree.map(
      lambda s, where: jax.ShapeDtypeStruct(s.shape, dtype, sharding=where),
      sharding.unboxed(boxed),
      layout,
    )
    size = (-(-batch // share) * share, length)
    ids = jax.ShapeDtypeStruct(size, jnp.int32, sharding=sharding.split_first(mesh))
    yield Program(
      f'prompts.{name}',
      sharding.compiled_whole(flux_text.encode, mesh, (0,)),
      (module, params, ids),
      mesh,
      {'parameters': params},
    )


def _evaluation(experiment: Experiment, snapshot: Snapshot, phase: str) -> Program:
  """What `evaluation.draw` compiles."""
  model, mesh, config = snapshot.model, experiment.mesh, experiment.config
  backbone, trainable = snapshot.backbone, snapshot.trainable
  if trainable is not None and not model.lora:
    backbone, trainable = trainable, None
  size = config.evaluation.batch_size
  noise = np.zeros((size, *model.latent_shape), np.float32)
  schedule = experiment.schedule(model)
  inputs = _batch((noise, experiment.text.take(np.zeros(size, np.int32))), mesh)
  rest = sharding.described((experiment.text.null, schedule), sharding.replicated(mesh))
  params = (backbone, trainable, snapshot.autoencoder)
  judge = evaluation.judge_of(experiment)
  return Program(
    f'{phase}.sample_and_decode',
    sharding.compiled_whole(evaluation.sample_and_decode, mesh, (0, 1, 2)),
    (model, judge, config.sampling.cfg_scale, *params, *inputs, *rest),
    mesh,
    {'parameters': params},
    passes=len(schedule) - 1,
  )


def _stage(
  experiment: Experiment,
  snapshot: Snapshot,
  name: str,
  stage: loop.Stage,
  optimizer: Any,
  state: PyTree,
) -> Iterator[Program]:
  config, mesh, model = experiment.config, experiment.mesh, snapshot.model
  settings, key = config.stage(name), _key(experiment.mesh)
  layout = jax.tree.map(lambda x: x.sharding, state)
  iterate = compile_stage(stage.program, optimizer, settings.optimizer.ema_decay, layout)
  frozen = stage.make_frozen()
  batch = _batch(stage.assemble(next(stage.batches)), mesh)
  held = (stage.trainable, snapshot.backbone, snapshot.autoencoder, snapshot.reward)
  if stage.consumes:
    held = _without(held, stage.trainable)

  def program(what: str, function: Any, arguments: tuple, kinds: PyTree, passes: int) -> Program:
    resident = _without((state, frozen, *held), arguments)
    return Program(f'{name}.{what}', function, arguments, mesh, kinds, resident, passes)

  if name == 'dk_dm':
    scale = settings.baked_scale if settings.guidance == 'baked' else config.sampling.cfg_scale
    text = _batch(experiment.text.take(np.zeros(config.evaluation.batch_size, np.int32)), mesh)
    draw = dk_dm.teacher_sampler(experiment, model, scale)
    yield Program(
      'dk_dm.teacher_pictures',
      draw,
      (snapshot.backbone, key, text),
      mesh,
      {'parameters': snapshot.backbone},
      _without((state, *held), snapshot.backbone),
      config.sampling.num_steps,
    )
  if name == 'flow_matching':
    images = np.zeros((1, model.height, model.width, 3), np.uint8)
    yield program(
      'encode_pictures',
      flow_matching.encoder(snapshot),
      (snapshot.autoencoder, sharding.described(images, sharding.replicated(mesh))),
      {'parameters': snapshot.autoencoder},
      0,
    )
  data = [value for part, value in frozen.items() if part in ('pictures', 'data')]
  weights = _without(frozen, data)
  training = {
    'parameters': (weights, state.params, state.behaviour),
    'optimizer': (state.opt_state, state.ema),
  }
  # Forwards of the student, its recomputed blocks and gradients, and what it is held against.
  turns = settings.accumulation * (4 if model.lora else 3)
  if not isinstance(iterate, CompiledStage):
    yield program('train_step', iterate, (state, frozen, batch, key), training, turns)
    return
  policy = policy_of(state)
  steps = getattr(settings, 'rollout_steps', 1)
  what = 'rollout_and_reward' if name == 'no_rl' else 'rollout'
  yield program(
    what, iterate.prepare, (policy, frozen, batch, key), {'parameters': (weights, policy)}, steps
  )
  examples = jax.eval_shape(iterate.prepare, policy, frozen, batch, key)[0]
  if iterate.host is not None:
    # Scores, and whether there are any.
    found = jax.ShapeDtypeStruct((len(examples['images']),), jnp.float32)
    examples = jax.eval_shape(iterate.rate, examples, (found, found))[0]
  parts = sharding.described(examples, sharding.split_second(mesh))
  index = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
  yield program('train_step', iterate.update, (state, frozen, parts, index, key), training, turns)


def _without(tree: PyTree, others: PyTree) -> list[Any]:
  """Leaves that are not among others; arrays described once are the same objects."""
  known = {id(leaf) for leaf in jax.tree.leaves(others)}
  leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}
  return [leaf for key, leaf in leaves.items() if key not in known]


def bytes_per_device(tree: PyTree) -> int:
  """Of described arrays, on one device."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      continue  # a static argument
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    total += int(np.prod(shape, dtype=np.int64)) * size
  return total


def traced(program: Program) -> Any:
  """The program traced without a mesh, where attention is written out as products."""
  return program.function.trace(*program.arguments).jaxpr
