"""Stage `flow_matching`: pretrains the backbone on (name, picture)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from eru_jax import flow, sharding
from eru_jax.data import pipeline
from eru_jax.losses.flow_matching import flow_matching
from eru_jax.training.experiment import Experiment, Snapshot
from eru_jax.training.loop import Stage
from eru_jax.training.stage_config import FlowMatchingStageConfig
from eru_jax.training.step import StageProgram
from eru_jax.training.text_dropout import perturb


def encode_pictures(snapshot: Snapshot, pictures: np.ndarray, batch_size: int = 64) -> jax.Array:
  """Packed latents (N, S, C) float32 of pictures (N, H, W, 3) uint8."""
  encode = jax.jit(lambda p, x: snapshot.model.encode(p, x.astype(jnp.float32) / 127.5 - 1))
  parts = [
    encode(snapshot.autoencoder, pictures[start : start + batch_size])
    for start in range(0, len(pictures), batch_size)
  ]
  return jnp.concatenate(parts)


def build(experiment: Experiment, snapshot: Snapshot, config: FlowMatchingStageConfig) -> Stage:
  """The stage that trains the whole backbone from where the snapshot has it."""
  model = snapshot.model
  pictures = experiment.world.pictures
  whole = dataclasses.replace(model, lora=())
  density = flow.TimestepDensity('logit_normal', config.time_mean, config.time_std)

  def make_frozen():
    text, null = experiment.conditioning(pictures.names), experiment.text.null
    # Names are short: cutting the padding that all of them share changes nothing but the time.
    longest = 0 if text.mask is None else int(text.mask.sum(axis=1).max())

    def cut(conditioning):
      if conditioning.mask is None:
        return conditioning
      return conditioning.replace(
        tokens=conditioning.tokens[:, :longest], mask=conditioning.mask[:, :longest]
      )

    frozen = {
      'latents': encode_pictures(snapshot, pictures.images),
      'text': cut(text),
      'null': cut(null),
    }
    return jax.device_put(frozen, sharding.replicated(experiment.mesh))

  def loss(params, frozen, batch, key, step):
    del step
    time_key, noise_key, text_key = jax.random.split(key, 3)
    x_0 = frozen['latents'][batch]
    noise = jax.random.normal(noise_key, x_0.shape)
    t = density.sample(time_key, (len(batch),))
    conditioning = perturb(
      text_key,
      jax.tree.map(lambda x: x[batch], frozen['text']),
      noise=config.text_noise,
      pooled_only=config.pooled_only,
      tokens_only=config.tokens_only,
      drop=config.drop_text,
      null=frozen['null'],
    )
    return flow_matching(whole.velocity(None, params), x_0, noise, t, conditioning)

  return Stage(
    program=StageProgram(loss, accumulation=config.accumulation),
    trainable=snapshot.backbone,
    make_frozen=make_frozen,
    batches=pipeline.batches(len(pictures.names), config.batch_size, experiment.config.seed),
    assemble=lambda index: index,
  )


def absorb(experiment: Experiment, snapshot: Snapshot, params) -> Snapshot:
  del experiment
  return dataclasses.replace(snapshot, backbone=params, trainable=None)
