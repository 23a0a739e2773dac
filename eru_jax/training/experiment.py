"""Everything the stages share: the world, its prompts, and the model between two stages."""

import dataclasses
import os
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from eru_jax import flow, sharding
from eru_jax.data.embeddings import EmbeddingCache
from eru_jax.data.flux_text import load_flux_text
from eru_jax.data.pairs import KnowledgePair
from eru_jax.data.text_encoder import TextEncoder, load_minilm
from eru_jax.data.world import World, load_emoji_world, load_prompt_world
from eru_jax.errors import UserError
from eru_jax.models import autoencoder_kl, registry
from eru_jax.models.minilm import sentence_conditioning
from eru_jax.training.config import (
  DATA_FILES,
  MODEL_NAMES,
  MODEL_OWN,
  NO_PATHS,
  REWARD_FILES,
  DataConfig,
  ExperimentConfig,
  ModelConfig,
  absolute,
  model_path,
)
from eru_jax.types import Conditioning, VelocityFn
from eru_jax.weights import model_directory

PyTree = Any


@dataclasses.dataclass(frozen=True)
class TextTable:
  """Embeddings of all prompts of a run, on the host.

  Attributes:
    conditioning: numpy arrays, one row a prompt.
    rows: prompt -> row. The empty prompt is row 0.
  """

  conditioning: Conditioning
  rows: dict[str, int]

  @classmethod
  def build(
    cls,
    cache: EmbeddingCache,
    encoder: TextEncoder,
    prompts: Sequence[str],
    sentence_only: bool = False,
  ) -> 'TextTable':
    """Looks up (or computes) the embeddings of the different prompts among `prompts`.

    Args:
      cache: embeddings on disk.
      encoder: makes those that are not there.
      prompts: texts, repeats allowed.
      sentence_only: keep of each prompt its sentence vector alone, see `sentence_conditioning`.
    """
    unique = list(dict.fromkeys(prompts))
    parts = [encoder.null_conditioning()] + ([cache.lookup(unique)] if unique else [])
    conditioning = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    if sentence_only:
      conditioning = sentence_conditioning(conditioning)
    return cls(conditioning, {'': 0} | {prompt: i + 1 for i, prompt in enumerate(unique)})

  def index(self, prompts: Sequence[str]) -> np.ndarray:
    """Rows of prompts, (N,) int32."""
    return np.array([self.rows[prompt] for prompt in prompts], np.int32)

  def take(self, rows: np.ndarray) -> Conditioning:
    """The conditioning of rows, batch first."""
    return jax.tree.map(lambda x: x[rows], self.conditioning)

  @property
  def null(self) -> Conditioning:
    """The empty prompt, batch size 1."""
    return self.take(np.zeros(1, np.int32))


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """The model as it stands between two stages.

  Attributes:
    model: modules and sizes.
    backbone: frozen base parameters.
    autoencoder: parameters of the autoencoder.
    trainable: adapter or whole parameters the stages so far have trained, None at the base.
    reward: parameters of the reward classifier, or None where none has been trained.
  """

  model: registry.DiffusionModel
  backbone: PyTree
  autoencoder: PyTree
  trainable: PyTree | None = None
  reward: PyTree | None = None

  def velocity(self) -> VelocityFn:
    return self.model.velocity(self.backbone, self.trainable)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What does not change while an experiment runs.

  Attributes:
    config: the experiment.
    mesh: the devices.
    world: pairs, and pictures where there are any.
    text: embeddings of all prompts.
  """

  config: ExperimentConfig
  mesh: Mesh
  world: World
  text: TextTable

  def schedule(self, model: registry.DiffusionModel, num_steps: int | None = None) -> jax.Array:
    """Solver grid of a model's pictures: of evaluation, or of so many steps."""
    sampling = self.config.sampling
    mu = sampling.shift_mu
    if mu is None:
      mu = flow.resolution_mu(model.latent_shape[0])
    return flow.timestep_schedule(num_steps or sampling.num_steps, mu)

  def key(self, purpose: str) -> jax.Array:
    """A random key of its own for every purpose."""
    return jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(purpose.encode()))

  def conditioning(self, prompts: Sequence[str]) -> Conditioning:
    return self.text.take(self.text.index(prompts))

  def prompts(self, split: str) -> tuple[KnowledgePair, ...]:
    return self.world.splits[split].pairs if split in self.world.splits else ()


def cache_directory() -> pathlib.Path:
  """Where prepared datasets and embeddings are shared between runs: $ERU_JAX_CACHE or ~/.cache."""
  return pathlib.Path(os.environ.get('ERU_JAX_CACHE', pathlib.Path.home() / '.cache' / 'eru_jax'))


def open_text(settings: ModelConfig, prompts: Sequence[str]) -> TextTable:
  """Embeds prompts through the shared cache, with the text encoder that the model was made for."""
  if settings.text_encoder == 'flux':
    encoder = load_flux_text(model_path(settings.source), settings.text_length)
  else:
    encoder = load_minilm(max_length=settings.text_length)
  cache = EmbeddingCache(cache_directory() / 'text', encoder)
  return TextTable.build(cache, encoder, prompts, settings.sentence_only)


def _build_model(
  config: ExperimentConfig,
  family: registry.ModelFamily,
  architecture: Any,
  autoencoder: autoencoder_kl.AutoencoderConfig,
) -> registry.DiffusionModel:
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


# What a model has that does not say otherwise.
_USUAL = {'text_encoder': 'minilm', 'text_length': 24, 'resolution': 64}


def resolve_model(settings: ModelConfig) -> ModelConfig:
  """The settings with nothing left to the model directory, and its path absolute.

  Raises:
    UserError: if there is no such directory, it says of itself what cannot be, or the settings
      name another text encoder or text length than its backbone was made for.
  """
  stored: dict[str, Any] = {}
  path = model_path(settings.source)
  if settings.source != 'scratch':
    if not path.is_dir():
      raise UserError(
        f'There is no model directory {path}: set model.source to `emoji_base`, `scratch` or a '
        'directory with eru_jax.json, transformer/ and vae/.'
      )
    stored = model_directory.read_settings(path)
  values = {}
  for name, (valid, wanted) in MODEL_OWN.items():
    own, given = stored.get(name, _USUAL[name]), getattr(settings, name)
    if not valid(own):
      raise UserError(f'{path / "eru_jax.json"}: {name} is {own!r} but must be {wanted}.')
    # At another resolution a backbone can be used; with other text it sees what it never learnt.
    if name in stored and name != 'resolution' and given not in (None, own):
      raise UserError(
        f'model.{name} is {given!r}, but the model in {path} was made with {own!r}: leave it out.'
      )
    values[name] = own if given is None else given
  source = absolute(settings.source, MODEL_NAMES)
  return dataclasses.replace(settings, source=source, **values)


def resolve(config: ExperimentConfig) -> ExperimentConfig:
  """The config with its model resolved and its paths absolute: what a workdir keeps of it.

  Raises:
    UserError: as `resolve_model`.
  """
  paths = {name: absolute(getattr(config.data, name), NO_PATHS) for name in DATA_FILES}
  data = dataclasses.replace(config.data, **paths)
  paths = {name: absolute(getattr(config.no_rl, name), NO_PATHS) for name in REWARD_FILES}
  no_rl = dataclasses.replace(config.no_rl, **paths)
  return dataclasses.replace(config, model=resolve_model(config.model), data=data, no_rl=no_rl)


def load_snapshot(config: ExperimentConfig, mesh: Mesh) -> Snapshot:
  """The model a resolved experiment starts from: a model directory, or random parameters.

  Raises:
    UserError: if the directory is missing, damaged or of another shape.
  """
  settings = config.model
  if settings.source == 'scratch':
    family = registry.family(settings.family)
    architecture = family.config.from_dict(settings.architecture)
    autoencoder = autoencoder_kl.AutoencoderConfig.from_dict(settings.autoencoder)
    model = _build_model(config, family, architecture, autoencoder)
    key = jax.random.key(config.seed)
    backbone = init_sharded(lambda: model.init(key, settings.num_text_tokens), mesh)
    pixels = settings.resolution
    images = jnp.zeros((1, pixels, pixels, autoencoder.in_channels // autoencoder.patch_size**2))
    params = init_sharded(lambda: model.autoencoder.init(key, images)['params'], mesh)
    return Snapshot(model, backbone, params)
  stored = model_directory.load(model_path(settings.source))
  model = _build_model(config, stored.family, stored.architecture, stored.autoencoder_config)
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), settings.num_text_tokens))
  backbone = jax.device_put(stored.backbone, sharding.logical_shardings(boxed, mesh))
  everywhere = sharding.replicated(mesh)
  reward = None if stored.reward is None else jax.device_put(stored.reward, everywhere)
  return Snapshot(model, backbone, jax.device_put(stored.autoencoder, everywhere), reward=reward)


def open_experiment(
  config: ExperimentConfig,
  mesh: Mesh,
  extra_prompts: Sequence[str] = (),
  *,
  any_size: bool = False,
) -> tuple[Experiment, Snapshot]:
  """Opens the world, embeds every prompt, and loads the model an experiment starts from.

  Args:
    config: the experiment.
    mesh: its devices.
    extra_prompts: prompts to embed besides those of the world.
    any_size: allow pictures of another size than the world's, which its judge cannot see.

  Raises:
    UserError: for bad data, a bad model, or missing packages.
  """
  config = resolve(config)
  world = open_world(config.data)
  size = config.model.resolution if world.pictures is None else world.pictures.images.shape[1]
  if config.model.resolution != size and not any_size:
    raise UserError(
      f'model.resolution is {config.model.resolution}, but the pictures of the world are of '
      f'{size} x {size} pixels: set it to {size}.'
    )
  # Before the backbone is there, as encoders are large themselves.
  text = open_text(config.model, [*world.all_prompts, *extra_prompts])
  return Experiment(config, mesh, world, text), load_snapshot(config, mesh)


def open_world(data: DataConfig) -> World:
  """The world that a config names.

  Raises:
    UserError: for bad data, or missing packages.
  """
  if data.world == 'prompts':
    return load_prompt_world(data.pairs, data.leave_out, data.others)
  return load_emoji_world(
    data.pairs, cache_directory(), data.wordings_per_fact, data.max_facts, data.leave_out
  )


def init_sharded(init: Callable[[], PyTree], mesh: Mesh) -> PyTree:
  """Runs an initialiser of boxed parameters so that they are born sharded; returns them unboxed."""
  layout = sharding.logical_shardings(jax.eval_shape(init), mesh)
  return jax.jit(lambda: nn.unbox(init()), out_shardings=layout)()
