"""Adapters: what they select, that they start as nothing, and that they equal a merged weight."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from oracle import relative_error

from eru_jax.errors import UserError
from eru_jax.models import flux, lora
from eru_jax.models.layers import Dense
from eru_jax.models.lora import LoraRule
from eru_jax.models.quantize import quantize
from eru_jax.types import Conditioning

TOLERANCE = 1e-5
CONFIG = flux.FluxConfig(
  in_channels=4,
  num_layers=2,
  num_single_layers=2,
  attention_head_dim=8,
  num_attention_heads=2,
  joint_attention_dim=6,
  pooled_projection_dim=5,
  guidance_embeds=False,
  axes_dims_rope=(2, 2, 4),
)
RULES = (LoraRule('attn/(to|add)_', rank=2, alpha=6.0), LoraRule('proj_mlp|x_emb', 3, 1.5))


def _inputs():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  text = Conditioning(tokens=normal(3, 4, 6), mask=None, pooled=normal(3, 5))
  return normal(3, 6, 4), np.float32([0.1, 0.5, 0.9]), text, flux.image_ids(2, 3)


@functools.cache
def _boxed():
  """Shapes of the parameters, with their logical axes."""
  return jax.eval_shape(lambda: flux.FluxTransformer(CONFIG).init(jax.random.key(0), *_inputs()))[
    'params'
  ]


def _random(shapes, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(rng.standard_normal(s.shape) * s.shape[-1] ** -0.5, jnp.float32), shapes
  )


@functools.cache
def _params():
  return _random(nn.unbox(_boxed()), 1)


@functools.cache
def _fresh(rules=RULES, seed=2):
  return lora.init(jax.random.key(seed), _params(), rules)


def _flat(tree):
  return traverse_util.flatten_dict(tree, sep='/')


@functools.cache
def _forward():
  model = flux.FluxTransformer(CONFIG)
  return jax.jit(lambda variables: model.apply(variables, *_inputs()))


def _dense(rank=2, alpha=6.0):
  """A layer, its input, kernel, bias, a trained adapter and its rule."""
  rng = np.random.default_rng(3)
  x, kernel, bias, a, b = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((4, 7), (7, 5), (5,), (7, rank), (rank, 5))
  )
  rules = (LoraRule('layer', rank, alpha),)
  return x, {'kernel': kernel, 'bias': bias}, {'layer': {'a': a, 'b': b}}, rules


def _dense_output(params, adapter, rules, x, strength=1.0):
  variables = {'params': params, 'lora': lora.variables(adapter, rules, strength)['layer']}
  return Dense(5).apply(variables, x)


def test_a_fresh_adapter_changes_no_bit():
  base = _forward()({'params': _params()})
  adapted = _forward()({'params': _params(), 'lora': lora.variables(_fresh(), RULES)})
  np.testing.assert_array_equal(adapted, base)
  trained = _random(_fresh(), 4)
  adapted = _forward()({'params': _params(), 'lora': lora.variables(trained, RULES)})
  assert relative_error(adapted, base) > 0.01


def test_patterns_select_the_layers_they_match_and_the_first_one_decides():
  flat = _flat(_fresh())
  blocks = ('transformer_blocks', 'single_transformer_blocks')
  expected = {f'{block}/attn/to_{part}': 2 for block in blocks for part in 'qkv'}
  expected |= {
    f'transformer_blocks/attn/{name}': 2
    for name in ('add_q_proj', 'add_k_proj', 'add_v_proj', 'to_out_0', 'to_add_out')
  }
  expected |= {'single_transformer_blocks/proj_mlp': 3, 'x_embedder': 3}
  assert set(flat) == {f'{layer}/{leaf}' for layer in expected for leaf in 'ab'}
  kernels = _flat(_params())
  for layer, rank in expected.items():
    *stack, n_in, n_out = kernels[f'{layer}/kernel'].shape
    assert flat[f'{layer}/a'].shape == (*stack, n_in, rank)
    assert flat[f'{layer}/b'].shape == (*stack, rank, n_out)
    assert flat[f'{layer}/a'].dtype == flat[f'{layer}/b'].dtype == jnp.float32
    assert not np.any(flat[f'{layer}/b']) and np.all(np.abs(flat[f'{layer}/a']) <= n_in**-0.5)
  first = _flat(_fresh((LoraRule('to_q', 1, 1.0), *RULES)))
  assert {path for path, x in first.items() if path.endswith('/a') and x.shape[-1] == 1} == {
    f'{block}/attn/to_q/a' for block in blocks
  }
  # A layer's numbers depend on its path alone, not on what else is adapted.
  np.testing.assert_array_equal(first['x_embedder/a'], flat['x_embedder/a'])
  assert np.any(_flat(_fresh(seed=5))['x_embedder/a'] != flat['x_embedder/a'])


def test_everything_selects_every_linear_layer_and_nothing_else():
  everything = (LoraRule('.*', 1, 1.0),)
  adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), _params(), everything))
  layers = {path[: -len('/a')] for path in _flat(adapter)}
  assert {f'{layer}/kernel' for layer in layers} == {
    path for path in _flat(_params()) if path.endswith('/kernel')
  }
  params = {'conv': {'kernel': jnp.zeros((3, 3, 2, 2))}, 'linear': {'kernel': jnp.zeros((2, 2))}}
  assert set(lora.init(jax.random.key(0), params, [LoraRule('.*', 1, 1.0)])) == {'linear'}


def test_a_pattern_without_layers_is_one_user_error():
  with pytest.raises(UserError, match=r"'attn/to_w' matches no layer .* named like '\w+"):
    _fresh((*RULES, LoraRule('attn/to_w', 1, 1.0)))
  # Nor may an earlier rule have taken all of them.
  with pytest.raises(UserError, match="'to_q' matches no layer that an earlier rule"):
    _fresh((*RULES, LoraRule('to_q', 1, 1.0)))


@pytest.mark.parametrize(('rank', 'alpha'), [(1, 1.0), (2, 6.0), (4, 1.0)])
def test_a_layer_equals_its_closed_form(rank, alpha):
  x, params, adapter, rules = _dense(rank, alpha)
  a, b = (adapter['layer'][name].astype(np.float64) for name in 'ab')
  direction = np.random.default_rng(5).standard_normal((4, 5))
  kernel = params['kernel'] + alpha / rank * (a @ b)

  def loss(adapter, x):
    out = _dense_output(params, adapter, rules, x)
    return jnp.sum(out * direction), out

  (grads, x_grad), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(adapter, x)
  assert relative_error(out, x @ kernel + params['bias']) <= TOLERANCE
  full = x.T @ direction
  assert relative_error(grads['layer']['a'], alpha / rank * full @ b.T) <= TOLERANCE
  assert relative_error(grads['layer']['b'], alpha / rank * a.T @ full) <= TOLERANCE
  assert relative_error(x_grad, direction @ kernel.T) <= TOLERANCE
  # The rule scales by alpha / rank, so that both doubled are the same scale.
  twice = (LoraRule('layer', 2 * rank, 2 * alpha),)
  assert relative_error(_dense_output(params, adapter, twice, x), out) <= TOLERANCE


def test_the_gradient_never_takes_the_shape_of_the_kernel():
  x, params, adapter, rules = _dense()

  def loss(adapter, params, x):
    return jnp.sum(jnp.square(_dense_output(params, adapter, rules, x)))

  def inside(value):
    # By attributes, since jax has moved the function that does this more than once.
    if hasattr(value, 'eqns'):
      yield getattr(value, 'jaxpr', value)
    elif isinstance(value, list | tuple):
      for part in value:
        yield from inside(part)

  def shapes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (out.aval.shape for out in equation.outvars)
      for inner in inside(list(equation.params.values())):
        yield from shapes(inner)

  def computed(argnums):
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums))(adapter, params, x).jaxpr
    return {tuple(sorted(shape)) for shape in shapes(jaxpr)}

  assert (2, 5) in computed(0) and (5, 7) not in computed(0)
  # Were the kernel differentiated, this would see it.
  assert (5, 7) in computed((0, 1))


def _gradient(variables, adapter, scan=True):
  """Gradient with respect to the adapter of a scalar of the model's output, and that output."""
  model = flux.FluxTransformer(CONFIG, scan=scan)
  direction = np.random.default_rng(7).standard_normal((3, 6, 4)).astype(np.float32)

  def loss(adapter):
    out = model.apply(variables(adapter), *_inputs())
    return jnp.mean(out * direction), out

  return jax.jit(jax.grad(loss, has_aux=True))(adapter)


@functools.cache
def _merged():
  """A trained adapter, and what it does as explicit weights W + alpha / rank A B."""
  adapter = _random(_fresh(), 6)

  def variables(adapter):
    flat, deltas = dict(_flat(_params())), _flat(adapter)
    for path, a in deltas.items():
      if path.endswith('/a'):
        layer = path[: -len('/a')]
        scale = 6.0 / 2 if '/attn/' in path else 1.5 / 3
        flat[f'{layer}/kernel'] += scale * a @ deltas[f'{layer}/b']
    return {'params': traverse_util.unflatten_dict(flat, sep='/')}

  return adapter, variables(adapter)['params'], _gradient(variables, adapter)


@pytest.mark.parametrize('scan', [True, False])
def test_a_model_equals_its_merged_parameters(scan):
  adapter, _, (expected, reference) = _merged()

  def variables(adapter):
    return {'params': _params(), 'lora': lora.variables(adapter, RULES)}

  found, out = _gradient(variables, adapter, scan)
  assert relative_error(out, reference) <= TOLERANCE
  errors = _flat(jax.tree.map(relative_error, found, expected))
  worst = max(errors, key=errors.get)
  assert errors[worst] <= TOLERANCE, (worst, errors[worst])


def test_merge_folds_the_adapter_in():
  adapter, expected, _ = _merged()
  merged = lora.merge(_params(), adapter, RULES)
  errors = jax.tree.map(relative_error, merged, expected)
  assert max(jax.tree.leaves(errors)) <= TOLERANCE
  assert merged['proj_out']['kernel'] is _params()['proj_out']['kernel']
  whole = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _params())
  assert lora.merge(whole, adapter, RULES)['x_embedder']['kernel'].dtype == jnp.bfloat16


def test_merge_refuses_a_quantised_kernel():
  adapter, expected, _ = _merged()
  with pytest.raises(UserError, match="'x_embedder' is quantised, .* before `quantize`") as caught:
    lora.merge(quantize(_params(), 'x_embedder'), adapter, RULES)
  assert '\n' not in str(caught.value)
  # Quantised layers without an adapter stay as they are.
  small = quantize(_params(), 'proj_out')
  merged = lora.merge(small, adapter, RULES)
  assert merged['proj_out']['kernel'] is small['proj_out']['kernel']
  found, wanted = (tree['x_embedder']['kernel'] for tree in (merged, expected))
  assert relative_error(found, wanted) <= TOLERANCE


def test_strength_gates_each_example():
  adapter, params = _random(_fresh(), 8), _params()

  def run(strength):
    return _forward()({'params': params, 'lora': lora.variables(adapter, RULES, strength)})

  gated = run(np.float32([0, 1, 0.5]))
  base = _forward()({'params': params})
  whole = _forward()({'params': lora.merge(params, adapter, RULES)})
  half = _forward()({'params': lora.merge(params, adapter, RULES, 0.5)})
  assert relative_error(gated[0], base[0]) <= TOLERANCE
  assert relative_error(gated[1], whole[1]) <= TOLERANCE
  assert relative_error(gated[2], half[2]) <= TOLERANCE
  assert relative_error(base[0], whole[0]) > 0.01


def test_adapters_inherit_the_logical_axes():
  boxed = jax.eval_shape(lambda params: lora.init(jax.random.key(0), params, RULES), _boxed())
  names = {path: box.names for path, box in _flat(boxed).items()}
  assert names['transformer_blocks/attn/to_q/a'] == ('layers', 'lora_channels', 'lora_rank')
  assert names['transformer_blocks/attn/to_q/b'] == ('layers', 'lora_rank', 'lora_channels')
  assert names['x_embedder/a'] == (None, 'lora_rank')
  assert names['x_embedder/b'] == ('lora_rank', 'lora_channels')
