"""Adapter files: diffusers and PEFT do with ours what we do, and we with theirs."""

import copy
import functools

import jax
import numpy as np
import pytest
import safetensors.numpy
from adapters import EVERYTHING, MIXED, SMALL, SOME, tiny_config, trained
from flax import traverse_util
from oracle import randomise, relative_error, tensors

from eru_jax.models import flux, lora
from eru_jax.models.lora import LoraRule
from eru_jax.types import Conditioning
from eru_jax.weights import flux as flux_table
from eru_jax.weights import lora_kohya, table
from eru_jax.weights.lora_io import export_lora, import_lora
from eru_jax.weights.lora_layers import layers
from eru_jax.weights.safetensors_io import write_safetensors

diffusers = pytest.importorskip('diffusers')
peft = pytest.importorskip('peft')
torch = pytest.importorskip('torch')
lora_conversion_utils = pytest.importorskip('diffusers.loaders.lora_conversion_utils')
single_file_utils = pytest.importorskip('diffusers.loaders.single_file_utils')

TOLERANCE = 1e-5
# What kohya files fuse, and diffusers only splits at FLUX.1's own width.
UNFUSED = r'^(?!single_transformer_blocks/(attn|proj_mlp))'


@functools.cache
def _reference(guidance=True):
  return randomise(
    diffusers.FluxTransformer2DModel(**SMALL, patch_size=1, guidance_embeds=guidance)
  )


@functools.cache
def _params(guidance=True):
  config = tiny_config(guidance)
  state = tensors(_reference(guidance))
  return table.to_flax(state, flux_table.rows(config), flux_table.counts(config))


def _named(params, guidance=True):
  config = tiny_config(guidance)
  return table.to_torch(params, flux_table.rows(config), flux_table.counts(config))


def _inputs():
  rng = np.random.default_rng(1)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  text = Conditioning(tokens=normal(2, 3, 12), mask=None, pooled=normal(2, 10))
  return normal(2, 6, 8), np.float32([0.2, 0.7]), text, flux.image_ids(2, 3), np.float32([0.3, 0.9])


@functools.cache
def _forward(guidance):
  model = flux.FluxTransformer(tiny_config(guidance))
  return jax.jit(lambda params: model.apply({'params': params}, *_inputs()))


def _ours(adapter, rules, guidance=True):
  return _forward(guidance)(lora.merge(_params(guidance), adapter, rules))


def _theirs(model):
  x, t, text, ids, scale = _inputs()
  with torch.no_grad():
    return model(
      hidden_states=torch.from_numpy(x),
      encoder_hidden_states=torch.from_numpy(text.tokens),
      pooled_projections=torch.from_numpy(text.pooled),
      timestep=torch.from_numpy(t),
      img_ids=torch.from_numpy(ids).float(),
      txt_ids=torch.zeros(text.tokens.shape[1], 3),
      guidance=torch.from_numpy(scale) if model.config.guidance_embeds else None,
    ).sample.numpy()


def _pipeline(model):
  parts = ('scheduler', 'vae', 'text_encoder', 'tokenizer', 'text_encoder_2', 'tokenizer_2')
  return diffusers.FluxPipeline(**dict.fromkeys(parts), transformer=model)


def _errors(found, expected):
  """Names of the tensors that differ, and by how much."""
  errors = {name: relative_error(found[name], value) for name, value in expected.items()}
  return {name: error for name, error in errors.items() if error > TOLERANCE}


@pytest.mark.parametrize('guidance', [True, False])
@pytest.mark.parametrize('rules', [EVERYTHING, SOME, MIXED])
def test_diffusers_loads_and_fuses_what_we_export(rules, guidance, tmp_path):
  adapter, path = trained(tiny_config(guidance), rules), tmp_path / 'adapter.safetensors'
  export_lora(path, adapter, rules, tiny_config(guidance))
  model = copy.deepcopy(_reference(guidance))
  pipeline = _pipeline(model)
  pipeline.load_lora_weights(path)
  found = _theirs(model)
  assert relative_error(found, _ours(adapter, rules, guidance)) <= TOLERANCE
  assert relative_error(found, _theirs(_reference(guidance))) > 0.01
  pipeline.fuse_lora(components=['transformer'])
  pipeline.unload_lora_weights()
  merged = lora.merge(_params(guidance), adapter, rules)
  assert not _errors(tensors(model), _named(merged, guidance))


@pytest.mark.parametrize('guidance', [True, False])
def test_diffusers_loads_the_kohya_files_that_we_export(guidance, tmp_path):
  config, path = tiny_config(guidance), tmp_path / 'adapter.safetensors'
  rules = (LoraRule(UNFUSED + '.*to_q', 2, 6.0), LoraRule(UNFUSED + '.*to_k', 3, 1.0))
  rules = (*rules, LoraRule(UNFUSED, 4, 5.0))
  adapter = trained(config, rules)
  export_lora(path, adapter, rules, config, 'kohya')
  model = copy.deepcopy(_reference(guidance))
  state = _pipeline(model).lora_state_dict(path)
  # diffusers 0.42 forgets to say of layers outside of blocks that they are the transformer's.
  state = {f'transformer.{name.removeprefix("transformer.")}': x for name, x in state.items()}
  model.load_lora_adapter(state)
  assert relative_error(_theirs(model), _ours(adapter, rules, guidance)) <= TOLERANCE


def _wide(rules, path):
  """A kohya file of one block of each kind at FLUX.1's own width, and what it is to do.

  Returns:
    The file's tensors, an input x (in, 1) for each input size, and of each of diffusers' modules
    what its adapter adds to its output for x.
  """
  config = flux.FluxConfig(num_layers=1, num_single_layers=1)
  adapter, known = trained(config, rules), layers(config)
  export_lora(path, adapter, rules, config, 'kohya')
  rng = np.random.default_rng(2)
  x = {size: rng.standard_normal((size, 1)) for size in {layer.n_in for layer in known.values()}}
  expected, flat = {}, traverse_util.flatten_dict(lora.variables(adapter, rules), sep='/')
  for module, layer in known.items():
    expected[module] = np.zeros((layer.n_out, 1))
    if f'{layer.path}/a' in flat:
      leaves = (np.float64(flat[f'{layer.path}/{leaf}']) for leaf in ('a', 'b', 'scale'))
      a, b, scale = (leaf[layer.place] for leaf in leaves)
      expected[module] = scale * b.T @ (a.T @ x[layer.n_in])
  return safetensors.numpy.load_file(path), x, expected


@pytest.mark.parametrize('rules', [EVERYTHING, SOME, MIXED])
def test_diffusers_splits_what_we_fuse(rules, tmp_path):
  stored, x, expected = _wide(rules, tmp_path / 'adapter.safetensors')
  state = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(
    {name: torch.from_numpy(np.array(value)) for name, value in stored.items()}
  )
  state, found = {name: value.double().numpy() for name, value in state.items()}, {}
  for name, down in state.items():
    if 'lora_A' in name:
      module = name.removeprefix('transformer.').removesuffix('.lora_A.weight')
      found[module] = state[name.replace('lora_A', 'lora_B')] @ (down @ x[down.shape[1]])
  assert set(found) >= {module for module, value in expected.items() if value.any()}
  assert not _errors(found, {module: expected[module] for module in found})


@pytest.mark.parametrize('rules', [EVERYTHING, SOME, MIXED])
def test_kohya_files_are_in_the_layout_of_original_checkpoints(rules, tmp_path):
  """By diffusers' reader of those, given what the file adds to the weights, times x."""
  stored, x, expected = _wide(rules, tmp_path / 'adapter.safetensors')
  config, checkpoint = flux.FluxConfig(num_layers=1, num_single_layers=1), {}
  for original in lora_kohya.originals(config):
    key = 'lora_unet_' + original.name.replace('.', '_')
    weight = np.zeros((sum(len(expected[part]) for part in original.parts), 1))
    if f'{key}.alpha' in stored:
      down, up = (np.float64(stored.pop(f'{key}.lora_{half}.weight')) for half in ('down', 'up'))
      weight = stored.pop(f'{key}.alpha') / len(down) * up @ (down @ x[down.shape[1]])
    checkpoint[f'{original.name}.weight'] = torch.from_numpy(weight)
    checkpoint[f'{original.name}.bias'] = torch.zeros(len(weight))
  assert not stored
  for block in ('double_blocks.0.img_attn', 'double_blocks.0.txt_attn', 'single_blocks.0'):
    for norm in ('query_norm', 'key_norm'):
      checkpoint[f'{block}.norm.{norm}.scale'] = torch.zeros(1)
  found = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
  found = {name.removesuffix('.weight'): value.numpy() for name, value in found.items()}
  assert not _errors(found, expected)


def test_alphas_beside_the_matrices_mean_the_same(tmp_path):
  stored, path = {}, tmp_path / 'adapter.safetensors'
  rng = np.random.default_rng(4)
  for index, (name, rank, alpha) in enumerate(
    [('attn.to_q', 2, 3.0), ('attn.to_k', 4, 3.0), ('attn.to_out.0', 4, 1.0)]
  ):
    module = f'transformer.transformer_blocks.{index % 2}.{name}'
    stored[f'{module}.lora_A.weight'] = rng.standard_normal((rank, 32)).astype(np.float32)
    stored[f'{module}.lora_B.weight'] = rng.standard_normal((32, rank)).astype(np.float32)
    stored[f'{module}.alpha'] = np.float32(alpha)
  write_safetensors(path, stored)
  model = copy.deepcopy(_reference())
  _pipeline(model).load_lora_weights(path)
  assert relative_error(_ours(*import_lora(path, tiny_config())), _theirs(model)) <= TOLERANCE
  assert relative_error(_theirs(model), _theirs(_reference())) > 0.01


@pytest.mark.parametrize('rank_stabilised', [False, True])
@pytest.mark.parametrize('prefixed', [False, True])
def test_what_peft_writes_is_read(prefixed, rank_stabilised, tmp_path):
  model = copy.deepcopy(_reference())
  model.add_adapter(
    peft.LoraConfig(
      r=4,
      lora_alpha=6,
      target_modules=['to_q', 'to_k', 'net.0.proj', 'proj_out', 'norm_out.linear'],
      rank_pattern={'attn.to_k': 2, '^transformer_blocks.1.attn.to_q': 3},
      alpha_pattern={'^proj_out': 5, 'to_k': 9, 'transformer_blocks\\.0\\.attn\\.to_q': 1},
      use_rslora=rank_stabilised,
    )
  )
  generator = torch.Generator().manual_seed(3)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if '.lora_' in name:
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
  if prefixed:
    diffusers.FluxPipeline.save_lora_weights(
      tmp_path,
      peft.get_peft_model_state_dict(model),
      transformer_lora_adapter_metadata=model.peft_config['default'].to_dict(),
    )
  else:
    model.save_lora_adapter(tmp_path)
  adapter, rules = import_lora(tmp_path / 'pytorch_lora_weights.safetensors', tiny_config())
  assert relative_error(_ours(adapter, rules), _theirs(model)) <= TOLERANCE
  assert relative_error(_ours(adapter, rules), _theirs(_reference())) > 0.01
