"""`sample` on the tiny FLUX.1 that the package makes itself: what its flags do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import relative_error

from eru_jax.training import sampling
from eru_jax.training.sampling import SampleRequest, sample

PROMPT = 'the fruit that fell on Newton'


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('ERU_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield


def draw(output, **options):
  request = {'prompts': (PROMPT,), 'steps': 1, 'height': 32, 'width': 32, 'save_latents': True}
  sample(SampleRequest('tiny_flux', str(output), **request | options))
  return np.load(output / 'latents_final.npy')


def test_the_dtype_is_the_one_that_was_asked_for(tmp_path, monkeypatch):
  used, real = [], sampling.draw

  def spy(experiment, snapshot, *rest):
    used.append(snapshot)
    return real(experiment, snapshot, *rest)

  monkeypatch.setattr(sampling, 'draw', spy)
  latents = [draw(tmp_path / name, dtype=name) for name in ('float32', 'bfloat16')]
  for snapshot, dtype in zip(used, (jnp.float32, jnp.bfloat16), strict=True):
    assert snapshot.model.backbone.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(snapshot.backbone)} == {jnp.dtype(dtype)}
  (record,) = json.loads((tmp_path / 'bfloat16' / 'samples.json').read_text())
  told = {name: record[name] for name in ('model', 'num_steps', 'height', 'dtype', 'adapters')}
  assert told == dict(model='tiny_flux', num_steps=1, height=32, dtype='bfloat16', adapters=[])
  assert 0 < relative_error(latents[1], latents[0]) < 0.1
