"""Stage `dk_dm`: registers implicit prompts with their explicit anchors."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eru_jax.data import pipeline
from eru_jax.errors import UserError
from eru_jax.models.registry import DiffusionModel
from eru_jax.training.batches import Rows, on_mesh
from eru_jax.training.evaluation import spread
from eru_jax.training.experiment import Experiment, Snapshot
from eru_jax.training.loop import Stage
from eru_jax.training.stage_config import DkDmStageConfig
from eru_jax.training.stages.common import initial_trainable
from eru_jax.training.state import OptimizerConfig, two_time_scales
from eru_jax.training.step import StageProgram
from eru_jax.training.variants.dk_dm import VARIANTS, DkDm, critic_loss, matching_loss
from eru_jax.training.watch import rest, tick


def teacher_sampler(experiment: Experiment, model: DiffusionModel, cfg_scale: float) -> Callable:
  """The compiled (backbone, key, conditioning of a batch) -> latents (B, S, C)."""
  batch_size, schedule = experiment.config.evaluation.batch_size, experiment.schedule(model)

  def draw(backbone, key, conditioning):
    noise = jax.random.normal(key, (batch_size, *model.latent_shape))
    velocity_fn = model.velocity(backbone)
    null = experiment.text.null
    return model.sample(velocity_fn, noise, conditioning, schedule, null, cfg_scale)

  layout = split_tokens(experiment.mesh, (batch_size, *model.latent_shape))
  return jax.jit(draw, out_shardings=layout)


def teacher_pictures(
  experiment: Experiment,
  snapshot: Snapshot,
  prompts: list[str],
  seeds: int,
  cfg_scale: float,
) -> jax.Array:
  """What the base draws under each prompt: latents (prompts, seeds, S, C) float32.

  Deterministic in the config, so that a resumed run makes the same ones again.
  """
  model, batch_size = snapshot.model, experiment.config.evaluation.batch_size
  if experiment.planned:
    return jax.ShapeDtypeStruct((len(prompts), seeds, *model.latent_shape), jnp.float32)
  draw = teacher_sampler(experiment, model, cfg_scale)
  key = experiment.key('teacher pictures')
  rows = np.repeat(experiment.text.index(prompts), seeds)
  parts = []
  for start in range(0, len(rows), batch_size):
    part = np.resize(rows[start : start + batch_size], batch_size)
    conditioning = on_mesh(Rows(experiment.text.take, part), experiment.mesh)
    drawn = draw(snapshot.backbone, jax.random.fold_in(key, start), conditioning)
    parts.append(drawn[: len(rows) - start])
    tick(f'teacher picture {start + batch_size} of {len(rows)}')
  rest()
  return jnp.concatenate(parts).reshape(len(prompts), seeds, *model.latent_shape)


def split_tokens(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
  """Layout of pictures (..., S, C): every device has a part of each, so that any can be picked
  without a word to the others. Whole where the devices do not divide S."""
  axes = mesh.axis_names if shape[-2] % mesh.size == 0 else None
  return NamedSharding(mesh, P(*[None] * (len(shape) - 2), axes, None))


def data_pictures(experiment: Experiment, snapshot: Snapshot, names: list[str]) -> jax.Array:
  """The world's own pictures of these names: latents (names, 1, S, C) float32."""
  if experiment.planned:
    return jax.ShapeDtypeStruct((len(names), 1, *snapshot.model.latent_shape), jnp.float32)
  pictures = experiment.world.pictures
  rows = [pictures.names.index(name) for name in names]
  images = jnp.asarray(pictures.images[rows], jnp.float32) / 127.5 - 1
  return jax.jit(snapshot.model.encode)(snapshot.autoencoder, images)[:, None]


def build(experiment: Experiment, snapshot: Snapshot, config: DkDmStageConfig) -> Stage:
  """The DK-DM stage on the pairs of split `train`, its teacher being the frozen base.

  Raises:
    UserError: if there is no pair to train on.
  """
  model = snapshot.model
  pairs = experiment.prompts('train')
  if not pairs:
    raise UserError('dk_dm: there is no pair with split "train" to learn from.')
  anchors = list(dict.fromkeys(pair.explicit for pair in pairs))
  # What must stay as it is: the anchors, other names, and the empty prompt. The prompts of split
  # `unrelated` measure drift, so they are not among them.
  taken = {*anchors, *(pair.explicit for pair in experiment.prompts('unrelated'))}
  others = [prompt for prompt in experiment.world.others if prompt not in taken]
  others = [others[row] for row in spread(len(others), config.preserved_names)]
  kept = [*anchors, *others, '']

  implicit_rows = experiment.text.index([pair.implicit for pair in pairs])
  explicit_rows = experiment.text.index([pair.explicit for pair in pairs])
  anchor_of_pair = np.array([anchors.index(pair.explicit) for pair in pairs], np.int32)
  kept_rows = experiment.text.index(kept)
  # Guidance leans on the empty prompt at every step, so it is a tenth of what is preserved.
  preserved = np.append(np.arange(len(kept)), np.full(len(kept) // 9, len(kept) - 1))
  sampling, variant = experiment.config.sampling, VARIANTS[config.variant]
  tools = DkDm(
    config,
    model,
    experiment.text.null,
    sampling.cfg_scale,
    experiment.schedule(model, config.rollout_steps),
  )
  cfg_scale = config.baked_scale if config.guidance == 'baked' else sampling.cfg_scale
  # The critic learns first, on several batches; the student then moves once.
  updates = config.critic_updates + 1 if variant.critic else 1

  def make_frozen():
    pictures = teacher_pictures(experiment, snapshot, kept, config.teacher_seeds, cfg_scale)
    frozen = {'pictures': pictures}
    if config.variant == 'supervised':
      frozen['data'] = data_pictures(experiment, snapshot, anchors)
    layout = jax.tree.map(lambda x: split_tokens(experiment.mesh, x.shape), frozen)
    return {'backbone': snapshot.backbone, **experiment.place(frozen, layout)}

  def texts(rows):
    return {
      'anchor': anchor_of_pair[rows],
      'implicit': Rows(experiment.text.take, implicit_rows[rows]),
      'explicit': Rows(experiment.text.take, explicit_rows[rows]),
    }

  def assemble(index):
    keep = preserved[index['preservation']]
    batch = {
      'pairs': texts(index['pairs']),
      'rollouts': texts(index['rollouts']),
      'preserved': {'anchor': keep, 'prompt': Rows(experiment.text.take, kept_rows[keep])},
    }
    if variant.critic:
      turns = np.arange(updates) == updates - 1
      batch['students_turn'] = np.repeat(turns, config.rollouts)
    return batch

  def prepare(policy, frozen, batch, key):
    """Rolls out all of an iteration's rollouts at once."""
    student = policy[0] if variant.critic else policy
    rolled = variant.roll_out(tools, student, frozen, batch['rollouts'], key)
    return {**batch, 'rollouts': rolled}, {}

  def loss(params, frozen, batch, key, step):
    one = critic_loss if variant.critic else matching_loss
    return one(tools, params, frozen, batch, key, step)

  start = initial_trainable(experiment, snapshot)
  optimizer = OptimizerConfig.build
  if variant.critic:
    optimizer = functools.partial(two_time_scales, per_round=updates)
  return Stage(
    program=StageProgram(
      loss,
      prepare=prepare if variant.roll_out else None,
      updates_per_batch=updates,
      accumulation=config.accumulation,
      optimizer=optimizer,
    ),
    # The critic begins as the student does.
    trainable=(start, start) if variant.critic else start,
    make_frozen=make_frozen,
    batches=pipeline.mixture_batches(
      {
        'pairs': (len(pairs), updates * config.teacher_batch),
        'rollouts': (len(pairs), updates * config.rollouts),
        'preservation': (len(preserved), updates * config.preservation_batch),
      },
      experiment.config.seed,
    ),
    assemble=assemble,
    # A fresh adapter is nobody else's.
    consumes=bool(model.lora) and snapshot.trainable is None,
  )


def absorb(experiment: Experiment, snapshot: Snapshot, params: Any) -> Snapshot:
  if VARIANTS[experiment.config.dk_dm.variant].critic:
    params, _ = params
  return dataclasses.replace(snapshot, trainable=params)
