"""Which kernel attention picks, that masks mean the same to every kernel, and how meshes split it.

There is no GPU here: the backend is made to look like one, and XLA stands in for cuDNN. The TPU's
kernel runs interpreted.
"""

import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from oracle import relative_error

from eru_jax.errors import UserError
from eru_jax.models import attention as module
from eru_jax.models.attention import attention
from eru_jax.models.splash import block, splash
from eru_jax.models.stack import stack_blocks


@pytest.fixture
def gpu(monkeypatch):
  """Pretends to be on an H100 or H200; returns what was asked of jax.nn, call by call."""
  calls, original = [], jax.nn.dot_product_attention

  def recorded(*args, implementation, **options):
    calls.append(implementation)
    return original(*args, implementation='xla', **options)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', recorded)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(module, '_compute_capability', lambda: (9, 0))
  module._warn.cache_clear()
  return calls


@pytest.fixture
def warnings(monkeypatch):
  lines = []
  monkeypatch.setattr(module.logging, 'warning', lambda text, *args: lines.append(text % args))
  return lines


def _inputs(dtype=np.float32, length=6, keys=9, head_dim=16):
  rng = np.random.default_rng(0)
  shapes = [(3, length, 2, head_dim), (3, keys, 2, head_dim), (3, keys, 2, head_dim)]
  query, key, value = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
  mask = rng.random((3, keys)) < 0.5
  # Text first, padded behind; everything; a single key.
  mask[0, :2], mask[0, 2:4], mask[0, 4:], mask[1], mask[2] = True, False, True, True, False
  mask[2, 5] = True
  return query, key, value, jnp.asarray(mask)


def test_masked_cudnn_equals_a_masked_softmax(gpu):
  query, key, value, mask = _inputs()
  direction = np.random.default_rng(1).standard_normal(query.shape).astype(np.float32)

  def explicit(query, key, value):
    scores = jnp.einsum('blhd,bshd->bhls', query, key) / 4
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum('bhls,bshd->blhd', weights, value)

  def ours(query, key, value):
    return attention(query, key, value, mask, 'cudnn')

  assert relative_error(ours(query, key, value), explicit(query, key, value)) < 1e-5
  found, expected = (
    jax.grad(lambda *args, f=f: jnp.sum(f(*args) * direction), argnums=(0, 1, 2))(query, key, value)
    for f in (ours, explicit)
  )
  for a, b in zip(found, expected, strict=True):
    assert relative_error(a, b) < 1e-5
  # A key that is masked out has no gradient at all.
  assert not np.any(np.asarray(found[1])[~np.asarray(mask)])
  assert set(gpu) == {'cudnn'}


def test_no_key_at_all_stays_finite(gpu):
  query, key, value, mask = _inputs()
  out = attention(query, key, value, jnp.zeros_like(mask), 'cudnn')
  np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_auto_is_cudnn_on_nvidia_in_half_precision(gpu, warnings, dtype, masked):
  query, key, value, mask = _inputs(dtype)
  attention(query, key, value, mask if masked else None)
  assert gpu == ['cudnn'] and not warnings


def test_auto_is_xla_in_float32_without_a_word(gpu, warnings):
  attention(*_inputs())
  assert gpu == ['xla'] and not warnings


@pytest.mark.parametrize(
  ('head_dim', 'capability', 'told'),
  [
    (12, (9, 0), '12 channels'),
    (136, (9, 0), '136 channels'),
    (16, (7, 5), 'compute capability 7.5, below 8.0'),
    (16, None, 'not one of NVIDIA'),
  ],
)
def test_auto_falls_back_and_says_so_once(gpu, warnings, monkeypatch, head_dim, capability, told):
  monkeypatch.setattr(module, '_compute_capability', lambda: capability)
  inputs = _inputs(jnp.bfloat16, head_dim=head_dim)
  for _ in range(3):
    attention(*inputs)
  assert gpu == ['xla'] * 3
  assert len(warnings) == 1 and told in warnings[0]


def test_auto_is_xla_on_the_processor():
  query, key, value, mask = _inputs(jnp.bfloat16)
  expected = attention(query, key, value, mask, 'xla')
  np.testing.assert_array_equal(attention(query, key, value, mask), expected)


def test_unknown_implementation():
  with pytest.raises(UserError, match='choose one of'):
    attention(*_inputs(), implementation='flash')


@pytest.fixture
def cudnn(monkeypatch):
  """Lets cuDNN's attention be traced, though nothing here could run it."""
  kernel = pytest.importorskip('jax._src.cudnn.fused_attention_stablehlo')
  monkeypatch.setattr(kernel, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(kernel, 'check_is_flash_attention', lambda *args, **options: None)


@pytest.mark.parametrize(
  ('remat', 'runs', 'arrays', 'statistics'),
  [('full', 2, 1, 0), ('attn', 1, 2, 1), ('names', 1, 4, 1)],
)
def test_checkpointing_keeps_what_cudnn_goes_on_from(
  cudnn, capsys, remat, runs, arrays, statistics
):
  """Nothing twice: a block's input, or query, key and value; output; statistics (B, H, L)."""

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      query, key, value = (checkpoint_name(x * n, 'qkv') for n in (1.0, 2.0, 3.0))
      # Its own result is an input of the backward pass, as a projection's is.
      return jnp.square(attention(query, key, value, None, 'cudnn')), None

  stack = stack_blocks(Block, 5, inputs=0, scan=True, remat=remat)()

  def loss(x):
    return jnp.sum(stack.apply({}, x)[0])

  x = jnp.ones((1, 6, 2, 16), jnp.bfloat16)
  assert str(jax.make_jaxpr(jax.grad(loss))(x)).count('dot_product_attention_fwd_wrapper[') == runs
  jax.ad_checkpoint.print_saved_residuals(loss, x)
  kept = capsys.readouterr().out
  assert kept.count('16[5,1,6,2,16]') == arrays
  assert kept.count('32[5,1,2,6]') == statistics


@pytest.mark.parametrize('masked', [False, True])
def test_splash_equals_xla_at_lengths_that_are_no_multiples(masked):
  query, key, value, _ = _inputs(length=130, keys=150, head_dim=32)
  rng = np.random.default_rng(1)
  direction = rng.standard_normal(query.shape).astype(np.float32)
  mask = jnp.asarray(rng.random((3, 150)) < 0.5) if masked else None

  def total(f):
    return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(f(*x) * direction), argnums=(0, 1, 2)))

  found = total(lambda *x: splash(*x, mask, interpret=True))(query, key, value)
  expected = total(lambda *x: attention(*x, mask, 'xla'))(query, key, value)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert relative_error(a, b) < 1e-5


def test_splash_stays_finite_without_any_key():
  query, key, value, _ = _inputs(length=5, keys=7, head_dim=32)
  out = splash(query, key, value, jnp.zeros((3, 7), bool), interpret=True)
  assert np.isfinite(out).all()


@pytest.mark.parametrize('length', [1, 128, 257, 1536, 4352, 4608, 10_000])
def test_blocks_waste_little(length):
  size = block(length)
  assert size % 128 == 0 and size <= 1024
  assert -(-length // size) * size < length + max(128, 0.1 * length)


def test_auto_goes_by_the_platform_of_the_mesh(monkeypatch, warnings):
  taken = []
  monkeypatch.setattr(module, 'splash', lambda query, *rest: taken.append(query.dtype) or query)
  monkeypatch.setattr(module, '_platform', lambda: 'tpu')
  module._warn.cache_clear()
  for dtype in (jnp.bfloat16, jnp.float32):
    attention(*_inputs(dtype))
  assert taken == [jnp.bfloat16] and not warnings
  attention(*_inputs(jnp.bfloat16, head_dim=12))
  assert len(taken) == 1 and 'without splash, since heads have 12 channels' in warnings[0]


def test_the_platform_is_that_of_the_mesh_in_context():
  assert module._platform() == 'cpu'
  mesh = jax.make_mesh((1,), ('data',), (jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert module._platform() == 'cpu'


_SPLIT = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from eru_jax import sharding
from eru_jax.models.attention import attention
from eru_jax.models.splash import splash
from eru_jax.training.planning_hlo import collectives

LENGTH = 40
def inputs(heads, batch=2):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal((batch, LENGTH, heads, 16)), jnp.float32) for _ in 'qkvd']

def between_blocks(x):
  return jax.lax.with_sharding_constraint(x, P(('data', 'fsdp'), 'sequence'))

def total(attend, split):
  keep = between_blocks if split else lambda x: x
  def f(q, k, v, d, mask):
    return jnp.sum(keep(attend(keep(q), keep(k), keep(v), mask)) * d)
  return jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))

mask = jnp.asarray(np.random.default_rng(1).random((2, LENGTH)) < 0.7)
found = {}
for name, heads, tensor, sequence, attend in (
  ('heads', 8, 2, 2, attention),
  ('queries', 3, 1, 4, attention),
  ('splash', 4, 2, 2, lambda *x: splash(*x, interpret=True)),
):
  compiled = total(lambda *x: attention(*x, 'xla'), False).lower(*inputs(heads), mask).compile()
  one, whole = compiled(*inputs(heads), mask), compiled.cost_analysis()['flops']
  mesh = sharding.make_mesh(sharding.MeshConfig(-1, 2, tensor, sequence))
  with sharding.use_mesh(mesh):
    compiled = total(attend, True).lower(*inputs(heads), mask).compile()
    many = compiled(*inputs(heads), mask)
  text = compiled.as_text()
  found[name] = {
    'errors': [
      float(jnp.linalg.norm(np.asarray(a) - np.asarray(b)) / jnp.linalg.norm(np.asarray(b)))
      for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one))
    ],
    'traffic': sorted({(t.kind, t.axes) for t in collectives(text, dict(mesh.shape))}),
    'share': compiled.cost_analysis()['flops'] / whole,
  }
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def split():
  """Attention on meshes of eight devices, and on one."""
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'PYTHONPATH': str(pathlib.Path(__file__).parent.parent),
  }
  result = subprocess.run(
    [sys.executable, '-c', _SPLIT], env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout)


@pytest.mark.parametrize('name', ['heads', 'queries', 'splash'])
def test_split_attention_equals_one_device(split, name):
  assert max(split[name]['errors']) < 1e-5


def test_tokens_are_exchanged_for_heads_or_keys_are_gathered(split):
  # Every device has an eighth of the work.
  assert split['heads']['share'] < 1.1 / 8 and split['queries']['share'] < 1.1 / 8
  assert ['all-to-all', 'sequence'] in split['heads']['traffic']
  # Three heads do not divide by four.
  assert not any(kind == 'all-to-all' for kind, _ in split['queries']['traffic'])
  assert ['all-gather', 'sequence'] in split['queries']['traffic']
