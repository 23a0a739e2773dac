"""Which safetensors files a model was made of, to the byte: so that the way back makes the same.

A converted directory keeps the headers of its source. They hold names, order, offsets, metadata and
even the white space; with the tensors' own bytes they are the files, whoever wrote them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from eru_jax.errors import UserError
from eru_jax.weights.sources import Weights, read_json
from eru_jax.weights.tensor_files import header_tensors

NAME = 'source.json'


@dataclasses.dataclass(frozen=True)
class Files:
  """Safetensors files without their tensors.

  Attributes:
    layouts: folder of a component -> the layout it is in.
    headers: path below the model directory -> header.
    indices: likewise, text of the index of a sharded set.
  """

  layouts: dict[str, str]
  headers: dict[str, bytes]
  indices: dict[str, str]


def of(source: pathlib.Path, weights: Sequence[Weights]) -> Files | None:
  """The files a model is made of, or was before it was converted; None if they cannot be made
  again from its components.

  Raises:
    UserError: if the record of an earlier conversion is damaged.
  """
  if any(part.layout == 'eru' for part in weights):
    path = source / NAME
    if not path.exists():
      return None
    files = _load(path)
  else:
    directory = source if source.is_dir() else source.parent
    files = Files({}, {}, {})
    for part in weights:
      files.layouts[part.component.folder] = part.layout
      folder = part.place.parent.relative_to(directory)
      found = part.stored.files
      for name, header in found.headers.items():
        files.headers[(folder / name).as_posix()] = header
      if found.index is not None:
        files.indices[(folder / found.path.name).as_posix()] = found.index
  return files if _complete(files, weights) else None


def _complete(files: Files, weights: Sequence[Weights]) -> bool:
  """Whether the files hold the components' tensors and nothing else."""
  wanted = {}
  for part in weights:
    layout = files.layouts.get(part.component.folder)
    if layout not in part.component.layouts:
      return False
    wanted |= part.tensors(layout)
  found = {}
  for path, header in files.headers.items():
    for name, tensor in header_tensors(header, pathlib.Path(path)).items():
      if name in found:
        return False
      found[name] = (tensor.shape, tensor.dtype)
  return found == wanted


def save(directory: pathlib.Path, files: Files) -> None:
  """Keeps a record in a model directory."""
  values = dataclasses.asdict(files)
  values['headers'] = {path: header.decode() for path, header in files.headers.items()}
  (directory / NAME).write_text(json.dumps(values, indent=1) + '\n', encoding='utf-8')


def _load(path: pathlib.Path) -> Files:
  values = read_json(path)
  try:
    files = Files(
      _texts(values['layouts']),
      {name: text.encode() for name, text in _texts(values['headers']).items()},
      _texts(values['indices']),
    )
    for name in (*files.headers, *files.indices):
      parts = pathlib.PurePosixPath(name).parts
      if name.startswith('/') or not parts or '..' in parts:
        raise ValueError(f'{name!r} is no path below the directory')
    for name, header in files.headers.items():
      header_tensors(header, path / name)
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged ({error}): remove it to write new files.') from error
  return files


def _texts(values: object) -> dict[str, str]:
  if not isinstance(values, dict) or not all(isinstance(text, str) for text in values.values()):
    raise ValueError('no table of texts')
  return values
