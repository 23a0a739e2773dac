"""What a FLUX.1 snapshot in diffusers' layout says of itself, in the terms of our eru_jax.json."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from eru_jax.errors import UserError

INDEX = 'model_index.json'
_PIPELINES = ('FluxPipeline', 'FluxImg2ImgPipeline')
_SCHEDULER = 'FlowMatchEulerDiscreteScheduler'
# The numbers behind `flow.resolution_mu`, as a scheduler's config has them if it has them at all.
_DYNAMIC = {
  'base_image_seq_len': 256,
  'max_image_seq_len': 4096,
  'base_shift': 0.5,
  'max_shift': 1.15,
}
# What else changes a scheduler's timesteps or steps -> the only value that there is here, which is
# that of FLUX.1, and diffusers' where the config does not have it.
_FIXED = {
  'num_train_timesteps': 1000,
  'use_beta_sigmas': False,
  'use_exponential_sigmas': False,
  'use_karras_sigmas': False,
  'shift_terminal': None,
  'time_shift_type': 'exponential',
  'invert_sigmas': False,
  'stochastic_sampling': False,
}
_RESOLUTION = 1024


def read_json(path: pathlib.Path, missing: str = 'copy or download it again') -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    UserError: if it is absent (saying what is `missing`), damaged, or no object.
  """
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{path} is missing: {missing}.') from None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f'{path} cannot be read ({error}): copy or download it again.') from error
  if not isinstance(values, dict):
    raise UserError(f'{path} holds no JSON object: copy the file again.')
  return values


def is_snapshot(directory: pathlib.Path) -> bool:
  return (directory / INDEX).is_file()


def settings(directory: pathlib.Path) -> dict[str, Any]:
  """Family, text encoder, size and sampler of a snapshot.

  Steps, text length and guidance are not written down anywhere in it: they are what the reference
  pipeline takes for a guidance-distilled model (FLUX.1-dev) and a step-distilled one (-schnell).

  Raises:
    UserError: if it is none of FLUX.1, or a file is missing or damaged.
  """
  name = read_json(directory / INDEX).get('_class_name')
  if name not in _PIPELINES:
    raise UserError(
      f'{directory / INDEX} describes a {name!r}: of published models only FLUX.1 can be read '
      f'({" or ".join(_PIPELINES)}).'
    )
  guided = read_json(directory / 'transformer' / 'config.json').get('guidance_embeds', False)
  path = directory / 'scheduler' / 'scheduler_config.json'
  sampling = published_sampler(guided)
  # Weights are copied about without their scheduler; then it is that of the published models.
  if path.exists():
    sampling['shift_mu'] = _shift_mu(read_json(path), path)
  return {
    'family': 'flux',
    'text_encoder': 'flux',
    'text_length': 512 if guided else 256,
    'resolution': _RESOLUTION,
    'sampling': sampling,
  }


def published_sampler(guided: bool) -> dict[str, Any]:
  """`sampling` of FLUX.1-dev, which is fed a guidance scale, or of -schnell, which is not."""
  if guided:
    return {'num_steps': 28, 'guidance': 3.5, 'shift_mu': None}
  return {'num_steps': 4, 'guidance': 0.0, 'shift_mu': 0.0}


def _shift_mu(scheduler: Mapping[str, Any], path: pathlib.Path) -> float | None:
  """`sampling.shift_mu` of a scheduler: None where it goes by the resolution."""
  if scheduler.get('_class_name') != _SCHEDULER:
    raise UserError(
      f'{path} describes a {scheduler.get("_class_name")!r}, but FLUX.1 is sampled with a '
      f'{_SCHEDULER}: copy or download the snapshot again.'
    )
  # A switch may be off as null, and shift_terminal as 0.
  odd = {
    k: scheduler[k] for k, v in _FIXED.items() if scheduler.get(k, v) != v and (v or scheduler[k])
  }
  if odd:
    raise UserError(
      f'{path}: {odd} asks for a sampler that is not built in; remove it to draw as FLUX.1 does, '
      f'with {dict((k, _FIXED[k]) for k in odd)}.'
    )
  if scheduler.get('use_dynamic_shifting'):
    odd = {k: scheduler[k] for k, v in _DYNAMIC.items() if scheduler.get(k, v) != v}
    if odd:
      raise UserError(
        f'{path}: {odd} differs from FLUX.1-dev, whose {_DYNAMIC} is built in: remove it to draw '
        'as FLUX.1-dev does.'
      )
    return None
  shift = scheduler.get('shift', 1.0)
  if not isinstance(shift, (int, float)) or not 0 < shift < math.inf:
    raise UserError(
      f'{path}: shift is {shift!r} but must be a positive number: copy or download it again.'
    )
  # The same map: s / (s + 1/t - 1) is FLUX's with s = e^mu.
  return math.log(shift)
