"""One training step on eight virtual devices against the same step on one.

The devices need a process of their own: this file, run as a script, is that process.
"""

import dataclasses
import pathlib
import pickle
import sys
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from oracle import relative_error
from virtual_devices import MESHES, mesh_named, one_iteration, run_shares

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.models import autoencoder_kl, registry
from eru_jax.sharding import MeshConfig
from eru_jax.types import Conditioning

TOLERANCE = {'adamw': 1e-5, 'muon': 1e-4}
RUNS = [(name, 'adamw') for name in MESHES] + [('all', 'muon')]
BATCH, TEXT = 8, 5


def _model():
  family = registry.family('flux')
  autoencoder = autoencoder_kl.AutoencoderKL(autoencoder_kl.AutoencoderConfig(latent_channels=4))
  step = family.packing * autoencoder.config.downscale
  backbone = family.backbone(family.config.from_dict(family.tiny))
  return registry.DiffusionModel(family, backbone, autoencoder, 6 * step, 4 * step)


def _boxed(model):
  return jax.eval_shape(lambda: model.init(jax.random.key(0), TEXT))


def _random(shapes, seed):
  """Numbers for every leaf: layers that start at zero would hide what is behind them."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: (rng.standard_normal(s.shape) * s.shape[-1] ** -0.5).astype(np.float32), shapes
  )


class _Batches:
  def __next__(self):
    return np.arange(BATCH, dtype=np.int32)

  def get_state(self):
    return {}


def _data(model, count):
  """Latents and conditioning of `count` examples."""
  width = model.backbone.config.joint_attention_dim
  shapes = (
    np.zeros((count, *model.latent_shape)),
    Conditioning(np.zeros((count, TEXT, width)), None, np.zeros((count, width))),
  )
  return _random(shapes, 1)


def _train(mesh, algorithm):
  """What one step of `run_stage` does on a mesh, everything on the host."""
  from eru_jax.losses.flow_matching import flow_matching
  from eru_jax.training.config import FlowMatchingStageConfig
  from eru_jax.training.loop import Stage
  from eru_jax.training.state import OptimizerConfig
  from eru_jax.training.step import StageProgram

  model = _model()
  boxed = _boxed(model)
  layout = sharding.logical_shardings(boxed, mesh)

  def loss(params, frozen, batch, key, step):
    del step
    x_0, text = jax.tree.map(lambda x: x[batch], frozen)
    keys = jax.random.split(key)
    noise, t = jax.random.normal(keys[0], x_0.shape), jax.random.uniform(keys[1], (BATCH,))
    return flow_matching(model.velocity(None, params), x_0, noise, t, text)

  stage = Stage(
    program=StageProgram(loss),
    trainable=jax.device_put(_random(nn.unbox(boxed), 0), layout),
    make_frozen=lambda: jax.device_put(_data(model, 20), sharding.replicated(mesh)),
    batches=_Batches(),
    assemble=lambda index: index,
  )
  optimizer = OptimizerConfig(algorithm=algorithm, learning_rate=1e-3, clip_norm=1e3)
  settings = FlowMatchingStageConfig(num_steps=1, batch_size=BATCH, optimizer=optimizer)
  return one_iteration(stage, settings, jax.random.key(3), mesh)


def _uneven(mesh):
  """Velocity of three examples, which eight devices cannot share evenly."""
  model = _model()
  boxed = _boxed(model)
  params = jax.device_put(_random(nn.unbox(boxed), 0), sharding.logical_shardings(boxed, mesh))
  x, text = _data(model, 3)
  with sharding.use_mesh(mesh):
    velocity = jax.jit(lambda p, x, text: model.velocity(p)(x, jnp.full(3, 0.5), text))
    return np.asarray(velocity(params, x, text))


def main(path, share):
  """Does every second of the runs, and leaves what it found in a file."""
  runs = [('one', algorithm) for algorithm in TOLERANCE] + RUNS
  found = {(name, how): _train(mesh_named(name), how) for name, how in runs[int(share) :: 2]}
  if share == '0':
    found['uneven'] = _uneven(mesh_named('data')), _uneven(mesh_named('one'))
  pathlib.Path(path).write_bytes(pickle.dumps(found))


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """What two processes of eight devices each found."""
  return run_shares(__file__, tmp_path_factory.mktemp('sharding'), '01')


@pytest.mark.parametrize(('name', 'algorithm'), RUNS)
def test_one_step_equals_one_device(found, name, algorithm):
  one, many = found['one', algorithm], found[name, algorithm]
  tolerance = TOLERANCE[algorithm]
  for value in ('loss', 'grad_norm'):
    assert many['values'][value] == pytest.approx(one['values'][value], rel=tolerance)
  assert many['arrays'].keys() == one['arrays'].keys()
  # Optimisers' first moments are the gradients, scaled.
  errors = {k: relative_error(many['arrays'][k], x) for k, x in one['arrays'].items()}
  worst = max(errors, key=errors.get)
  assert errors[worst] <= tolerance, (worst, errors[worst])
  before = _random(nn.unbox(_boxed(_model())), 0)
  assert relative_error(before['x_embedder']['kernel'], one['arrays']['params/x_embedder/kernel'])


@pytest.mark.parametrize(('name', 'algorithm'), RUNS)
def test_parameters_averages_and_moments_lie_as_the_rules_say(found, name, algorithm):
  many, config = found[name, algorithm], MESHES[name]
  expected = {
    'x_embedder/kernel': P(None, 'fsdp'),
    'transformer_blocks/attn/to_q/kernel': P(None, 'fsdp', 'tensor'),
    'transformer_blocks/attn/to_out_0/kernel': P(None, 'tensor', 'fsdp'),
    'transformer_blocks/ff/net_0_proj/kernel': P(None, 'fsdp', 'tensor'),
    'single_transformer_blocks/proj_out/kernel': P(None, 'tensor', 'fsdp'),
    'single_transformer_blocks/proj_mlp/bias': P(None, 'tensor'),
    'transformer_blocks/attn/norm_q/scale': P(None, None),
  }
  fsdp = 8 if config.fsdp == -1 else config.fsdp
  for suffix, spec in expected.items():
    copies = [key for key in many['arrays'] if key.endswith(f'/{suffix}')]
    # Parameter, average, and one moment (Muon) or two (Adam).
    assert len(copies) == (3 if algorithm == 'muon' and suffix.endswith('kernel') else 4)
    share = 1 / np.prod([{'fsdp': fsdp, 'tensor': config.tensor}[axis] for axis in spec if axis])
    for key in copies:
      assert many['specs'][key] == spec and many['shares'][key] == share, key


@pytest.mark.parametrize('name', MESHES)
def test_devices_share_the_work(found, name):
  """They would not if linen skipped the constraints: the batch comes out of replicated tables."""
  one, many = (sum(found[mesh, 'adamw']['flops']) for mesh in ('one', name))
  assert many < one / 4, one / many


def test_a_batch_the_devices_cannot_share_evenly(found):
  many, one = found['uneven']
  assert relative_error(many, one) <= 1e-5


@pytest.mark.parametrize(
  'config',
  [
    MeshConfig(data=3),
    MeshConfig(data=16),
    MeshConfig(data=4),
    MeshConfig(fsdp=3),
    MeshConfig(data=-1, fsdp=-1),
    MeshConfig(data=0),
    MeshConfig(tensor=0),
    MeshConfig(data=-2, fsdp=-4),
  ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_a_user_error(config):
  with pytest.raises(UserError, match=r"mesh \{'data'.* does not fit 8 devices"):
    sharding.make_mesh(config, [None] * 8)


@dataclasses.dataclass(frozen=True)
class _Device:
  """What the arrangement of a mesh asks of a device."""

  id: int
  slice_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'
  process_index: int = 0


@pytest.mark.parametrize(
  ('config', 'shape'),
  [
    (MeshConfig(), (8, 1, 1, 1)),
    (MeshConfig(data=1, fsdp=-1), (2, 4, 1, 1)),
    (MeshConfig(data=1, fsdp=2, tensor=2), (2, 2, 2, 1)),
    (MeshConfig(data=1, fsdp=-1, dcn_data=1, dcn_fsdp=-1), (1, 8, 1, 1)),
  ],
)
def test_slices_are_joined_along_data_unless_told_otherwise(config, shape):
  devices = [_Device(i, i % 2) for i in range(8)]
  with mock.patch.object(sharding, 'Mesh') as made:
    sharding.make_mesh(config, devices)
  arranged = made.call_args.args[0]
  assert arranged.shape == shape
  # A slice is a half of the first axis that is longer than one: the fast network has the rest.
  halves = arranged.reshape(2, 4)
  assert [{d.slice_index for d in half} for half in halves] == [{0}, {1}]


def test_a_mesh_that_does_not_fit_the_slices_is_a_user_error():
  devices = [_Device(i, i % 2) for i in range(8)]
  with pytest.raises(UserError, match='does not fit 4 devices of each of 2 slices'):
    sharding.make_mesh(MeshConfig(data=8), devices)
  with pytest.raises(UserError, match=r"\{'dcn_data': 3, .* does not fit 2 slices"):
    sharding.make_mesh(MeshConfig(dcn_data=3), devices)


def _abstract(**sizes):
  sizes = {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1} | sizes
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * 4)


@pytest.mark.parametrize('axis', ['fsdp', 'tensor'])
def test_a_mesh_that_does_not_divide_the_model_is_a_user_error(axis):
  message = rf'mesh {axis} = 3 does not divide the \d+ channels of \w+/.*, of shape \('
  with pytest.raises(UserError, match=message):
    sharding.logical_shardings(_boxed(_model()), _abstract(**{axis: 3}))
  # It may be any number where it splits nothing but the batch.
  sharding.logical_shardings(_boxed(_model()), _abstract(data=3))


def test_constraints_need_mesh_and_rules():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

  def constrained():
    x = jnp.zeros((2, 3, 4))
    jaxpr = jax.make_jaxpr(lambda x: nn.with_logical_constraint(x, ('batch', 'length', None)))(x)
    return [str(e.params['sharding'].spec) for e in jaxpr.eqns if 'sharding' in e.params]

  with sharding.use_mesh(mesh):
    assert constrained() == [str(P(('data', 'fsdp'), 'sequence', None))]
  # Neither alone is enough.
  assert not constrained()
  with jax.set_mesh(mesh):
    assert not constrained()
  with nn.logical_axis_rules(sharding.RULES):
    assert not constrained()


def test_training_enters_both(monkeypatch, tmp_path):
  from eru_jax.training import run

  def run_stage(*unused):
    assert nn.get_logical_axis_rules() == sharding.RULES
    assert jax.sharding.get_abstract_mesh().axis_names == ('data', 'fsdp', 'tensor', 'sequence')
    raise KeyboardInterrupt

  experiment = run.experiment_lib.Experiment(
    mock.MagicMock(seed=0), None, mock.MagicMock(), mock.MagicMock()
  )
  monkeypatch.setattr(
    run.experiment_lib,
    'open_experiment',
    lambda *unused: (experiment, mock.MagicMock(trainable=None)),
  )
  monkeypatch.setattr(run, 'STAGES', {'autoencoder': mock.MagicMock()})
  monkeypatch.setattr(run, 'judge_of', mock.MagicMock())
  monkeypatch.setattr(run, 'enable_compilation_cache', lambda: None)
  monkeypatch.setattr(run, 'run_stage', run_stage)
  model = {'source': 'scratch', 'autoencoder': {'latent_channels': 16}}
  values = {'stages': ('autoencoder',), 'model': model}
  with pytest.raises(KeyboardInterrupt):
    run.train(values, str(tmp_path / 'run'))


def test_a_batch_that_the_mesh_does_not_divide_is_a_user_error():
  from eru_jax.training.config import ExperimentConfig, FlowMatchingStageConfig
  from eru_jax.training.run import print_plan

  mesh = mock.Mock(devices=np.array(jax.devices() * 8), shape=dict(_abstract(data=4, fsdp=2).shape))

  def plan(batch_size, accumulation):
    stage = FlowMatchingStageConfig(batch_size=batch_size, accumulation=accumulation)
    print_plan(ExperimentConfig(stages=('flow_matching',), flow_matching=stage), mesh)

  plan(48, 3)
  for batch_size, accumulation in ((12, 1), (36, 3)):
    with pytest.raises(UserError, match=rf'{batch_size} examples .* 8 devices .* x {accumulation}'):
      plan(batch_size, accumulation)


if __name__ == '__main__':
  main(*sys.argv[1:])
