"""Noise and dropout on prompts: what each share replaces, and what it leaves as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eru_jax.training.text_dropout import perturb
from eru_jax.types import Conditioning

KEY = jax.random.key(0)


def prompts(masked, batch=64, length=5, width=8):
  rng = np.random.default_rng(1)
  lengths = rng.integers(1, length + 1, batch)
  return Conditioning(
    jnp.asarray(rng.standard_normal((batch, length, width)), jnp.float32),
    jnp.asarray(np.arange(length)[None] < lengths[:, None]) if masked else None,
    jnp.asarray(rng.standard_normal((batch, width)), jnp.float32),
  )


def empty(masked):
  return jax.tree.map(lambda x: x[:1] * 0 + 1, prompts(masked))


def assert_equal(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize('masked', [True, False])
def test_shares_of_zero_change_nothing(masked):
  given = prompts(masked)
  assert_equal(perturb(KEY, given), given)


@pytest.mark.parametrize('masked', [True, False])
def test_shares_of_one_change_every_example(masked):
  given = prompts(masked)
  pooled = perturb(KEY, given, pooled_only=1.0)
  assert pooled.mask.shape == (64, 5) and not pooled.mask.any()
  np.testing.assert_array_equal(pooled.pooled, given.pooled)
  tokens = perturb(KEY, given, tokens_only=1.0)
  assert not tokens.pooled.any()
  assert_equal(tokens.replace(pooled=None), given.replace(pooled=None))


@pytest.mark.parametrize(('masked', 'null_masked'), [(True, True), (True, False), (False, False)])
def test_dropped_prompts_are_the_empty_one(masked, null_masked):
  null = empty(null_masked)
  dropped = perturb(KEY, prompts(masked), noise=0.3, drop=1.0, null=null)
  np.testing.assert_array_equal(dropped.tokens, np.broadcast_to(null.tokens, (64, 5, 8)))
  np.testing.assert_array_equal(dropped.pooled, np.broadcast_to(null.pooled, (64, 8)))
  if masked:
    assert dropped.mask.all()
  else:
    assert dropped.mask is None


def test_masking_token_states_does_not_mask_an_unmasked_empty_prompt():
  """A mask appears where there was none; dropped prompts then have a whole one."""
  out = perturb(KEY, prompts(False), pooled_only=0.5, drop=0.5, null=empty(False))
  dropped = (out.tokens == 1).all(axis=(1, 2))
  assert 0 < dropped.sum() < 64
  np.testing.assert_array_equal(out.mask, np.broadcast_to(dropped[:, None], (64, 5)))


def test_shares_are_shares_and_exclude_each_other():
  given = prompts(True, batch=4000)
  out = perturb(KEY, given, pooled_only=0.3, tokens_only=0.2, drop=0.1, null=empty(True))
  masked, zeroed = ~out.mask.any(axis=1), ~out.pooled.any(axis=1)
  dropped = (out.tokens == 1).all(axis=(1, 2))
  # Five standard deviations of a share of 4,000 draws are at most 0.04.
  for found, share in ((masked, 0.3), (zeroed, 0.2), (dropped, 0.1)):
    assert abs(found.mean() - share) < 0.04
  assert not (masked & zeroed).any() and not (dropped & (masked | zeroed)).any()


def test_noise_has_the_asked_deviation_relative_to_the_prompts_own():
  scale = jnp.array([1.0, 5.0])[:, None, None]
  rng = np.random.default_rng(0)
  tokens = scale * rng.standard_normal((2, 100, 200)).astype(np.float32)
  given = Conditioning(tokens, None, tokens[:, 0] * 3)
  out = perturb(KEY, given, noise=0.25)
  for got, was in ((out.tokens, given.tokens), (out.pooled, given.pooled)):
    for row in range(2):
      noise = np.asarray(got[row] - was[row])
      # 20,000 or 200 values: five standard errors are 2.5 % and 25 %.
      tolerance = 5 / np.sqrt(2 * noise.size)
      np.testing.assert_allclose(noise.std() / np.std(was[row]), 0.25, rtol=tolerance)
      assert abs(noise.mean()) < 5 * noise.std() / np.sqrt(noise.size)


def test_a_sentence_token_stays_equal_to_the_pooled_vector():
  pooled = prompts(False).pooled
  out = perturb(KEY, Conditioning(pooled[:, None], None, pooled), noise=0.5)
  np.testing.assert_array_equal(out.tokens[:, 0], out.pooled)
  assert (out.pooled != pooled).any(axis=1).all()
