"""`sample` on a FLUX.1 snapshot against diffusers' pipelines: same noise in, same picture out."""

import json

import numpy as np
import pytest
from oracle import relative_error
from PIL import Image
from tiny_flux import write_snapshot

from eru_jax.errors import UserError
from eru_jax.flow import timestep_schedule
from eru_jax.training import sampling
from eru_jax.training.evaluation import Generated
from eru_jax.training.sampling import SampleRequest, sample

PROMPTS = ('a red apple', 'the fruit that fell on Newton')
HEIGHT, WIDTH, STEPS = 48, 80, 4


@pytest.fixture(scope='module', params=[True, False], ids=['dev', 'schnell'])
def flux(request, tmp_path_factory):
  """(directory, diffusers' pipeline, keyword arguments of its call)."""
  directory = tmp_path_factory.mktemp('flux') / 'snapshot'
  pipeline = write_snapshot(directory, guidance=request.param)
  length = 512 if request.param else 256
  options = dict(
    prompt=list(PROMPTS), height=HEIGHT, width=WIDTH, num_inference_steps=STEPS,
    guidance_scale=3.5, max_sequence_length=length,
  )  # fmt: skip
  return directory, pipeline, options


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('ERU_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield


def noise(directory, seed=0):
  """Start noise of both prompts, packed (2, S, C), and the file it is in."""
  rows, columns, channels = HEIGHT // 16, WIDTH // 16, 16
  values = np.random.default_rng(seed).standard_normal((2, rows * columns, channels))
  path = directory / 'noise.npy'
  np.save(path, values.astype(np.float32))
  return values.astype(np.float32), str(path)


def draw(model, output, latents, **options):
  request = SampleRequest(
    str(model), str(output), prompts=PROMPTS, height=HEIGHT, width=WIDTH, steps=STEPS,
    latents=latents, save_latents=True, batch_size=2, **options,
  )  # fmt: skip
  sample(request)
  pictures = [np.asarray(Image.open(path)) for path in sorted(output.glob('0*.png'))]
  return np.load(output / 'latents_final.npy'), np.stack(pictures)


def test_it_draws_what_diffusers_draws(flux, tmp_path):
  torch = pytest.importorskip('torch')
  directory, pipeline, options = flux
  start, path = noise(tmp_path)
  ours, pictures = draw(directory, tmp_path / 'out', path)
  latents = torch.from_numpy(start)
  theirs = pipeline(**options, latents=latents, output_type='latent').images.numpy()
  assert relative_error(ours, theirs) <= 1e-4
  images = pipeline(**options, latents=latents, output_type='np').images
  assert np.abs(pictures / 255 - images).max() <= 1 / 255
  record = json.loads((tmp_path / 'out' / 'samples.json').read_text())[0]
  assert record['prompt'] == PROMPTS[0] and 'judge_sees' not in record


@pytest.mark.parametrize('strength', [0.5, 1.0])
def test_it_sets_out_from_a_picture_as_diffusers_does(flux, tmp_path, monkeypatch, strength):
  torch = pytest.importorskip('torch')
  from diffusers.pipelines.flux import pipeline_flux_img2img as reference

  directory, pipeline, options = flux
  start, path = noise(tmp_path)
  rng = np.random.default_rng(1)
  picture = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
  picture.save(tmp_path / 'start.png')
  ours, _ = draw(
    directory, tmp_path / 'out', path, image=str(tmp_path / 'start.png'), strength=strength
  )
  unpacked = start.reshape(2, HEIGHT // 16, WIDTH // 16, 4, 2, 2).transpose(0, 3, 1, 4, 2, 5)
  unpacked = torch.from_numpy(unpacked.reshape(2, 4, HEIGHT // 8, WIDTH // 8).copy())
  monkeypatch.setattr(reference, 'randn_tensor', lambda *_, **__: unpacked)
  # Its latents are drawn from the encoder's posterior; ours are the mean.
  mean = lambda encoded, **_: encoded.latent_dist.mode()  # noqa: E731
  monkeypatch.setattr(reference, 'retrieve_latents', mean)
  parts = reference.FluxImg2ImgPipeline(**pipeline.components)
  parts.set_progress_bar_config(disable=True)
  theirs = parts(**options, image=picture, strength=strength, output_type='latent').images
  assert relative_error(ours, theirs.numpy()) <= 1e-4


def test_guidance_is_for_the_distilled_model_alone(flux, tmp_path, capsys):
  torch = pytest.importorskip('torch')
  directory, pipeline, options = flux
  start, path = noise(tmp_path)
  distilled = pipeline.transformer.config.guidance_embeds
  # What -dev draws at 3.5 is another test's.
  for scale in (0.0,) if distilled else (0.0, 3.5):
    ours, _ = draw(directory, tmp_path / f'{scale}', path, guidance=scale)
    latents = torch.from_numpy(start)
    theirs = pipeline(
      **options | {'guidance_scale': scale}, latents=latents, output_type='latent'
    ).images.numpy()
    assert relative_error(ours, theirs) <= 1e-4
    ignored = f'--guidance={scale:g} is ignored: this model was made for no guidance scale; --cfg'
    assert (ignored in capsys.readouterr().out) != distilled


def test_classifier_free_guidance_is_that_of_diffusers(flux, tmp_path):
  torch = pytest.importorskip('torch')
  directory, pipeline, options = flux
  start, path = noise(tmp_path)
  ours, _ = draw(directory, tmp_path / 'out', path, cfg_scale=2.0)
  theirs = pipeline(
    **options, negative_prompt=['', ''], true_cfg_scale=2.0, latents=torch.from_numpy(start),
    output_type='latent',
  ).images.numpy()  # fmt: skip
  assert relative_error(ours, theirs) <= 1e-4


def test_adapters_draw_what_they_draw_in_diffusers(flux, tmp_path):
  torch = pytest.importorskip('torch')
  pytest.importorskip('peft')
  directory, pipeline, options = flux
  start, path = noise(tmp_path)
  files = [write_adapter(directory, tmp_path / f'{seed}.safetensors', seed) for seed in (1, 2)]
  plain, _ = draw(directory, tmp_path / 'plain', path)
  for names, weights in (([0], [0.7]), ([0, 1], [1.0, -0.5])):
    chosen = tuple(files[name] for name in names)
    ours, _ = draw(
      directory, tmp_path / f'out{len(names)}', path, lora=chosen, lora_scale=tuple(weights)
    )
    for name in names:
      pipeline.load_lora_weights(files[name], adapter_name=str(name))
    pipeline.set_adapters([str(name) for name in names], adapter_weights=weights)
    try:
      latents = torch.from_numpy(start)
      theirs = pipeline(**options, latents=latents, output_type='latent').images.numpy()
    finally:
      pipeline.unload_lora_weights()
    assert relative_error(ours, theirs) <= 1e-4
    assert relative_error(plain, theirs) > 1e-2


def write_adapter(directory, path, seed):
  """A random adapter of a snapshot's backbone, in a file."""
  import jax

  from eru_jax.models import lora
  from eru_jax.weights import model_directory
  from eru_jax.weights.lora_io import export_lora

  stored = model_directory.load(directory)
  rules = (lora.LoraRule('attn', 2 + seed, 4.0), lora.LoraRule('ff|proj_mlp', 2, 2.0))
  adapter = lora.init(jax.random.key(seed), stored.backbone, rules)
  rng = np.random.default_rng(seed)
  adapter = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), adapter)
  export_lora(path, adapter, rules, stored.architecture)
  return str(path)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'lora': ('nosuch.safetensors',)}, 'nosuch.safetensors'),
    ({'lora': ('a', 'b'), 'lora_scale': (1.0, 1.0, 1.0)}, '3 --lora_scale for 2 --lora'),
    ({'height': 50}, 'multiples of 16'),
    ({'image': 'nosuch.png'}, '--image: there is no picture nosuch.png'),
    ({'image': 'broken.png'}, 'not a readable picture'),
    ({'image': 'start.png', 'strength': 0.0}, 'leaves none of 2 steps'),
    ({'strength': 0.5}, '--strength is given without --image'),
    ({'lora_scale': (0.5,)}, '--lora_scale is given without --lora'),
    ({'lora': ('a',), 'lora_scale': (float('nan'),)}, '--lora_scale=nan: give a finite number'),
    ({'lora': ('a',), 'lora_scale': (float('inf'),)}, '--lora_scale=inf'),
    ({'guidance': float('inf')}, '--guidance=inf'),
    ({'guidance': float('nan')}, '--guidance=nan'),
    ({'cfg_scale': float('inf')}, '--cfg_scale=inf'),
    ({'latents': 'nan.npy'}, '--latents=nan.npy holds numbers that are not finite'),
  ],
)
def test_what_cannot_be_drawn_is_refused(flux, tmp_path, monkeypatch, options, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'broken.png').write_bytes(b'no picture')
  Image.new('RGB', (WIDTH, HEIGHT)).save(tmp_path / 'start.png')
  np.save(tmp_path / 'nan.npy', np.full((2, 15, 16), np.nan, np.float32))
  request = {'prompts': PROMPTS, 'height': HEIGHT, 'width': WIDTH, 'steps': 2} | options
  with pytest.raises(UserError, match=message):
    sample(SampleRequest(str(flux[0]), str(tmp_path / 'out'), **request))


def test_pictures_that_are_not_finite_are_refused(flux, tmp_path, monkeypatch):
  def diverge(experiment, snapshot, judge, prompts, noise, schedule):
    pictures = np.zeros((len(prompts), HEIGHT, WIDTH, 3), np.uint8)
    return Generated(pictures, np.zeros(len(prompts), np.int32), np.full_like(noise, np.inf))

  monkeypatch.setattr(sampling, 'draw', diverge)
  with pytest.raises(UserError, match='The pictures are not finite: lower --guidance'):
    draw(flux[0], tmp_path / 'out', noise(tmp_path)[1])
  assert not (tmp_path / 'out').exists()


def test_a_strength_that_forgets_the_picture_is_told(monkeypatch):
  told = []
  monkeypatch.setattr(sampling.logging, 'warning', lambda text, *args: told.append(text % args))
  latents, start = np.zeros((3, 4), np.float32), np.ones((1, 3, 4), np.float32)
  for steps, strength in ((2, 0.6), (2, 0.5), (4, 0.6), (2, 1.0)):
    sampling.start_from_image(latents, start, timestep_schedule(steps), strength)
  assert told == [
    '--strength=0.6 of 2 steps is all of them, which forgets the picture: lower it, or take more '
    '--steps.'
  ]


@pytest.mark.parametrize(
  'file, values, message',
  [
    ('model_index.json', {'_class_name': 'Flux2Pipeline'}, "'Flux2Pipeline'.*only FLUX.1"),
    ('scheduler/scheduler_config.json', {'_class_name': 'DDIMScheduler'}, 'DDIMScheduler'),
    ('scheduler/scheduler_config.json', {'base_shift': 0.3}, 'base_shift.* differs'),
    ('scheduler/scheduler_config.json', {'shift': 0, 'use_dynamic_shifting': False}, 'shift is 0'),
    *[
      ('scheduler/scheduler_config.json', {key: value}, f'{key}.* not built in')
      for key, value in {
        'num_train_timesteps': 500,
        'use_beta_sigmas': True,
        'use_karras_sigmas': True,
        'use_exponential_sigmas': True,
        'shift_terminal': 0.02,
        'time_shift_type': 'linear',
        'invert_sigmas': True,
        'stochastic_sampling': True,
      }.items()
    ],
  ],
)
def test_a_snapshot_of_something_else_is_refused(flux, tmp_path, file, values, message):
  import shutil

  directory = tmp_path / 'other'
  shutil.copytree(flux[0], directory)
  path = directory / file
  path.write_text(json.dumps(json.loads(path.read_text()) | values))
  if 'base_shift' in values:
    path.write_text(json.dumps(json.loads(path.read_text()) | {'use_dynamic_shifting': True}))
  with pytest.raises(UserError, match=message):
    sample(SampleRequest(str(directory), str(tmp_path / 'out'), prompts=PROMPTS))
