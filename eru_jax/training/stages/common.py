"""What the fine-tuning stages share."""

from typing import Any

import jax

from eru_jax.models import lora
from eru_jax.training.experiment import Experiment, Snapshot


def initial_trainable(experiment: Experiment, snapshot: Snapshot) -> Any:
  """What a stage starts from: the last stage's result, a fresh adapter, or the base's copy."""
  if snapshot.trainable is not None:
    return snapshot.trainable
  model = snapshot.model
  if not model.lora:
    return snapshot.backbone
  key = experiment.key('lora')

  def init():
    boxed = model.init(key, experiment.config.model.num_text_tokens)
    return lora.init(key, boxed, model.lora)

  return experiment.initialise(init)


def unstacked(tree: Any, rows: jax.Array) -> Any:
  """Gathers rows of every leaf."""
  return jax.tree.map(lambda x: x[rows], tree)
