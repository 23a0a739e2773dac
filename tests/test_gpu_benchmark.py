"""The comparison on a GPU: its operations are counted right, its bookkeeping holds, it runs."""

import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from eru_jax.models import flux, lora, stack
from eru_jax.types import Conditioning

ROOT = pathlib.Path(__file__).parents[1]
# Wide and long enough for matrix products to be nearly all that is computed.
CONFIG = flux.FluxConfig(
  in_channels=64,
  num_layers=1,
  num_single_layers=1,
  attention_head_dim=64,
  num_attention_heads=6,
  joint_attention_dim=128,
  pooled_projection_dim=64,
  axes_dims_rope=(16, 24, 24),
)
BATCH, IMAGE, TEXT, RANK = 2, 192, 64, 8
COUNTS = (CONFIG, BATCH, IMAGE, TEXT)


@pytest.fixture(scope='module')
def modules(benchmarks):
  del benchmarks
  return [importlib.import_module(name) for name in ('side_by_side', 'gpu_rows', 'gpu_results')]


@pytest.fixture(scope='module')
def loaded(modules):
  return tuple(modules)


def _shapes():
  """The unrolled model, and the shapes of its parameters and inputs."""
  model, spec = flux.FluxTransformer(CONFIG, scan=False), jax.ShapeDtypeStruct
  inputs = (
    spec((BATCH, IMAGE, CONFIG.in_channels), jnp.float32),
    spec((BATCH,), jnp.float32),
    Conditioning(
      tokens=spec((BATCH, TEXT, CONFIG.joint_attention_dim), jnp.float32),
      pooled=spec((BATCH, CONFIG.pooled_projection_dim), jnp.float32),
    ),
  )
  ids = flux.image_ids(12, IMAGE // 12)

  def call(variables, x, t, conditioning):
    return model.apply(variables, x, t, conditioning, ids, t)

  init = functools.partial(model.init, jax.random.key(0), ids=ids)
  params = jax.eval_shape(lambda x, t, c: init(x, t, c, guidance=t), *inputs)['params']
  return call, nn.unbox(params), inputs


def _rows_of(layer):
  """Vectors of a picture that go through a layer, named after its path."""
  if 'time_text_embed' in layer or 'norm' in layer:
    return 1
  if layer.startswith('single_transformer_blocks'):
    return IMAGE + TEXT
  text = ('add_', 'context')
  return TEXT if any(name in layer for name in text) else IMAGE


def test_operations_equal_a_hand_count(loaded):
  """Every kernel times what goes through it, two products of attention a block."""
  side_by_side, _, _ = loaded
  _, params, _ = _shapes()
  forward = adapters = 0
  rules = (lora.LoraRule('transformer_blocks/', RANK, RANK),)
  adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, rules))
  for tree, count in ((params, 'kernel'), (adapter, 'ab')):
    for path, leaf in traverse_util.flatten_dict(tree, sep='/').items():
      layer, _, name = path.rpartition('/')
      if name in ('kernel', 'a', 'b'):
        # Stacked blocks each do it once.
        work = 2 * BATCH * _rows_of(layer) * leaf.size
        forward, adapters = forward + work * (count == 'kernel'), adapters + work * (count == 'ab')
  blocks = CONFIG.num_layers + CONFIG.num_single_layers
  attention = blocks * BATCH * 2 * 2 * (IMAGE + TEXT) ** 2 * CONFIG.width
  assert side_by_side.flops(*COUNTS) == forward + attention
  assert side_by_side.full_flops(*COUNTS) == 3 * (forward + attention)
  assert side_by_side.adapter_flops(*COUNTS, RANK) == adapters
  assert side_by_side.lora_flops(*COUNTS, RANK) == 2 * forward + 3 * attention + 3 * adapters


def _compiled_flops(function, *args):
  return jax.jit(function).lower(*args).cost_analysis()['flops']


def test_operations_equal_xlas_within_a_few_percent(loaded):
  """XLA counts elementwise operations as well, hence a little more."""
  side_by_side, _, _ = loaded
  call, params, inputs = _shapes()
  found = _compiled_flops(lambda p, *args: call({'params': p}, *args), params, *inputs)
  assert 1 <= found / side_by_side.flops(*COUNTS) < 1.05

  def loss(params, *args):
    return jnp.sum(call({'params': params}, *args))

  found = _compiled_flops(jax.grad(loss), params, *inputs)
  assert 0.97 < found / side_by_side.full_flops(*COUNTS) < 1.05

  rules = (lora.LoraRule('transformer_blocks/', RANK, RANK),)
  adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, rules))

  def adapted(adapter, params, *args):
    return jnp.sum(call({'params': params, 'lora': lora.variables(adapter, rules)}, *args))

  found = _compiled_flops(jax.grad(adapted), adapter, params, *inputs)
  assert 0.97 < found / side_by_side.lora_flops(*COUNTS, RANK) < 1.05


def test_flux_dev_at_1024_pixels(loaded):
  """59.5 TFLOP in products with weights, 14.9 in attention; published counts say as much."""
  side_by_side, _, _ = loaded
  counts = (flux.FluxConfig(), 1, 4096, 512)
  assert side_by_side.flops(*counts) == pytest.approx(74.4e12, rel=2e-3)


def test_rows_are_processes_of_their_own(loaded):
  _, rows, _ = loaded
  names = [row.name for row in rows.ROWS]
  assert len(set(names)) == len(names)
  policies = {option for row in rows.ROWS if row.side == 'ours' for option in row.options}
  assert policies == {'unrolled', *stack.REMAT_POLICIES}
  for task in ('sample', 'lora', 'full'):
    for pixels in (512, 1024):
      pair = [row for row in rows.ROWS if (row.task, row.pixels) == (task, pixels)]
      assert {row.side for row in pair} == set(rows.SIDES)
  assert [row.name for row in rows.chosen_rows(['peak-*', 'sample-512-ours'])] == [
    'peak-ours',
    'peak-diffusers',
    'sample-512-ours',
  ]
  assert rows.chosen_rows([]) == list(rows.ROWS)
  with pytest.raises(ValueError, match='matches no row'):
    rows.chosen_rows(['sample-768-*'])
  assert rows.FULL.grid(1024) == (64, 64) and rows.FULL.config() == flux.FluxConfig()


def test_sweep_takes_the_largest_batch_that_fits(loaded, capsys):
  _, rows, _ = loaded

  def measure(batch):
    if batch > 2:
      raise MemoryError(f'no room for {batch}')
    return {'call_seconds': 0.0}

  rows.sweep((1, 2, 4, 8), measure, 100)
  found = {}
  for line in capsys.readouterr().out.splitlines():
    rows.merge(found, json.loads(line.removeprefix(rows.MARK)))
  assert found['batches'].keys() == {'1', '2'}
  assert found['skipped'] == {b: f'MemoryError: no room for {b}' for b in '84'}
  rows.sweep((1, 2), lambda batch: {'call_seconds': 60.0}, 100)
  assert 'no time' in capsys.readouterr().out


KEY = dict(
  date='2026-11-22', device='NVIDIA H200', versions={}, environment={}, published_tflops=1000.0
)


def _entry(tflop, seconds, finite=True):
  return {'tflop': tflop, 'seconds': seconds, 'finite': finite}


def test_figures_of_a_run(loaded):
  _, _, results = loaded
  run = results.open_run([], KEY)
  run['rows'] = {
    'peak-ours': {'matmul_tflops': 700.0},
    'peak-diffusers': {'matmul_tflops': 800.0},
    'full-1024-ours-names': {
      'batches': {
        '1': _entry(200.0, 0.5),
        '8': _entry(1600.0, 3.2),
        '4': _entry(800.0, 0.1, finite=False),
      },
      'skipped': {'2': 'no time'},
    },
    'full-1024-diffusers-checkpoint': {'batches': {'2': _entry(400.0, 1.6)}},
    'sample-1024-ours': {'batches': {'1': _entry(70.0, 0.1)}},
    'lora-512-ours-names': {'failed': 'OutOfMemory'},
  }
  results.derive(run)
  batches = run['rows']['full-1024-ours-names']['batches']
  assert batches['1']['mfu'] == pytest.approx(0.4)
  assert batches['1']['share_of_measured_peak'] == pytest.approx(0.5)
  sampled = run['rows']['sample-1024-ours']['batches']['1']
  assert sampled['pictures_per_second'] == pytest.approx(1 / 2.8)
  summary = results.summary(run)
  # 2.5 pictures a second against 1.25; what was not finite does not count.
  assert summary['train_mfu'] == pytest.approx(0.5)
  assert summary['train_ratio'] == pytest.approx(2.0)
  assert summary['sample_mfu'] == pytest.approx(0.7) and summary['sample_ratio'] is None
  table = results.table(run)
  assert '| training everything | 1024 | full-1024-ours-names, batch 8 |' in table
  for told in ('batch 4: not finite', 'batch 2: no time', 'lora-512-ours-names: OutOfMemory'):
    assert told in table


def test_runs_go_on_and_are_appended(loaded, tmp_path):
  _, _, results = loaded
  path = tmp_path / 'results' / 'gpu.json'
  runs = results.load_runs(path)
  run = results.open_run(runs, KEY)
  run['rows']['peak-ours'] = {'finished': True, 'matmul_tflops': 700.0}
  results.save(path, runs)
  again = results.load_runs(path)
  assert results.open_run(again, KEY)['rows'] == run['rows'] and len(again) == 1
  # Another day's figures are not mixed with it.
  assert results.open_run(again, {**KEY, 'date': '2026-11-23'})['rows'] == {} and len(again) == 2
  results.save(path, again)
  assert 'NVIDIA H200, 2026-11-23' in path.with_suffix('.md').read_text()


@pytest.mark.slow
def test_quick_comparison(loaded, tmp_path):
  """Both sides agree, a row of every kind is measured, and what is finished is not run again."""
  for name in ('torch', 'diffusers', 'peft'):
    pytest.importorskip(name)
  path = tmp_path / 'gpu.json'
  patterns = ['peak-*', 'attention-*', 'sample-512-*', 'lora-512-ours-names', 'full-512-ours-attn']
  patterns += ['lora-512-diffusers-checkpoint-compiled', 'full-512-diffusers-checkpoint']
  command = [sys.executable, 'benchmarks/gpu.py', '--quick', f'--output={path}']
  command += [f'--rows={",".join(patterns)}', '--row_limit=3600', '--time_limit=18000']
  # Compiled fast rather than well.
  fast = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  environment |= {'XLA_FLAGS': fast, 'OMP_NUM_THREADS': '1'}

  def run():
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout

  summary = json.loads(run().splitlines()[-1])
  assert summary.keys() == {'rows', 'train_mfu', 'sample_mfu', 'train_ratio', 'sample_ratio'}
  _, rows, _ = loaded
  wanted = [*rows.AGREEMENT, *rows.chosen_rows(patterns)]
  assert summary['rows'].keys() == {row.name for row in wanted}
  for row in wanted:
    found = summary['rows'][row.name]
    assert found.get('finished'), (row.name, found)
    if row.pixels:
      assert set(found['batches']) == {'1', '2'}, (row.name, found)
      assert all(entry['pictures_per_second'] > 0 for entry in found['batches'].values())
  assert len(summary['rows']['agreement-diffusers']['differences']) == 7
  assert 'measured before' in run()
