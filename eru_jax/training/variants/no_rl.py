"""The variants of NO-RL: what is learnt from pictures of the old policy and how right they are.

`VARIANTS` holds them by the name that `no_rl.variant` takes. Adding one is writing one function
from fields and examples to a loss, and naming it there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp

from eru_jax import flow
from eru_jax.losses import advantages, nft, no_rl, policy_gradient
from eru_jax.losses.flow_matching import flow_matching
from eru_jax.types import Conditioning, VelocityFn

if TYPE_CHECKING:
  from eru_jax.training.stage_config import NoRlStageConfig

Loss = tuple[jax.Array, dict[str, jax.Array]]

# How rewards become r: 'absolute' maps [reward_low, reward_high] to [0, 1]; 'group' compares with
# the other pictures of the prompt, as DiffusionNFT does.
REWARD_SCALES = ('absolute', 'group')


@dataclasses.dataclass(frozen=True)
class Fields:
  """The velocity networks, guided if the policy is.

  Attributes:
    student: the one that is trained.
    old: the policy that drew the pictures.
    reference: the model at the start of the stage.
  """

  student: VelocityFn
  old: VelocityFn
  reference: VelocityFn


@flax.struct.dataclass
class Examples:
  """What a variant learns from, (B, ...) each.

  Attributes:
    text: prompts.
    r: (B,) optimality probability of the picture.
    advantage: (B,) how much better than expected it is; negative where it is wrong.
    weight: (B,) 0 for pictures without a reward, and for those of prompts that are solved, if
      these are dropped; else 1, or `doubtful_weight`.
    x_0: (B, S, C) pictures, for variants that noise them again; else None.
    noise: (B, S, C) what they are noised with, or None.
    t: (B,) and how strongly, or None.
    transitions: steps of the sampler, for variants that learn from those; else None.
    old_log_prob: (B,) of those steps under the old policy, or None.
  """

  text: Conditioning
  r: jax.Array
  advantage: jax.Array
  weight: jax.Array
  x_0: jax.Array | None = None
  noise: jax.Array | None = None
  t: jax.Array | None = None
  transitions: policy_gradient.Transitions | None = None
  old_log_prob: jax.Array | None = None


def ratings(
  score: jax.Array,
  config: 'NoRlStageConfig',
  known: jax.Array | None = None,
  trust: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """What rewards say of pictures, those of a prompt next to each other.

  Args:
    score: (N,) rewards.
    config: their scale.
    known: (N,), 0 where there is no reward, else 1; None if there is one for every picture.
    trust: (N,), what each reward weighs, above 0; None for 1.

  Returns:
    `r`, `advantage` and `weight`, (N,) each. A picture without a reward is neither right nor wrong,
    weighs nothing, and does not count among those of its prompt.
  """
  groups = score.reshape(-1, config.images_per_prompt)
  known = None if known is None else known.reshape(groups.shape)
  r = advantages.optimality(groups, config.reward_low, config.reward_high)
  weight = jnp.ones_like(r)
  if config.drop_solved:
    weight = advantages.unsolved_groups(r, known=known)
  if config.reward_scale == 'group':
    advantage = advantages.group_normalized(groups, clip=config.advantage_clip, known=known)
    r = advantages.probability(advantage, config.advantage_clip)
  else:
    advantage = 2 * r - 1
  if known is not None:
    r, advantage = jnp.where(known > 0, r, 0.5), jnp.where(known > 0, advantage, 0)
    weight = weight * known
  if trust is not None:
    weight = weight * trust.reshape(groups.shape)
  return {'r': r.reshape(-1), 'advantage': advantage.reshape(-1), 'weight': weight.reshape(-1)}


def dynamics(config: 'NoRlStageConfig') -> flow.Dynamics:
  """How the sampler of `policy_gradient` injects noise."""
  return flow.Dynamics(config.dynamics, config.noise_level)


def _noised(examples: Examples) -> tuple:
  return examples.x_0, examples.noise, examples.t, examples.text


def _clip(config: 'NoRlStageConfig') -> dict[str, float]:
  """The ratio's clip range, where the loss's own default is not wanted."""
  return {} if config.clip_range is None else {'clip_range': config.clip_range}


def _regression(
  loss: Callable[..., Loss],
  fields: Fields,
  examples: Examples,
  config: 'NoRlStageConfig',
  **settings: Any,
) -> Loss:
  """A loss on pictures of the old policy, noised again, that holds the student to two fields."""
  return loss(
    fields.student,
    fields.old,
    fields.reference,
    *_noised(examples),
    examples.r,
    beta=config.beta,
    reference_weight=config.reference_weight,
    **settings,
  )


def _nft(mode: str, fields: Fields, examples: Examples, config: 'NoRlStageConfig') -> Loss:
  settings = {'mode': mode, 'weights': config.nft_weights, 'weight': examples.weight}
  return _regression(nft.nft, fields, examples, config, **settings)


def _anchored(fields: Fields, examples: Examples, config: 'NoRlStageConfig') -> Loss:
  weight = examples.weight
  return _regression(no_rl.anchored_negatives, fields, examples, config, weight=weight)


def _policy_gradient(fields: Fields, examples: Examples, config: 'NoRlStageConfig') -> Loss:
  return policy_gradient.policy_gradient(
    fields.student,
    fields.reference,
    examples.transitions,
    examples.text,
    examples.old_log_prob,
    advantages.scale_positives(examples.advantage, config.positive_weight),
    dynamics(config),
    kl_weight=config.reference_weight,
    weight=examples.weight,
    **_clip(config),
  )


def _advantage_weighted(fields: Fields, examples: Examples, config: 'NoRlStageConfig') -> Loss:
  return policy_gradient.advantage_weighted_matching(
    fields.student,
    fields.old,
    fields.reference,
    *_noised(examples),
    advantages.scale_positives(examples.advantage, config.positive_weight),
    reference_weight=config.reference_weight,
    weight=examples.weight,
    **_clip(config),
  )


def _bounded(fields: Fields, examples: Examples, config: 'NoRlStageConfig') -> Loss:
  return no_rl.bounded_unlearning(
    fields.student,
    fields.reference,
    *_noised(examples),
    examples.r,
    sharpness=config.sharpness,
    reference_weight=config.reference_weight,
    weight=examples.weight,
  )


def _rejection(fields: Fields, examples: Examples, config: 'NoRlStageConfig') -> Loss:
  del config
  weight = examples.weight * examples.r
  return flow_matching(fields.student, *_noised(examples), weight)


def _repulsion(fields: Fields, examples: Examples, config: 'NoRlStageConfig') -> Loss:
  del config
  return no_rl.repulsion(fields.student, *_noised(examples), examples.r, examples.weight)


@dataclasses.dataclass(frozen=True)
class Variant:
  """A variant of NO-RL.

  Attributes:
    loss: (fields, examples, config) -> (loss, measurements).
    on_steps: whether it learns from steps of a stochastic sampler, not from noised pictures.
  """

  loss: Callable[[Fields, Examples, 'NoRlStageConfig'], Loss]
  on_steps: bool = False


VARIANTS = {
  'negative_only': Variant(functools.partial(_nft, 'negative_only')),
  'anchored_negatives': Variant(_anchored),
  'policy_gradient': Variant(_policy_gradient, on_steps=True),
  'advantage_weighted': Variant(_advantage_weighted),
  'bounded_unlearning': Variant(_bounded),
  'nft': Variant(functools.partial(_nft, 'all')),
  'positive_only': Variant(functools.partial(_nft, 'positive_only')),
  'rejection_sampling': Variant(_rejection),
  'negatives_subset': Variant(functools.partial(_regression, no_rl.negatives_subset)),
  'repulsion': Variant(_repulsion),
}
