"""What `python -m eru_jax.sample` does: prompts in, pictures and a grid out."""

import dataclasses
import io
import json
import pathlib
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eru_jax import flow
from eru_jax.data.image_files import read_image
from eru_jax.data.pairs import read_lines, read_prompt_file
from eru_jax.data.text_encoder import check_prompts
from eru_jax.errors import UserError
from eru_jax.files import check_directory, replace_file
from eru_jax.training.evaluation import draw, judge_of, start_noise
from eru_jax.training.experiment import with_adapters
from eru_jax.training.pictures import enlargement, image_grid, png_bytes, save_png
from eru_jax.training.restore import open_model, read_config, snapshots
from eru_jax.training.run import enable_compilation_cache


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
  height: int | None = None
  width: int | None = None
  seed: int = 0
  num_images: int = 1
  latents: str | None = None
  save_latents: bool = False
  image: str | None = None
  strength: float = 0.6
  dtype: str | None = None
  batch_size: int | None = None
  lora: tuple[str, ...] = ()
  lora_scale: tuple[float, ...] = ()


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
  return noise


def _strengths(request: SampleRequest) -> list[float]:
  """A strength for each adapter: one may stand for all of them."""
  count, given = len(request.lora), request.lora_scale or (1.0,)
  if len(given) not in (1, count):
    raise UserError(
      f'There are {len(given)} --lora_scale for {count} --lora: give one for each, or one for all.'
    )
  return list(given) * (count // len(given))


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
  skipped = int(max(steps - min(steps * strength, steps), 0))
  if skipped >= steps:
    raise UserError(
      f'--strength={strength:g} leaves none of {steps} steps: raise it, or take more --steps.'
    )
  left = schedule[skipped:]
  return flow.interpolate(latents[None], noise, jnp.full(len(noise), left[0])), left


def sample(request: SampleRequest) -> pathlib.Path:
  """Draws the request and returns the output directory.

  Raises:
    UserError: for whatever the user can mend.
  """
  output = pathlib.Path(request.output).expanduser()
  check_directory(output)
  prompts = _prompts(request)
  noise = None if request.latents is None else _read_noise(request.latents)
  config, _ = read_config(request.model)
  overrides: dict[str, Any] = {}
  if request.dtype is not None:
    overrides['model'] = dataclasses.replace(
      config.model, dtype=request.dtype, params=request.dtype
    )
  if request.batch_size is not None:
    evaluation = dataclasses.replace(config.evaluation, batch_size=request.batch_size)
    overrides['evaluation'] = evaluation
  changes: dict[str, Any] = {}
  if request.steps is not None:
    changes['num_steps'] = request.steps
  if request.guidance is not None:
    changes['guidance'] = request.guidance
  sampling = dataclasses.replace(config.sampling, **changes)
  enable_compilation_cache()
  experiment, snapshot, workdir = open_model(request.model, prompts, sampling=sampling, **overrides)
  model = snapshot.model
  if request.guidance is not None and not getattr(model.backbone.config, 'guidance_embeds', False):
    # A model without a guidance embedding takes the scale as classifier-free guidance.
    sampling = dataclasses.replace(sampling, cfg_scale=request.guidance)
  reached = dict(snapshots(experiment, snapshot, workdir))
  if not reached:
    raise UserError(
      f'--model={request.model}: this run has not finished a stage that draws pictures yet.'
    )
  label = request.stage or next(reversed(reached))
  if label not in reached:
    raise UserError(f'--stage={label}: this model has the stages {list(reached)}.')
  size = (request.height or model.height, request.width or model.width)
  model = dataclasses.replace(reached[label].model, height=size[0], width=size[1])
  snapshot = dataclasses.replace(reached[label], model=model)
  if request.lora:
    files = zip(request.lora, _strengths(request), strict=True)
    snapshot = with_adapters(snapshot, experiment.config, experiment.mesh, list(files))
    model = snapshot.model

  drawn = [prompt for prompt in prompts for _ in range(request.num_images)]
  shape = (len(drawn), *model.latent_shape)
  if noise is None:
    noise = start_noise(model, request.seed, 'sample', np.arange(len(drawn)))
  elif noise.shape != shape:
    raise UserError(
      f'--latents={request.latents} has shape {noise.shape}, but these prompts need {shape}.'
    )
  experiment = dataclasses.replace(
    experiment, config=dataclasses.replace(experiment.config, sampling=sampling)
  )
  pictures = experiment.world.pictures
  judged = pictures is not None and size == pictures.images.shape[1:3]
  judge, schedule = judge_of(experiment) if judged else None, None
  if request.image is not None:
    picture = read_image(request.image, *size, where='--image')
    images = picture[None].astype(np.float32) / 127.5 - 1
    latents = jax.jit(model.encode)(snapshot.autoencoder, images)[0]
    schedule = experiment.schedule(model)
    noise, schedule = start_from_image(latents, noise, schedule, request.strength)
  generated = draw(experiment, snapshot, judge, drawn, noise, schedule)

  records = []
  for index, prompt in enumerate(drawn):
    name = f'{index:04d}.png'
    replace_file(output / name, png_bytes(generated.images[index]))
    record = {'file': name, 'prompt': prompt, 'stage': label, 'seed': request.seed, 'index': index}
    if judged:
      record['judge_sees'] = pictures.names[generated.shown[index]]
    records.append(record)
  columns = request.num_images if request.num_images > 1 else min(len(drawn), 6)
  grid = image_grid(generated.images, columns, drawn, enlargement(generated.images[0]))
  save_png(output / 'grid.png', grid)
  replace_file(output / 'samples.json', (json.dumps(records, indent=2) + '\n').encode())
  if request.save_latents:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(jax.device_get(generated.latents), np.float32))
    replace_file(output / 'latents_final.npy', buffer.getvalue())
  print(f'{len(drawn)} picture(s) with the model after {label!r}: {output / "grid.png"}')
  return output
