"""The directory of a run: which config it belongs to, and what was measured in it so far."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from eru_jax.errors import UserError
from eru_jax.files import replace_file
from eru_jax.training.evaluation import Evaluation, Generated
from eru_jax.weights.safetensors_io import read_safetensors, write_safetensors

# What may differ between the runs of one workdir, because no number depends on it.
_FREE = ('title', 'wandb_project', 'mesh')


def _differences(old: Any, new: Any, where: str = '') -> list[str]:
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    keys = [key for key in {**old, **new} if where or key not in _FREE]
    return [
      line
      for key in keys
      for line in _differences(old.get(key), new.get(key), f'{where}.{key}' if where else key)
    ]
  return [] if old == new else [f'{where} was {old!r} and is now {new!r}']


def claim(workdir: pathlib.Path, config: dict[str, Any]) -> None:
  """Makes the directory this config's, or checks that it is.

  Raises:
    UserError: if it belongs to a run of another config, or holds other things.
  """
  path = workdir / 'config.json'
  config = json.loads(json.dumps(config))
  if path.is_file():
    try:
      old = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
      raise UserError(f'{path} is damaged ({error}): choose another --workdir.') from error
    changed = _differences(old, config)
    if changed:
      raise UserError(
        f'{workdir} belongs to a run of another config ({"; ".join(changed[:3])}): choose another '
        '--workdir, or go back to that config to continue it.'
      )
    return
  if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise UserError(
      f'{workdir} is not empty and holds no run (config.json is missing): choose another --workdir.'
    )
  replace_file(path, (json.dumps(config, indent=2) + '\n').encode())


def save_evaluation(workdir: pathlib.Path, label: str, evaluation: Evaluation) -> None:
  """Keeps an evaluation, so that a resumed run need not repeat it."""
  directory = workdir / 'evaluations'
  directory.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for split, generated in evaluation.generated.items():
    tensors[f'{split}/images'] = generated.images
    tensors[f'{split}/shown'] = generated.shown.astype(np.int32)
  write_safetensors(directory / f'{label}.safetensors', tensors)
  replace_file(directory / f'{label}.json', json.dumps(evaluation.scores).encode())


def load_evaluation(workdir: pathlib.Path, label: str) -> Evaluation | None:
  """What `save_evaluation` kept under this label, or None if there is nothing whole."""
  path = workdir / 'evaluations' / f'{label}.json'
  try:
    scores = json.loads(path.read_text(encoding='utf-8'))
    tensors = read_safetensors(path.with_suffix('.safetensors'))
    splits = [name.removesuffix('/images') for name in tensors if name.endswith('/images')]
    generated = {s: Generated(tensors[f'{s}/images'], tensors[f'{s}/shown']) for s in splits}
  except (OSError, ValueError, KeyError):
    return None
  return Evaluation(scores, generated)
