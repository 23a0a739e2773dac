"""The adapter files that a run leaves, and what the next run makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapters import trained
from flax import traverse_util
from test_flux_training import settings

from eru_jax import sharding
from eru_jax.models import lora
from eru_jax.training import config as config_lib
from eru_jax.training import modules, run
from eru_jax.training.experiment import Snapshot, resolve, with_adapters
from eru_jax.weights.lora_io import import_lora
from eru_jax.weights.lora_layers import layers
from eru_jax.weights.safetensors_io import read_safetensors

FORMS = ('dk_dm.safetensors', 'dk_dm_kohya.safetensors')


@pytest.fixture(scope='module', autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('ERU_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield


def finished(directory, dtype):
  """(config, model, adapter) of a DK-DM that has written its adapter there."""
  values = settings('flux_dev_dk_dm.py:runlocal', model__dtype=dtype)
  config = resolve(config_lib.from_mapping(config_lib.ExperimentConfig, values))
  model = modules.described(config)
  adapter = trained(model.backbone.config, config.lora)
  run.export_adapter(directory, 'dk_dm', Snapshot(model, None, None, trainable=adapter))
  return config, model, adapter


def test_a_training_goes_on_with_the_rank_and_alpha_that_it_had(tmp_path):
  config, model, adapter = finished(tmp_path, 'float32')
  mesh = sharding.make_mesh(config.mesh)
  for form in FORMS:
    config = dataclasses.replace(config, adapter=str(tmp_path / form))
    snapshot = with_adapters(Snapshot(model, None, None), config, mesh, [(config.adapter, 1.0)])
    found = snapshot.trainable, snapshot.model.lora
    assert lora.sizes(*found) == lora.sizes(adapter, config.lora)
    assert set(lora.sizes(*found).values()) == {(64, 128.0)}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found[0], adapter)
    told = run.describe_adapter(config, snapshot)
    assert 'rank 64 and alpha 128 in 17 kinds of layers' in told and 'config.lora' not in told
    for rule in (lora.LoraRule('attn', 64, 128.0), lora.LoraRule('attn|ff|proj', 64, 64.0)):
      other = dataclasses.replace(config, lora=(rule,))
      assert 'config.lora has other layers, ranks or alphas' in run.describe_adapter(
        other, snapshot
      )


def test_files_have_the_dtype_that_the_run_computed_in(tmp_path):
  _, model, adapter = finished(tmp_path, 'bfloat16')
  used = traverse_util.flatten_dict(lora.variables(adapter, model.lora), sep='/')
  for form in FORMS:
    stored = read_safetensors(tmp_path / form)
    weights = [value for name, value in stored.items() if name.endswith('.weight')]
    assert {value.dtype for value in weights} == {np.dtype(ml_dtypes.bfloat16)}
    loaded = lora.variables(*import_lora(tmp_path / form, model.backbone.config))
    # To the bit what its layers, which cast it, multiplied with.
    for path, value in traverse_util.flatten_dict(loaded, sep='/').items():
      np.testing.assert_array_equal(
        value.astype(jnp.bfloat16), used[path].astype(jnp.bfloat16), path
      )
  finished(tmp_path, 'float32')
  stored = read_safetensors(tmp_path / FORMS[0]).values()
  assert {value.dtype for value in stored} == {np.dtype(np.float32)}


def test_the_configs_adapt_what_every_reader_keeps(tmp_path):
  config, model, _ = finished(tmp_path, 'float32')
  paths = {layer.path for layer in layers(model.backbone.config).values()}
  adapted = {path for path in paths if lora.rule_of(path, config.lora)}
  everywhere = {path for path in paths if any(word in path for word in ('attn', 'ff', 'proj'))}
  assert everywhere - adapted == {'proj_out'}
  names = {name.split('_blocks_')[0] for name in read_safetensors(tmp_path / FORMS[1])}
  assert names == {'lora_unet_double', 'lora_unet_single'}
