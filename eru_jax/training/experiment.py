"""Everything the stages share: the world, its prompts, and the model between two stages."""

import dataclasses
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
from eru_jax.data.text_encoder import load_minilm
from eru_jax.data.world import SAMPLE_PAIRS, World, load_emoji_world, load_prompt_world
from eru_jax.distributed import main_first, to_host
from eru_jax.errors import UserError
from eru_jax.files import cache_directory
from eru_jax.models import lora, registry
from eru_jax.models.minilm import sentence_conditioning
from eru_jax.training.config import (
  DATA_FILES,
  MODEL_NAMES,
  MODEL_OWN,
  NO_PATHS,
  REWARD_FILES,
  REWARD_NAMES,
  DataConfig,
  ExperimentConfig,
  ModelConfig,
  absolute,
  model_path,
)
from eru_jax.training.modules import build_model, described, int8_layers
from eru_jax.types import Conditioning, VelocityFn
from eru_jax.weights import model_directory
from eru_jax.weights.lora_io import import_lora
from eru_jax.weights.tiny_models import write_tiny_clip, write_tiny_flux

PyTree = Any


@dataclasses.dataclass(frozen=True)
class TextTable:
  """Embeddings of all prompts of a run, on the host or on disk.

  Attributes:
    rows: prompt -> row. The empty prompt is row 0.
    take: rows (B,) -> their conditioning, numpy arrays with the batch first.
    null: the empty prompt, batch size 1.
  """

  rows: dict[str, int]
  take: Callable[[np.ndarray], Conditioning]
  null: Conditioning

  @classmethod
  def in_memory(
    cls,
    cache: EmbeddingCache,
    prompts: Sequence[str],
    sentence_only: bool = False,
  ) -> 'TextTable':
    """Looks up (or computes) the embeddings of the different prompts among `prompts`.

    Args:
      cache: embeddings on disk.
      prompts: texts, repeats allowed.
      sentence_only: keep of each prompt its sentence vector alone, see `sentence_conditioning`.
    """
    unique = list(dict.fromkeys(prompts))
    parts = [cache.null()] + ([cache.lookup(unique)] if unique else [])
    conditioning = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    if sentence_only:
      conditioning = sentence_conditioning(conditioning)

    def take(rows: np.ndarray) -> Conditioning:
      return jax.tree.map(lambda x: x[rows], conditioning)

    return cls(numbered(unique), take, take(np.zeros(1, np.int32)))

  @classmethod
  def on_disk(cls, cache: EmbeddingCache, prompts: Sequence[str]) -> 'TextTable':
    """The same, read from the cache batch by batch: for encoders that make megabytes of it."""
    unique = list(dict.fromkeys(prompts))
    cache.fill(unique)
    texts = ['', *unique]
    return cls(
      numbered(unique), lambda rows: cache.read([texts[row] for row in rows]), cache.null()
    )

  def index(self, prompts: Sequence[str]) -> np.ndarray:
    """Rows of prompts, (N,) int32."""
    return np.array([self.rows[prompt] for prompt in prompts], np.int32)


def numbered(prompts: Sequence[str]) -> dict[str, int]:
  """Rows of different prompts, behind the empty one."""
  return {'': 0} | {prompt: row for row, prompt in enumerate(prompts, start=1)}


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
    planned: whether the mesh is of devices that are not there, so that arrays are described, as
      ShapeDtypeStructs, and not made.
    directory: where a run that trains keeps small files; None where nothing is trained.
  """

  config: ExperimentConfig
  mesh: Mesh
  world: World
  text: TextTable
  planned: bool = False
  directory: pathlib.Path | None = None

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

  def place(self, tree: PyTree, layout: PyTree | None = None) -> PyTree:
    """Puts arrays onto the mesh: a copy on every device, or as a layout says."""
    layout = sharding.replicated(self.mesh) if layout is None else layout
    return sharding.described(tree, layout) if self.planned else jax.device_put(tree, layout)

  def share(self, tree: PyTree) -> PyTree:
    """Puts arrays (N, ...) onto the mesh, every device taking some rows; some may be added."""

    def even(x: Any) -> Any:
      missing = -x.shape[0] % sharding.batch_share(self.mesh)
      if not missing:
        return x
      if self.planned:
        return jax.ShapeDtypeStruct((x.shape[0] + missing, *x.shape[1:]), x.dtype)
      return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))

    even_tree = jax.tree.map(even, tree)
    return self.place(even_tree, jax.tree.map(lambda _: sharding.split_first(self.mesh), tree))

  def initialise(self, init: Callable[[], PyTree]) -> PyTree:
    """Parameters by an initialiser of boxed ones, laid out over the mesh; see `init_sharded`."""
    if not self.planned:
      return init_sharded(init, self.mesh)
    boxed = jax.eval_shape(init)
    layout = sharding.logical_shardings(boxed, self.mesh)
    return sharding.described(sharding.unboxed(boxed), layout)


def open_text(settings: ModelConfig, prompts: Sequence[str], mesh: Mesh) -> TextTable:
  """Embeds prompts through the shared cache, with the text encoder that the model was made for.

  Raises:
    UserError: if the encoder is missing, damaged, or makes what the backbone does not take.
  """
  # Encoders run on this process's own devices, so that nobody else has to take part.
  if mesh.is_multi_process:
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1), jax.local_devices())
  with main_first():
    return _embedded(settings, prompts, cache_directory() / 'text', mesh)


def _embedded(
  settings: ModelConfig, prompts: Sequence[str], directory: pathlib.Path, mesh: Mesh
) -> TextTable:
  if settings.text_encoder != 'flux':
    encoder = load_minilm(max_length=settings.text_length)
    _check_widths(settings, encoder.widths)
    cache = EmbeddingCache(directory, encoder)
    return TextTable.in_memory(cache, prompts, settings.sentence_only)
  encoder = load_flux_text(
    model_path(settings.source), settings.text_length, settings.dtype, keep_resident=True, mesh=mesh
  )
  _check_widths(settings, encoder.widths)
  table = TextTable.on_disk(EmbeddingCache(directory, encoder), prompts)
  encoder.release()
  return table


def _check_widths(settings: ModelConfig, made: tuple[int, int]) -> None:
  """Raises UserError unless the backbone takes token states and pooled vectors of these widths."""
  if settings.source == 'scratch':
    where = 'model.architecture'
    backbone = registry.family(settings.family).config.from_dict(settings.architecture)
  else:
    where = str(model_path(settings.source))
    backbone = model_directory.architecture(where)
  taken = (backbone.joint_attention_dim, backbone.pooled_projection_dim)
  if taken != made:
    raise UserError(
      f'{where}: the backbone takes token states of {taken[0]} and pooled vectors of {taken[1]} '
      f'channels (joint_attention_dim, pooled_projection_dim), but the text encoder '
      f'{settings.text_encoder!r} makes {made[0]} and {made[1]}: take both from the same model.'
    )


# What a model has that does not say otherwise.
_USUAL = {'text_encoder': 'minilm', 'text_length': 24, 'resolution': 64}


def prepare_model(source: str) -> None:
  """Makes a model that `model.source` or `no_rl.reward_model` names, if it is made on first use."""
  if source == 'tiny_flux':
    write_tiny_flux(model_path(source))
  elif source == 'tiny_clip':
    write_tiny_clip(model_path(source))


def resolve_model(settings: ModelConfig) -> ModelConfig:
  """The settings with nothing left to the model directory, and its path absolute.

  Raises:
    UserError: if there is no such directory, it says of itself what cannot be, or the settings
      name another text encoder or text length than its backbone was made for.
  """
  stored: dict[str, Any] = {}
  path = model_path(settings.source)
  prepare_model(settings.source)
  if settings.source != 'scratch':
    if not path.is_dir():
      raise UserError(
        f'There is no model directory {path}: set model.source to {", ".join(MODEL_NAMES)} or a '
        'directory with eru_jax.json or model_index.json, transformer/ and vae/.'
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
  adapter = absolute(config.adapter, NO_PATHS)
  paths = {name: absolute(getattr(config.no_rl, name), REWARD_NAMES) for name in REWARD_FILES}
  judge = config.no_rl.judge
  judge = dataclasses.replace(judge, instructions=absolute(judge.instructions, NO_PATHS))
  no_rl = dataclasses.replace(config.no_rl, judge=judge, **paths)
  model = resolve_model(config.model)
  return dataclasses.replace(
    config,
    model=model,
    data=data,
    adapter=adapter,
    no_rl=no_rl,
    sampling=config.sampling.of(own_sampling(model)),
  )


def own_sampling(model: ModelConfig) -> dict[str, Any]:
  """The sampler that a resolved model was made for, as far as its directory says."""
  if model.source == 'scratch':
    return {}
  return model_directory.read_settings(model_path(model.source)).get('sampling', {})


def load_snapshot(config: ExperimentConfig, mesh: Mesh) -> Snapshot:
  """The model a resolved experiment starts from: a model directory, or random parameters.

  Raises:
    UserError: if the directory is missing, damaged or of another shape.
  """
  settings = config.model
  if settings.source == 'scratch':
    model = described(config)
    autoencoder = model.autoencoder.config
    key = jax.random.key(config.seed)
    backbone = init_sharded(lambda: model.init(key, settings.num_text_tokens), mesh)
    pixels = settings.resolution
    images = jnp.zeros((1, pixels, pixels, autoencoder.in_channels // autoencoder.patch_size**2))
    params = init_sharded(lambda: model.autoencoder.init(key, images)['params'], mesh)
    return Snapshot(model, backbone, params)
  stored = model_directory.load(
    model_path(settings.source),
    mesh,
    settings.dtype if settings.params == 'int8' else settings.params,
    int8_layers(settings),
    frozen_autoencoder='autoencoder' not in config.stages,
  )
  model = build_model(config, stored.family, stored.architecture, stored.autoencoder_config)
  snapshot = Snapshot(model, stored.backbone, stored.autoencoder, reward=stored.reward)
  if not config.adapter:
    return snapshot
  return with_adapters(snapshot, config, mesh, [(config.adapter, 1.0)])


def with_adapters(
  snapshot: Snapshot,
  config: ExperimentConfig,
  mesh: Mesh,
  files: Sequence[tuple[str, float]],
) -> Snapshot:
  """A snapshot with adapters from files, beside what it has been trained to.

  Args:
    snapshot: the model.
    config: its experiment.
    mesh: its devices.
    files: (path, strength) of each.

  Raises:
    UserError: if a file is missing, damaged, or of another architecture.
  """
  model, backbone = snapshot.model, snapshot.backbone
  parts = []
  for path, strength in files:
    parts.append((*import_lora(pathlib.Path(path), model.backbone.config), strength))
  if snapshot.trainable is not None and model.lora:
    parts.append((to_host(snapshot.trainable), model.lora, 1.0))
  elif snapshot.trainable is not None:
    backbone = snapshot.trainable
  # One alone keeps its own ranks and alphas.
  one = len(parts) == 1 and parts[0][2] == 1
  adapter, rules = parts[0][:2] if one else lora.combine(parts)
  model = dataclasses.replace(model, lora=rules)

  def boxed():
    key = jax.random.key(0)
    return lora.init(key, model.init(key, config.model.num_text_tokens), rules)

  layout = sharding.logical_shardings(jax.eval_shape(boxed), mesh)
  adapter = jax.device_put(jax.tree.map(np.asarray, adapter), layout)
  return dataclasses.replace(snapshot, model=model, backbone=backbone, trainable=adapter)


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
  with main_first():
    world = open_world(config.data)
  size = config.model.resolution if world.pictures is None else world.pictures.images.shape[1]
  if config.model.resolution != size and not any_size:
    raise UserError(
      f'model.resolution is {config.model.resolution}, but the pictures of the world are of '
      f'{size} x {size} pixels: set it to {size}.'
    )
  # Before the backbone is there, as encoders are large themselves.
  text = open_text(config.model, [*world.all_prompts, *extra_prompts], mesh)
  return Experiment(config, mesh, world, text), load_snapshot(config, mesh)


def open_world(data: DataConfig) -> World:
  """The world that a config names.

  Raises:
    UserError: for bad data, or missing packages.
  """
  if data.world == 'prompts':
    pairs = str(SAMPLE_PAIRS) if data.pairs == 'sample' else data.pairs
    return load_prompt_world(pairs, data.leave_out, data.others)
  return load_emoji_world(
    data.pairs, cache_directory(), data.wordings_per_fact, data.max_facts, data.leave_out
  )


def init_sharded(init: Callable[[], PyTree], mesh: Mesh) -> PyTree:
  """Runs an initialiser of boxed parameters so that they are born sharded; returns them unboxed."""
  layout = sharding.logical_shardings(jax.eval_shape(init), mesh)
  return jax.jit(lambda: nn.unbox(init()), out_shardings=layout)()
