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
from eru_jax.weights import layouts, source_record, sources, table
from eru_jax.weights.source_record import Files
from eru_jax.weights.sources import ARRAYS, Weights
from eru_jax.weights.tensor_files import TensorWriter, make_header

LAYOUTS = ('eru', 'diffusers', 'original', 'comfyui')
DTYPES = ('float32', 'bfloat16', 'float16')
# Where diffusers' save_pretrained begins a new file.
_SHARD_BYTES = 10 * 10**9
# Larger files are linked rather than copied, if both directories are on one disk.
_LINKED_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class ConversionRequest:
  """What to convert into what.

  Attributes:
    family: the model family.
    source: a model directory, or a safetensors file.
    output: a directory that is not there yet, or empty.
    to: one of LAYOUTS.
    int8: whether to round the backbone's kernels to int8; for the layout eru.
    dtype: one of DTYPES to cast to; None keeps every tensor to the bit.
    shard_bytes: size at which new files in diffusers' layout are split.
  """

  family: str
  source: str
  output: str
  to: str = 'eru'
  int8: bool = False
  dtype: str | None = None
  shard_bytes: int = _SHARD_BYTES


def convert(request: ConversionRequest) -> list[str]:
  """Converts a model; the output directory appears when all of it is there.

  Returns:
    What was done, one line an item.

  Raises:
    UserError: if the source is missing, damaged or of another model, or the output exists or
      cannot be written.
  """
  source, output = (pathlib.Path(p).expanduser() for p in (request.source, request.output))
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
        folder = temporary.absolute() / part.component.folder
        orbax_arrays.save(folder / ARRAYS, part.arrays())
      if files is not None:
        source_record.save(temporary, files)
    else:
      if files is None or set(files.layouts.values()) != {request.to}:
        files = _new_files(request, weights)
      _write_files(temporary, request.to, weights, files)
    carried = _carry_over(request, source, temporary, weights)
    os.replace(temporary, output)
  except OSError as error:
    raise UserError(f'{output} cannot be written: {error.strerror or error}.') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  lines = []
  for part in weights:
    size = sum(math.prod(spec.shape) for spec in part.specs().values())
    lines.append(f'{part.component.folder}: {size:,} numbers, {part.layout} -> {request.to}')
  return lines + ([f'carried over: {", ".join(carried)}'] if carried else [])


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
  backbone = layouts.backbone(registry.family(request.family))
  weights = [sources.open_weights(backbone, source, cast, '' if request.int8 else None)]
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


def _new_files(request: ConversionRequest, weights: Sequence[Weights]) -> Files:
  """Files as the authors of a layout would write them.

  Raises:
    UserError: if arrays of different dtypes would share a tensor.
  """
  headers: dict[str, dict[str, tuple[tuple[int, ...], Any]]] = {}
  indices = {}
  for part in weights:
    layout = part.component.layouts[request.to]
    tensors = part.tensors(request.to)
    shards = [list(tensors)]
    if request.to == 'diffusers':
      shards = _shards(tensors, request.shard_bytes)
    if len(shards) == 1:
      headers.setdefault(layout.file, {}).update(tensors)
      continue
    stem, kind = layout.file.rsplit('.', 1)
    paths = [f'{stem}-{i + 1:05d}-of-{len(shards):05d}.{kind}' for i in range(len(shards))]
    for path, names in zip(paths, shards, strict=True):
      headers[path] = {name: tensors[name] for name in names}
    indices[f'{layout.file}.index.json'] = _index(dict(zip(paths, shards, strict=True)), tensors)
  return Files(
    {part.component.folder: request.to for part in weights},
    {path: make_header(tensors, {'format': 'pt'}) for path, tensors in headers.items()},
    indices,
  )


def _bytes(tensor: tuple[tuple[int, ...], Any]) -> int:
  return math.prod(tensor[0]) * np.dtype(tensor[1]).itemsize


def _shards(tensors: Mapping[str, tuple], limit: int) -> list[list[str]]:
  """Names by file, split where diffusers splits: a file ends before the tensor that would make it
  too large, and a tensor that is too large by itself has its own."""
  shards, current, total = [], [], 0
  for name, tensor in tensors.items():
    size = _bytes(tensor)
    if size > limit:
      shards.append([name])
      continue
    if total + size > limit:
      shards.append(current)
      current, total = [], 0
    current.append(name)
    total += size
  return [*shards, current] if current else shards


def _index(shards: Mapping[str, Sequence[str]], tensors: Mapping[str, tuple]) -> str:
  """Text of diffusers' index of a sharded model."""
  where = {name: pathlib.PurePath(path).name for path, names in shards.items() for name in names}
  total = sum(_bytes(tensors[name]) for name in where)
  values = {'metadata': {'total_size': total}, 'weight_map': where}
  return json.dumps(values, indent=2, sort_keys=True) + '\n'


def _write_files(
  directory: pathlib.Path, to: str, weights: Sequence[Weights], files: Files
) -> None:
  writers = []
  try:
    for path, header in files.headers.items():
      writers.append(TensorWriter(directory / path, header))
    where = {name: writer for writer in writers for name in writer.tensors}
    for part in weights:
      rows = part.component.layouts[to].rows(part.config)
      cells = {cell.path: cell for cell in table.cells(rows, part.component.counts(part.config))}
      for path, array in part.arrays():
        _write_array(cells[path], array, where)
        del array  # Before the next one is made.
    for writer in writers:
      writer.finish()
  finally:
    for writer in writers:
      writer.close()
  for path, text in files.indices.items():
    (directory / path).write_text(text, encoding='utf-8')


def _write_array(cell: table.Cell, array: np.ndarray, where: Mapping[str, TensorWriter]) -> None:
  for name, first, piece in table.scatter(cell, array):
    where[name].write(name, first, piece)


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
