"""What a run that trained the whole backbone leaves: a model directory that other tools load."""

import jax
import numpy as np
import pytest
from oracle import relative_error

from eru_jax.errors import UserError
from eru_jax.training.restore import open_model, snapshots
from eru_jax.types import Conditioning
from eru_jax.weights import model_directory
from eru_jax.weights.conversion import ConversionRequest, convert

TOLERANCE = 1e-5
LENGTH = 5


def _inputs(config, rows, columns):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  text = Conditioning(
    normal(2, LENGTH, config.joint_attention_dim), None, normal(2, config.pooled_projection_dim)
  )
  return normal(2, rows * columns, config.in_channels), np.array([0.2, 0.9], np.float32), text


def _velocity_of_diffusers(directory, x, t, text, ids):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  model = diffusers.FluxTransformer2DModel.from_pretrained(
    directory, subfolder='transformer', torch_dtype=torch.float32
  )
  with torch.no_grad():
    return model(
      hidden_states=torch.from_numpy(x),
      timestep=torch.from_numpy(t),
      encoder_hidden_states=torch.from_numpy(text.tokens),
      pooled_projections=torch.from_numpy(text.pooled),
      img_ids=torch.from_numpy(np.asarray(ids, np.float32)),
      txt_ids=torch.zeros(LENGTH, 3),
      guidance=torch.full((2,), 3.5) if model.config.guidance_embeds else None,
    ).sample.numpy()


def assert_the_model_is_what_was_trained(workdir):
  """The velocity of `model/` is diffusers' of the same files, and that of the run's end."""
  experiment, base, _ = open_model(str(workdir), ())
  *_, (_, trained) = snapshots(experiment, base, workdir)
  stored = model_directory.load(workdir / 'model')
  assert stored.architecture == trained.model.backbone.config
  edge = trained.model.height // trained.model.autoencoder.config.downscale
  grid = edge // trained.model.family.packing
  x, t, text = _inputs(stored.architecture, grid, grid)
  velocity = jax.jit(lambda params: trained.model.velocity(params)(x, t, text))
  ours = velocity(stored.backbone)
  theirs = _velocity_of_diffusers(
    workdir / 'model', x, t, text, trained.model.family.latent_ids(grid, grid)
  )
  assert relative_error(ours, theirs) <= 5 * TOLERANCE  # guidance of 3.5, see test_flux
  # Nothing of what was learnt is lost on the way, however little it is.
  moved = relative_error(velocity(base.backbone), velocity(trained.trainable))
  assert relative_error(ours, velocity(trained.trainable)) <= 1e-3 * moved


def test_a_run_leaves_its_model(tiny_run):
  assert_the_model_is_what_was_trained(tiny_run)
  stored = model_directory.load(tiny_run / 'model')
  assert stored.reward is not None and stored.settings['sampling']['cfg_scale'] == 2.0


def _convert(source, output, to):
  convert(ConversionRequest('flux', str(source), str(output), to))
  return model_directory.load(output)


@pytest.mark.parametrize('to', ['original', 'comfyui', 'diffusers', 'eru'])
def test_a_workdir_is_converted(tiny_run, tmp_path, to):
  found = _convert(tiny_run, tmp_path / 'out', to)
  wanted = model_directory.load(tiny_run / 'model')
  jax.tree.map(np.testing.assert_array_equal, found.backbone, wanted.backbone)
  assert found.architecture == wanted.architecture
  assert found.settings == wanted.settings


def test_a_workdir_without_a_model_is_refused(tmp_path):
  (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
  (tmp_path / 'run' / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='run is the workdir of a run that has no model/: .*adapters'):
    _convert(tmp_path / 'run', tmp_path / 'out', 'diffusers')


@pytest.mark.slow
def test_flux_trained_whole(tmp_path, monkeypatch):
  from test_flux_training import settings

  from eru_jax.training.run import train

  monkeypatch.setenv('ERU_JAX_CACHE', str(tmp_path / 'cache'))
  values = settings('flux_dev_dk_dm.py:runlocal,full', dk_dm__num_steps='2')
  values |= {'evaluation': dict(max_prompts=1, batch_size=1, gallery=1, diagnosis=0)}
  train(values, str(tmp_path / 'run'))
  assert_the_model_is_what_was_trained(tmp_path / 'run')
  assert not (tmp_path / 'run' / 'adapters').exists()
  # A snapshot of FLUX.1, with all that draws with it.
  assert (tmp_path / 'run' / 'model' / 'tokenizer_2').is_dir()
  assert model_directory.read_settings(tmp_path / 'run' / 'model')['text_encoder'] == 'flux'
  pipeline = pytest.importorskip('diffusers').FluxPipeline.from_pretrained(
    str(tmp_path / 'run' / 'model')
  )
  pipeline.set_progress_bar_config(disable=True)
  image = pipeline('a red apple', height=32, width=32, num_inference_steps=1, output_type='np')
  assert np.isfinite(image.images).all()
