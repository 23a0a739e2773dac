"""CLIP's vision tower, and a whole CLIPModel's weights, against transformers on random weights."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracle import gradients, randomise, relative_error, tensors

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.models.clip import ClipTextConfig
from eru_jax.models.clip_vision import ClipConfig, ClipVisionConfig, ClipVisionModel
from eru_jax.weights import clip_model as table
from eru_jax.weights.safetensors_io import write_safetensors
from eru_jax.weights.table import to_flax, to_torch

TOLERANCE = 1e-5
# bfloat16 keeps 8 bits: 4e-3 a rounding, and a block rounds a handful of times.
BFLOAT16_TOLERANCE = 2e-2
# laion/CLIP-ViT-H-14-laion2B-s32B-b79K, and so SciScore.
HUGE_TEXT = dict(
  hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
  hidden_act='gelu',
)  # fmt: skip
HUGE_PARAMETERS = 986_109_441
TEXT = dict(
  vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
  max_position_embeddings=16,
)  # fmt: skip
VISION = dict(
  hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=20,
  patch_size=5,
)  # fmt: skip


def _pair(seed=0, **changed):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = transformers.CLIPConfig(
    text_config=TEXT, vision_config=VISION | changed, projection_dim=12, attn_implementation='eager'
  )
  oracle = randomise(transformers.CLIPModel(config), seed)
  ours = ClipConfig.from_dict(config.to_dict())
  params = to_flax(tensors(oracle), table.rows(ours), table.counts(ours), table.shapes(ours))
  return torch, oracle, ours, jax.tree.map(jnp.asarray, params)


def _pixels(config, batch=2, seed=0):
  edge = config.vision.image_size
  shape = (batch, edge, edge, config.vision.num_channels)
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CASES = [
  # batch, changed, options
  (2, {}, {}),
  (1, dict(hidden_act='gelu', num_attention_heads=2, num_hidden_layers=3), {'scan': False}),
  (3, dict(image_size=23), {'remat': 'full'}),  # the patches leave an edge over
  (2, dict(num_channels=1, patch_size=10, hidden_act='gelu'), {}),
]


@pytest.mark.parametrize('batch,changed,options', CASES)
def test_features_and_all_gradients_equal_transformers(batch, changed, options):
  torch, oracle, config, params = _pair(**changed)
  pixels = _pixels(config, batch)
  weight = np.random.default_rng(1).standard_normal((batch, 12)).astype(np.float32)
  model = ClipVisionModel(config.vision, **options)

  def loss(params, pixels):
    features = model.apply({'params': params}, pixels)
    return jnp.sum(weight * features), features

  grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (ours, ours_pixels), features = grad(params['vision_model'], pixels)
  seen = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).requires_grad_()
  out = oracle.get_image_features(seen)
  out = getattr(out, 'pooler_output', out)
  (torch.from_numpy(weight) * out).sum().backward()
  assert relative_error(features, out.detach().numpy()) <= TOLERANCE
  assert relative_error(ours_pixels, seen.grad.numpy().transpose(0, 2, 3, 1)) <= TOLERANCE
  # The towers share nothing: the text's have none.
  unused = jax.tree.map(jnp.zeros_like, params) | {'vision_model': ours}
  mapped = to_torch(unused, table.rows(config), table.counts(config))
  for parameter in oracle.parameters():
    if parameter.grad is None:
      parameter.grad = torch.zeros_like(parameter)
  theirs = gradients(oracle)
  assert set(mapped) == set(theirs)
  flat = [np.concatenate([g[name].ravel() for name in sorted(theirs)]) for g in (mapped, theirs)]
  assert relative_error(*flat) <= TOLERANCE


def test_bfloat16_stays_near_and_projects_to_float32():
  _, _, config, params = _pair(num_hidden_layers=3)
  pixels = _pixels(config)
  run = lambda dtype: ClipVisionModel(config.vision, dtype).apply(  # noqa: E731
    {'params': params['vision_model']}, pixels
  )
  near = run(jnp.bfloat16)
  assert near.dtype == jnp.float32
  assert relative_error(near, run(jnp.float32)) <= BFLOAT16_TOLERANCE


def test_the_published_size_has_the_published_count():
  leaves = jax.tree.leaves(table.shapes(ClipConfig(ClipTextConfig(**HUGE_TEXT))))
  assert sum(leaf.size for leaf in leaves) == HUGE_PARAMETERS


def test_every_parameter_has_axes_that_the_rules_know():
  boxed = table.boxed_vision(ClipConfig(ClipTextConfig(**HUGE_TEXT)))
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  shardings = sharding.logical_shardings(boxed, mesh)
  assert shardings['encoder']['layers']['mlp']['fc1']['kernel'].spec == P(None, 'fsdp', 'tensor')
  assert shardings['visual_projection']['kernel'].spec == P('fsdp', None)
  is_box = lambda node: isinstance(node, nn.LogicallyPartitioned)  # noqa: E731
  assert all(is_box(leaf) for leaf in jax.tree.leaves(boxed, is_leaf=is_box))


def test_files_load_and_their_tensors_come_back(tmp_path):
  _, oracle, config, params = _pair()
  state = tensors(oracle)
  buffers = {
    f'{tower}_model.embeddings.position_ids': np.arange(9)[None] for tower in ('text', 'vision')
  }
  write_safetensors(tmp_path / 'model.safetensors', state | buffers)
  loaded = table.load(tmp_path / 'model.safetensors', config)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  back = to_torch(loaded, table.rows(config), table.counts(config))
  assert set(back) == set(state)
  for name, value in state.items():
    np.testing.assert_array_equal(back[name], value)
  vision = dataclasses.replace(config.vision, num_hidden_layers=3, projection_dim=13)
  words = r'(?s)model.safetensors: .*missing: vision_model.encoder.layers.2.*wrong shape'
  with pytest.raises(UserError, match=words):
    table.load(tmp_path / 'model.safetensors', dataclasses.replace(config, vision=vision))


def test_config_json_is_read_with_transformers_defaults():
  transformers = pytest.importorskip('transformers')
  usual = ClipConfig.from_dict({'model_type': 'clip'})
  assert usual == ClipConfig.from_dict(transformers.CLIPConfig().to_dict())
  assert (usual.text.hidden_size, usual.vision.patch_size) == (512, 32)
  huge = {
    'model_type': 'clip',
    'projection_dim': 1024,
    'text_config': HUGE_TEXT,
    'vision_config': dict(
      hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
      patch_size=14, hidden_act='gelu',
    ),
  }  # fmt: skip
  assert ClipConfig.from_dict(huge).vision == ClipVisionConfig()
  # Of openai's files, which say it twice.
  twice = huge | {'vision_config_dict': {'patch_size': 16}, 'text_config_dict': None}
  assert ClipConfig.from_dict(twice).vision.patch_size == 16


@pytest.mark.parametrize(
  'changed, message',
  [
    ({'model_type': 'clip_text_model'}, "model_type is 'clip_text_model'"),
    ({'model_type': None}, 'model_type is None'),
    ({'vision_config': {'hidden_act': ['gelu']}}, 'hidden_act'),
    ({'vision_config': {'num_attention_heads': 5}}, 'must divide'),
    ({'vision_config': {'image_size': [224, 224]}}, 'image_size'),
    ({'vision_config': {'patch_size': 999}}, 'patch_size'),
    ({'vision_config': {'layer_norm_eps': 'x'}}, 'layer_norm_eps'),
    ({'vision_config': [1]}, 'vision_config'),
    ({'text_config': {'hidden_size': 0}}, 'hidden_size is 0'),
    ({'projection_dim': '512'}, 'projection_dim'),
  ],
)
def test_other_architectures_are_refused(changed, message):
  with pytest.raises(UserError, match=f'^CLIP config: .*{message}'):
    ClipConfig.from_dict({'model_type': 'clip'} | changed)


def test_pictures_of_another_size_are_refused():
  model = ClipVisionModel(ClipVisionConfig(**VISION, projection_dim=12))
  with pytest.raises(UserError, match=r'20 x 20 pixels and 3 channels.*\(1, 20, 25, 3\)'):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 20, 25, 3)))
