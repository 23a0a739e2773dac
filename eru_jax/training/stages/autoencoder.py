"""Stage `autoencoder`: learns to compress the world's pictures."""

import dataclasses

import jax
import jax.numpy as jnp

from eru_jax.data import pipeline
from eru_jax.losses.autoencoding import autoencoding
from eru_jax.training.experiment import Experiment, Snapshot
from eru_jax.training.loop import Stage
from eru_jax.training.stage_config import AutoencoderStageConfig
from eru_jax.training.step import StageProgram


def build(experiment: Experiment, snapshot: Snapshot, config: AutoencoderStageConfig) -> Stage:
  """The stage that trains the snapshot's autoencoder further."""
  module = snapshot.model.autoencoder

  def loss(params, frozen, batch, key, step):
    del step
    images = frozen['pictures'][batch].astype(jnp.float32) / 127.5 - 1

    def method(name):
      return lambda x: module.apply({'params': params}, x, method=name)

    return autoencoding(method('encode'), method('decode'), images, key, config.kl_weight)

  pictures = experiment.world.pictures.images
  return Stage(
    program=StageProgram(loss, accumulation=config.accumulation),
    trainable=snapshot.autoencoder,
    make_frozen=lambda: experiment.place({'pictures': pictures}),
    batches=pipeline.batches(len(pictures), config.batch_size, experiment.config.seed),
    assemble=lambda index: index,
  )


def absorb(experiment: Experiment, snapshot: Snapshot, params) -> Snapshot:
  """Takes the trained autoencoder over and measures the scale of its latents.

  The backbone sees (z - shift) * scale with zero mean and unit variance over the world.
  """
  if experiment.planned:
    return dataclasses.replace(snapshot, autoencoder=params)
  model = snapshot.model
  encode = jax.jit(lambda p, x: model.autoencoder.apply({'params': p}, x, method='encode')[0])
  pictures = experiment.world.pictures.images
  latents = jnp.concatenate(
    [
      encode(params, pictures[start : start + 64].astype('float32') / 127.5 - 1)
      for start in range(0, len(pictures), 64)
    ]
  )
  config = dataclasses.replace(
    model.autoencoder.config,
    shift_factor=float(jnp.mean(latents)),
    scaling_factor=float(1 / jnp.std(latents)),
  )
  model = dataclasses.replace(model, autoencoder=type(model.autoencoder)(config))
  return dataclasses.replace(snapshot, model=model, autoencoder=params)
