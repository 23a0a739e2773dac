"""Adapter files: diffusers and PEFT do with ours what we do, and we with theirs."""

import copy
import functools
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from absl import logging
from flax import traverse_util
from oracle import randomise, relative_error, tensors

from eru_jax.errors import UserError
from eru_jax.models import flux, lora
from eru_jax.models.lora import LoraRule
from eru_jax.types import Conditioning
from eru_jax.weights import flux as flux_table
from eru_jax.weights import lora_kohya, table
from eru_jax.weights.lora_io import export_lora, import_lora
from eru_jax.weights.lora_layers import layers
from eru_jax.weights.safetensors_io import write_safetensors

TOLERANCE = 1e-5
SMALL = dict(
  in_channels=8,
  num_layers=2,
  num_single_layers=2,
  attention_head_dim=16,
  num_attention_heads=2,
  joint_attention_dim=12,
  pooled_projection_dim=10,
  axes_dims_rope=(4, 6, 6),
)
EVERYTHING = (LoraRule('.*', 4, 8.0),)
SOME = (LoraRule('attn/to_(q|v)|proj_mlp', 3, 1.5), LoraRule('ff/', 2, 7.0))
MIXED = (
  LoraRule('attn/(to_q|add_k)', 2, 6.0),
  LoraRule('proj_out|norm_out', 3, 1.0),
  LoraRule('embed', 1, 2.5),
  LoraRule('.*', 4, 5.0),
)
# What kohya files fuse, and diffusers only splits at FLUX.1's own width.
UNFUSED = r'^(?!single_transformer_blocks/(attn|proj_mlp))'


def _config(guidance=True):
  return flux.FluxConfig(**SMALL, guidance_embeds=guidance)


def _adapter(config, rules, seed=0):
  """A trained adapter: no number of it is zero."""
  rng, flat = np.random.default_rng(seed), {}
  for layer in layers(config).values():
    rule = next((rule for rule in rules if re.search(rule.pattern, layer.path)), None)
    if rule is not None and f'{layer.path}/a' not in flat:
      for leaf, shape in (('a', (layer.n_in, rule.rank)), ('b', (rule.rank, layer.n_out))):
        noise = 0.2 * rng.standard_normal((*layer.stack, *shape))
        flat[f'{layer.path}/{leaf}'] = noise.astype(np.float32)
  return traverse_util.unflatten_dict(flat, sep='/')


@functools.cache
def _reference(guidance=True):
  diffusers = pytest.importorskip('diffusers')
  pytest.importorskip('peft')
  return randomise(
    diffusers.FluxTransformer2DModel(**SMALL, patch_size=1, guidance_embeds=guidance)
  )


@functools.cache
def _params(guidance=True):
  config = _config(guidance)
  state = tensors(_reference(guidance))
  return table.to_flax(state, flux_table.rows(config), flux_table.counts(config))


def _named(params, guidance=True):
  config = _config(guidance)
  return table.to_torch(params, flux_table.rows(config), flux_table.counts(config))


def _inputs():
  rng = np.random.default_rng(1)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  text = Conditioning(tokens=normal(2, 3, 12), mask=None, pooled=normal(2, 10))
  return normal(2, 6, 8), np.float32([0.2, 0.7]), text, flux.image_ids(2, 3), np.float32([0.3, 0.9])


@functools.cache
def _forward(guidance):
  model = flux.FluxTransformer(_config(guidance))
  return jax.jit(lambda params: model.apply({'params': params}, *_inputs()))


def _ours(adapter, rules, guidance=True):
  return _forward(guidance)(lora.merge(_params(guidance), adapter, rules))


def _theirs(model):
  torch = pytest.importorskip('torch')
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
  diffusers = pytest.importorskip('diffusers')
  parts = ('scheduler', 'vae', 'text_encoder', 'tokenizer', 'text_encoder_2', 'tokenizer_2')
  return diffusers.FluxPipeline(**dict.fromkeys(parts), transformer=model)


def _errors(found, expected):
  """Names of the tensors that differ, and by how much."""
  errors = {name: relative_error(found[name], value) for name, value in expected.items()}
  return {name: error for name, error in errors.items() if error > TOLERANCE}


@pytest.mark.parametrize('guidance', [True, False])
@pytest.mark.parametrize('rules', [EVERYTHING, SOME, MIXED])
def test_diffusers_loads_and_fuses_what_we_export(rules, guidance, tmp_path):
  adapter, path = _adapter(_config(guidance), rules), tmp_path / 'adapter.safetensors'
  export_lora(path, adapter, rules, _config(guidance))
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
  config, path = _config(guidance), tmp_path / 'adapter.safetensors'
  rules = (LoraRule(UNFUSED + '.*to_q', 2, 6.0), LoraRule(UNFUSED + '.*to_k', 3, 1.0))
  rules = (*rules, LoraRule(UNFUSED, 4, 5.0))
  adapter = _adapter(config, rules)
  export_lora(path, adapter, rules, config, 'kohya')
  model = copy.deepcopy(_reference(guidance))
  state = _pipeline(model).lora_state_dict(path)
  # diffusers 0.42 forgets to say of layers outside of blocks that they are the transformer's.
  state = {f'transformer.{name.removeprefix("transformer.")}': x for name, x in state.items()}
  model.load_lora_adapter(state)
  assert relative_error(_theirs(model), _ours(adapter, rules, guidance)) <= TOLERANCE


@pytest.mark.parametrize('rules', [EVERYTHING, SOME, MIXED])
def test_kohya_files_at_the_width_of_flux(rules, tmp_path):
  """Against diffusers' readers of kohya adapters and of original checkpoints, weights times x."""
  torch = pytest.importorskip('torch')
  pytest.importorskip('peft')
  convert = pytest.importorskip('diffusers.loaders.lora_conversion_utils')
  single_file = pytest.importorskip('diffusers.loaders.single_file_utils')
  config, path = (
    flux.FluxConfig(num_layers=1, num_single_layers=1),
    tmp_path / 'adapter.safetensors',
  )
  adapter, known = _adapter(config, rules), layers(config)
  export_lora(path, adapter, rules, config, 'kohya')
  rng = np.random.default_rng(2)
  x = {size: rng.standard_normal((size, 1)) for size in {layer.n_in for layer in known.values()}}

  expected, flat = {}, traverse_util.flatten_dict(lora.variables(adapter, rules), sep='/')
  for module, layer in known.items():
    expected[module] = np.zeros((layer.n_out, 1))
    if f'{layer.path}/a' in flat:
      a, b, scale = (
        np.float64(flat[f'{layer.path}/{leaf}'][layer.place]) for leaf in 'a b scale'.split()
      )
      expected[module] = scale * b.T @ (a.T @ x[layer.n_in])

  stored = safetensors.numpy.load_file(path)
  state = convert._convert_kohya_flux_lora_to_diffusers(
    {name: torch.from_numpy(np.array(value)) for name, value in stored.items()}
  )
  found = {}
  for name, down in state.items():
    if name.endswith('.lora_A.weight'):
      module, up = name.removesuffix('.lora_A.weight'), state[name.replace('lora_A', 'lora_B')]
      found[module.removeprefix('transformer.')] = up.double().numpy() @ (
        down.double().numpy() @ x[down.shape[1]]
      )
  assert set(found) >= {module for module, value in expected.items() if value.any()}
  assert not _errors(
    {**dict.fromkeys(expected, np.zeros(())), **found}, {k: expected[k] for k in found}
  )

  # An original checkpoint whose weights are what the file adds to them.
  checkpoint = {}
  for original in lora_kohya.originals(config):
    key = 'lora_unet_' + original.name.replace('.', '_')
    n_in, n_out = known[original.parts[0]].n_in, sum(known[part].n_out for part in original.parts)
    weight = np.zeros((n_out, 1))
    if f'{key}.alpha' in stored:
      down, up = (np.float64(stored[f'{key}.lora_{half}.weight']) for half in ('down', 'up'))
      weight = stored[f'{key}.alpha'] / len(down) * up @ (down @ x[n_in])
    checkpoint[f'{original.name}.weight'] = torch.from_numpy(weight)
    checkpoint[f'{original.name}.bias'] = torch.zeros(n_out)
  for block in ('double_blocks.0.img_attn', 'double_blocks.0.txt_attn', 'single_blocks.0'):
    for norm in ('query_norm', 'key_norm'):
      checkpoint[f'{block}.norm.{norm}.scale'] = torch.zeros(1)
  weights = single_file.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
  assert not _errors(
    {name.removesuffix('.weight'): value.numpy() for name, value in weights.items()}, expected
  )


@pytest.mark.parametrize('rank_stabilised', [False, True])
@pytest.mark.parametrize('prefixed', [False, True])
def test_what_peft_writes_is_read(prefixed, rank_stabilised, tmp_path):
  peft, diffusers = pytest.importorskip('peft'), pytest.importorskip('diffusers')
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
  torch = pytest.importorskip('torch')
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
  adapter, rules = import_lora(tmp_path / 'pytorch_lora_weights.safetensors', _config())
  assert relative_error(_ours(adapter, rules), _theirs(model)) <= TOLERANCE
  assert relative_error(_ours(adapter, rules), _theirs(_reference())) > 0.01


def _stored(path):
  with safetensors.safe_open(path, framework='np') as file:
    metadata = file.metadata()
  return safetensors.numpy.load_file(path), metadata


def _same_function(found, expected):
  """Whether two (adapter, rules) change the weights alike."""
  zeros = {
    f'{layer.path}/kernel': np.zeros((*layer.stack, layer.n_in, layer.n_out), np.float32)
    for layer in layers(_config()).values()
  }
  zeros = traverse_util.unflatten_dict(zeros, sep='/')
  merged = [lora.merge(zeros, adapter, rules) for adapter, rules in (found, expected)]
  return max(jax.tree.leaves(jax.tree.map(relative_error, *merged)))


@pytest.mark.parametrize('form', ['diffusers', 'kohya'])
@pytest.mark.parametrize('rules', [EVERYTHING, SOME, MIXED])
def test_round_trips(rules, form, tmp_path):
  adapter = _adapter(_config(), rules)
  first, second = tmp_path / 'first.safetensors', tmp_path / 'second.safetensors'
  export_lora(first, adapter, rules, _config(), form)
  found = import_lora(first, _config())
  assert _same_function(found, (adapter, rules)) <= 1e-6
  # The rules are those of these very arrays: training could go on.
  shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), _params(), found[1]))
  assert jax.tree.map(np.shape, found[0]) == jax.tree.map(lambda x: x.shape, shapes)
  assert len({(rule.rank, rule.alpha) for rule in found[1]}) == len(found[1])
  export_lora(second, *found, _config(), form)
  (stored, metadata), (again, settings) = _stored(first), _stored(second)
  assert set(stored) == set(again)
  for name, value in stored.items():
    np.testing.assert_array_equal(again[name], value)
  assert {**metadata, 'rules': ''} == {**settings, 'rules': ''}
  # And by way of the other form.
  other = 'kohya' if form == 'diffusers' else 'diffusers'
  export_lora(second, *found, _config(), other)
  export_lora(first, *import_lora(second, _config()), _config(), form)
  for name, value in stored.items():
    np.testing.assert_array_equal(_stored(first)[0][name], value)


@pytest.mark.parametrize(('dtype', 'error'), [('bfloat16', 4e-3), (np.float16, 5e-4)])
def test_smaller_dtypes(dtype, error, tmp_path):
  adapter, path = _adapter(_config(), MIXED), tmp_path / 'adapter.safetensors'
  for form in ('diffusers', 'kohya'):
    export_lora(path, adapter, MIXED, _config(), form, dtype)
    matrices = [x for name, x in _stored(path)[0].items() if name.endswith('.weight')]
    assert {x.dtype for x in matrices} == {np.dtype(dtype)}
    assert _same_function(import_lora(path, _config()), (adapter, MIXED)) <= error
  large = jax.tree.map(lambda x: 1e6 * x, adapter)
  with pytest.raises(UserError, match='not finite in float16: take another dtype'):
    export_lora(path, large, MIXED, _config(), dtype='float16')
  export_lora(path, large, MIXED, _config(), dtype='bfloat16')


def test_the_metadata_say_what_the_file_is(tmp_path):
  path = tmp_path / 'adapter.safetensors'
  export_lora(path, _adapter(_config(), SOME), SOME, _config(), base_model='FLUX.1-dev')
  metadata = _stored(path)[1]
  assert metadata['base_model'] == 'FLUX.1-dev' and metadata['form'] == 'diffusers'
  assert json.loads(metadata['rules']) == [['attn/to_(q|v)|proj_mlp', 3, 1.5], ['ff/', 2, 7.0]]
  settings = json.loads(metadata['lora_adapter_metadata'])
  assert settings['transformer.r'] == settings['transformer.lora_alpha'] == 3
  assert settings['transformer.rank_pattern']['^transformer_blocks.1.ff.net.2'] == 2
  assert str(tmp_path) not in str(metadata)


def _write(path, tensors, settings=None):
  metadata = None if settings is None else {'lora_adapter_metadata': json.dumps(settings)}
  write_safetensors(path, {name: np.float32(value) for name, value in tensors.items()}, metadata)
  return path


def _pair(name, n_in, n_out, rank=2, names=('lora_A', 'lora_B'), seed=5):
  rng = np.random.default_rng(seed)
  return {
    f'{name}.{names[0]}.weight': rng.standard_normal((rank, n_in)),
    f'{name}.{names[1]}.weight': rng.standard_normal((n_out, rank)),
  }


def _delta(tensors, name, names=('lora_A', 'lora_B')):
  return tensors[f'{name}.{names[1]}.weight'] @ tensors[f'{name}.{names[0]}.weight']


@pytest.mark.parametrize('prefix', ['', 'transformer.', 'base_model.model.', 'lora_transformer_'])
def test_the_prefixes_of_tools(prefix, tmp_path):
  name = 'single_transformer_blocks.1.attn.to_k'
  name = prefix + (name.replace('.', '_') if prefix.endswith('_') else name)
  stored = _pair(name, 32, 32) | {f'{name}.alpha': 3.0}
  adapter, rules = import_lora(_write(tmp_path / 'x.safetensors', stored), _config())
  found = lora.merge(
    {
      'single_transformer_blocks': {'attn': {'to_k': {'kernel': np.zeros((2, 32, 32), np.float32)}}}
    },
    adapter,
    rules,
  )
  kernel = found['single_transformer_blocks']['attn']['to_k']['kernel']
  assert rules == (LoraRule('^(single_transformer_blocks/attn/to_k)$', 2, 3.0),)
  # Layers of the stack that are not adapted get zeros.
  assert not adapter['single_transformer_blocks']['attn']['to_k']['a'][0].any()
  assert not np.any(kernel[0])
  assert relative_error(kernel[1], 1.5 * _delta(stored, name).T) <= TOLERANCE


@pytest.mark.parametrize('prefix', ['lora_unet_', 'diffusion_model.', 'base_model.model.'])
def test_fused_layers_of_others_are_split(prefix, tmp_path):
  """A dense update of the fused layer, as trainers that keep the original layout make it."""
  names, name = ('lora_down', 'lora_up'), f'{prefix}single_blocks.0.linear1'
  name = name.replace('.', '_') if prefix.endswith('_') else name
  stored = _pair(name, 32, 7 * 32, rank=5, names=names) | {f'{name}.alpha': 2.0}
  path = _write(tmp_path / 'x.safetensors', stored)
  adapter, rules = import_lora(path, _config())
  assert [(rule.rank, rule.alpha) for rule in rules] == [(5, 2.0)]
  delta = (2.0 / 5 * _delta(stored, name, names)).T
  block, flat = 'single_transformer_blocks', traverse_util.flatten_dict(adapter, sep='/')
  parts = {
    'attn/to_q': (0, 32),
    'attn/to_k': (32, 64),
    'attn/to_v': (64, 96),
    'proj_mlp': (96, 224),
  }
  assert set(flat) == {f'{block}/{part}/{leaf}' for part in parts for leaf in 'ab'}
  for part, (start, stop) in parts.items():
    found = 2.0 / 5 * flat[f'{block}/{part}/a'][0] @ flat[f'{block}/{part}/b'][0]
    assert relative_error(found, delta[:, start:stop]) <= TOLERANCE
  # On the way back, what is shared is stored once.
  export_lora(path, adapter, rules, _config(), 'kohya')
  assert _stored(path)[0]['lora_unet_single_blocks_0_linear1.lora_down.weight'].shape == (5, 32)


def test_ranks_and_alphas_may_differ_within_a_stack(tmp_path):
  sizes = {0: (3, 12.0), 1: (5, 2.0)}
  stored = {}
  for index, (rank, alpha) in sizes.items():
    name = f'transformer.transformer_blocks.{index}.attn.to_v'
    stored |= _pair(name, 32, 32, rank, seed=index) | {f'{name}.alpha': alpha}
  adapter, rules = import_lora(_write(tmp_path / 'x.safetensors', stored), _config())
  assert rules == (LoraRule('^(transformer_blocks/attn/to_v)$', 5, 2.0),)
  part = adapter['transformer_blocks']['attn']['to_v']
  for index, (rank, alpha) in sizes.items():
    wanted = alpha / rank * _delta(stored, f'transformer.transformer_blocks.{index}.attn.to_v')
    assert relative_error(2.0 / 5 * part['a'][index] @ part['b'][index], wanted.T) <= TOLERANCE
  # Exported, each has its own rank again.
  export_lora(tmp_path / 'y.safetensors', adapter, rules, _config())
  again = _stored(tmp_path / 'y.safetensors')[0]
  assert {name: x.shape for name, x in again.items()} == {
    name: x.shape for name, x in stored.items() if not name.endswith('.alpha')
  }


def test_a_fresh_adapter_survives(tmp_path):
  """Before the first step b is zero, and no component may be taken for padding."""
  flat = traverse_util.flatten_dict(_adapter(_config(), SOME), sep='/')
  flat |= {path: np.zeros_like(x) for path, x in flat.items() if path.endswith('/b')}
  fresh = traverse_util.unflatten_dict(flat, sep='/')
  for form in ('diffusers', 'kohya'):
    export_lora(tmp_path / 'x.safetensors', fresh, SOME, _config(), form)
    adapter, _ = import_lora(tmp_path / 'x.safetensors', _config())
    found, expected = (traverse_util.flatten_dict(tree, sep='/') for tree in (adapter, fresh))
    # A fused layer does not tell who was to write with what.
    assert set(found) >= set(expected)
    assert not any(value.any() for path, value in found.items() if path.endswith('/b'))
    assert all(value.any() for path, value in found.items() if path.endswith('/a'))


def test_text_encoders_are_left_out_with_one_warning(tmp_path, monkeypatch):
  warned = []
  monkeypatch.setattr(logging, 'warning', lambda message, *args: warned.append(message % args))
  stored = _pair('transformer.x_embedder', 8, 32)
  stored |= _pair('text_encoder.text_model.encoder.layers.0.mlp.fc1', 4, 4)
  stored |= _pair(
    'lora_te1_text_model_encoder_layers_0_mlp_fc1', 4, 4, names=('lora_down', 'lora_up')
  )
  adapter, _ = import_lora(_write(tmp_path / 'x.safetensors', stored), _config())
  assert set(adapter) == {'x_embedder'}
  assert len(warned) == 1 and 'text encoders' in warned[0] and 'lora_te1_' in warned[0]
  del stored['transformer.x_embedder.lora_A.weight'], stored['transformer.x_embedder.lora_B.weight']
  with pytest.raises(UserError, match='holds no adapter of a FLUX.1 transformer'):
    import_lora(_write(tmp_path / 'x.safetensors', stored), _config())


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
  name = 'transformer.x_embedder'
  stored = {
    **_pair(name, 8, 32),
    **_pair('x_embedder', 8, 32),
    f'{name}.lora_magnitude_vector.weight': np.ones(32),
    f'{name}.lora_B.bias': np.ones(32),
    'lora_unet_img_in.hada_w1_a': np.ones((2, 2)),
    'lora_unet_txt_in.lokr_w1': np.ones((2, 2)),
    **_pair('transformer.transformer_blocks.2.attn.to_q', 32, 32),
    **_pair('transformer.context_embedder', 12, 31),
    'transformer.proj_out.lora_A.weight': np.ones((2, 32)),
    **_pair('lora_unet_double_blocks_0_img_attn_qkv', 32, 96, names=('lora_down', 'lora_up')),
    **_pair('transformer.transformer_blocks.0.attn.to_k', 32, 32),
    **_pair('transformer.norm_out.linear', 32, 64),
    'transformer.norm_out.linear.alpha': -1.0,
    'transformer.single_transformer_blocks.0.proj_out.lora_A.weight': np.full((1, 160), np.nan),
    'transformer.single_transformer_blocks.0.proj_out.lora_B.weight': np.ones((32, 1)),
    'guess\nwhat': np.ones(1),
  }
  with pytest.raises(UserError) as caught:
    import_lora(_write(tmp_path / 'x.safetensors', stored), _config())
  message = str(caught.value)
  for expected in (
    'DoRA: transformer.x_embedder.lora_magnitude_vector.weight',
    'biases: transformer.x_embedder.lora_B.bias',
    'LoHa: lora_unet_img_in.hada_w1_a',
    'LoKr: lora_unet_txt_in.lokr_w1',
    'of no layer of this model: transformer.transformer_blocks.2.attn.to_q.lora_A.weight',
    'wrong shape: context_embedder (2, 12) (31, 2) for 12 -> 32',
    'without their other matrix: proj_out',
    'given twice: x_embedder.lora_A.weight, x_embedder.lora_B.weight, transformer_blocks.0.attn.to_k',
    'alpha is no sensible number: norm_out.linear',
    'not finite numbers: single_transformer_blocks.0.proj_out',
    "unknown: 'guess\\nwhat'",
  ):
    assert expected in message, (expected, message)
  assert '\n' not in message


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ([], 'no JSON object'),
    ({'use_dora': True}, 'adapter with DoRA'),
    ({'init_lora_weights': 'pissa_niter_4'}, "init_lora_weights 'pissa_niter_4'"),
    ({'transformer.lora_alpha': 'much'}, 'alpha in the LoRA settings of .* is no number from'),
    ({'lora_alpha': 0}, 'is no number from 1e-06 to 1e'),
    ({'lora_alpha': 10**400}, 'is no number from'),
    ({'lora_alpha': float('nan')}, 'is no number from'),
    ({'lora_alpha': True}, 'is no number from'),
    ({'alpha_pattern': [1]}, 'no JSON object'),
    ({'alpha_pattern': {'to_q': [1]}}, "alpha of 'to_q' in the LoRA settings"),
    # Matching it against a long name would take longer than anybody lives.
    ({'alpha_pattern': {'(a+)+$b': 1}}, 'no plain name of modules'),
  ],
)
def test_settings_of_strangers_are_not_trusted(settings, message, tmp_path):
  path = _write(tmp_path / 'x.safetensors', _pair('x_embedder', 8, 32), settings)
  with pytest.raises(UserError, match=message) as caught:
    import_lora(path, _config())
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('text', ['{', '[' * 100_000, '"' + 'x' * 10])
def test_damaged_settings(text, tmp_path):
  path = tmp_path / 'x.safetensors'
  write_safetensors(path, {'a': np.ones(1)}, {'lora_adapter_metadata': text})
  with pytest.raises(UserError, match='LoRA settings in .* are no JSON'):
    import_lora(path, _config())


@pytest.mark.parametrize('value', [np.int32, np.bool_, np.complex64, 'float8_e4m3fn'])
def test_matrices_of_strange_types(value, tmp_path):
  path = tmp_path / 'x.safetensors'
  if value == 'float8_e4m3fn':
    torch = pytest.importorskip('torch')
    matrix = torch.ones(2, 8).to(torch.float8_e4m3fn)
    pytest.importorskip('safetensors.torch').save_file({'x_embedder.lora_A.weight': matrix}, path)
  else:
    stored = {name: value(x) for name, x in _pair('x_embedder', 8, 32).items()}
    path.write_bytes(safetensors.numpy.save(stored))
  with pytest.raises(UserError, match='not finite numbers|of a type that cannot be read'):
    import_lora(path, _config())


def test_absent_and_damaged_files(tmp_path):
  path = _write(tmp_path / 'x.safetensors', _pair('x_embedder', 8, 32))
  whole = path.read_bytes()
  with pytest.raises(UserError, match='There is no weights file'):
    import_lora(tmp_path / 'absent.safetensors', _config())
  for damaged in (b'', whole[:40], whole[:-4], b'\xff' * 64):
    path.write_bytes(damaged)
    with pytest.raises(UserError, match='not a whole safetensors file'):
      import_lora(path, _config())


def test_extremes_of_shapes_and_scales(tmp_path):
  path = tmp_path / 'x.safetensors'
  for shapes in (
    ((0, 8), (32, 0)),
    ((), (32, 1)),
    ((2, 8, 1, 1), (32, 2, 1, 1)),
    ((2, 8), (32, 3)),
  ):
    stored = dict(zip(_pair('x_embedder', 8, 32), map(np.ones, shapes), strict=True))
    with pytest.raises(UserError, match='wrong shape: x_embedder'):
      import_lora(_write(path, stored), _config())
  for alpha in (0.0, 1e-30, 1e30, np.inf, np.nan, np.ones(2)):
    stored = _pair('x_embedder', 8, 32) | {'x_embedder.alpha': alpha}
    with pytest.raises(UserError, match='alpha is no sensible number: x_embedder'):
      import_lora(_write(path, stored), _config())


def test_half_precision_alphas_are_read(tmp_path):
  stored = _pair('x_embedder', 8, 32) | {'x_embedder.alpha': np.ones(())}
  for dtype in (ml_dtypes.bfloat16, np.float16, np.float64):
    path = tmp_path / 'x.safetensors'
    write_safetensors(path, {name: np.asarray(x, dtype) for name, x in stored.items()})
    adapter, rules = import_lora(path, _config())
    assert rules == (LoraRule('^(x_embedder)$', 2, 1.0),)
    assert adapter['x_embedder']['a'].dtype == np.float32


def test_what_cannot_be_exported(tmp_path):
  path, adapter = tmp_path / 'x.safetensors', _adapter(_config(), SOME)
  with pytest.raises(UserError, match="Unknown form 'a1111'"):
    export_lora(path, adapter, SOME, _config(), 'a1111')
  for dtype in ('float8', 'int8', np.int32):
    with pytest.raises(UserError, match='one of float32, bfloat16, float16'):
      export_lora(path, adapter, SOME, _config(), dtype=dtype)
  with pytest.raises(UserError, match="No LoRA rule matches 'transformer_blocks/ff/net_0_proj'"):
    export_lora(path, adapter, SOME[:1], _config())
  with pytest.raises(UserError, match="no linear layer 'elsewhere'"):
    other = {'elsewhere': adapter['single_transformer_blocks']['proj_mlp']}
    export_lora(path, other, EVERYTHING, _config())
  longer = flux.FluxConfig(**{**SMALL, 'num_layers': 3})
  with pytest.raises(UserError, match=r'it maps \(2, 32, 32\) at .* this model \(3, 32, 32\)'):
    export_lora(path, adapter, SOME, longer)
  with pytest.raises(UserError, match='zero everywhere'):
    export_lora(path, jax.tree.map(np.zeros_like, adapter), SOME, _config())
  assert not path.exists()


def test_every_linear_layer_has_a_name_in_both_layouts():
  for guidance in (True, False):
    config = flux.FluxConfig(guidance_embeds=guidance)
    parts = [part for original in lora_kohya.originals(config) for part in original.parts]
    assert sorted(parts) == sorted(layers(config))
    assert len(parts) == (504 if guidance else 502)
    names = [original.name for original in lora_kohya.originals(config)]
    underscored = [name.replace('.', '_') for name in [*names, *parts]]
    assert len(set(underscored)) == len(underscored)


def test_several_adapters_are_one():
  rules = (LoraRule('attn/to_q|x_embedder', 2, 5.0), LoraRule('norm_out', 1, 1.0))
  first, second = _adapter(_config(), SOME, seed=1), _adapter(_config(), rules, seed=2)
  combined = lora.combine([(first, SOME, 0.5), (second, rules, -2.0)])
  expected = lora.merge(lora.merge(_params(), first, SOME, 0.5), second, rules, -2.0)
  found = lora.merge(_params(), *combined)
  assert not _errors(_named(found), _named(expected))
  assert combined[0]['transformer_blocks']['attn']['to_q']['a'].shape == (2, 32, 5)
  assert (
    relative_error(_named(found)['x_embedder.weight'], _named(_params())['x_embedder.weight'])
    > 0.01
  )
  assert all(rule.alpha == rule.rank for rule in combined[1])
  other = {'x_embedder': {'a': np.ones((9, 2)), 'b': np.ones((2, 32))}}
  with pytest.raises(UserError, match=r"not of one model: at 'x_embedder' .*\(9, 2\)"):
    lora.combine([(second, rules, 1.0), (other, rules, 1.0)])
