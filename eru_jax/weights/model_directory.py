"""A model on disk: diffusers' folders `transformer/` and `vae/`, plus our `eru_jax.json`.

The toy base that ships with the package, a snapshot of FLUX.1 and what `eru_jax.convert` writes
share this layout, so that one loader serves them. The toy adds `reward/`, the classifier of its
world, and names its text encoder.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.files import replace_file
from eru_jax.models import autoencoder_kl, registry
from eru_jax.rewards.emoji import EmojiReward
from eru_jax.weights import layouts, sources, streaming, table
from eru_jax.weights.safetensors_io import write_safetensors
from eru_jax.weights.tensor_files import TensorFiles

PyTree = Any


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


def read_settings(directory: str | pathlib.Path) -> dict[str, Any]:
  """Contents of a model directory's eru_jax.json, or what a published snapshot says instead.

  Raises:
    UserError: if it is missing or damaged.
  """
  return sources.read_settings(pathlib.Path(directory))


def is_model(directory: str | pathlib.Path) -> bool:
  """Whether a directory says that it holds a model."""
  return sources.has_settings(pathlib.Path(directory))


def load(
  directory: str | pathlib.Path,
  mesh: Mesh | None = None,
  dtype: Any = np.float32,
  int8: str | None = None,
) -> StoredModel:
  """Reads a model directory, one array at a time.

  Args:
    directory: a directory that `save` or `eru_jax.convert` wrote, or a snapshot of diffusers.
    mesh: where the parameters go: the backbone split by `sharding.RULES`, the rest on all devices.
      None keeps them on the host, as numpy arrays.
    dtype: of the parameters; None keeps that of the files. int8 kernels and their scales stay as
      they are.
    int8: regular expression; kernels of backbone layers whose path it is found in become int8 on
      the way. None: no kernel.

  Raises:
    UserError: if it is missing, or a file in it is damaged, of another model or another shape.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise UserError(
      f'There is no model directory {directory}: give `emoji_base` or a directory with '
      'eru_jax.json, transformer/ and vae/.'
    )
  settings = sources.read_settings(directory)
  family = sources.family_of(settings)
  backbone = sources.open_weights(layouts.backbone(family), directory, dtype, int8)
  autoencoder = sources.open_weights(layouts.AUTOENCODER, directory, dtype)
  # All headers are looked at before the first array is read.
  for weights in (backbone, autoencoder):
    weights.specs()
  reward = None
  if (directory / 'reward').is_dir():
    reward = _reward(directory / 'reward' / 'model.safetensors', dtype)
    reward.check()
  places = None
  if mesh is not None:
    boxed = backbone.component.boxed(backbone.config)
    places = traverse_util.flatten_dict(sharding.logical_shardings(boxed, mesh), sep='/')
  return StoredModel(
    family,
    backbone.config,
    _tree(backbone.arrays(places)),
    autoencoder.config,
    _tree(autoencoder.arrays(_everywhere(autoencoder.specs(), mesh))),
    settings,
    None if reward is None else _tree(reward.arrays(_everywhere(reward.specs(), mesh))),
  )


def _tree(arrays: Any) -> PyTree:
  return traverse_util.unflatten_dict(dict(arrays), sep='/')


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


def save(
  directory: str | pathlib.Path, model: StoredModel, dtype: Any = ml_dtypes.bfloat16
) -> None:
  """Writes a model directory; every file of it appears whole or not at all.

  Args:
    directory: where; made if needed.
    model: what to store.
    dtype: of the stored tensors.

  Raises:
    UserError: if a file cannot be written.
  """
  directory = pathlib.Path(directory)

  def stored(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype), tree)

  def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    replace_file(path, (json.dumps(values, indent=2) + '\n').encode())

  architecture, config = model.architecture, model.autoencoder_config
  parts = (
    (layouts.backbone(model.family), architecture, model.backbone),
    (layouts.AUTOENCODER, config, model.autoencoder),
  )
  for component, of, params in parts:
    layout = component.layouts['diffusers']
    tensors = table.to_torch(stored(params), layout.rows(of), component.counts(of))
    write_safetensors(directory / layout.file, tensors)
  if model.reward is not None:
    flat = traverse_util.flatten_dict(stored(model.reward), sep='/')
    write_safetensors(directory / 'reward' / 'model.safetensors', flat)
  write_json(directory / 'transformer' / 'config.json', architecture.to_dict())
  write_json(directory / 'vae' / 'config.json', config.to_dict())
  write_json(directory / 'eru_jax.json', {**model.settings, 'family': model.family.name})
