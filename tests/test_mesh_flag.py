"""--mesh of the commands that draw, and where a model goes without it."""

from unittest import mock

import jax
import pytest

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.sharding import MeshConfig
from eru_jax.training import restore
from eru_jax.training.config import ModelConfig


@pytest.mark.parametrize(
  ('text', 'config'),
  [
    ('fsdp=4', MeshConfig(data=-1, fsdp=4)),
    ('fsdp=-1', MeshConfig(data=1, fsdp=-1)),
    ('data=2, fsdp=-1', MeshConfig(data=2, fsdp=-1)),
    ('sequence=2,tensor=2', MeshConfig(data=-1, tensor=2, sequence=2)),
    ('data=8', MeshConfig(data=8)),
  ],
)
def test_a_mesh_is_read(text, config):
  assert sharding.parse_mesh(text) == config


@pytest.mark.parametrize(
  'text', ['', 'fsdp', 'fsdp=x', 'fsdp=1.5', 'model=2', 'fsdp=2,fsdp=4', '4']
)
def test_a_mesh_written_otherwise_is_a_user_error(text):
  with pytest.raises(UserError, match='--mesh=.*: give sizes of data, fsdp, tensor, sequence'):
    sharding.parse_mesh(text)


def test_a_mesh_that_is_not_there_is_refused_before_the_model_is_read(tiny_model_dir, monkeypatch):
  monkeypatch.setattr(restore, 'open_experiment', None)
  with pytest.raises(UserError, match="'fsdp': 4.* does not fit 1 devices"):
    restore.open_model(str(tiny_model_dir), (), 'fsdp=4')


@pytest.mark.parametrize(
  ('devices', 'gigabytes', 'params', 'split'),
  [
    (4, 15.75, 'bfloat16', True),
    (8, 80, 'bfloat16', False),
    (8, 80, 'float32', True),
    (4, 31, 'int8', False),
    (1, 15.75, 'bfloat16', False),
    (8, None, 'float32', False),
  ],
)
def test_large_models_are_split_by_themselves(monkeypatch, devices, gigabytes, params, split):
  stats = gigabytes and {'bytes_limit': gigabytes * 2**30}
  monkeypatch.setattr(jax, 'device_count', lambda: devices)
  device = mock.Mock(memory_stats=lambda: stats)
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  monkeypatch.setattr(restore.model_directory, 'backbone_size', lambda path: 11_901_408_320)
  found = restore._mesh_for(ModelConfig(source='FLUX.1-dev', params=params))
  assert found == (MeshConfig(data=1, fsdp=-1) if split else MeshConfig())


def test_the_size_of_a_backbone_is_read_from_its_config(tiny_model_dir):
  from eru_jax.weights import model_directory

  stored = model_directory.load(tiny_model_dir)
  size = sum(x.size for x in jax.tree.leaves(stored.backbone))
  assert model_directory.backbone_size(tiny_model_dir) == size
