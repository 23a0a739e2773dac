"""Opens an experiment without its weights: shapes, dtypes and shardings in place of arrays."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from eru_jax import sharding
from eru_jax.data.emoji_knowledge import PairTable
from eru_jax.data.pairs import KnowledgePair
from eru_jax.data.world import World
from eru_jax.models import autoencoder_kl, registry
from eru_jax.models.clip import ClipTextConfig
from eru_jax.models.minilm import BertConfig, sentence_conditioning
from eru_jax.models.quantize import is_quantised
from eru_jax.models.t5 import T5Config
from eru_jax.training import experiment as experiment_lib
from eru_jax.training.config import NO_PATHS, ExperimentConfig, ModelConfig, model_path
from eru_jax.training.experiment import Experiment, Snapshot, TextTable
from eru_jax.training.modules import build_model
from eru_jax.types import Conditioning
from eru_jax.weights import layouts, model_directory, sources
from eru_jax.weights.layouts import Component
from eru_jax.weights.lora_io import import_lora
from eru_jax.weights.snapshot import published_sampler, read_json
from eru_jax.weights.streaming import sharding_of

PyTree = Any
# Pairs that are assumed where the file of them is not there.
ASSUMED_PAIRS = 256


@dataclasses.dataclass(frozen=True)
class Planned:
  """An experiment that nothing was read for.

  Attributes:
    experiment: its config is resolved; `planned` is set.
    snapshot: the model it starts from, described.
    t5: architecture of T5, or None where prompts are encoded otherwise.
    clip: of CLIP's text encoder, or None.
    notes: what had to be assumed, a sentence each.
  """

  experiment: Experiment
  snapshot: Snapshot
  t5: T5Config | None
  clip: ClipTextConfig | None
  notes: tuple[str, ...]


def open_planned(config: ExperimentConfig, mesh: Mesh) -> Planned:
  """Opens an experiment for planning; files that are not there are stood in for.

  Without its snapshot a FLUX.1 is the published one (-schnell if `model.source` says so, else -dev)
  and without its file of pairs a world of prompts has ASSUMED_PAIRS of them.

  Raises:
    UserError: if what is there is damaged, or the config cannot be.
  """
  notes = []
  path = model_path(config.model.source)
  experiment_lib.prepare_model(config.model.source)
  published = config.model.source != 'scratch' and not path.is_dir()
  if published:
    notes.append(f'{config.model.source} is not there: planned for the published FLUX.1.')
    model = _published(config.model)
    sampling = published_sampler(guided=not _is_schnell(config.model))
  else:
    model = experiment_lib.resolve_model(config.model)
    sampling = experiment_lib.own_sampling(model)
  config = dataclasses.replace(config, model=model, sampling=config.sampling.of(sampling))
  world = _world(config, notes)
  family, architecture, autoencoder = _architectures(config.model, None if published else path)
  t5, clip = _text_encoders(config.model, None if published else path)
  text = _text(config.model, world, t5, clip)
  experiment = Experiment(config, mesh, world, text, planned=True)
  if config.adapter:
    experiment = _with_adapter(experiment, architecture, notes)
  snapshot = _snapshot(experiment, family, architecture, autoencoder, None if published else path)
  return Planned(experiment, snapshot, t5, clip, tuple(notes))


def _is_schnell(settings: ModelConfig) -> bool:
  return 'schnell' in pathlib.Path(settings.source).name.lower()


def _published(settings: ModelConfig) -> ModelConfig:
  return dataclasses.replace(
    settings,
    text_encoder='flux',
    text_length=settings.text_length or (256 if _is_schnell(settings) else 512),
    resolution=settings.resolution or 1024,
  )


def _world(config: ExperimentConfig, notes: list[str]) -> World:
  given = config.data.pairs
  if given in NO_PATHS or pathlib.Path(given).expanduser().is_file():
    others = config.data.others
    if others and not pathlib.Path(others).expanduser().is_file():
      notes.append(f'{others} is not there: planned without.')
      config = dataclasses.replace(config, data=dataclasses.replace(config.data, others=''))
    return experiment_lib.open_world(config.data)
  notes.append(f'{given} is not there: planned for {ASSUMED_PAIRS} pairs.')
  pairs = tuple(
    KnowledgePair(f'implicit {i}', f'explicit {i}', id=str(i), image=f'{i}.png')
    for i in range(ASSUMED_PAIRS)
  )
  anchors = tuple(dataclasses.replace(p, implicit=p.explicit, split='explicit') for p in pairs)
  return World({'train': PairTable(pairs), 'explicit': PairTable(anchors)})


def _architectures(
  settings: ModelConfig, path: pathlib.Path | None
) -> tuple[registry.ModelFamily, Any, autoencoder_kl.AutoencoderConfig]:
  """Family and architectures: out of the settings, a directory, or as published."""
  if settings.source == 'scratch':
    family = registry.family(settings.family)
    autoencoder = autoencoder_kl.AutoencoderConfig.from_dict(settings.autoencoder)
    return family, family.config.from_dict(settings.architecture), autoencoder
  if path is None:
    family = registry.family('flux')
    schnell = 'schnell' in pathlib.Path(settings.source).name.lower()
    return family, family.config(guidance_embeds=not schnell), autoencoder_kl.FLUX
  family = sources.family_of(sources.read_settings(path))

  def read(component: Component, usual: Any) -> Any:
    file = path / component.folder / 'config.json'
    return component.config.from_dict(read_json(file)) if file.exists() else usual

  backbone = read(layouts.backbone(family), family.config())
  return family, backbone, read(layouts.AUTOENCODER, autoencoder_kl.FLUX)


def _text_encoders(
  settings: ModelConfig, path: pathlib.Path | None
) -> tuple[T5Config | None, ClipTextConfig | None]:
  if settings.text_encoder != 'flux':
    return None, None
  if path is None:
    return T5Config(), ClipTextConfig()
  t5 = T5Config.from_dict(read_json(path / 'text_encoder_2' / 'config.json'))
  return t5, ClipTextConfig.from_dict(read_json(path / 'text_encoder' / 'config.json'))


def _text(
  settings: ModelConfig, world: World, t5: T5Config | None, clip: ClipTextConfig | None
) -> TextTable:
  """Prompts' rows as always; what is taken has the right shape and says nothing."""

  def take(rows: np.ndarray) -> Conditioning:
    shape = (len(rows), settings.text_length)
    if t5 is not None:
      tokens = np.zeros((*shape, t5.d_model), jnp.dtype(settings.dtype))
      return Conditioning(tokens, pooled=np.zeros((len(rows), clip.hidden_size), np.float32))
    width = BertConfig().hidden_size
    tokens, pooled = np.zeros((*shape, width), np.float32), np.zeros((len(rows), width), np.float32)
    found = Conditioning(tokens, np.ones(shape, bool), pooled)
    return sentence_conditioning(found) if settings.sentence_only else found

  rows = experiment_lib.numbered(list(dict.fromkeys(world.all_prompts)))
  return TextTable(rows, take, take(np.zeros(1, np.int32)))


def _with_adapter(experiment: Experiment, architecture: Any, notes: list[str]) -> Experiment:
  """The experiment with the rules of the adapter it begins with, which stages then describe."""
  config = experiment.config
  path = pathlib.Path(config.adapter).expanduser()
  if not path.is_file():
    notes.append(f'{config.adapter} is not there: planned for an adapter as `lora` says.')
    return experiment
  _, rules = import_lora(path, architecture)
  return dataclasses.replace(experiment, config=dataclasses.replace(config, lora=rules))


def _snapshot(
  experiment: Experiment,
  family: registry.ModelFamily,
  architecture: Any,
  autoencoder: autoencoder_kl.AutoencoderConfig,
  path: pathlib.Path | None,
) -> Snapshot:
  config, mesh = experiment.config, experiment.mesh
  model = build_model(config, family, architecture, autoencoder)
  if config.model.source == 'scratch':
    # Random, and of the initialisers' dtype.
    component, whole = layouts.backbone(family), layouts.AUTOENCODER
    params = [
      sharding.described(
        sharding.unboxed(part.boxed(of)), sharding.logical_shardings(part.boxed(of), mesh)
      )
      for part, of in ((component, architecture), (whole, autoencoder))
    ]
    return Snapshot(model, *params)
  int8 = config.model.params == 'int8'
  dtype = config.model.dtype if int8 else config.model.params
  component = layouts.backbone(family)
  boxed = component.boxed(architecture)
  places = traverse_util.flatten_dict(sharding.logical_shardings(boxed, mesh), sep='/')
  found = _specs(component, architecture, path, dtype, family.blocks if int8 else None)
  backbone = {
    name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding_of(name, len(s.shape), places))
    for name, s in found.items()
  }
  frozen = 'autoencoder' not in config.stages
  other = _specs(layouts.AUTOENCODER, autoencoder, path, dtype, None, frozen)
  reward = None
  if path is not None and (path / 'reward').is_dir():
    reward = experiment.place(_tree(model_directory.reward_specs(path, dtype)))
  return Snapshot(model, _tree(backbone), experiment.place(_tree(other)), reward=reward)


def _tree(flat: dict[str, Any]) -> PyTree:
  return traverse_util.unflatten_dict(flat, sep='/')


def _specs(
  component: Component,
  architecture: Any,
  path: pathlib.Path | None,
  dtype: Any,
  int8: str | None,
  frozen: bool = False,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Parameters as they would be loaded: as the files say, or without files as all of them do."""
  if path is not None and sources.holds(component, path):
    weights = sources.open_weights(component, path, dtype, int8)
    return (model_directory.frozen(weights) if frozen else weights).specs()
  # What is published is in bfloat16.
  dtype = jnp.bfloat16 if frozen else dtype
  found = {}
  shapes = traverse_util.flatten_dict(component.shapes(architecture), sep='/')
  for name, spec in shapes.items():
    shape = spec.shape
    if int8 is not None and is_quantised(name, shape, int8):
      found[name] = jax.ShapeDtypeStruct(shape, np.int8)
      found[f'{name}_scale'] = jax.ShapeDtypeStruct((*shape[:-2], shape[-1]), np.float32)
    else:
      found[name] = jax.ShapeDtypeStruct(shape, dtype)
  return found
