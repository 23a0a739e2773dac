"""Planning: operations and collectives that are counted by hand, and a tiny run on a tiny slice."""

import dataclasses
import importlib.util
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

from eru_jax import flops, sharding
from eru_jax.config_file import load_config
from eru_jax.errors import UserError
from eru_jax.training import config as config_lib
from eru_jax.training import planning_chips, planning_hlo, planning_remedies, run

ROOT = pathlib.Path(__file__).parent.parent
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="the package libtpu is not installed: pip install -e '.[plan]'",
)


def _counted(function, *arguments):
  return flops.traced_flops(jax.make_jaxpr(function)(*arguments))


def test_products_convolutions_and_loops_are_counted():
  a, b = jnp.zeros((3, 5, 7)), jnp.zeros((3, 7, 11))
  product = 2 * 3 * 5 * 7 * 11
  assert _counted(lambda a, b: a @ b, a, b) == product
  image, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 4))
  strided = 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)

  def convolve(image, kernel):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(image, kernel, (2, 2), 'SAME', dimension_numbers=numbers)

  assert _counted(convolve, image, kernel) == strided

  @jax.jit
  def loop(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=9)[0]

  x, w = jnp.zeros((2, 4)), jnp.zeros((4, 4))
  assert _counted(loop, x, w) == 9 * 2 * 2 * 4 * 4
  # Forward, and the gradient of each factor.
  gradient = jax.grad(lambda x, w: loop(x, w).sum(), argnums=(0, 1))
  assert _counted(gradient, x, w) == 3 * 9 * 2 * 2 * 4 * 4
  # The dearer branch.
  branches = (lambda x, w: x, lambda x, w: x @ w)
  assert _counted(lambda x, w: jax.lax.cond(True, *branches, x, w), x, w) == 2 * 2 * 4 * 4


def test_flux_is_counted_as_its_formula_says():
  from eru_jax.models import lora
  from eru_jax.models.flux import FluxConfig, FluxTransformer, image_ids
  from eru_jax.types import Conditioning

  cfg = FluxConfig(
    in_channels=8,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=10,
    pooled_projection_dim=6,
    axes_dims_rope=(4, 4, 4),
  )
  batch, text, rank = 2, 5, 3
  x, t = jnp.zeros((batch, 4, 8)), jnp.zeros(batch)
  prompt = Conditioning(jnp.zeros((batch, text, 10)), pooled=jnp.zeros((batch, 6)))

  def model(remat):
    return FluxTransformer(cfg, remat=remat)

  def init():
    return model('none').init(jax.random.key(0), x, t, prompt, image_ids(2, 2), t)['params']

  params = nn.unbox(jax.eval_shape(init))
  rules = (lora.LoraRule('transformer_blocks', rank, 1.0),)
  adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, rules))

  def loss(params, adapter, remat='none'):
    variables = {'params': params}
    if adapter is not None:
      variables['lora'] = lora.variables(adapter, rules)
    return model(remat).apply(variables, x, t, prompt, image_ids(2, 2), t).sum()

  sizes = (cfg, batch, 4, text)
  forward = flops.flops(*sizes)
  assert _counted(lambda p: loss(p, None), params) == forward
  # Nobody asks for the gradients of the inputs of the first layers.
  found = _counted(lambda p: jax.grad(loss)(p, None), params)
  assert 0.97 < found / flops.full_flops(*sizes) <= 1
  found = _counted(lambda p, a: jax.grad(loss, argnums=1)(p, a), params, adapter)
  assert 0.95 < found / flops.lora_flops(*sizes, rank) <= 1.01
  again = _counted(lambda p: jax.grad(lambda p: loss(p, None, 'full'))(p), params)
  assert 1.2 < again / flops.full_flops(*sizes) < 4 / 3


_COLLECTIVES = """
import json
import jax, jax.numpy as jnp
from functools import partial
from jax.sharding import PartitionSpec as P
from eru_jax import sharding
from eru_jax.training.planning_hlo import collectives

mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2, tensor=2, sequence=2))
x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=jax.NamedSharding(mesh, P('fsdp', 'tensor')))

def found(body, out):
  mapped = jax.shard_map(
    body, mesh=mesh, in_specs=P('fsdp', 'tensor'), out_specs=out, check_vma=False)
  text = jax.jit(mapped).lower(x).compile().as_text()
  return [[t.kind, t.axes, t.count, t.bytes] for t in collectives(text, dict(mesh.shape))]

def looped(x):
  return jax.lax.scan(lambda x, _: (jax.lax.psum(jnp.sin(x), 'tensor'), None), x, length=5)[0]

turn = [(0, 1), (1, 0)]
print(json.dumps({
  'gather': found(lambda x: jax.lax.all_gather(x, 'fsdp'), P()),
  'sum': found(lambda x: jax.lax.psum(x, ('fsdp', 'sequence')), P(None, 'tensor')),
  'loop': found(looped, P('fsdp')),
  'scatter': found(
    lambda x: jax.lax.psum_scatter(x, 'sequence', tiled=True), P(('fsdp', 'sequence'), 'tensor')),
  'exchange': found(
    lambda x: jax.lax.all_to_all(x, 'tensor', 0, 1, tiled=True), P('fsdp', 'tensor')),
  'permute': found(lambda x: jax.lax.ppermute(x, 'sequence', turn), P('fsdp', 'tensor')),
}))
"""


def test_collectives_of_small_programs():
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'PYTHONPATH': str(ROOT),
  }
  result = subprocess.run(
    [sys.executable, '-c', _COLLECTIVES], env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout)
  # A device holds (4, 4) float32: 64 bytes.
  assert found['gather'] == [['all-gather', 'fsdp', 1, 64]]
  assert found['sum'] == [['all-reduce', 'fsdp+sequence', 1, 2 * 64 * 3 // 4]]
  assert found['loop'] == [['all-reduce', 'tensor', 5, 5 * 64]]
  assert found['scatter'] == [['reduce-scatter', 'sequence', 1, 32]]
  assert found['exchange'] == [['all-to-all', 'tensor', 1, 32]]
  assert found['permute'] == [['collective-permute', 'sequence', 1, 64]]


def test_collectives_as_a_tpu_writes_them():
  # What it starts, and groups as an order of the devices.
  line = (
    '  %all-gather-start.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%p), channel_id=1, '
    'replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, use_global_device_ids=true'
  )
  text = f'HloModule m\n\nENTRY %main (p: bf16[4,8]) -> bf16[16,8] {{\n{line}\n}}\n'
  shape = {'data': 1, 'fsdp': 4, 'tensor': 2, 'sequence': 1}
  assert planning_hlo.collectives(text, shape) == [
    planning_hlo.Traffic('all-gather', 'fsdp', 1, 16 * 8 * 2 * 3 // 4)
  ]


@pytest.mark.parametrize('told', [True, False])
def test_loops_as_a_tpu_writes_them(told):
  """Compiled quickly, they do not tell how often they turn; their conditions do."""
  trips = ', backend_config={"known_trip_count":{"n":"19"}}' if told else ''
  text = f"""HloModule m

%cond.1 (a: (s32[], f32[8])) -> pred[] {{
  %constant.4 = s32[]{{:T(128)}} constant(19)
  %a = (s32[], f32[8]) parameter(0)
  %gte.9 = s32[]{{:T(128)}} get-tuple-element(%a), index=0
  ROOT %lt.2 = pred[]{{:T(512)}} compare(%gte.9, %constant.4), direction=LT
}}

%body.1 (a: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %all-reduce.1 = f32[8]{{0}} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%add
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %while.1 = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1{trips}
}}
"""
  assert planning_hlo.collectives(text, {'fsdp': 2}) == [
    planning_hlo.Traffic('all-reduce', 'fsdp', 19, 19 * 8 * 4)
  ]


@pytest.mark.parametrize(
  'name', ['v5litepod-8', 'v5e-8', 'v5e:3x7', 'v5e:2x2x1', 'v5p:2x2', 'v9:2x2', '', 'v5e']
)
def test_a_wrong_slice_lists_the_right_ones(name):
  with pytest.raises(UserError, match=r'no TPU slice; there are v5e and v6e with .*2x4.* v5p'):
    planning_chips.open_slice(name)


def test_without_libtpu_one_sentence_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install -e '.\[plan\]'"):
    planning_chips.open_slice('v5e:2x2')


def _plan(directory, *arguments, check=True):
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  result = subprocess.run(
    [sys.executable, '-m', 'eru_jax.plan', *arguments],
    env=environment,
    cwd=directory,
    capture_output=True,
    text=True,
  )
  assert not check or result.returncode == 0, result.stderr
  return result


def test_mistakes_are_one_line(tmp_path):
  config = f'--config={ROOT / "configs" / "flux_dev_dk_dm.py"}:runlocal'
  wrong = _plan(tmp_path, config, '--topology=v5litepod-8', check=False)
  assert wrong.returncode == 2 and 'v5e:2x4' in wrong.stderr
  assert len(wrong.stderr.splitlines()) == 1
  missing = _plan(tmp_path, config, check=False)
  assert missing.returncode == 2 and '--topology must be given' in missing.stderr


def test_no_program_of_that_name(tmp_path):
  config = f'--config={ROOT / "configs" / "flux_dev_dk_dm.py"}:runlocal'
  wrong = _plan(tmp_path, config, '--topology=v5e:1x1', '--only=(', check=False)
  assert wrong.returncode == 2 and '--only=( is no regular expression' in wrong.stderr
  nothing = _plan(tmp_path, config, '--topology=v5e:1x1', '--only=^nosuch', check=False)
  assert nothing.returncode == 2 and 'there are prompts.clip, prompts.t5, ' in nothing.stderr
  path = tmp_path / 'file' / 'plan.json'
  path.parent.write_text('not a directory')
  wrong = _plan(tmp_path, config, '--topology=v5e:1x1', f'--json={path}', check=False)
  assert wrong.returncode == 2 and 'compiled in' not in wrong.stdout


@pytest.mark.parametrize('argument', ['', 'full', 'int8', 'res=1024'])
@pytest.mark.parametrize('name', ['flux_dev_dk_dm', 'flux_dev_no_rl', 'flux_finetune'])
def test_what_helps_is_taken_by_the_same_config(name, argument):
  path = ROOT / 'configs' / f'{name}.py'
  devices = np.array(jax.devices()[:1] * 8)

  def opened(overrides):
    values = load_config(f'{path}:{argument}', overrides)
    config = config_lib.from_mapping(config_lib.ExperimentConfig, values)
    sizes = dataclasses.replace(config.mesh, fsdp=8 // config.mesh.sequence)
    shape = [sizes.data, sizes.fsdp, sizes.tensor, sizes.sequence]
    mesh = jax.sharding.Mesh(devices.reshape(shape), sharding.AXES)
    run.print_plan(config.on(sharding.batch_share(mesh)), mesh)
    return config, mesh

  base, mesh = opened({})
  (stage,) = base.stages
  seen = set()
  for what in ('train_step', 'rollout_and_reward', 'teacher_pictures', 'sample_and_decode'):
    for phase in (stage, f'evaluate_{stage}', 'prompts'):
      for help in planning_remedies.remedies(f'{phase}.{what}', base, mesh):
        if help.startswith('--config.'):
          key, _, value = help.split()[0].removeprefix('--config.').partition('=')
          changed, _ = opened({key: value})
          assert changed != base, help
          seen.add(key)
  assert 'mesh.sequence' in seen and ('model.params' in seen) == (argument not in ('full', 'int8'))
  assert not any(key.endswith('accumulation') for key in seen)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  """What is planned for a tiny run on four chips, and what is printed."""
  directory = tmp_path_factory.mktemp('plan')
  result = _plan(
    directory,
    f'--config={ROOT / "configs" / "flux_dev_dk_dm.py"}:runlocal',
    '--topology=v5e:2x2',
    '--config.mesh.fsdp=2',
    '--config.mesh.sequence=2',
    '--only=^dk_dm',
    '--json=plan.json',
  )
  return json.loads((directory / 'plan.json').read_text()), result


@needs_libtpu
def test_two_slices_are_joined_along_data():
  from jax.experimental import topologies

  planning_chips.open_slice('v5e:2x2')  # sets what libtpu wants of the environment
  with planning_chips.quiet():
    devices = topologies.get_topology_desc(
      platform='tpu', topology_name='v5e:2x2', num_slices=2
    ).devices
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1), devices)
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 4, 'tensor': 1, 'sequence': 1}
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  assert (slices[0] == slices[0].flat[0]).all() and (slices[1] == slices[1].flat[0]).all()
  assert slices[0].flat[0] != slices[1].flat[0]


@needs_libtpu
def test_a_tiny_run_on_four_chips(tiny):
  found, result = tiny
  assert found['topology'] == 'v5e:2x2'
  programs = found['programs']
  assert set(programs) == {'dk_dm.teacher_pictures', 'dk_dm.rollout', 'dk_dm.train_step'}
  for name, program in programs.items():
    assert program['fits'] and 0 < program['hbm_bytes'] < program['hbm_limit'] == 15.75 * 2**30
    assert program['flops'] > 0 and 0 < program['mfu'] < 1 and program['step_seconds'] > 0, name
    assert f'{name}\n  fits: needs ' in result.stdout
  step = programs['dk_dm.train_step']
  assert step['executed_flops'] > step['flops']
  axes = {part['axes'] for part in step['collectives']}
  assert {'fsdp', 'sequence'} <= axes
  # Attention exchanges tokens for heads.
  assert any(p['kind'] == 'all-to-all' and p['axes'] == 'sequence' for p in step['collectives'])
  assert not result.stderr


@needs_libtpu
def test_flux_learns_on_one_small_chip(tmp_path):
  """The first row of docs/plan.md's table: adapters on an int8 base, on what Colab lends."""
  config = ROOT / 'configs' / 'flux_dev_dk_dm.py'
  _plan(
    tmp_path,
    f'--config={config}:res=512,int8',
    '--topology=v5e:1x1',
    '--only=^dk_dm.train_step$',
    '--json=plan.json',
  )
  programs = json.loads((tmp_path / 'plan.json').read_text())['programs']
  step = programs['dk_dm.train_step']
  assert step['fits'] and step['hbm_bytes'] <= step['hbm_limit'] == 15.75 * 2**30
  # 11.9e9 weights of a byte each, of which some norms and biases are kept in more.
  assert 11.9e9 < step['hbm_by_class']['parameters'] < 12.6e9


def test_described_parameters_are_those_that_are_loaded(tmp_path, monkeypatch):
  from eru_jax import sharding
  from eru_jax.training import config as config_lib
  from eru_jax.training import experiment as experiment_lib
  from eru_jax.training.planning_model import open_planned
  from eru_jax.training.stages.common import initial_trainable

  monkeypatch.setenv('ERU_JAX_CACHE', str(tmp_path))
  for params in ('float32', 'int8'):
    config = config_lib.from_mapping(
      config_lib.ExperimentConfig,
      {
        'stages': ('dk_dm',),
        'model': {'source': 'tiny_flux', 'resolution': 64, 'params': params},
        'data': {'world': 'prompts', 'pairs': 'sample'},
        'lora': ({'pattern': 'attn', 'rank': 2, 'alpha': 2.0},),
      },
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    planned = open_planned(config, mesh)
    real = experiment_lib.load_snapshot(experiment_lib.resolve(config), mesh)
    experiment = experiment_lib.Experiment(planned.experiment.config, mesh, None, None)
    pairs = (
      (real.backbone, planned.snapshot.backbone),
      (real.autoencoder, planned.snapshot.autoencoder),
      (
        initial_trainable(experiment, real),
        initial_trainable(planned.experiment, planned.snapshot),
      ),
    )
    for made, told in pairs:
      assert jax.tree.structure(made) == jax.tree.structure(told)
      for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(told), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
