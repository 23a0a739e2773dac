"""Adapter files of both forms: they come back as they went, and strangers' are not trusted."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from absl import logging
from adapters import EVERYTHING, MIXED, SMALL, SOME, tiny_config, trained
from flax import traverse_util
from oracle import relative_error

from eru_jax.errors import UserError
from eru_jax.models import flux, lora
from eru_jax.models.lora import LoraRule
from eru_jax.weights import lora_kohya
from eru_jax.weights.lora_io import check_lora, export_lora, import_lora
from eru_jax.weights.lora_layers import layers
from eru_jax.weights.safetensors_io import write_safetensors

TOLERANCE = 1e-5


def _stored(path):
  with safetensors.safe_open(path, framework='np') as file:
    metadata = file.metadata()
  return safetensors.numpy.load_file(path), metadata


def _kernels():
  """A model whose weights are zero, so that what an adapter adds is all there is."""
  zeros = {
    f'{layer.path}/kernel': np.zeros((*layer.stack, layer.n_in, layer.n_out), np.float32)
    for layer in layers(tiny_config()).values()
  }
  return traverse_util.unflatten_dict(zeros, sep='/')


def _same_function(found, expected):
  """The largest relative difference between what two (adapter, rules) add to a weight."""
  merged = [lora.merge(_kernels(), adapter, rules) for adapter, rules in (found, expected)]
  return max(jax.tree.leaves(jax.tree.map(relative_error, *merged)))


@pytest.mark.parametrize('form', ['diffusers', 'kohya'])
@pytest.mark.parametrize('rules', [EVERYTHING, SOME, MIXED])
def test_round_trips(rules, form, tmp_path):
  adapter = trained(tiny_config(), rules)
  first, second = tmp_path / 'first.safetensors', tmp_path / 'second.safetensors'
  export_lora(first, adapter, rules, tiny_config(), form)
  found = import_lora(first, tiny_config())
  assert _same_function(found, (adapter, rules)) <= 1e-6
  # Ranks and alphas are those it was trained with, and of these very arrays: training goes on.
  assert lora.sizes(*found) == lora.sizes(adapter, rules)
  shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), _kernels(), found[1]))
  assert jax.tree.map(np.shape, found[0]) == jax.tree.map(lambda x: x.shape, shapes)
  assert len({(rule.rank, rule.alpha) for rule in found[1]}) == len(found[1])
  export_lora(second, *found, tiny_config(), form)
  (stored, metadata), (again, settings) = _stored(first), _stored(second)
  assert set(stored) == set(again)
  # The scale is taken out and put in again.
  for name, value in stored.items():
    np.testing.assert_allclose(again[name], value, rtol=3e-7)
  assert {**metadata, 'rules': ''} == {**settings, 'rules': ''}
  # And by way of the other form.
  other = 'kohya' if form == 'diffusers' else 'diffusers'
  export_lora(second, *found, tiny_config(), other)
  export_lora(first, *import_lora(second, tiny_config()), tiny_config(), form)
  for name, value in stored.items():
    np.testing.assert_allclose(_stored(first)[0][name], value, rtol=6e-7)


@pytest.mark.parametrize(('dtype', 'error'), [('bfloat16', 4e-3), (np.float16, 5e-4)])
def test_smaller_dtypes(dtype, error, tmp_path):
  adapter, path = trained(tiny_config(), MIXED), tmp_path / 'adapter.safetensors'
  for form in ('diffusers', 'kohya'):
    export_lora(path, adapter, MIXED, tiny_config(), form, dtype)
    matrices = [x for name, x in _stored(path)[0].items() if name.endswith('.weight')]
    assert {x.dtype for x in matrices} == {np.dtype(dtype)}
    assert _same_function(import_lora(path, tiny_config()), (adapter, MIXED)) <= error
  large = jax.tree.map(lambda x: 1e6 * x, adapter)
  with pytest.raises(UserError, match='not finite in float16: take another dtype'):
    export_lora(path, large, MIXED, tiny_config(), dtype='float16')
  export_lora(path, large, MIXED, tiny_config(), dtype='bfloat16')


def test_the_metadata_say_what_the_file_is(tmp_path):
  path = tmp_path / 'adapter.safetensors'
  export_lora(path, trained(tiny_config(), SOME), SOME, tiny_config(), base_model='FLUX.1-dev')
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
  adapter, rules = import_lora(_write(tmp_path / 'x.safetensors', stored), tiny_config())
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
  adapter, rules = import_lora(path, tiny_config())
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
  export_lora(path, adapter, rules, tiny_config(), 'kohya')
  assert _stored(path)[0]['lora_unet_single_blocks_0_linear1.lora_down.weight'].shape == (5, 32)


def test_ranks_and_alphas_may_differ_within_a_stack(tmp_path):
  sizes = {0: (3, 12.0), 1: (5, 2.0)}
  stored = {}
  for index, (rank, alpha) in sizes.items():
    name = f'transformer.transformer_blocks.{index}.attn.to_v'
    stored |= _pair(name, 32, 32, rank, seed=index) | {f'{name}.alpha': alpha}
  adapter, rules = import_lora(_write(tmp_path / 'x.safetensors', stored), tiny_config())
  assert rules == (LoraRule('^(transformer_blocks/attn/to_v)$', 5, 2.0),)
  part = adapter['transformer_blocks']['attn']['to_v']
  for index, (rank, alpha) in sizes.items():
    wanted = alpha / rank * _delta(stored, f'transformer.transformer_blocks.{index}.attn.to_v')
    assert relative_error(2.0 / 5 * part['a'][index] @ part['b'][index], wanted.T) <= TOLERANCE
  # Exported, each has its own rank again.
  export_lora(tmp_path / 'y.safetensors', adapter, rules, tiny_config())
  again = _stored(tmp_path / 'y.safetensors')[0]
  assert {name: x.shape for name, x in again.items()} == {
    name: x.shape for name, x in stored.items() if not name.endswith('.alpha')
  }


def test_a_fresh_adapter_survives(tmp_path):
  """Before the first step b is zero, and no component may be taken for padding."""
  flat = traverse_util.flatten_dict(trained(tiny_config(), SOME), sep='/')
  flat |= {path: np.zeros_like(x) for path, x in flat.items() if path.endswith('/b')}
  fresh = traverse_util.unflatten_dict(flat, sep='/')
  for form in ('diffusers', 'kohya'):
    export_lora(tmp_path / 'x.safetensors', fresh, SOME, tiny_config(), form)
    adapter, _ = import_lora(tmp_path / 'x.safetensors', tiny_config())
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
  adapter, _ = import_lora(_write(tmp_path / 'x.safetensors', stored), tiny_config())
  assert set(adapter) == {'x_embedder'}
  assert len(warned) == 1 and 'text encoders' in warned[0] and 'lora_te1_' in warned[0]
  del stored['transformer.x_embedder.lora_A.weight'], stored['transformer.x_embedder.lora_B.weight']
  with pytest.raises(UserError, match='holds adapters of text encoders alone'):
    import_lora(_write(tmp_path / 'x.safetensors', stored), tiny_config())


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
    'double_blocks.0.processor.qkv_lora1.down.weight': np.ones((2, 32)),
    'transformer.transformer_blocks.0.attn.to_q.lora.down.weight': np.ones((2, 32)),
    'transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight': np.ones((2, 32)),
    'guess\nwhat': np.ones(1),
  }
  path = _write(tmp_path / 'x.safetensors', stored)
  with pytest.raises(UserError) as caught:
    import_lora(path, tiny_config())
  message, details = str(caught.value), caught.value.details
  # All but the numbers is seen without reading them.
  with pytest.raises(UserError) as caught:
    check_lora(path, tiny_config())
  assert 'not finite' not in str(caught.value) and 'LoKr' in str(caught.value)
  assert 'alpha is no sensible number: norm_out.linear' in str(caught.value)
  for expected in (
    'DoRA: transformer.x_embedder.lora_magnitude_vector.weight',
    'biases: transformer.x_embedder.lora_B.bias',
    'LoHa: lora_unet_img_in.hada_w1_a',
    'LoKr: lora_unet_txt_in.lokr_w1',
    "XLabs' names: double_blocks.0.processor.qkv_lora1.down.weight",
    "diffusers' names before PEFT: transformer.transformer_blocks.0.attn.to_q.lora.down.weight",
    "PEFT's inner names: transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight",
    'of no layer of this model: transformer.transformer_blocks.2.attn.to_q.lora_A.weight',
    'wrong shape: context_embedder (2, 12) (31, 2) for 12 -> 32',
    'without their other matrix: proj_out',
    'given twice: x_embedder.lora_A.weight',
    'given twice: x_embedder.lora_B.weight',
    'given twice: transformer_blocks.0.attn',
    'alpha is no sensible number: norm_out.linear',
    'not finite numbers: single_transformer_blocks.0.proj_out',
    "unknown: 'guess\\nwhat'",
  ):
    assert expected in message, (expected, message)
  assert len(message.splitlines()) == 1 + len(details)


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
    import_lora(path, tiny_config())
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('text', ['{', '[' * 100_000, '"' + 'x' * 10])
def test_damaged_settings(text, tmp_path):
  path = tmp_path / 'x.safetensors'
  write_safetensors(path, {'a': np.ones(1)}, {'lora_adapter_metadata': text})
  with pytest.raises(UserError, match='LoRA settings in .* are no JSON'):
    import_lora(path, tiny_config())


@pytest.mark.parametrize(
  'text',
  ['{', '[' * 100_000, '[]', '{"x": 2}', '{"x": [2]}', '{"x": [0, 1]}', '{"x": [true, 1]}',
   '{"x": [2, 1e400]}', '{"x": [2, null]}'],
)  # fmt: skip
def test_damaged_sizes(text, tmp_path):
  path = tmp_path / 'x.safetensors'
  stored = {name: np.float32(x) for name, x in _pair('x_embedder', 8, 32).items()}
  write_safetensors(path, stored, {'eru_jax.layers': text})
  for read in (import_lora, check_lora):
    with pytest.raises(UserError, match='eru_jax.layers in .*: export it again'):
      read(path, tiny_config())


def test_layers_that_a_file_was_not_trained_with_keep_their_alpha(tmp_path):
  """Somebody resized or renamed what we wrote: the function is what the tensors say."""
  path = tmp_path / 'x.safetensors'
  stored = {name: np.float32(x) for name, x in _pair('x_embedder', 8, 32, rank=3).items()}
  layers_ = {'x_embedder': [4, 10.0], 'nosuch': [7, 1.0]}
  write_safetensors(path, stored, {'eru_jax.layers': json.dumps(layers_)})
  adapter, rules = import_lora(path, tiny_config())
  assert rules == (LoraRule('^(x_embedder)$', 3, 7.5),)
  found = 2.5 * adapter['x_embedder']['a'] @ adapter['x_embedder']['b']
  assert relative_error(found, _delta(stored, 'x_embedder').T) <= TOLERANCE


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
  with pytest.raises(
    UserError, match='not finite numbers|of a type that cannot be read|cannot take'
  ):
    import_lora(path, tiny_config())


def test_absent_and_damaged_files(tmp_path):
  path = _write(tmp_path / 'x.safetensors', _pair('x_embedder', 8, 32))
  whole = path.read_bytes()
  with pytest.raises(UserError, match='There is no weights file'):
    import_lora(tmp_path / 'absent.safetensors', tiny_config())
  for damaged in (b'', whole[:40], whole[:-4], b'\xff' * 64):
    path.write_bytes(damaged)
    with pytest.raises(UserError, match='not a whole safetensors file'):
      import_lora(path, tiny_config())


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
      import_lora(_write(path, stored), tiny_config())
  for alpha in (0.0, 1e-30, 1e30, np.inf, np.nan, np.ones(2)):
    stored = _pair('x_embedder', 8, 32) | {'x_embedder.alpha': alpha}
    with pytest.raises(UserError, match='alpha is no sensible number: x_embedder'):
      import_lora(_write(path, stored), tiny_config())


def test_half_precision_alphas_are_read(tmp_path):
  stored = _pair('x_embedder', 8, 32) | {'x_embedder.alpha': np.ones(())}
  for dtype in (ml_dtypes.bfloat16, np.float16, np.float64):
    path = tmp_path / 'x.safetensors'
    write_safetensors(path, {name: np.asarray(x, dtype) for name, x in stored.items()})
    adapter, rules = import_lora(path, tiny_config())
    assert rules == (LoraRule('^(x_embedder)$', 2, 1.0),)
    assert adapter['x_embedder']['a'].dtype == np.float32


def test_what_cannot_be_exported(tmp_path):
  path, adapter = tmp_path / 'x.safetensors', trained(tiny_config(), SOME)
  with pytest.raises(UserError, match="Unknown form 'a1111'"):
    export_lora(path, adapter, SOME, tiny_config(), 'a1111')
  for dtype in ('float8', 'int8', np.int32):
    with pytest.raises(UserError, match='one of float32, bfloat16, float16'):
      export_lora(path, adapter, SOME, tiny_config(), dtype=dtype)
  with pytest.raises(UserError, match="No LoRA rule matches 'transformer_blocks/ff/net_0_proj'"):
    export_lora(path, adapter, SOME[:1], tiny_config())
  with pytest.raises(UserError, match="no linear layer 'elsewhere'"):
    other = {'elsewhere': adapter['single_transformer_blocks']['proj_mlp']}
    export_lora(path, other, EVERYTHING, tiny_config())
  longer = flux.FluxConfig(**{**SMALL, 'num_layers': 3})
  with pytest.raises(UserError, match=r'it maps \(2, 32, 32\) at .* this model \(3, 32, 32\)'):
    export_lora(path, adapter, SOME, longer)
  with pytest.raises(UserError, match='zero everywhere'):
    export_lora(path, jax.tree.map(np.zeros_like, adapter), SOME, tiny_config())
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
  first, second = trained(tiny_config(), SOME, seed=1), trained(tiny_config(), rules, seed=2)
  combined = lora.combine([(first, SOME, 0.5), (second, rules, -2.0)])
  expected = lora.merge(lora.merge(_kernels(), first, SOME, 0.5), second, rules, -2.0)
  found = lora.merge(_kernels(), *combined)
  assert max(jax.tree.leaves(jax.tree.map(relative_error, found, expected))) <= TOLERANCE
  assert combined[0]['transformer_blocks']['attn']['to_q']['a'].shape == (2, 32, 5)
  assert all(rule.alpha == rule.rank for rule in combined[1])
  other = {'x_embedder': {'a': np.ones((9, 2)), 'b': np.ones((2, 32))}}
  with pytest.raises(UserError, match=r"not of one model: at 'x_embedder' .*\(9, 2\)"):
    lora.combine([(second, rules, 1.0), (other, rules, 1.0)])


def test_weights_of_a_model_are_no_adapter(tmp_path):
  path = _write(tmp_path / 'x.safetensors', {'x_embedder.bias': np.zeros(4, np.float32)})
  with pytest.raises(UserError, match='holds no adapter, but 1 other tensors such as x_embedder.b'):
    import_lora(path, tiny_config())
