"""The model of an experiment as far as configs and headers tell it, before any weight is read."""

from typing import Any

import jax
import jax.numpy as jnp

from eru_jax.errors import UserError
from eru_jax.models import autoencoder_kl, lora, registry
from eru_jax.training.config import ExperimentConfig, ModelConfig, model_path
from eru_jax.weights import model_directory
from eru_jax.weights.lora_io import check_lora

# Stages that train a backbone, or adapters on it.
_OF_BACKBONE = ('flow_matching', 'dk_dm', 'no_rl')


def build_model(
  config: ExperimentConfig,
  family: registry.ModelFamily,
  architecture: Any,
  autoencoder: autoencoder_kl.AutoencoderConfig,
) -> registry.DiffusionModel:
  """The modules that a resolved experiment runs.

  Raises:
    UserError: if they do not belong together, or make no pictures of the experiment's size.
  """
  settings = config.model
  backbone = family.backbone(
    architecture,
    dtype=jnp.dtype(settings.dtype),
    scan=settings.scan,
    remat=settings.remat,
    attention=settings.attention,
  )
  return registry.DiffusionModel(
    family,
    backbone,
    autoencoder_kl.AutoencoderKL(autoencoder),
    settings.resolution,
    settings.resolution,
    config.sampling.guidance,
    config.lora,
  )


def int8_layers(settings: ModelConfig) -> str | None:
  """Regular expression of the layers whose kernels a resolved model keeps in int8, or None.

  Raises:
    UserError: if the model directory is damaged.
  """
  if settings.params != 'int8':
    return None
  return model_directory.family(model_path(settings.source)).blocks


def read_headers(settings: ModelConfig) -> model_directory.Headers:
  """What a resolved model consists of.

  Raises:
    UserError: if the model directory is missing, or a file in it is damaged or of another model.
  """
  if settings.source != 'scratch':
    return model_directory.read_headers(model_path(settings.source), int8_layers(settings))
  family = registry.family(settings.family)
  architecture = family.config.from_dict(settings.architecture)
  autoencoder = autoencoder_kl.AutoencoderConfig.from_dict(settings.autoencoder)
  return model_directory.Headers(family, architecture, autoencoder, int8=False)


def check_training(config: ExperimentConfig) -> None:
  """Looks at what a resolved experiment is going to train, hours before it does.

  Raises:
    UserError: as `described`, if what would be trained can only stay frozen, if a pattern of `lora`
      matches no layer, or if the adapter to begin with is missing, damaged or of another
      architecture.
  """
  found = read_headers(config.model)
  model = build_model(config, found.family, found.architecture, found.autoencoder_config)
  if trains_backbone(config) and found.int8:
    raise UserError(
      f'{model_path(config.model.source)} holds kernels in int8, which can only stay frozen, and '
      'this run trains the whole backbone: set model.source to the model that they were rounded '
      'from, or train adapters (`lora`).'
    )
  if config.adapter:
    check_lora(config.adapter, found.architecture)
  elif config.lora:
    key = jax.random.key(0)
    boxed = jax.eval_shape(lambda: model.init(key, config.model.num_text_tokens))
    jax.eval_shape(lambda: lora.init(key, boxed, config.lora))


def trains_backbone(config: ExperimentConfig) -> bool:
  """Whether an experiment has a stage that trains the backbone itself instead of adapters."""
  # Pretraining in the emoji world takes no adapters.
  if 'flow_matching' in config.stages and config.data.world == 'emoji':
    return True
  return not config.lora and not config.adapter and bool(set(config.stages) & set(_OF_BACKBONE))


def described(config: ExperimentConfig) -> registry.DiffusionModel:
  """The modules of a resolved experiment.

  Raises:
    UserError: as `read_headers` and `build_model`.
  """
  found = read_headers(config.model)
  return build_model(config, found.family, found.architecture, found.autoencoder_config)
