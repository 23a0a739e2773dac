"""The directory of a run: which config it belongs to, and what was measured in it so far."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from eru_jax import distributed
from eru_jax.errors import UserError
from eru_jax.files import replace_file
from eru_jax.training.config import (
  DATA_FILES,
  MODEL_NAMES,
  NO_PATHS,
  ExperimentConfig,
  absolute,
  from_mapping,
  to_json,
)
from eru_jax.training.evaluation import Evaluation, Generated
from eru_jax.training.mirror import Workdir
from eru_jax.weights.safetensors_io import read_safetensors, write_safetensors

# What may differ between the runs of one workdir, because no score depends on it.
_FREE = (
  'title', 'wandb_project', 'mesh', 'watch', 'evaluation.diagnosis',
  *(
    f'no_rl.judge.{name}'
    for name in ('url', 'timeout', 'attempts', 'concurrency', 'max_tokens', 'max_unscored', 'price')
  ),
)  # fmt: skip
# What a run has achieved. A workdir without any of it belongs to nobody yet.
_RESULTS = ('checkpoints', 'evaluations', 'metrics.jsonl', 'summary.json', 'model')
# Key of config.json, beside the config: file -> SHA-256 of what it held when the run began.
_INPUTS = 'inputs'


def _differences(old: Any, new: Any, where: str = '') -> list[str]:
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    paths = {key: f'{where}.{key}' if where else key for key in {**old, **new}}
    return [
      line
      for key, path in paths.items()
      if path not in _FREE
      for line in _differences(old.get(key), new.get(key), path)
    ]
  return [] if old == new else [f'{where} was {old!r} and is now {new!r}']


def read_config(workdir: pathlib.Path) -> tuple[Any, dict[str, str]]:
  """The config a workdir belongs to, as JSON data, and the SHA-256 of each of its input files.

  Raises:
    OSError, ValueError: if config.json cannot be read.
  """
  values = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
  if not isinstance(values, dict):
    return values, {}
  if _INPUTS not in values and isinstance(values.get('model'), dict):
    # Before they kept their inputs, workdirs stated a default and used the model's own encoder.
    if values['model'].get('source') != 'scratch':
      values['model'].pop('text_encoder', None)
  inputs = values.pop(_INPUTS, {})
  return values, inputs


def _input_hashes(config: dict[str, Any]) -> dict[str, str]:
  found = {}
  paths = [config['adapter'], *(config['data'][name] for name in DATA_FILES)]
  no_rl = config.get('no_rl', {})
  paths += [no_rl.get('reward_anchors', ''), no_rl.get('judge', {}).get('instructions', '')]
  for path in paths:
    # Whoever reads it for its prompts can say better what is wrong with it.
    with contextlib.suppress(OSError):
      if path not in NO_PATHS:
        found[path] = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
  return found


def claim(workdir: pathlib.Path, config: dict[str, Any]) -> None:
  """Makes the directory this config's, or checks that it is.

  Args:
    workdir: the directory, which need not exist.
    config: a resolved config as JSON data.

  Raises:
    UserError: if it holds results of a run of another config or of other prompts, or other things.
  """
  path = workdir / 'config.json'
  config = json.loads(json.dumps(config))
  inputs = _input_hashes(config)
  if path.is_file():
    try:
      old, old_inputs = read_config(workdir)
    except ValueError as error:
      raise UserError(f'{path} is damaged ({error}): choose another --workdir.') from error
    if any((workdir / name).exists() for name in _RESULTS):
      _check_same(workdir, old, config, old_inputs, inputs)
      return
  elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise UserError(
      f'{workdir} is not empty and holds no run (config.json is missing): choose another --workdir.'
    )
  replace_file(path, (json.dumps({**config, _INPUTS: inputs}, indent=2) + '\n').encode())


def join(workdir: Workdir, config: dict[str, Any]) -> None:
  """`claim` for a run of several processes, of which the first does it.

  Raises:
    UserError: as `claim`, or if the others do not see what the first has written.
  """
  if distributed.is_main():
    workdir.pull()
    claim(workdir.local, config)
    workdir.push()
  distributed.barrier()
  if not distributed.is_main():
    workdir.pull()
  if not (workdir.local / 'config.json').is_file():
    raise UserError(
      f'{workdir.place} is not the directory that process 0 has just written to: choose a '
      '--workdir on a disk that all machines of the run share.'
    )


def _check_same(
  workdir: pathlib.Path,
  old: Any,
  new: dict[str, Any],
  old_inputs: dict[str, str],
  new_inputs: dict[str, str],
) -> None:
  """Raises UserError if a config or its input files are not those that a workdir belongs to."""
  changed = _differences(_as_resolved(old, new), new)
  if changed:
    raise UserError(
      f'{workdir} belongs to a run of another config ({"; ".join(changed[:3])}): choose another '
      '--workdir, or go back to that config to continue it.'
    )
  for path, digest in new_inputs.items():
    if old_inputs.get(path, digest) != digest:
      raise UserError(
        f'{path} has changed since the run in {workdir} began: choose another --workdir, or put '
        'the old file back to continue it.'
      )


def _as_resolved(old: Any, new: dict[str, Any]) -> Any:
  """A config as workdirs used to keep it, as they do now: paths absolute, no key left out."""
  if not isinstance(old, dict):
    return old
  old = dict(old)
  for section, key, names in (('model', 'source', MODEL_NAMES), ('data', 'pairs', NO_PATHS)):
    if isinstance(old.get(section), dict) and isinstance(old[section].get(key), str):
      old[section] = {**old[section], key: absolute(old[section][key], names)}
  if isinstance(old.get('model'), dict):
    old['model'] = {'text_encoder': new['model']['text_encoder'], **old['model']}
  try:
    # A key that the config did not have then has the default that does what was done then.
    return json.loads(json.dumps(to_json(from_mapping(ExperimentConfig, old))))
  except UserError:
    return old


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
