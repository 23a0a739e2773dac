"""A model on disk: diffusers' folders `transformer/` and `vae/`, plus our `eru_jax.json`.

The toy base that ships with the package, a snapshot of FLUX.1 and what `eru_jax.convert` writes
share this layout, so that one loader serves them. The toy adds `reward/`, the classifier of its
world, and names its text encoder.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.files import replace_file
from eru_jax.models import autoencoder_kl, registry
from eru_jax.rewards.emoji import EmojiReward
from eru_jax.weights import layouts, sources, streaming, table, writing
from eru_jax.weights.safetensors_io import write_safetensors
from eru_jax.weights.tensor_files import TensorFiles

PyTree = Any
# Of a model directory that is being written: its new weights.
_TEMPORARY = '.saving'


@dataclasses.dataclass(frozen=True)
class StoredModel:
  """What a model directory holds.

  Attributes:
    family: the model family.
    architecture: config of the backbone.
    backbone: its parameters, nested dict of arrays: on the host, or on a mesh.
    autoencoder_config: config of the autoencoder, latent scale included.
    autoencoder: its parameters.
    settings: contents of eru_jax.json: `text_encoder`, `text_length`, `resolution`, `sampling`.
    reward: parameters of the reward classifier, or None.
  """

  family: registry.ModelFamily
  architecture: Any
  backbone: PyTree
  autoencoder_config: autoencoder_kl.AutoencoderConfig
  autoencoder: PyTree
  settings: Mapping[str, Any]
  reward: PyTree | None = None


@dataclasses.dataclass(frozen=True)
class Headers:
  """What is known of a model directory before its weights are read.

  Attributes:
    family: the model family.
    architecture: config of the backbone.
    autoencoder_config: config of the autoencoder.
    int8: whether the backbone has kernels in int8, which can only stay frozen.
  """

  family: registry.ModelFamily
  architecture: Any
  autoencoder_config: autoencoder_kl.AutoencoderConfig
  int8: bool


def read_settings(directory: str | pathlib.Path) -> dict[str, Any]:
  """Contents of a model directory's eru_jax.json, or what a published snapshot says instead.

  Raises:
    UserError: if it is missing or damaged.
  """
  return sources.read_settings(pathlib.Path(directory))


def is_model(directory: str | pathlib.Path) -> bool:
  """Whether a directory says that it holds a model."""
  return sources.has_settings(pathlib.Path(directory))


def family(directory: str | pathlib.Path) -> registry.ModelFamily:
  """The model family that a model directory names.

  Raises:
    UserError: if its settings are missing or damaged, or there is no such family.
  """
  return sources.family_of(read_settings(directory))


def architecture(directory: str | pathlib.Path) -> Any:
  """Config of the backbone in a model directory, of whose weights only headers are read.

  Raises:
    UserError: as `load`.
  """
  component = layouts.backbone(family(directory))
  return sources.open_weights(component, pathlib.Path(directory)).config


def backbone_size(directory: str | pathlib.Path) -> int:
  """Numbers that the backbone in a model directory consists of.

  Raises:
    UserError: as `load`.
  """
  component = layouts.backbone(family(directory))
  return sum(x.size for x in jax.tree.leaves(component.shapes(architecture(directory))))


def read_headers(directory: str | pathlib.Path, int8: str | None = None) -> Headers:
  """Looks at everything in a model directory but the weights themselves.

  Args:
    directory, int8: as of `load`.

  Raises:
    UserError: as `load`.
  """
  settings, backbone, autoencoder = _open(pathlib.Path(directory), None, int8)
  kept = any(spec.dtype == np.int8 for spec in backbone.specs().values())
  return Headers(sources.family_of(settings), backbone.config, autoencoder.config, kept)


def load(
  directory: str | pathlib.Path,
  mesh: Mesh | None = None,
  dtype: Any = np.float32,
  int8: str | None = None,
  frozen_autoencoder: bool = False,
) -> StoredModel:
  """Reads a model directory, one array at a time.

  Args:
    directory: a directory that `save` or `eru_jax.convert` wrote, or a snapshot of diffusers.
    mesh: where the parameters go: the backbone split by `sharding.RULES`, the rest on all devices.
      None keeps them on the host, as numpy arrays.
    dtype: of the parameters; None keeps that of the files. int8 kernels and their scales stay as
      they are.
    int8: regular expression; kernels of backbone layers whose path it is found in become int8 on
      the way, if they are not yet. None: no kernel.
    frozen_autoencoder: leave the autoencoder as it is stored if that is no wider than `dtype`:
      nothing trains it, and more digits than it has would only take space.

  Raises:
    UserError: if it is missing, or a file in it is damaged, of another model or another shape.
  """
  directory = pathlib.Path(directory)
  settings, backbone, autoencoder = _open(directory, dtype, int8)
  if frozen_autoencoder:
    autoencoder = frozen(autoencoder)
  reward = None
  if (directory / 'reward').is_dir():
    reward = _reward(directory / 'reward' / 'model.safetensors', dtype)
    reward.check()
  places = None
  if mesh is not None:
    boxed = backbone.component.boxed(backbone.config)
    places = traverse_util.flatten_dict(sharding.logical_shardings(boxed, mesh), sep='/')
  return StoredModel(
    sources.family_of(settings),
    backbone.config,
    _tree(backbone.arrays(places)),
    autoencoder.config,
    _tree(autoencoder.arrays(_everywhere(autoencoder.specs(), mesh))),
    settings,
    None if reward is None else _tree(reward.arrays(_everywhere(reward.specs(), mesh))),
  )


def _open(
  directory: pathlib.Path, dtype: Any, int8: str | None
) -> tuple[dict[str, Any], sources.Weights, sources.Weights]:
  """Settings, backbone and autoencoder of a model directory, all of whose headers fit."""
  if not directory.is_dir():
    raise UserError(
      f'There is no model directory {directory}: give `emoji_base` or a directory with '
      'eru_jax.json, transformer/ and vae/.'
    )
  settings = sources.read_settings(directory)
  component = layouts.backbone(sources.family_of(settings))
  backbone = sources.open_weights(component, directory, dtype, int8)
  autoencoder = sources.open_weights(layouts.AUTOENCODER, directory, dtype)
  for weights in (backbone, autoencoder):
    weights.specs()
  return settings, backbone, autoencoder


def frozen(weights: sources.Weights) -> sources.Weights:
  """Weights as they are stored, unless some are wider than what they were to be cast to."""
  if weights.cast is None:
    return weights
  stored, width = weights.uncast(), np.dtype(weights.cast).itemsize
  try:
    wider = any(np.dtype(spec.dtype).itemsize > width for spec in stored.specs().values())
  except UserError:  # of several dtypes where one is needed
    return weights
  return weights if wider else stored


def _tree(arrays: Any) -> PyTree:
  return traverse_util.unflatten_dict(dict(arrays), sep='/')


def reward_specs(directory: pathlib.Path, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of a directory's reward classifier, by path."""
  return _reward(directory / 'reward' / 'model.safetensors', dtype).specs()


def _everywhere(specs: Mapping[str, Any], mesh: Mesh | None) -> dict[str, Any] | None:
  return None if mesh is None else dict.fromkeys(specs, sharding.replicated(mesh))


def _reward(path: pathlib.Path, dtype: Any) -> streaming.Stored:
  """The reward classifier, which is stored under its own names."""
  files = TensorFiles(path)
  bias = files.tensors.get('head/bias')
  if bias is None or len(bias.shape) != 1 or bias.shape[0] < 2:
    raise UserError(f'{path} is not the reward classifier of a model directory: copy it again.')
  module, images = EmojiReward(bias.shape[0] - 1).module, jnp.zeros((1, 64, 64, 3))
  shapes = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), images)['params']))
  names = traverse_util.flatten_dict(shapes, sep='/')
  return streaming.Stored(files, [table.Row(name, name) for name in names], {}, shapes, dtype)


def save(directory: str | pathlib.Path, model: StoredModel, dtype: Any = None) -> None:
  """Writes a model directory; every file of it appears whole or not at all.

  Of parameters on devices, the host holds one array at a time.

  Args:
    directory: where; made if needed.
    model: what to store.
    dtype: of the stored tensors; None keeps that of the parameters.

  Raises:
    UserError: if a file cannot be written.
  """
  directory = pathlib.Path(directory)
  parts = [
    writing.Held(layouts.backbone(model.family), model.architecture, model.backbone, dtype),
    writing.Held(layouts.AUTOENCODER, model.autoencoder_config, model.autoencoder, dtype),
  ]
  _write_weights(directory, parts)
  if model.reward is not None:
    flat = traverse_util.flatten_dict(model.reward, sep='/')
    stored = {path: np.asarray(x).astype(dtype or x.dtype) for path, x in flat.items()}
    write_safetensors(directory / 'reward' / 'model.safetensors', stored)
  for part in parts:
    _write_json(directory / part.component.folder / 'config.json', part.config.to_dict())
  _write_json(directory / 'eru_jax.json', {**model.settings, 'family': model.family.name})


def _write_weights(directory: pathlib.Path, parts: Sequence[writing.Held]) -> None:
  """Writes diffusers' files elsewhere, moves them in, and removes those that they replace."""
  files = writing.new_files(parts, 'diffusers')
  temporary = directory / _TEMPORARY
  shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
  try:
    temporary.mkdir(parents=True)
    writing.write(temporary, 'diffusers', parts, files)
    new = [*files.headers, *files.indices]
    for name in new:
      (directory / name).parent.mkdir(exist_ok=True)
      os.replace(temporary / name, directory / name)
    for part in parts:
      stem = directory / part.component.layouts['diffusers'].file
      for path in stem.parent.glob(f'{stem.stem}*'):
        if path.relative_to(directory).as_posix() not in new:
          path.unlink()
  except OSError as error:
    raise UserError(f'{directory} cannot be written: {error.strerror or error}.') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  replace_file(path, (json.dumps(values, indent=2) + '\n').encode())
