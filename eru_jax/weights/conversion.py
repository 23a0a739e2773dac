"""Conversion of a model from one layout into another, one array at a time."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (makes `bfloat16` a name that numpy knows)
import numpy as np

from eru_jax.errors import UserError
from eru_jax.files import check_directory
from eru_jax.models import registry
from eru_jax.weights import arrays as orbax_arrays
from eru_jax.weights import layouts, source_record, sources, writing
from eru_jax.weights.sources import ARRAYS, Weights

# Of a run's workdir: the model it has trained, if that was a whole one.
MODEL = 'model'
LAYOUTS = ('eru', 'diffusers', 'original', 'comfyui')
DTYPES = ('float32', 'bfloat16', 'float16')
# Larger files are linked rather than copied, if both directories are on one disk.
_LINKED_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class ConversionRequest:
  """What to convert into what.

  Attributes:
    family: the model family.
    source: a model directory, a safetensors file, or the workdir of a run that left a `model/`.
    output: a directory that is not there yet, or empty.
    to: one of LAYOUTS.
    int8: whether to round the kernels of the backbone's blocks to int8; for the layout eru.
    dtype: one of DTYPES to cast to; None keeps every tensor to the bit.
    shard_bytes: size at which new files in diffusers' layout are split.
  """

  family: str
  source: str
  output: str
  to: str = 'eru'
  int8: bool = False
  dtype: str | None = None
  shard_bytes: int = writing.SHARD_BYTES


def convert(request: ConversionRequest) -> list[str]:
  """Converts a model; the output directory appears when all of it is there.

  Returns:
    What was done, one line an item.

  Raises:
    UserError: if the source is missing, damaged or of another model, or the output exists or
      cannot be written.
  """
  source, output = (pathlib.Path(p).expanduser() for p in (request.source, request.output))
  source = _trained_model(source)
  _check_request(request, source, output)
  weights = _open(request, source)
  files = None
  if not request.int8 and request.dtype is None:
    files = source_record.of(source, weights)

  temporary = output.with_name(f'{output.name}.{os.getpid()}.partial')
  try:
    temporary.mkdir(parents=True)
    if request.to == 'eru':
      for part in weights:
        folder = temporary / part.component.folder
        orbax_arrays.save(folder / ARRAYS, part.arrays())
      if files is not None:
        source_record.save(temporary, files)
    else:
      if files is None or set(files.layouts.values()) != {request.to}:
        files = writing.new_files(weights, request.to, request.shard_bytes)
      writing.write(temporary, request.to, weights, files)
    carried = _carry_over(request, source, temporary, weights)
    os.replace(temporary, output)
  except OSError as error:
    raise UserError(f'{output} cannot be written: {error.strerror or error}.') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  lines = []
  for part in weights:
    # Scales of int8 kernels are no numbers of the model, but how some of them are stored.
    specs = {k: spec for k, spec in part.specs().items() if not k.endswith('/kernel_scale')}
    size = sum(math.prod(spec.shape) for spec in specs.values())
    lines.append(f'{part.component.folder}: {size:,} numbers, {part.layout} -> {request.to}')
  if carried:
    lines.append(f'carried over: {", ".join(carried)}')
  if len(weights) == 1:
    lines.append(
      f'{source} has no autoencoder: to draw with {output}, copy the other files and folders of a '
      'snapshot into it (docs/weights.md)'
    )
  return lines


def _trained_model(source: pathlib.Path) -> pathlib.Path:
  """The model that a run has left, where the source is its workdir; else the source."""
  if not (source / 'config.json').is_file() or sources.has_settings(source):
    return source
  model = source / MODEL
  if (source / 'checkpoints').is_dir() and not sources.has_settings(model):
    raise UserError(
      f'{source} is the workdir of a run that has no {MODEL}/: it is not finished, or it trained '
      'adapters, which are in its adapters/ in the forms of diffusers and ComfyUI.'
    )
  return model if sources.has_settings(model) else source


def _check_request(request: ConversionRequest, source: pathlib.Path, output: pathlib.Path) -> None:
  for name, value, valid in (('to', request.to, LAYOUTS), ('dtype', request.dtype, DTYPES)):
    if value is not None and value not in valid:
      raise UserError(f'--{name}={value}: choose one of {", ".join(valid)}.')
  family = registry.family(request.family)
  if request.int8 and request.to != 'eru':
    raise UserError(f'--int8 is a storage of our own, which --to={request.to} does not know.')
  if not source.exists():
    raise UserError(f'There is nothing at {source}: give a model directory or a .safetensors file.')
  if source.is_dir() and sources.has_settings(source):
    found = sources.family_of(sources.read_settings(source))
    if found is not family:
      raise UserError(f'{source} is a model of the family {found.name}, not {family.name}.')
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise UserError(f'{output} is there already: choose another --output, or remove it.')
  if source.resolve() in (output.resolve(), *output.resolve().parents):
    raise UserError(f'{output} lies inside of {source}: choose another --output.')
  check_directory(output)


def _open(request: ConversionRequest, source: pathlib.Path) -> list[Weights]:
  """The components, all of whose headers fit."""
  cast = None if request.dtype is None else np.dtype(request.dtype)
  family = registry.family(request.family)
  blocks = family.blocks if request.int8 else None
  weights = [sources.open_weights(layouts.backbone(family), source, cast, blocks)]
  # Backbones are published alone, too.
  if sources.holds(layouts.AUTOENCODER, source):
    weights.append(sources.open_weights(layouts.AUTOENCODER, source, cast))
  for part in weights:
    if request.to != 'eru' and any(spec.dtype == np.int8 for spec in part.specs().values()):
      raise UserError(
        f'{part.place} holds int8 kernels, which --to={request.to} does not know: convert from the '
        'files they were made of.'
      )
  return weights


def carry_over(
  source: pathlib.Path, target: pathlib.Path, converted: Collection[str] = ('transformer', 'vae')
) -> list[str]:
  """Copies what a model directory has beside its weights: text encoders, tokenisers and so on.

  Args:
    source: the model directory.
    target: another one; made if needed.
    converted: folders that are left out.

  Returns:
    The names of what was copied.

  Raises:
    OSError: if it cannot be copied.
  """
  target.mkdir(parents=True, exist_ok=True)
  carried = []
  for path in sorted(source.iterdir()):
    kept = path.name not in (*converted, source_record.NAME) and not path.name.startswith('.')
    if kept and path.exists() and '.safetensors' not in path.name:
      _copy(path, target / path.name)
      carried.append(path.name)
  return carried


def _carry_over(
  request: ConversionRequest,
  source: pathlib.Path,
  target: pathlib.Path,
  weights: Sequence[Weights],
) -> list[str]:
  """Everything of a model directory that is no weight of a converted component, as it is."""
  directory = source if source.is_dir() else source.parent
  for part in weights:
    folder = part.component.folder
    (target / folder).mkdir(exist_ok=True)
    config = directory / folder / 'config.json'
    if config.exists():
      shutil.copyfile(config, target / folder / 'config.json')
    else:
      _write_json(target / folder / 'config.json', part.config.to_dict())
  converted = {part.component.folder for part in weights}
  carried = carry_over(source, target, converted) if source.is_dir() else []
  settings, plain = target / 'eru_jax.json', {'family': request.family}
  if not settings.exists() and (request.to == 'eru' or not sources.has_settings(target)):
    _write_json(settings, plain)
  elif request.to != 'eru' and (target / 'model_index.json').exists():
    # Written by us on the way in: a snapshot of diffusers says as much without it.
    if settings.exists() and sources.read_json(settings) == plain:
      settings.unlink()
      carried.remove(settings.name)
  return carried


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a file or a tree; large files become hard links where that is possible."""
  if source.is_dir():
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
      if path.exists():
        _copy(path, target / path.name)
    return
  # One that is there may be a link to the source, of a copy that was broken off.
  target.unlink(missing_ok=True)
  if source.stat().st_size > _LINKED_BYTES:
    try:
      # A hub's cache is full of symbolic links, which would dangle when it is cleaned.
      os.link(source.resolve(), target)
      return
    except OSError:
      pass  # Another disk, or one without links.
  shutil.copyfile(source, target)
