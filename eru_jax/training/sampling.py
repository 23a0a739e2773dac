"""What `python -m eru_jax.sample` does: prompts in, pictures and a grid out."""

import dataclasses
import io
import json
import math
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from eru_jax import distributed, flow, sharding
from eru_jax.data.image_files import read_image
from eru_jax.data.pairs import read_lines, read_prompt_file
from eru_jax.data.text_encoder import check_prompts
from eru_jax.errors import UserError
from eru_jax.files import check_directory, replace_file
from eru_jax.models.registry import DiffusionModel
from eru_jax.training.config import ExperimentConfig, SamplingConfig
from eru_jax.training.evaluation import draw, judge_of, start_noise
from eru_jax.training.experiment import with_adapters
from eru_jax.training.modules import described
from eru_jax.training.pictures import enlargement, image_grid, png_bytes, save_png
from eru_jax.training.restore import open_model, read_config, snapshots
from eru_jax.training.run import enable_compilation_cache
from eru_jax.training.stages import evaluated_as
from eru_jax.training.together import together
from eru_jax.weights.lora_io import check_lora

# Of --image, if nobody says, as in diffusers' img2img.
_STRENGTH = 0.6


@dataclasses.dataclass(frozen=True)
class SampleRequest:
  """The flags of `sample`, see there."""

  model: str
  output: str
  stage: str | None = None
  prompts: tuple[str, ...] = ()
  prompt_file: str | None = None
  steps: int | None = None
  guidance: float | None = None
  cfg_scale: float | None = None
  height: int | None = None
  width: int | None = None
  seed: int = 0
  num_images: int = 1
  latents: str | None = None
  save_latents: bool = False
  image: str | None = None
  strength: float | None = None
  dtype: str | None = None
  batch_size: int | None = None
  lora: tuple[str, ...] = ()
  lora_scale: tuple[float, ...] = ()
  mesh: str | None = None


def _prompts(request: SampleRequest) -> list[str]:
  prompts = list(request.prompts)
  if request.prompt_file is not None:
    path = pathlib.Path(request.prompt_file).expanduser()
    if path.suffix.lower() in ('.jsonl', '.json'):
      prompts += [pair.implicit for pair in read_prompt_file(path)]
    else:
      prompts += read_lines(path)
  if not prompts:
    raise UserError('There is nothing to draw: give --prompt (repeatable) or --prompts=FILE.')
  check_prompts(prompts)  # before the world's own prompts come in front of them
  return prompts


def _read_noise(path: str) -> np.ndarray:
  try:
    noise = np.load(pathlib.Path(path).expanduser(), allow_pickle=False)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise UserError(f'--latents={path} is not a readable .npy file: {error}.') from error
  if not isinstance(noise, np.ndarray):
    raise UserError(f'--latents={path} is an archive: give the .npy file of one array.')
  if noise.dtype != np.float32:
    raise UserError(f'--latents={path} holds {noise.dtype}: store it as float32.')
  if not np.isfinite(noise).all():
    raise UserError(f'--latents={path} holds numbers that are not finite: draw them anew.')
  return noise


def _check(request: SampleRequest) -> None:
  """Raises UserError for flags that mean nothing alone, and numbers that are none."""
  if request.lora_scale and not request.lora:
    raise UserError('--lora_scale is given without --lora: name the adapter that it scales.')
  if request.strength is not None and request.image is None:
    raise UserError('--strength is given without --image: name the picture to set out from.')
  names = ('guidance', 'cfg_scale', 'strength')
  numbers = {name: getattr(request, name) for name in names}
  for name, value in (*numbers.items(), *(('lora_scale', scale) for scale in request.lora_scale)):
    if value is not None and not math.isfinite(value):
      raise UserError(f'--{name}={value:g}: give a finite number.')


def _check_stage(stage: str | None, config: ExperimentConfig, workdir: pathlib.Path | None) -> None:
  """Raises UserError for a stage that this model will never have."""
  names = ['base'] if config.model.source != 'scratch' else []
  names += ['adapter'] if config.adapter else []
  if workdir is not None:
    labels = (evaluated_as(name, config.model.source) for name in config.stages)
    names += [label for label in labels if label]
  if stage is not None and stage not in names:
    raise UserError(f'--stage={stage}: this model has {" and ".join(names)}, give one of these.')


def _strengths(request: SampleRequest) -> list[float]:
  """A strength for each adapter: one may stand for all of them."""
  count, given = len(request.lora), request.lora_scale or (1.0,)
  if len(given) not in (1, count):
    raise UserError(
      f'There are {len(given)} --lora_scale for {count} --lora: give one for each, or one for all.'
    )
  return list(given) * (count // len(given))


def _sampler(request: Any, own: SamplingConfig, embedded: bool) -> SamplingConfig:
  """The model's sampler with what the flags change.

  Args:
    request: the flags.
    own: what the model is sampled with by itself.
    embedded: whether its backbone is fed the guidance scale.

  Raises:
    UserError: if a value is out of range, or two flags set the same scale.
  """
  changes: dict[str, Any] = {
    'num_steps': request.steps,
    'guidance': request.guidance,
    'cfg_scale': request.cfg_scale,
  }
  if request.guidance is not None and not embedded:
    if own.cfg_scale == 1:
      distributed.announce(
        f'--guidance={request.guidance:g} is ignored: this model was made for no guidance scale; '
        '--cfg_scale is classifier-free guidance, for any model.'
      )
    elif request.cfg_scale is not None:
      raise UserError('--guidance and --cfg_scale are the same scale to this model: give one.')
    else:
      changes['cfg_scale'] = request.guidance
  return dataclasses.replace(own, **{k: v for k, v in changes.items() if v is not None})


def overridden(request: Any, config: ExperimentConfig) -> tuple[dict[str, Any], DiffusionModel]:
  """What the flags change of how a model draws.

  Args:
    request: has steps, guidance, cfg_scale, height, width, dtype and batch_size, None where the
      model's own is to stay.
    config: what the model is drawn with by itself.

  Returns:
    Overrides for `restore.open_model`, and the model, without parameters, of the size to draw.

  Raises:
    UserError: if a value is out of range, or two flags set the same scale.
  """
  overrides: dict[str, Any] = {}
  if request.dtype is not None:
    params = 'int8' if config.model.params == 'int8' else request.dtype
    overrides['model'] = dataclasses.replace(config.model, dtype=request.dtype, params=params)
  if request.batch_size is not None:
    evaluation = dataclasses.replace(config.evaluation, batch_size=request.batch_size)
    overrides['evaluation'] = evaluation
  model = described(config)
  guided = getattr(model.backbone.config, 'guidance_embeds', False)
  overrides['sampling'] = _sampler(request, config.sampling, guided)
  size = (request.height or model.height, request.width or model.width)
  return overrides, dataclasses.replace(model, height=size[0], width=size[1])


def _skipped_steps(steps: int, strength: float) -> int:
  """Of so many steps, those that a picture to set out from stands in for.

  Raises:
    UserError: if no step is left.
  """
  skipped = int(max(steps - min(steps * strength, steps), 0))
  if skipped >= steps:
    raise UserError(
      f'--strength={strength:g} leaves none of {steps} steps: raise it, or take more --steps.'
    )
  return skipped


def start_from_image(
  latents: jax.Array, noise: jax.Array, schedule: jax.Array, strength: float
) -> tuple[jax.Array, jax.Array]:
  """Where sampling sets out from a picture instead of pure noise, as diffusers' img2img does.

  Args:
    latents: (S, C) of the picture.
    noise: (N, S, C) start noise.
    schedule: (steps + 1,) of sampling from pure noise.
    strength: share of the steps that are taken, in (0, 1]; 1 forgets the picture.

  Returns:
    States (N, S, C) at the first time that is left, and the (<= steps + 1,) schedule from there.

  Raises:
    UserError: if no step is left.
  """
  steps = len(schedule) - 1
  skipped = _skipped_steps(steps, strength)
  if not skipped and strength < 1 and distributed.is_main():
    logging.warning(
      '--strength=%g of %d steps is all of them, which forgets the picture: lower it, or take more '
      '--steps.', strength, steps,
    )  # fmt: skip
  left = schedule[skipped:]
  return flow.interpolate(latents[None], noise, jnp.full(len(noise), left[0])), left


def sample(request: SampleRequest) -> pathlib.Path:
  """Draws the request and returns the output directory.

  Of several processes, all draw what process 0 was asked for, and it alone writes.

  Raises:
    UserError: for whatever the user can mend.
  """
  with together('the same command begins anew'):
    return _sample(distributed.of_main(request))


def _sample(request: SampleRequest) -> pathlib.Path:
  output = pathlib.Path(request.output).expanduser()
  if distributed.is_main():
    check_directory(output)
  _check(request)
  prompts = distributed.agreed(lambda: _prompts(request))
  noise = None if request.latents is None else _read_noise(request.latents)
  with distributed.main_first():
    config, workdir = read_config(request.model)
  _check_stage(request.stage, config, workdir)
  # Encoders and weights take minutes to read: what headers tell of a mistake is told before.
  overrides, model = overridden(request, config)
  size = (model.height, model.width)
  drawn = [prompt for prompt in prompts for _ in range(request.num_images)]
  shape = (len(drawn), *model.latent_shape)
  if noise is not None and noise.shape != shape:
    raise UserError(
      f'--latents={request.latents} has shape {noise.shape}, but these prompts need {shape}.'
    )
  strength = _STRENGTH if request.strength is None else request.strength
  picture = None
  if request.image is not None:
    picture = read_image(request.image, *size, where='--image')
    _skipped_steps(overrides['sampling'].num_steps, strength)
  adapters = list(zip(request.lora, _strengths(request), strict=True))
  for path, _ in adapters:
    check_lora(path, model.backbone.config)
  enable_compilation_cache()
  experiment, snapshot, workdir = open_model(request.model, prompts, request.mesh, **overrides)
  reached = dict(snapshots(experiment, snapshot, workdir))
  if not reached:
    raise UserError(
      f'--model={request.model}: this run has not finished a stage that draws pictures yet.'
    )
  label = request.stage or next(reversed(reached))
  if label not in reached:
    raise UserError(
      f'--stage={label}: this run has only reached {" and ".join(reached)} yet, give one of these.'
    )
  model = dataclasses.replace(reached[label].model, height=size[0], width=size[1])
  snapshot = dataclasses.replace(reached[label], model=model)
  if adapters:
    snapshot = with_adapters(snapshot, experiment.config, experiment.mesh, adapters)
    model = snapshot.model
  if noise is None:
    noise = start_noise(model, request.seed, 'sample', np.arange(len(drawn)))
  pictures = experiment.world.pictures
  judged = pictures is not None and size == pictures.images.shape[1:3]
  judge, schedule = judge_of(experiment) if judged else None, None
  if picture is not None:
    images = picture[None].astype(np.float32) / 127.5 - 1
    encode = sharding.compiled_whole(model.encode, experiment.mesh)
    start = distributed.to_host(encode(snapshot.autoencoder, images))[0]
    schedule = experiment.schedule(model)
    noise, schedule = start_from_image(start, noise, schedule, strength)
  generated = draw(experiment, snapshot, judge, drawn, noise, schedule)
  latents = np.asarray(jax.device_get(generated.latents), np.float32)
  if not np.isfinite(latents).all():
    raise UserError(
      'The pictures are not finite: lower --guidance and --lora_scale, or take --dtype=float32; if '
      'that does not help, the weights are damaged.'
    )
  if not distributed.is_main():
    return output

  settings = _settings(request, experiment.config, size, adapters)
  if picture is not None:
    settings |= {'image': request.image, 'strength': strength}
  records = []
  for index, prompt in enumerate(drawn):
    name = f'{index:04d}.png'
    replace_file(output / name, png_bytes(generated.images[index]))
    record = {'file': name, 'prompt': prompt, 'stage': label, 'seed': request.seed, 'index': index}
    record |= settings
    if judged:
      record['judge_sees'] = pictures.names[generated.shown[index]]
    records.append(record)
  columns = request.num_images if request.num_images > 1 else min(len(drawn), 6)
  grid = image_grid(generated.images, columns, drawn, enlargement(generated.images[0]))
  save_png(output / 'grid.png', grid)
  replace_file(output / 'samples.json', (json.dumps(records, indent=2) + '\n').encode())
  if request.save_latents:
    buffer = io.BytesIO()
    np.save(buffer, latents)
    replace_file(output / 'latents_final.npy', buffer.getvalue())
  with_what = ''.join(f' + {scale:g} x {path}' for path, scale in adapters)
  print(f'{len(drawn)} picture(s) with the model after {label!r}{with_what}: {output / "grid.png"}')
  return output


def _settings(
  request: SampleRequest,
  config: ExperimentConfig,
  size: tuple[int, int],
  adapters: Sequence[tuple[str, float]],
) -> dict[str, Any]:
  """What, besides prompt, stage and seed, it takes to draw a picture again."""
  return {
    'model': request.model,
    'height': size[0],
    'width': size[1],
    **dataclasses.asdict(config.sampling),
    'dtype': config.model.dtype,
    'params': config.model.params,
    'adapters': [{'file': path, 'scale': scale} for path, scale in adapters],
    'latents': request.latents,
  }
