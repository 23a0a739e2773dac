"""Which layouts a model's weights come in, and which of them a file is of.

A component (the backbone, the autoencoder) has a weight table for each layout. A file says by the
names in it which one it needs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.models import autoencoder_kl, registry
from eru_jax.weights import autoencoder_kl as autoencoder_table
from eru_jax.weights import autoencoder_original, flux_original, table
from eru_jax.weights import flux as flux_table
from eru_jax.weights.table import Row

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Layout:
  """One way of naming a component's tensors.

  Attributes:
    rows: its weight table, a function of the architecture.
    file: where such a model is written, below its directory.
    prefix: of all names; what begins otherwise belongs to another component.
  """

  rows: Callable[[Any], Sequence[Row]]
  file: str
  prefix: str = ''


@dataclasses.dataclass(frozen=True)
class Component:
  """A part of a model that has weights.

  Attributes:
    folder: its folder in a model directory.
    config: dataclass of its architecture, with `from_dict` and `to_dict`.
    example: an architecture, to know the layouts' names by.
    counts: how often the tables' counters run, a function of the architecture.
    boxed: its abstract parameters with their logical axis names, a function of the architecture.
    layouts: by name.
    infer: (tensors, prefix) -> architecture of a file in the original layout without config.json.
  """

  folder: str
  config: type
  example: Any
  counts: Callable[[Any], Mapping[str, int]]
  boxed: Callable[[Any], PyTree]
  layouts: Mapping[str, Layout]
  infer: Callable[[Mapping[str, Any], str], Any]

  def shapes(self, architecture: Any) -> PyTree:
    """Nested dict of ShapeDtypeStructs."""
    return sharding.unboxed(self.boxed(architecture))

  def tensors(
    self, architecture: Any, layout: str, dtypes: Mapping[str, Any]
  ) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """(shape, dtype) of the reference's tensors, in the order in which its module holds them.

    Args:
      architecture: the component's.
      layout: one of its layouts.
      dtypes: of our arrays, by path.

    Raises:
      UserError: if arrays of different dtypes would share a tensor.
    """
    rows, counts = self.layouts[layout].rows(architecture), self.counts(architecture)
    found: dict[str, np.dtype] = {}
    for cell in table.cells(rows, counts):
      dtype = np.dtype(dtypes[cell.path])
      for name, _ in cell.parts:
        if found.setdefault(name, dtype) != dtype:
          raise UserError(f'parts of {name} are {found[name]} and {dtype}: give one --dtype.')
    shapes = table.torch_shapes(rows, counts, self.shapes(architecture))
    return {name: (shape, found[name]) for name, shape in shapes.items()}

  def layout_of(self, names: Iterable[str]) -> str | None:
    """The layout that most of these tensors are named by; None if not one is in any."""
    names = list(names)
    best, most = None, 0
    for name, layout in self.layouts.items():
      heads = {_head(row.torch, layout.prefix) for row in layout.rows(self.example)}
      found = sum(_head(tensor, layout.prefix) in heads for tensor in names)
      if found > most:
        best, most = name, found
    return best


def _head(name: str, prefix: str) -> tuple[str, ...] | None:
  """What tells layouts apart: the first words of a name, up to where it counts."""
  if not name.startswith(prefix):
    return None
  words = name.removeprefix(prefix).split('.')[:2]
  return tuple(word for word in words if not word.isdigit() and '{' not in word)


def backbone(family: registry.ModelFamily) -> Component:
  """The backbone of a model family."""
  tables = _BACKBONES[family.name]
  return Component(
    folder='transformer',
    config=family.config,
    example=family.config(),
    boxed=lambda architecture: _boxed_backbone(family, architecture),
    **tables,
  )


# Traced once: a conversion asks for them again and again.
@functools.lru_cache
def _boxed_backbone(family: registry.ModelFamily, architecture: Any) -> PyTree:
  """What the backbone's parameters must be like, without making them."""

  return jax.eval_shape(lambda: family.init(family.backbone(architecture), jax.random.key(0)))


@functools.lru_cache
def _boxed_autoencoder(config: autoencoder_kl.AutoencoderConfig) -> PyTree:
  """What the autoencoder's parameters must be like, without making them."""
  edge, channels = config.downscale, config.in_channels // config.patch_size**2
  images = jax.ShapeDtypeStruct((1, edge, edge, channels), jnp.float32)
  module = autoencoder_kl.AutoencoderKL(config)
  return jax.eval_shape(module.init, jax.random.key(0), images)['params']


def _published_autoencoder(
  tensors: Mapping[str, Any], prefix: str
) -> autoencoder_kl.AutoencoderConfig:
  """FLUX.1's autoencoder; scale and shift of its latents are not in the tensors."""
  found = tensors.get(f'{prefix}encoder.conv_out.weight')
  if found is None or tuple(found.shape[:2]) != (32, 512):
    raise UserError(
      "The autoencoder is not FLUX.1's: put the config.json of diffusers' `vae` folder beside "
      'the weights, as vae/config.json.'
    )
  return autoencoder_kl.FLUX


_DIFFUSERS = 'diffusion_pytorch_model.safetensors'
_COMFYUI = 'flux1_checkpoint.safetensors'
# Family -> tables of its backbone.
_BACKBONES: dict[str, dict[str, Any]] = {
  'flux': dict(
    counts=flux_table.counts,
    layouts={
      'diffusers': Layout(flux_table.rows, f'transformer/{_DIFFUSERS}'),
      'original': Layout(flux_original.rows, 'flux1.safetensors'),
      'comfyui': Layout(flux_original.comfyui_rows, _COMFYUI, flux_original.COMFYUI_PREFIX),
    },
    infer=flux_original.infer_config,
  ),
}

AUTOENCODER = Component(
  folder='vae',
  config=autoencoder_kl.AutoencoderConfig,
  example=autoencoder_kl.FLUX,
  counts=autoencoder_table.counts,
  boxed=_boxed_autoencoder,
  layouts={
    'diffusers': Layout(autoencoder_table.rows, f'vae/{_DIFFUSERS}'),
    'original': Layout(autoencoder_original.rows, 'ae.safetensors'),
    'comfyui': Layout(
      autoencoder_original.comfyui_rows, _COMFYUI, autoencoder_original.COMFYUI_PREFIX
    ),
  },
  infer=_published_autoencoder,
)
