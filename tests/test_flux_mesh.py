"""FLUX.1's text encoders, and `sample`, on eight virtual devices against one.

The devices need a process of their own: this file, run as a script, is that process.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from oracle import relative_error

from eru_jax import sharding
from eru_jax.data.flux_text import load_flux_text
from eru_jax.training.sampling import SampleRequest, sample
from eru_jax.weights.tiny_models import write_tiny_flux

TOLERANCE = 1e-5
LENGTH = 16
# Fewer than the devices, and more than a batch of T5.
PROMPTS = [f'{n} red apples' for n in range(11)]
MESHES = {
  'fsdp': sharding.MeshConfig(data=1, fsdp=-1),
  'all': sharding.MeshConfig(data=2, fsdp=2, tensor=2),
}
# Elements; what is smaller may lie on every device.
SPLIT = 1024


def main(directory):
  """Leaves embeddings and shares of the parameters in files."""
  for name, config in MESHES.items():
    encoder = load_flux_text(
      directory / 'flux', LENGTH, keep_resident=True, mesh=sharding.make_mesh(config)
    )
    found = encoder.encode(PROMPTS)
    few = encoder.encode(PROMPTS[:1])
    np.savez(
      directory / name,
      tokens=found.tokens,
      pooled=found.pooled,
      few_tokens=few.tokens,
      few_pooled=few.pooled,
    )
    held = {half.folder.name: half.parameters() for half in (encoder.clip, encoder.t5)}
    parts = {
      jax.tree_util.keystr(path, simple=True, separator='/'): [
        x.size,
        max(shard.data.size for shard in x.addressable_shards),
      ]
      for path, x in jax.tree_util.tree_leaves_with_path(held)
    }
    (directory / f'{name}.json').write_text(json.dumps(parts))
  draw(directory, 'eight', 'fsdp=8')


def draw(directory, name, mesh=None):
  """One picture, which eight devices cannot share evenly: its latents."""
  request = SampleRequest(
    str(directory / 'flux'), str(directory / name), prompts=PROMPTS[:1], steps=1, height=32,
    width=32, save_latents=True, mesh=mesh,
  )  # fmt: skip
  sample(request)
  return np.load(directory / name / 'latents_final.npy')


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp('mesh')
  write_tiny_flux(directory / 'flux')
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'PYTHONPATH': os.pathsep.join(p for p in sys.path if p),
    'ERU_JAX_CACHE': str(directory / 'cache8'),
  }
  subprocess.run([sys.executable, __file__, str(directory)], env=environment, check=True)
  return directory


@pytest.mark.parametrize('mesh', MESHES)
def test_embeddings_equal_those_of_one_device(directory, mesh):
  wanted = load_flux_text(directory / 'flux', LENGTH).encode(PROMPTS)
  with np.load(directory / f'{mesh}.npz') as found:
    for name in ('tokens', 'pooled'):
      assert relative_error(found[name], getattr(wanted, name)) <= TOLERANCE
      assert relative_error(found[f'few_{name}'], getattr(wanted, name)[:1]) <= TOLERANCE


@pytest.mark.parametrize('mesh', MESHES)
def test_every_large_array_is_split(directory, mesh):
  parts = json.loads((directory / f'{mesh}.json').read_text())
  large = {path: (size, part) for path, (size, part) in parts.items() if size > SPLIT}
  assert {'text_encoder/embeddings/position_embedding/embedding'} < set(large)
  assert len([path for path in large if path.startswith('text_encoder_2/')]) >= 8
  # On 2 x 2 x 2 devices, an array without an axis for `tensor` is halved only.
  whole = [path for path, (size, part) in large.items() if part > size // 2]
  assert not whole
  if mesh == 'fsdp':
    assert all(part == size // 8 for size, part in large.values())


def test_a_picture_equals_that_of_one_device(directory, monkeypatch):
  monkeypatch.setenv('ERU_JAX_CACHE', str(directory / 'cache1'))
  wanted = draw(directory, 'one')
  found = np.load(directory / 'eight' / 'latents_final.npy')
  assert relative_error(found, wanted) <= TOLERANCE
  pictures = [(directory / name / '0000.png').read_bytes() for name in ('one', 'eight')]
  assert pictures[0][:8] == pictures[1][:8] == b'\x89PNG\r\n\x1a\n'


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
