"""Stage `reward`: trains the classifier whose probability NO-RL uses as its reward."""

import dataclasses

import jax.numpy as jnp

from eru_jax.data import pipeline
from eru_jax.rewards.emoji import EmojiReward, classifier_loss, distort
from eru_jax.training.experiment import Experiment, Snapshot
from eru_jax.training.loop import Stage
from eru_jax.training.stage_config import RewardStageConfig
from eru_jax.training.step import StageProgram


def build(experiment: Experiment, snapshot: Snapshot, config: RewardStageConfig) -> Stage:
  """The stage that trains a classifier of the world's pictures from random parameters."""
  del snapshot
  pictures = experiment.world.pictures.images
  classes = len(pictures)
  module = EmojiReward(classes).module
  example = jnp.zeros((1, *pictures.shape[1:]))

  def loss(params, frozen, batch, key, step):
    del step
    images = frozen['pictures'][batch].astype(jnp.float32) / 255
    images, labels = distort(key, images, batch, nothing=classes)
    logits = module.apply({'params': params}, images)
    return classifier_loss(logits, labels, config.label_smoothing)

  return Stage(
    program=StageProgram(loss, accumulation=config.accumulation),
    trainable=experiment.initialise(
      lambda: module.init(experiment.key('reward'), example)['params']
    ),
    make_frozen=lambda: experiment.place({'pictures': pictures}),
    batches=pipeline.batches(classes, config.batch_size, experiment.config.seed),
    assemble=lambda index: index,
  )


def absorb(experiment: Experiment, snapshot: Snapshot, params) -> Snapshot:
  del experiment
  return dataclasses.replace(snapshot, reward=params)
