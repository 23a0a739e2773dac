"""Where the weights of a model are, whichever layout they are in.

A model directory has diffusers' folders. A component's weights are the first of: our Orbax arrays
(`transformer/arrays`), diffusers' file or shards (`diffusion_pytorch_model.safetensors` in
`transformer/`), and a file beside the folders in a layout of the component, as Black Forest Labs'
are. A model may also be such a file alone. Architectures are in `transformer/config.json` and
`vae/config.json`; single files without one are taken for the published model if shapes allow it.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from eru_jax.errors import UserError, listed
from eru_jax.models import registry
from eru_jax.models.quantize import is_quantised
from eru_jax.weights import arrays as orbax_arrays
from eru_jax.weights import snapshot
from eru_jax.weights.casting import fill
from eru_jax.weights.layouts import Component
from eru_jax.weights.streaming import Stored, sharding_of
from eru_jax.weights.tensor_files import TensorFiles

ARRAYS = 'arrays'
_LAYOUT = 'a model directory holds eru_jax.json (or model_index.json), transformer/ and vae/'


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """An object out of a JSON file of a model directory.

  Raises:
    UserError: if it is missing, damaged or something else.
  """
  return snapshot.read_json(path, _LAYOUT)


def read_settings(directory: pathlib.Path) -> dict[str, Any]:
  """Contents of a model directory's eru_jax.json, or what a published snapshot says instead.

  Raises:
    UserError: if it is missing or damaged.
  """
  path = directory / 'eru_jax.json'
  if not snapshot.is_snapshot(directory):
    return read_json(path)
  own = read_json(path) if path.exists() else {}
  return {**snapshot.settings(directory), **own}


def has_settings(directory: pathlib.Path) -> bool:
  """Whether a directory says what model it holds."""
  return (directory / 'eru_jax.json').is_file() or snapshot.is_snapshot(directory)


def family_of(settings: Mapping[str, Any]) -> registry.ModelFamily:
  """The model family that settings name.

  Raises:
    UserError: if there is no such family.
  """
  name = settings.get('family', '')
  return registry.family(name if isinstance(name, str) else repr(name))


@dataclasses.dataclass(frozen=True)
class Weights:
  """The weights of one component, not read yet.

  Attributes:
    component: the component.
    config: its architecture.
    place: the files, or the directory of Orbax arrays.
    layout: one of the component's, or 'eru' for Orbax arrays.
    stored: how the files are read; None for Orbax arrays.
    cast: dtype to cast to; None keeps the stored one.
  """

  component: Component
  config: Any
  place: pathlib.Path
  layout: str
  stored: Stored | None
  cast: Any = None

  def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of what `arrays` yields, by path.

    Raises:
      UserError: listing all tensors that do not fit the architecture.
    """
    if self.stored is not None:
      return self.stored.specs()
    found = {
      path: jax.ShapeDtypeStruct(spec.shape, self._dtype(path, spec.dtype))
      for path, spec in orbax_arrays.specs(self.place).items()
    }
    self._check(found)
    return found

  def uncast(self) -> 'Weights':
    """The same in the dtype of the files."""
    stored = None if self.stored is None else dataclasses.replace(self.stored, cast=None)
    return dataclasses.replace(self, stored=stored, cast=None)

  def is_rounded(self, pattern: str) -> bool:
    """Whether all kernels of the layers that a regular expression is found in are int8 already.

    Raises:
      UserError: as `specs`.
    """
    kernels = [x.dtype for path, x in self.specs().items() if is_quantised(path, x.shape, pattern)]
    return all(dtype == np.int8 for dtype in kernels)

  def tensors(self, layout: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """(shape, dtype) of the reference's tensors in one of the component's layouts, in the order in
    which its module holds them.

    Raises:
      UserError: as `specs`, or if arrays of different dtypes would share a tensor.
    """
    dtypes = {path: np.dtype(spec.dtype) for path, spec in self.specs().items()}
    try:
      return self.component.tensors(self.config, layout, dtypes)
    except UserError as error:
      raise error.at(self.place) from error

  def _dtype(self, path: str, dtype: Any) -> Any:
    if self.cast is None or dtype == np.int8 or path.endswith('kernel_scale'):
      return dtype
    return np.dtype(self.cast)

  def _check(self, found: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Compares Orbax arrays with the architecture."""
    shapes = traverse_util.flatten_dict(self.component.shapes(self.config), sep='/')
    wanted = {path: tuple(spec.shape) for path, spec in shapes.items()}
    for path, shape in list(wanted.items()):
      if path in found and found[path].dtype == np.int8 and is_quantised(path, shape, ''):
        wanted[f'{path}_scale'] = (*shape[:-2], shape[-1])
    problems = {
      'missing': sorted(set(wanted) - set(found)),
      'unexpected': sorted(set(found) - set(wanted)),
      'wrong shape': [
        f'{path} {tuple(found[path].shape)} instead of {shape}'
        for path, shape in wanted.items()
        if path in found and tuple(found[path].shape) != shape
      ],
    }
    if any(problems.values()):
      raise UserError(
        f'{self.place}: the arrays do not fit this model: check that they and config.json belong '
        'together.',
        listed(problems),
      )

  def arrays(
    self, shardings: Mapping[str, jax.sharding.Sharding] | None = None
  ) -> Iterator[tuple[str, Any]]:
    """Yields (path, array), of which the host holds one at a time (of small ones, some).

    Args:
      shardings: path -> where an array goes; None keeps them on the host, as numpy arrays.

    Raises:
      UserError: as `specs`, or if what is stored is damaged or too large for the dtype.
    """
    if self.stored is not None:
      yield from self.stored.arrays(shardings)
      return
    wanted = self.specs()
    where = None
    if shardings is not None:
      where = {path: sharding_of(path, len(spec.shape), shardings) for path, spec in wanted.items()}
    for path, array in orbax_arrays.load(self.place, where):
      dtype = wanted[path].dtype
      if array.dtype != dtype and isinstance(array, np.ndarray):
        values, array = array, np.empty(array.shape, dtype)
        fill(array, values, f'{self.place}: {path}')
      yield path, array.astype(dtype, copy=False)


def open_weights(
  component: Component, source: pathlib.Path, cast: Any = None, int8: str | None = None
) -> Weights:
  """Finds the weights of a component and looks at what describes them.

  Args:
    component: the component.
    source: a model directory, or a safetensors file.
    cast: dtype to cast to; None keeps the stored one.
    int8: as of `streaming.Stored`.

  Raises:
    UserError: if there are none, they are in no layout the component has, or it cannot be told
      which of several to take.
  """
  directory = source if source.is_dir() else source.parent
  config_path = directory / component.folder / 'config.json'
  config = _architecture(component, config_path) if config_path.exists() else None
  arrays = directory / component.folder / ARRAYS
  if source.is_dir() and orbax_arrays.exists(arrays):
    if config is None:
      read_json(config_path)
    weights = Weights(component, config, arrays, 'eru', None, cast)
    if int8 is not None and not weights.is_rounded(int8):
      raise UserError(
        f'Kernels are rounded to int8 as they are read from safetensors, and {arrays} holds whole '
        'ones in Orbax arrays: convert the files they were made of once more, with --int8.'
      )
    return weights
  files = TensorFiles(source) if source.is_file() else _files(component, source, config_path)
  name = component.layout_of(files.tensors)
  if name is None:
    raise UserError(
      f'{files.path} holds no weights of this kind: not one of its {len(files.tensors)} tensors is '
      f'named as in {" or ".join(component.layouts)}. Check which model it is of.'
    )
  layout = component.layouts[name]
  if config is None:
    if name == 'diffusers':
      read_json(config_path)
    config = component.infer(files.tensors, layout.prefix)
  stored = Stored(
    files,
    layout.rows(config),
    component.counts(config),
    component.shapes(config),
    cast,
    int8,
    layout.prefix,
  )
  return Weights(component, config, files.path, name, stored, cast)


def _architecture(component: Component, path: pathlib.Path) -> Any:
  """The architecture in a config.json; errors name the file."""
  values = read_json(path)
  try:
    return component.config.from_dict(values)
  except UserError as error:
    raise error.at(path) from error


def holds(component: Component, source: pathlib.Path) -> bool:
  """Whether a model directory or a file has weights of a component.

  Raises:
    UserError: if a file in question is damaged.
  """
  if source.is_file():
    return component.layout_of(TensorFiles(source).tensors) is not None
  return (source / component.folder).is_dir() or bool(_beside(component, source))


def _beside(component: Component, directory: pathlib.Path) -> list[TensorFiles]:
  """Files with weights of a component that lie beside the folders."""
  found = [TensorFiles(path) for path in sorted(directory.glob('*.safetensors'))]
  return [files for files in found if component.layout_of(files.tensors) is not None]


def _files(component: Component, directory: pathlib.Path, config_path: pathlib.Path) -> TensorFiles:
  """The weight files of a component in a model directory."""
  usual = directory / component.layouts['diffusers'].file
  if usual.exists() or usual.with_name(f'{usual.name}.index.json').exists():
    return TensorFiles(usual)
  found = _beside(component, directory)
  if len(found) > 1:
    names = ', '.join(files.path.name for files in found)
    raise UserError(
      f'{directory} holds weights for `{component.folder}` in several files ({names}): leave one '
      'of them there.'
    )
  if not found:
    read_json(config_path)
  return found[0] if found else TensorFiles(usual)
