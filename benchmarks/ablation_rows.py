"""What `ablation.py` compares: every row is the emoji config, the common budget, and these values.

Values have the keys of a config file, so that any row can be repeated by `python -m eru_jax.train`.
Nothing is tuned for a row; what a row's method needs in another unit (rollouts instead of pictures,
six updates in one step) is set such that it sees as many states in as many updates as the rest.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import app


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a table.

  Attributes:
    name: in the table and in file names.
    group: its table.
    values: dotted config keys that differ from the common ones.
    start: 'base', or the row whose DK-DM result NO-RL begins with.
    biased: whether the base is the one of `ablation_bias.py`, and not the shipped one.
    copies: pictures of each prompt that are judged, 1 to 9.
  """

  name: str
  group: str
  values: Mapping[str, Any]
  start: str = 'base'
  biased: bool = False
  copies: int = 1


_CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'emoji.py'

# A few steps on a few facts: does everything run?
_QUICK_VALUES = {
  'data.max_facts': 8,
  'evaluation.max_prompts': 8,
  'dk_dm.num_steps': 2,
  'dk_dm.preserved_names': 8,
  'no_rl.num_steps': 2,
}
# 32 prompts in each of 100 steps: every prompt is seen five to six times.
COMMON = {
  'data.max_facts': 48,
  'evaluation.max_prompts': 128,
  'evaluation.gallery': 0,
  'dk_dm.num_steps': 100,
  'dk_dm.teacher_batch': 32,
  'dk_dm.accumulation': 2,
  'dk_dm.preserved_names': 320,
  'dk_dm.save_every': 1000,
  'no_rl.num_steps': 32,
  'no_rl.optimizer.learning_rate': 1e-4,
  'no_rl.save_every': 1000,
}
# As many states, of as many prompts, as the teacher's pictures give elsewhere.
_ROLLOUTS = {'dk_dm.rollouts': 32, 'dk_dm.states_per_rollout': 1}
_EVERYWHERE = '.*'
# Of anchors that are right now and wrong then, one picture says nothing.
BIASED = {
  'data.max_facts': 12,
  'evaluation.max_prompts': 48,
  'dk_dm.num_steps': 40,
  'dk_dm.teacher_seeds': 8,
}
# Three times the pictures of a quarter of the prompts, drawn as the sampler that is measured does.
_CORRECTION = {
  'num_steps': 48,
  'images_per_prompt': 8,
  'explicit_share': 0.5,
  'cfg_scale': 3.0,
  'advantage_clip': 1.0,
}
_CONTEXT = 'context_embedder|add_[qkv]_proj|to_add_out|ff_context|norm1_context'


def _dk_dm(name: str, variant: str, **values: Any) -> Row:
  return Row(name, 'DK-DM', {'dk_dm.variant': variant, **values})


def _critic(updates: int) -> Row:
  values = {
    'dk_dm.variant': 'critic',
    'dk_dm.critic_updates': updates,
    'dk_dm.num_steps': 100 // (updates + 1),
    'dk_dm.rollouts': 32,
  }
  return Row(f'c, {updates} critic update{"s" * (updates > 1)}', 'DK-DM', values)


def _lora(name: str, pattern: str, rank: int) -> Row:
  rule = {'pattern': pattern, 'rank': rank, 'alpha': 2.0 * rank}
  return Row(name, 'LoRA', {'lora': (rule,)})


def _no_rl(name: str, variant: str, start: str = 'mixture', **values: Any) -> Row:
  options = {f'no_rl.{key}': value for key, value in values.items()}
  return Row(name, 'NO-RL', {'no_rl.variant': variant, **options}, start)


def _elsewhere(group: str, start: Row, names: tuple[str, ...]) -> tuple[Row, ...]:
  """Some of NO-RL's rows from another model."""
  chosen = [row for row in _NO_RL if row.name in names]
  return tuple(
    dataclasses.replace(
      row,
      name=f'{row.name} {group.removeprefix("NO-RL ")}',
      group=group,
      values={**start.values, **row.values},
      start=start.name,
    )
    for row in chosen
  )


def _biased(name: str, variant: str, **values: Any) -> Row:
  options = {f'no_rl.{key}': value for key, value in {**_CORRECTION, **values}.items()}
  return Row(
    f'{name}, biased anchors',
    'NO-RL, biased anchors',
    {**BIASED, 'no_rl.variant': variant, **options},
    _TORN.name,
    biased=True,
    copies=_TORN.copies,
  )


# Policy gradients follow the policy at once, as their authors have it.
_AT_ONCE = {'behaviour_cap': 0.0}
_FLOW_GRPO = {'positive_weight': 1.0, 'dynamics': 'sde', 'noise_level': 0.7, **_AT_ONCE}

_BASE = Row('base', 'base', {})
# Knows half of its prompts, so that NO-RL has mistakes to learn from.
_HALF = Row('mixture, 40 steps', 'DK-DM', {'dk_dm.num_steps': 40})

# Has learnt of anchors that are wrong as often as right.
_TORN = Row('mixture, biased anchors', 'DK-DM, biased anchors', {**BIASED}, biased=True, copies=4)

_NO_RL = (
  _no_rl('N1', 'negative_only'),
  _no_rl('N1, branch weights', 'negative_only', nft_weights='branch'),
  _no_rl('N1, group-normalised', 'negative_only', reward_scale='group'),
  _no_rl('N1, solved dropped', 'negative_only', drop_solved=True),
  _no_rl('N1, no KL', 'negative_only', reference_weight=0.0),
  _no_rl('N1, implicit prompts only', 'negative_only', explicit_share=0.0),
  _no_rl('N1, explicit prompts only', 'negative_only', explicit_share=1.0),
  # As the deployed sampler is.
  _no_rl('N1, guided by 3', 'negative_only', cfg_scale=3.0),
  _no_rl('N2', 'anchored_negatives'),
  _no_rl('N3', 'policy_gradient', **_AT_ONCE),
  _no_rl('N3, W-REINFORCE', 'policy_gradient', positive_weight=0.1, **_AT_ONCE),
  _no_rl('N4', 'advantage_weighted', **_AT_ONCE),
  _no_rl('N5', 'bounded_unlearning'),
  _no_rl('full NFT', 'nft'),
  _no_rl('full NFT, branch weights', 'nft', nft_weights='branch'),
  _no_rl('full NFT, guided by 3', 'nft', cfg_scale=3.0),
  # Pictures that are nearer to what the velocity field says.
  _no_rl('full NFT, 32 rollout steps', 'nft', rollout_steps=32),
  _no_rl('positive-only NFT', 'positive_only'),
  _no_rl('rejection sampling', 'rejection_sampling'),
  # As their authors have them: what is better than a prompt's other pictures is right.
  _no_rl('DiffusionNFT', 'nft', reward_scale='group', nft_weights='branch'),
  _no_rl('Flow-GRPO', 'policy_gradient', reward_scale='group', **_FLOW_GRPO),
  _no_rl('AWM', 'advantage_weighted', reward_scale='group', positive_weight=1.0, **_AT_ONCE),
  _no_rl('negatives subset', 'negatives_subset'),
  _no_rl('N0', 'repulsion'),
)

ROWS = (
  _BASE,
  Row('mixture', 'DK-DM', {}),
  _dk_dm('a, off-policy', 'off_policy'),
  _dk_dm('a, path velocity', 'self_distillation'),
  _dk_dm('supervised on the pictures', 'supervised'),
  _dk_dm('a, path-KL weight', 'off_policy', **{'dk_dm.time_weight': 'path_kl'}),
  _dk_dm('a, min-SNR weight', 'off_policy', **{'dk_dm.time_weight': 'min_snr'}),
  _dk_dm('b1, on-policy', 'on_policy', **_ROLLOUTS),
  _dk_dm('b2, renoised', 'renoised', **_ROLLOUTS),
  _dk_dm('d, trajectory', 'trajectory', **_ROLLOUTS),
  _dk_dm('d, paired endpoint', 'paired_endpoint', **_ROLLOUTS),
  _critic(5),
  _critic(1),
  _dk_dm('mixture, branchwise', 'mixture', **{'dk_dm.guidance': 'branchwise'}),
  _dk_dm('mixture, baked', 'mixture', **{'dk_dm.guidance': 'baked', 'sampling.cfg_scale': 1.0}),
  _HALF,
  *_NO_RL,
  *_elsewhere(
    'NO-RL from 40 steps',
    _HALF,
    (
      'N1',
      'N1, group-normalised',
      'N1, no KL',
      'N1, guided by 3',
      'N2',
      'N3',
      'N3, W-REINFORCE',
      'N4',
      'N5',
      'full NFT',
      'positive-only NFT',
      'rejection sampling',
      'DiffusionNFT',
      'Flow-GRPO',
      'AWM',
      'negatives subset',
    ),
  ),
  *_elsewhere('NO-RL from the base', _BASE, ('N1', 'full NFT', 'positive-only NFT')),
  Row('biased base', 'base', {**BIASED}, biased=True, copies=_TORN.copies),
  _TORN,
  dataclasses.replace(
    _TORN, name='mixture, 80 steps, biased anchors', values={**BIASED, 'dk_dm.num_steps': 80}
  ),
  _biased('N1', 'negative_only'),
  _biased('N1, group-normalised', 'negative_only', reward_scale='group'),
  _biased(
    'N1, group-normalised, no KL', 'negative_only', reward_scale='group', reference_weight=0.0
  ),
  _biased('N1, group-normalised, unguided', 'negative_only', reward_scale='group', cfg_scale=1.0),
  _biased('N2, group-normalised', 'anchored_negatives', reward_scale='group'),
  _biased('positive-only NFT, group-normalised', 'positive_only', reward_scale='group'),
  _biased('full NFT', 'nft'),
  _biased('DiffusionNFT', 'nft', reward_scale='group', nft_weights='branch'),
  _biased(
    'DiffusionNFT, unguided', 'nft', reward_scale='group', nft_weights='branch', cfg_scale=1.0
  ),
  _biased('Flow-GRPO', 'policy_gradient', reward_scale='group', **_FLOW_GRPO),
  Row('1 wording', 'wordings', {'data.wordings_per_fact': 1}),
  Row('2 wordings', 'wordings', {'data.wordings_per_fact': 2}),
  Row('4 wordings', 'wordings', {'data.wordings_per_fact': 4}),
  Row('8 wordings', 'wordings', {'data.wordings_per_fact': 8}),
  # A prompt is seen as often as in the other rows.
  Row('12 facts', 'facts', {'data.max_facts': 12, 'dk_dm.num_steps': 25}),
  Row('24 facts', 'facts', {'data.max_facts': 24, 'dk_dm.num_steps': 50}),
  Row('96 facts', 'facts', {'data.max_facts': 96, 'dk_dm.num_steps': 200}),
  _lora('LoRA rank 4, everywhere', _EVERYWHERE, 4),
  _lora('LoRA rank 16, everywhere', _EVERYWHERE, 16),
  _lora('LoRA rank 64, everywhere', _EVERYWHERE, 64),
  _lora('LoRA rank 16, context stream', _CONTEXT, 16),
)


def config_values(quick, **flat):
  """The emoji config with the common budget and dotted keys, as data."""
  from eru_jax.config_file import load_config

  values = load_config(str(_CONFIG), {})
  for key, value in {**COMMON, **flat, **(_QUICK_VALUES if quick else {})}.items():
    *path, last = key.split('.')
    section = values
    for part in path:
      section = section.setdefault(part, {})
    section[last] = value
  return values


def config_of(row, seed, quick=False, source=None):
  """The row's config, resolved; `source` is the base's directory if it is not the shipped one."""
  from eru_jax.training.config import ExperimentConfig, from_mapping
  from eru_jax.training.experiment import resolve

  own = {} if source is None else {'model.source': str(source)}
  values = config_values(quick, **row.values, **own, seed=seed)
  no_rl = row.group.startswith('NO-RL')
  values['stages'] = ('no_rl',) if no_rl else ('dk_dm',)
  if no_rl and row.start != 'base':
    values['stages'] = ('dk_dm', 'no_rl')
  return resolve(from_mapping(ExperimentConfig, values))


def compared_with(row):
  """The name of the row whose pictures of the same prompts a row's are held against, or None."""
  if row.group.startswith('NO-RL'):
    return row.start
  if row.biased:
    return _TORN.name if row.name not in (_TORN.name, 'biased base') else None
  # Other numbers of facts have other prompts.
  return None if row.group in ('base', 'facts') or row.name == 'mixture' else 'mixture'


def slug(name):
  return ''.join(c if c.isalnum() else '-' for c in name.lower())


def chosen_rows(wanted):
  if not wanted:
    return ROWS
  exact = {row.name for row in ROWS}
  rows = [
    row
    for row in ROWS
    if any(row.name == name if name in exact else row.name.startswith(name) for name in wanted)
  ]
  missing = [name for name in wanted if not any(r.name.startswith(name) for r in rows)]
  if missing:
    known = ', '.join(repr(row.name) for row in ROWS)
    raise app.UsageError(f'No row begins with {missing}; there are {known}.')
  return tuple(rows)
