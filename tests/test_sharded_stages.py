"""Every stage and the sampler on eight virtual devices against the same on one.

The devices need a process of their own: this file, run as a script, is that process.
"""

import dataclasses
import pathlib
import pickle
import sys

import jax
import numpy as np
import pytest
from oracle import relative_error
from virtual_devices import MESHES, mesh_named, one_iteration, run_shares

from eru_jax.training.stage_config import STAGE_CONFIGS

TOLERANCE = 1e-5
TEXT, EDGE = 6, 32
OPTIMIZER = {'learning_rate': 1e-3}
DK_DM = dict(
  teacher_batch=8,
  rollouts=8,
  rollout_steps=2,
  states_per_rollout=1,
  preservation_batch=8,
  teacher_seeds=1,
  preserved_names=2,
  mixture_ramp=0.0,
)
NO_RL = dict(
  prompts_per_step=8,
  images_per_prompt=2,
  rollout_steps=3,
  timesteps_per_image=1,
  updates_per_step=2,
  text_noise=0.1,
  reward_high=0.5,
)
# Chance calls one of eight right: r is below one half, from which nothing positive is learnt.
_REWARDED = {'positive_only': {'reward_low': -1.0}}
# Over how many devices a mesh splits examples.
EXAMPLES = {'data': 8, 'fsdp': 8, 'all': 4, 'data and tensor': 4, 'sequence': 2}
# What is run: name -> (stage, its settings, the experiment's).
PROGRAMS = {
  'autoencoder': ('autoencoder', dict(batch_size=8), {}),
  'reward': ('reward', dict(batch_size=8), {}),
  'flow_matching': ('flow_matching', dict(batch_size=16, accumulation=2), {}),
  'dk_dm': ('dk_dm', DK_DM, {}),
  'dk_dm, whole backbone': ('dk_dm', DK_DM, {'lora': ()}),
  'dk_dm, branchwise': ('dk_dm', DK_DM | {'guidance': 'branchwise'}, {}),
  'no_rl': ('no_rl', NO_RL, {}),
  **{
    f'dk_dm, {variant}': ('dk_dm', DK_DM | {'variant': variant}, {})
    for variant in (
      'off_policy',
      'self_distillation',
      'supervised',
      'on_policy',
      'renoised',
      'trajectory',
      'paired_endpoint',
      'critic',
    )
  },
  **{
    f'no_rl, {variant}': ('no_rl', NO_RL | {'variant': variant, **_REWARDED.get(variant, {})}, {})
    for variant in (
      'anchored_negatives',
      'policy_gradient',
      'advantage_weighted',
      'bounded_unlearning',
      'nft',
      'positive_only',
      'rejection_sampling',
      'negatives_subset',
      'repulsion',
    )
  },
}
# What runs where; 'draw' is the sampler.
_WHOLE = ('autoencoder', 'reward', 'flow_matching', 'dk_dm', 'no_rl', 'draw')
RUNS = {
  'quick': {'dk_dm': ['all'], 'no_rl': ['all'], 'draw': ['all', 'sequence']},
  'slow': {
    program: list(MESHES) if program in _WHOLE else ['all', 'sequence']
    for program in ('draw', *PROGRAMS)
  },
}


def _random(shapes, seed, scale=1.0):
  """Numbers for every leaf: layers that start at zero would hide what is behind them."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: (scale * rng.standard_normal(s.shape) * s.shape[-1] ** -0.5).astype(np.float32),
    shapes,
  )


def _placed(boxed, seed, mesh):
  """Random parameters where the rules put them."""
  from eru_jax import sharding

  return jax.device_put(
    _random(sharding.unboxed(boxed), seed), sharding.logical_shardings(boxed, mesh)
  )


def _world():
  """Eight pictures of nothing, and questions about them."""
  from eru_jax.data.emoji_knowledge import PairTable, PictureTable
  from eru_jax.data.pairs import KnowledgePair
  from eru_jax.data.world import World

  names = tuple(f'thing {i}' for i in range(8))
  images = np.random.default_rng(0).integers(0, 256, (8, EDGE, EDGE, 3), np.uint8)

  def table(split, ask):
    pairs = [
      KnowledgePair(ask(i), name, 'things', split, f'{split}-{i}') for i, name in enumerate(names)
    ]
    return PairTable(tuple(pairs), np.arange(8, dtype=np.int32))

  splits = {
    'train': table('train', lambda i: f'what is number {i}?'),
    'explicit': table('explicit', lambda i: names[i]),
  }
  return World(splits, ('a chair', 'a street'), PictureTable(images, names, names, names))


def _experiment(mesh, **changes):
  """An experiment and its model, small and random, of which nothing is read from disk."""
  from eru_jax.models import autoencoder_kl, lora, registry
  from eru_jax.rewards.emoji import EmojiReward
  from eru_jax.training.config import ExperimentConfig, SamplingConfig, from_mapping
  from eru_jax.training.experiment import Experiment, Snapshot, TextTable
  from eru_jax.types import Conditioning

  rules = [dict(pattern='attn|ff|proj', rank=4, alpha=8.0)]
  values = {'stages': ('dk_dm', 'no_rl'), 'lora': rules, 'evaluation': {'batch_size': 8}}
  config = from_mapping(ExperimentConfig, values | changes)
  config = dataclasses.replace(config, sampling=SamplingConfig(num_steps=2, cfg_scale=2.0))

  family = registry.family('flux')
  architecture = family.config.from_dict(family.tiny)
  autoencoder = autoencoder_kl.AutoencoderConfig(
    in_channels=48,
    out_channels=48,
    latent_channels=4,
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
    use_quant_conv=False,
    use_post_quant_conv=False,
    patch_size=4,
  )
  model = registry.DiffusionModel(
    family,
    family.backbone(architecture),
    autoencoder_kl.AutoencoderKL(autoencoder),
    EDGE,
    EDGE,
    lora=config.lora,
  )
  key, pictures = jax.random.key(0), np.zeros((1, EDGE, EDGE, 3), np.float32)
  boxed = jax.eval_shape(lambda: model.init(key, TEXT))
  judge = EmojiReward(8).module
  snapshot = Snapshot(
    model,
    _placed(boxed, 0, mesh),
    _placed(jax.eval_shape(lambda: model.autoencoder.init(key, pictures)['params']), 1, mesh),
    reward=_placed(jax.eval_shape(lambda: judge.init(key, pictures)['params']), 2, mesh),
  )
  if config.lora:
    adapter = jax.eval_shape(lambda: lora.init(key, model.init(key, TEXT), config.lora))
    snapshot = dataclasses.replace(snapshot, trainable=_placed(adapter, 3, mesh))

  world = _world()
  prompts = list(dict.fromkeys(['', *world.all_prompts]))
  width = architecture.joint_attention_dim
  shape = (len(prompts), TEXT, width)
  text = _random(Conditioning(np.zeros(shape), None, np.zeros(shape[::2])), 4, width**0.5)
  lengths = 1 + np.arange(len(prompts)) % TEXT
  text = text.replace(mask=np.arange(TEXT) < lengths[:, None])

  def take(rows):
    return jax.tree.map(lambda x: x[rows], text)

  table = TextTable({p: i for i, p in enumerate(prompts)}, take, take(np.zeros(1, np.int32)))
  return Experiment(config, mesh, world, table), snapshot


def _run(program, mesh):
  """The first iteration of a stage."""
  from eru_jax.training.config import from_mapping
  from eru_jax.training.stages import STAGES

  name, settings, changes = PROGRAMS[program]
  experiment, snapshot = _experiment(mesh, **changes)
  settings = from_mapping(STAGE_CONFIGS[name], {'num_steps': 1, 'optimizer': OPTIMIZER, **settings})
  stage = STAGES[name].build(experiment, snapshot, settings)
  return one_iteration(stage, settings, experiment.key(name), mesh)


def _draw(mesh):
  """Pictures, by the sampler of `sample` and of evaluations."""
  from eru_jax.training.evaluation import draw, judge_of, start_noise

  experiment, snapshot = _experiment(mesh)
  prompts = [pair.implicit for pair in experiment.prompts('train')]
  noise = start_noise(snapshot.model, 0, 'test', np.arange(len(prompts)))
  found = draw(experiment, snapshot, judge_of(experiment), prompts, noise)
  return {'latents': found.latents, 'images': found.images, 'shown': found.shown}


def main(path, share):
  """Does the runs of a share, and leaves what it found in a file."""
  kind, part, parts = share.split('-')
  found = {}
  for program, meshes in list(RUNS[kind].items())[int(part) :: int(parts)]:
    for name in ('one', *meshes):
      mesh = mesh_named(name)
      found[program, name] = _draw(mesh) if program == 'draw' else _run(program, mesh)
  pathlib.Path(path).write_bytes(pickle.dumps(found))


_found = {}


@pytest.fixture
def found(request, tmp_path_factory):
  """What two processes of eight devices each found, of the quick or of the slow runs."""
  kind = request.param
  if kind not in _found:
    shares = [f'{kind}-{part}-2' for part in (0, 1)]
    _found[kind] = run_shares(__file__, tmp_path_factory.mktemp(kind), shares)
  return _found[kind]


def _cases(kind):
  marks = [pytest.mark.slow] if kind == 'slow' else []
  return [
    pytest.param(kind, program, mesh, marks=marks, id=f'{program} on {mesh}')
    for program, meshes in RUNS[kind].items()
    for mesh in meshes
  ]


@pytest.mark.parametrize(
  ('found', 'program', 'mesh'), _cases('quick') + _cases('slow'), indirect=['found']
)
def test_it_equals_one_device(found, program, mesh):
  one, many = found[program, 'one'], found[program, mesh]
  if program == 'draw':
    assert relative_error(many['latents'], one['latents']) <= TOLERANCE
    assert np.abs(many['images'].astype(int) - one['images']).max() <= 1
    return
  assert many['values'].keys() == one['values'].keys()
  for name in ('loss', 'grad_norm'):
    assert many['values'][name] == pytest.approx(one['values'][name], rel=TOLERANCE)
  assert many['values']['skipped'] == 0 < many['values']['grad_norm']
  assert many['arrays'].keys() == one['arrays'].keys()
  errors = _errors(many['arrays'], one['arrays'])
  worst = max(errors, key=errors.get)
  assert errors[worst] <= TOLERANCE, (worst, errors[worst])
  # The devices share the work; convolutions only as far as they share the examples.
  share = 1 / 4
  if program.startswith(('autoencoder', 'reward', 'no_rl')):
    share = max(share, 1.3 / EXAMPLES[mesh])
  assert sum(many['flops']) < share * sum(one['flops'])


def _errors(many, one):
  """Relative errors by path, where a rounding error of the gradients is one of the array, too.

  Optimisers' moments are the gradients, scaled, and their squares. Some gradients are zero but for
  rounding (a bias of attention's keys moves no output): a hundredth of the usual one is the least
  that errors are relative to. AdamW's first step is the sign of every element: parameters are
  compared where that is sure.
  """

  def gradients(arrays):
    found = {k: np.float64(x) for k, x in arrays.items() if '/mu/' in k}
    return found | {k: np.sqrt(np.float64(x)) for k, x in arrays.items() if '/nu/' in k}

  mine, theirs = gradients(many), gradients(one)
  usual = {
    kind: np.sqrt(np.mean(np.concatenate([x.ravel() for k, x in theirs.items() if kind in k]) ** 2))
    for kind in ('/mu/', '/nu/')
  }
  errors = {}
  for name in one:
    root, _, path = name.partition('/')
    found, expected = (x.get(name) for x in (mine, theirs))
    least = 0.0
    if expected is not None:
      least = 1e-2 * usual['/mu/' if '/mu/' in name else '/nu/']
    else:
      found, expected = np.float64(many[name]), np.float64(one[name])
    moment = next((k for k in theirs if k.endswith(f'/mu/{path}')), None)
    if root in ('params', 'ema') and moment:
      gradient = np.abs(theirs[moment])
      sure = gradient > 1e-3 * max(np.sqrt(np.mean(gradient**2)), 1e-2 * usual['/mu/'])
      found, expected = found[sure], expected[sure]
    size = max(np.linalg.norm(expected), least * expected.size**0.5, 1e-30)
    errors[name] = np.linalg.norm(found - expected) / size
  return errors


def test_every_variant_is_run():
  from eru_jax.training.variants import dk_dm, no_rl

  for stage, variants in (('dk_dm', dk_dm.VARIANTS), ('no_rl', no_rl.VARIANTS)):
    usual = STAGE_CONFIGS[stage]().variant
    run = {settings.get('variant', usual) for of, settings, _ in PROGRAMS.values() if of == stage}
    assert run == set(variants)


if __name__ == '__main__':
  main(*sys.argv[1:])
