"""Which kernel attention picks on a GPU, and that masks mean the same to every kernel.

There is no GPU here: the backend is made to look like one, and XLA stands in for cuDNN.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import relative_error

from eru_jax.errors import UserError
from eru_jax.models import attention as module
from eru_jax.models.attention import attention


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
