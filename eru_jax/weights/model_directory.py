"""A model on disk: diffusers' folders `transformer/` and `vae/`, plus our `eru_jax.json`.

The toy base that ships with the package and a FLUX snapshot share this layout, so that one loader
serves both. The toy adds `reward/`, the classifier of its world, and names its text encoder.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from eru_jax.errors import UserError
from eru_jax.files import replace_file
from eru_jax.models import autoencoder_kl, registry
from eru_jax.rewards.emoji import EmojiReward
from eru_jax.types import Conditioning
from eru_jax.weights import autoencoder_kl as autoencoder_table
from eru_jax.weights import flux as flux_table
from eru_jax.weights import snapshot, table
from eru_jax.weights.safetensors_io import read_safetensors, write_safetensors

PyTree = Any
_OWN = 'eru_jax.json'
_WEIGHTS = 'diffusion_pytorch_model.safetensors'
# Family -> (rows, counts) of its backbone's weight table, both functions of the architecture.
_TABLES: dict[str, tuple[Callable[[Any], Sequence[table.Row]], Callable[[Any], Mapping]]] = {
  'flux': (flux_table.rows, flux_table.counts),
}


@dataclasses.dataclass(frozen=True)
class StoredModel:
  """What a model directory holds.

  Attributes:
    family: the model family.
    architecture: config of the backbone.
    backbone: its parameters, nested dict of float32 numpy arrays.
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
  directory = pathlib.Path(directory)
  if not (directory / _OWN).is_file() and snapshot.is_snapshot(directory):
    return snapshot.settings(directory)
  return _read_json(directory / _OWN)


def is_model(directory: str | pathlib.Path) -> bool:
  """Whether a directory claims to hold a model."""
  directory = pathlib.Path(directory)
  return (directory / _OWN).is_file() or snapshot.is_snapshot(directory)


_read_json = functools.partial(
  snapshot.read_json,
  missing='a model directory holds eru_jax.json (or model_index.json), transformer/ and vae/',
)


def _float32(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def load(directory: str | pathlib.Path) -> StoredModel:
  """Reads a model directory.

  Raises:
    UserError: if it is missing, or a file in it is damaged, of another model or another shape.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise UserError(
      f'There is no model directory {directory}: give `emoji_base` or a directory with '
      'eru_jax.json, transformer/ and vae/.'
    )
  settings = read_settings(directory)
  family = registry.family(settings.get('family', ''))
  architecture = family.config.from_dict(_read_json(directory / 'transformer' / 'config.json'))
  rows, counts = _TABLES[family.name]
  backbone = _read_weights(
    directory / 'transformer' / _WEIGHTS,
    rows(architecture),
    counts(architecture),
    backbone_shapes(family, architecture),
  )
  config = autoencoder_kl.AutoencoderConfig.from_dict(_read_json(directory / 'vae' / 'config.json'))
  autoencoder = _read_weights(
    directory / 'vae' / _WEIGHTS,
    autoencoder_table.rows(config),
    autoencoder_table.counts(config),
    autoencoder_shapes(config),
  )
  reward = None
  if (directory / 'reward').is_dir():
    reward = _read_reward(directory / 'reward' / 'model.safetensors')
  return StoredModel(family, architecture, backbone, config, autoencoder, settings, reward)


def _read_weights(
  path: pathlib.Path, rows: Sequence[table.Row], counts: Mapping[str, int], shapes: PyTree
) -> PyTree:
  """Float32 parameters of these shapes out of a weights file, which errors name."""
  tensors = read_safetensors(path)
  try:
    return _float32(table.to_flax(tensors, rows, counts, shapes))
  except UserError as error:
    raise UserError(f'{path}: {error}') from error


def _read_reward(path: pathlib.Path) -> PyTree:
  """Parameters of the reward classifier, which is stored under its own names."""
  tensors = read_safetensors(path)
  bias = tensors.get('head/bias')
  if bias is None or bias.ndim != 1:
    raise UserError(f'{path} is not the reward classifier of a model directory: copy it again.')
  module, images = EmojiReward(len(bias) - 1).module, jnp.zeros((1, 64, 64, 3))
  shapes = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), images)['params']))
  names = traverse_util.flatten_dict(shapes, sep='/')
  return _read_weights(path, [table.Row(name, name) for name in names], {}, shapes)


def autoencoder_shapes(config: autoencoder_kl.AutoencoderConfig) -> PyTree:
  """Shapes the autoencoder's parameters must have, without making them."""
  edge, channels = config.downscale, config.in_channels // config.patch_size**2
  images = jax.ShapeDtypeStruct((1, edge, edge, channels), jnp.float32)
  module = autoencoder_kl.AutoencoderKL(config)
  return nn.unbox(jax.eval_shape(module.init, jax.random.key(0), images)['params'])


def backbone_shapes(family: registry.ModelFamily, architecture: Any) -> PyTree:
  """Shapes the backbone's parameters must have, without making them."""

  def init():
    conditioning = Conditioning(
      tokens=jnp.zeros((1, 1, architecture.joint_attention_dim)),
      pooled=jnp.zeros((1, architecture.pooled_projection_dim)),
    )
    ids, x = family.latent_ids(1, 1), jnp.zeros((1, 1, architecture.in_channels))
    t = jnp.zeros(1)
    return nn.unbox(
      family.backbone(architecture).init(jax.random.key(0), x, t, conditioning, ids, t)['params']
    )

  return jax.eval_shape(init)


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

  rows, counts = _TABLES[model.family.name]
  architecture, config = model.architecture, model.autoencoder_config
  write_safetensors(
    directory / 'transformer' / _WEIGHTS,
    table.to_torch(stored(model.backbone), rows(architecture), counts(architecture)),
  )
  write_safetensors(
    directory / 'vae' / _WEIGHTS,
    table.to_torch(
      stored(model.autoencoder), autoencoder_table.rows(config), autoencoder_table.counts(config)
    ),
  )
  if model.reward is not None:
    flat = traverse_util.flatten_dict(stored(model.reward), sep='/')
    write_safetensors(directory / 'reward' / 'model.safetensors', flat)
  write_json(directory / 'transformer' / 'config.json', architecture.to_dict())
  write_json(directory / 'vae' / 'config.json', config.to_dict())
  write_json(directory / _OWN, {**model.settings, 'family': model.family.name})
