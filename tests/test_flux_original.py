"""FLUX.1's single files: the same tensors as by diffusers' own converters, bit by bit."""

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from eru_jax.errors import UserError
from eru_jax.models import registry
from eru_jax.models.autoencoder_kl import FLUX as FLUX_AUTOENCODER
from eru_jax.models.autoencoder_kl import AutoencoderConfig
from eru_jax.models.flux import FluxConfig
from eru_jax.weights import autoencoder_kl as autoencoder_table
from eru_jax.weights import autoencoder_original, flux_original, layouts, table
from eru_jax.weights import flux as flux_table
from eru_jax.weights.table import to_flax, to_torch

# As published in transformer/config.json and vae/config.json.
DEV = {
  '_class_name': 'FluxTransformer2DModel',
  '_diffusers_version': '0.30.0.dev0',
  '_name_or_path': '../checkpoints/flux-dev/transformer',
  'attention_head_dim': 128,
  'guidance_embeds': True,
  'in_channels': 64,
  'joint_attention_dim': 4096,
  'num_attention_heads': 24,
  'num_layers': 19,
  'num_single_layers': 38,
  'patch_size': 1,
  'pooled_projection_dim': 768,
}
SCHNELL = DEV | {'guidance_embeds': False, 'axes_dims_rope': [16, 56, 56], 'out_channels': None}
VAE = {
  '_class_name': 'AutoencoderKL',
  '_diffusers_version': '0.30.0.dev0',
  '_name_or_path': '../checkpoints/flux-dev',
  'act_fn': 'silu',
  'block_out_channels': [128, 256, 512, 512],
  'down_block_types': ['DownEncoderBlock2D'] * 4,
  'force_upcast': True,
  'in_channels': 3,
  'latent_channels': 16,
  'latents_mean': None,
  'latents_std': None,
  'layers_per_block': 2,
  'mid_block_add_attention': True,
  'norm_num_groups': 32,
  'out_channels': 3,
  'sample_size': 1024,
  'scaling_factor': 0.3611,
  'shift_factor': 0.1159,
  'up_block_types': ['UpDecoderBlock2D'] * 4,
  'use_post_quant_conv': False,
  'use_quant_conv': False,
}
FLUX = layouts.backbone(registry.family('flux'))
SMALL_AUTOENCODER = AutoencoderConfig(
  latent_channels=4, block_out_channels=(8, 12, 12), layers_per_block=2, norm_num_groups=4
)


def random(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def assert_same(ours, theirs):
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name], name)


def original_shapes(layers, singles, width, columns):
  """What the authors' code names its parameters; all matrices take `columns` inputs."""
  shapes = {}

  def linear(name, size):
    shapes[f'{name}.weight'], shapes[f'{name}.bias'] = (size, columns), (size,)

  for name in ('img_in', 'txt_in'):
    linear(name, width)
  for name in ('time_in', 'vector_in', 'guidance_in'):
    linear(f'{name}.in_layer', width)
    linear(f'{name}.out_layer', width)
  for i in range(layers):
    for stream in ('img', 'txt'):
      block = f'double_blocks.{i}.{stream}'
      linear(f'{block}_mod.lin', 6 * width)
      linear(f'{block}_attn.qkv', 3 * width)
      linear(f'{block}_attn.proj', width)
      linear(f'{block}_mlp.0', 4 * width)
      linear(f'{block}_mlp.2', width)
      for kind in ('query', 'key'):
        shapes[f'{block}_attn.norm.{kind}_norm.scale'] = (128,)
  for i in range(singles):
    linear(f'single_blocks.{i}.linear1', 7 * width)
    linear(f'single_blocks.{i}.linear2', width)
    linear(f'single_blocks.{i}.modulation.lin', 3 * width)
    for kind in ('query', 'key'):
      shapes[f'single_blocks.{i}.norm.{kind}_norm.scale'] = (128,)
  linear('final_layer.linear', 64)
  linear('final_layer.adaLN_modulation.1', 2 * width)
  return shapes


@pytest.mark.parametrize('prefix', ['', 'model.diffusion_model.'])
def test_the_backbone_converts_as_diffusers_converts_it(prefix):
  torch = pytest.importorskip('torch')
  utils = pytest.importorskip('diffusers.loaders.single_file_utils')
  # The converter splits at FLUX.1's own width; how many inputs a matrix has is all the same to it.
  config = FluxConfig(num_layers=2, num_single_layers=3)
  tensors = random(original_shapes(2, 3, 3072, 2))
  theirs = utils.convert_flux_transformer_checkpoint_to_diffusers(
    {prefix + name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
  )
  rows = flux_original.comfyui_rows(config) if prefix else flux_original.rows(config)
  named = {prefix + name: value for name, value in tensors.items()}
  params = to_flax(named, rows, flux_original.counts(config))
  ours = to_torch(params, flux_table.rows(config), flux_table.counts(config))
  assert_same(ours, {name: value.numpy() for name, value in theirs.items()})
  # And back, which diffusers cannot.
  params = to_flax(ours, flux_table.rows(config), flux_table.counts(config))
  assert_same(to_torch(params, rows, flux_original.counts(config)), named)


@pytest.mark.parametrize('prefix', ['', 'vae.'])
def test_the_autoencoder_converts_as_diffusers_converts_it(prefix):
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  utils = pytest.importorskip('diffusers.loaders.single_file_utils')
  config = SMALL_AUTOENCODER
  shapes = layouts.AUTOENCODER.shapes(config)
  flat = random({k: s.shape for k, s in traverse_util.flatten_dict(shapes, sep='/').items()})
  params = traverse_util.unflatten_dict(flat, sep='/')
  rows = autoencoder_original.comfyui_rows(config) if prefix else autoencoder_original.rows(config)
  tensors = to_torch(params, rows, {})
  # Level 0 is at the picture's side, where the width changes.
  assert tensors[f'{prefix}decoder.up.0.block.0.nin_shortcut.weight'].shape == (8, 12, 1, 1)
  assert f'{prefix}decoder.up.2.block.0.nin_shortcut.weight' not in tensors
  assert tensors[f'{prefix}encoder.mid.attn_1.q.weight'].shape == (12, 12, 1, 1)
  values = {**config.to_dict()}
  theirs = utils.convert_ldm_vae_checkpoint(
    {name: torch.from_numpy(value) for name, value in tensors.items()}, values
  )
  ours = to_torch(params, autoencoder_table.rows(config), {})
  assert_same(ours, {name: value.numpy() for name, value in theirs.items()})
  oracle = diffusers.AutoencoderKL.from_config(values)
  oracle.load_state_dict(theirs, strict=True)
  back = to_flax(tensors, rows, {}, shapes)
  assert_same(traverse_util.flatten_dict(back, sep='/'), flat)


@pytest.mark.parametrize('published', [DEV, SCHNELL], ids=['dev', 'schnell'])
def test_full_size_by_shape(published):
  """Every tensor of the published model has its place, in all layouts and in diffusers' order."""
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  config = FluxConfig.from_dict(published)
  shapes, counts = FLUX.shapes(config), flux_table.counts(config)
  with torch.device('meta'):
    oracle = diffusers.FluxTransformer2DModel.from_config(dict(published))
  theirs = {name: tuple(value.shape) for name, value in oracle.state_dict().items()}
  ours = table.torch_shapes(flux_table.rows(config), counts, shapes)
  assert ours == theirs and list(ours) == list(theirs)
  total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  dev = published is DEV
  assert total == (11_901_408_320 if dev else 11_891_178_560)
  original = table.torch_shapes(flux_original.rows(config), counts, shapes)
  assert (len(theirs), len(original)) == ((1160, 780) if dev else (1156, 776))
  assert sum(int(np.prod(shape)) for shape in original.values()) == total
  names = original_shapes(19, 38, 3072, 2)
  assert set(original) == {n for n in names if dev or not n.startswith('guidance_in')}
  found = {n: jax.ShapeDtypeStruct(s, ml_dtypes.bfloat16) for n, s in original.items()}
  assert flux_original.infer_config(found) == config
  assert FLUX.layout_of(original) == 'original' and FLUX.layout_of(theirs) == 'diffusers'


def test_the_published_autoencoder_by_shape():
  torch = pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  config = AutoencoderConfig.from_dict(VAE)
  assert config == FLUX_AUTOENCODER
  with torch.device('meta'):
    oracle = diffusers.AutoencoderKL.from_config(dict(VAE))
  theirs = {name: tuple(value.shape) for name, value in oracle.state_dict().items()}
  shapes = layouts.AUTOENCODER.shapes(config)
  ours = table.torch_shapes(autoencoder_table.rows(config), {}, shapes)
  assert ours == theirs and list(ours) == list(theirs) and len(ours) == 244
  original = table.torch_shapes(autoencoder_original.rows(config), {}, shapes)
  assert len(original) == 244
  assert layouts.AUTOENCODER.layout_of(original) == 'original'
  assert (
    layouts.AUTOENCODER.infer(
      {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in original.items()}, ''
    )
    == config
  )


@pytest.mark.parametrize('component', [FLUX, layouts.AUTOENCODER], ids=['flux', 'vae'])
def test_rows_cut_every_tensor_without_remainder_or_overlap(component):
  config = component.example
  shapes = component.shapes(config)
  total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  for layout in component.layouts.values():
    rows, counts = layout.rows(config), component.counts(config)
    tensors = table.torch_shapes(rows, counts, shapes)
    assert sum(int(np.prod(shape)) for shape in tensors.values()) == total
    spans = {}
    for row in rows:
      spans.setdefault(row.torch, []).extend(row.ranges)
    for name, ranges in spans.items():
      stops = [0, *(stop for _, stop in sorted(ranges))]
      assert [start for start, _ in sorted(ranges)] == stops[:-1], name


def test_layouts_are_told_by_names():
  for component in (FLUX, layouts.AUTOENCODER):
    for name, layout in component.layouts.items():
      rows, counts = layout.rows(component.example), component.counts(component.example)
      assert component.layout_of(table.names(rows, counts)) == name
    assert component.layout_of(['model.layers.0.weight', 'x']) is None
  comfyui = [row.torch for row in FLUX.layouts['comfyui'].rows(FLUX.example)]
  assert layouts.AUTOENCODER.layout_of(comfyui) is None


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'img_in.weight': None}, 'without img_in.weight'),
    ({'txt_in.weight': (8,)}, 'without txt_in.weight, of 2 axes'),
    ({'double_blocks.0.img_attn.norm.query_norm.scale': (64,)}, 'Heads of 64 channels'),
  ],
)
def test_an_architecture_that_cannot_be_told_asks_for_its_config(change, words):
  shapes = original_shapes(1, 1, 256, 8) | change
  found = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes.items() if s is not None}
  with pytest.raises(UserError, match=words) as caught:
    flux_original.infer_config(found)
  assert 'config.json' in str(caught.value)
