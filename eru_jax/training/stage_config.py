"""The settings of every stage: one frozen dataclass each, checked as it is made."""

import dataclasses
import math

from eru_jax.errors import UserError
from eru_jax.rewards.clip import SCORES
from eru_jax.rewards.judge import JudgeConfig
from eru_jax.training.checks import one_of, require
from eru_jax.training.state import OptimizerConfig
from eru_jax.training.variants import dk_dm as dk_dm_variants
from eru_jax.training.variants import no_rl as no_rl_variants


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """What every stage has.

  Attributes:
    num_steps: iterations.
    optimizer: see OptimizerConfig.
    accumulation: microbatches averaged into one update.
    per_device: if positive, `accumulation` is set when the mesh is known, such that a device sees
      so many examples of each kind at a time (or fewer); NO-RL's `rollout_batch` likewise.
    save_every: iterations between checkpoints; the last iteration is always saved.
    log_every: iterations between lines of metrics.jsonl.
  """

  num_steps: int = 100
  optimizer: OptimizerConfig = OptimizerConfig()
  accumulation: int = 1
  per_device: int = 0
  save_every: int = 100
  log_every: int = 10

  def __post_init__(self):
    require(
      self,
      num_steps=(self.num_steps >= 1, 'at least 1'),
      accumulation=(self.accumulation >= 1, 'at least 1'),
      per_device=(
        self.per_device >= 0 and (not self.per_device or self.accumulation == 1),
        'zero or more, and zero if accumulation is set',
      ),
      save_every=(self.save_every >= 1, 'at least 1'),
      log_every=(self.log_every >= 1, 'at least 1'),
    )

  @property
  def kinds(self) -> dict[str, int]:
    """What an iteration learns from: description -> how many."""
    return {'examples': self.batch_size}

  @property
  def split(self) -> tuple[int, ...]:
    """Numbers of examples that `accumulation` splits."""
    return (self.batch_size,)

  def on(self, share: int) -> 'StageConfig':
    """The config with its accumulation settled, where `share` devices split the batch."""
    if not self.per_device:
      return self
    accumulation = max(1, math.gcd(*self.split) // (share * self.per_device))
    return dataclasses.replace(self, accumulation=accumulation, per_device=0)


def _batch(size: int, accumulation: int) -> tuple[bool, str]:
  valid = size >= 1 and size % accumulation == 0
  return valid, 'positive and a multiple of accumulation'


@dataclasses.dataclass(frozen=True)
class AutoencoderStageConfig(StageConfig):
  """Trains the autoencoder on the world's pictures.

  Attributes:
    batch_size: pictures an iteration.
    kl_weight: weight of the KL to the unit normal.
  """

  batch_size: int = 16
  kl_weight: float = 5e-4

  def __post_init__(self):
    super().__post_init__()
    require(
      self,
      batch_size=_batch(self.batch_size, self.accumulation),
      kl_weight=(self.kl_weight >= 0, 'zero or more'),
    )


@dataclasses.dataclass(frozen=True)
class RewardStageConfig(StageConfig):
  """Trains the reward classifier on distorted pictures of the world.

  Attributes:
    batch_size: pictures an iteration.
    label_smoothing: share of the probability given to all classes alike.
  """

  batch_size: int = 64
  label_smoothing: float = 0.05

  def __post_init__(self):
    super().__post_init__()
    require(
      self,
      batch_size=_batch(self.batch_size, self.accumulation),
      label_smoothing=(0 <= self.label_smoothing < 1, 'in [0, 1)'),
    )


@dataclasses.dataclass(frozen=True)
class FlowMatchingStageConfig(StageConfig):
  """Pretrains the backbone on (name, picture).

  Attributes:
    batch_size: examples an iteration.
    pooled_only: share of examples whose token states are masked, which leaves the pooled vector.
    tokens_only: share of examples whose pooled vector is zeroed.
    drop_text: share of examples trained on the empty prompt.
    text_noise: standard deviation of Gaussian noise on the text, relative to its own.
    time_mean: mean of the logit-normal timestep density.
    time_std: its standard deviation.
  """

  batch_size: int = 64
  pooled_only: float = 0.2
  tokens_only: float = 0.1
  drop_text: float = 0.05
  text_noise: float = 0.1
  time_mean: float = 0.0
  time_std: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    shares = (self.pooled_only, self.tokens_only, self.drop_text)
    require(
      self,
      batch_size=_batch(self.batch_size, self.accumulation),
      pooled_only=(
        min(shares) >= 0 and sum(shares) <= 1,
        'such that it, tokens_only and drop_text are zero or more and sum to at most 1',
      ),
      text_noise=(self.text_noise >= 0, 'zero or more'),
      time_std=(self.time_std > 0, 'positive'),
    )


@dataclasses.dataclass(frozen=True)
class DkDmStageConfig(StageConfig):
  """DK-DM (a reconstruction: docs/method.md).

  Attributes:
    variant: where the states come from and what is matched there, see `variants.dk_dm`.
    guidance: 'matched', 'branchwise' or 'baked', see `variants.dk_dm`.
    baked_scale: guidance scale of the teacher where it is baked in.
    time_weight: weight in t of the matched states: 'uniform', 'path_kl' or 'min_snr', each divided
      by its mean under the density of t. The variant 'critic' takes none.
    critic_updates: for variant 'critic', its updates for each of the student's.
    teacher_batch: implicit prompts an iteration that meet states of the teacher's pictures.
    rollouts: implicit prompts an iteration that are rolled out with the student.
    rollout_steps: Euler steps of a rollout.
    states_per_rollout: states kept of each rollout.
    mixture: final weight of the rollout states.
    mixture_ramp: fraction of the stage over which that weight grows from zero.
    preservation_batch: anchors, other names and empty prompts an iteration.
    preservation_weight: weight of the preservation term.
    preserved_names: names of the world, beside the anchors, that the preservation term draws from.
    in_turn: whether the kinds of states go through the student one after the other: a third of the
      activations for a fifth more operations.
    teacher_seeds: pictures the teacher makes of each anchor before the stage begins.
    text_noise: noise on the implicit prompt's text, relative to its own standard deviation.
    pooled_only: share of implicit prompts whose token states are masked.
    time_mean: mean of the logit-normal timestep density of teacher states.
    time_std: its standard deviation.
  """

  variant: str = 'mixture'
  guidance: str = 'matched'
  baked_scale: float = 3.0
  time_weight: str = 'uniform'
  critic_updates: int = 5
  teacher_batch: int = 32
  rollouts: int = 4
  rollout_steps: int = 8
  states_per_rollout: int = 4
  mixture: float = 0.1
  mixture_ramp: float = 0.3
  preservation_batch: int = 16
  preservation_weight: float = 1.0
  preserved_names: int = 256
  in_turn: bool = False
  teacher_seeds: int = 2
  text_noise: float = 0.1
  pooled_only: float = 0.2
  time_mean: float = 0.4
  time_std: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    sizes = (self.teacher_batch, self.rollouts, self.preservation_batch)
    # The critic's loss compares whole fields.
    guidance = [g for g in dk_dm_variants.GUIDANCE if (self.variant, g) != ('critic', 'branchwise')]
    no_branches = ", as variant 'critic' has no branches to match"
    require(
      self,
      variant=one_of(self.variant, dk_dm_variants.VARIANTS),
      guidance=(
        self.guidance in guidance,
        f'one of {", ".join(guidance)}' + no_branches * (self.guidance in dk_dm_variants.GUIDANCE),
      ),
      baked_scale=(self.baked_scale >= 0, 'zero or more'),
      time_weight=one_of(self.time_weight, dk_dm_variants.TIME_WEIGHTS),
      critic_updates=(self.critic_updates >= 1, 'at least 1'),
      teacher_batch=(
        min(sizes) >= 1 and not any(s % self.accumulation for s in self.split),
        'positive and, like rollouts and preservation_batch, a multiple of accumulation',
      ),
      states_per_rollout=(
        1 <= self.states_per_rollout <= self.rollout_steps,
        'between 1 and rollout_steps',
      ),
      mixture=(0 <= self.mixture <= 1, 'in [0, 1]'),
      mixture_ramp=(0 <= self.mixture_ramp <= 1, 'in [0, 1]'),
      preservation_weight=(self.preservation_weight >= 0, 'zero or more'),
      preserved_names=(self.preserved_names >= 0, 'zero or more'),
      teacher_seeds=(self.teacher_seeds >= 1, 'at least 1'),
      text_noise=(self.text_noise >= 0, 'zero or more'),
      pooled_only=(0 <= self.pooled_only <= 1, 'in [0, 1]'),
      time_std=(self.time_std > 0, 'positive'),
    )

  @property
  def split(self) -> tuple[int, ...]:
    # States take the place of rollouts before they are split, but for those that stay together.
    variant = dk_dm_variants.VARIANTS.get(self.variant)
    by_state = variant is not None and variant.roll_out and not variant.addition
    copies = self.states_per_rollout if by_state else 1
    return self.teacher_batch, self.rollouts * copies, self.preservation_batch

  @property
  def kinds(self) -> dict[str, int]:
    kept = self.rollouts * self.states_per_rollout
    return {
      'teacher states': self.teacher_batch,
      f'rollout states ({self.rollouts} rollouts x {self.states_per_rollout})': kept,
      'preservation states': self.preservation_batch,
    }


@dataclasses.dataclass(frozen=True)
class NoRlStageConfig(StageConfig):
  """NO-RL (a reconstruction: docs/method.md).

  Attributes:
    variant: what is learnt from the pictures, see `variants.no_rl`; 'negative_only' is N1.
    reward: what judges pictures: 'emoji', the classifier of that world; 'clip_score' or 'sci_score'
      of any picture against its pair's implicit prompt, see `rewards.clip`; or 'judge', a model
      that is asked over HTTP, see `rewards.judge`.
    judge: for the last: which, and how it is asked.
    reward_model: for 'clip_score' and 'sci_score', the directory of a CLIPModel in the Hugging Face
      layout, or 'tiny_clip', a tiny random one.
    reward_anchors: '' or a JSON Lines file that gives every prompt its own reward_low and
      reward_high, see `rewards.anchors`; the reward is then in [0, 1] already.
    doubtful: categories of pairs, such as laws of Science-T2I, whose rewards are not to be trusted.
    doubtful_weight: what they weigh, 0 to 1; with 0 their pairs are left out of NO-RL.
    reward_scale: 'absolute', between reward_low and reward_high, or 'group', against the other
      pictures of the prompt.
    advantage_clip: with 'group', the normalised advantage that counts as certainly right.
    drop_solved: whether prompts whose pictures are right on average (r above 0.9) are left out.
    nft_weights: adaptive weights of the NFT variants: 'shared' by both branches, or the official
      ones, of each 'branch'.
    positive_weight: of positive advantages, in 'policy_gradient' and 'advantage_weighted': 0 learns
      from negatives only, 0.1 is W-REINFORCE, 1 the whole method.
    clip_range: of those two's ratio; None is the usual one of each, 1e-4 and 0.2.
    dynamics: sampler of 'policy_gradient', 'sde' or 'cps'.
    noise_level: its noise, see `flow.Dynamics`.
    sharpness: of 'bounded_unlearning'.
    prompts_per_step: prompts an iteration.
    images_per_prompt: rollouts of each.
    rollout_steps: Euler steps of a rollout.
    rollout_batch: pictures that are drawn, decoded and judged at a time; 0 is all of an iteration.
    cfg_scale: guidance scale of the policy that is trained, in its rollouts and in the loss; the
      usual 1 costs half, and shows mistakes that guidance hides.
    timesteps_per_image: noise levels each rollout is trained at.
    updates_per_step: parameter updates made from one iteration's rollouts.
    explicit_share: share of the prompts that are explicit anchors.
    text_noise: noise on the prompts' text, relative to its own standard deviation: bad samples are
      looked for around the prompts, too.
    beta: DiffusionNFT's beta.
    reference_weight: weight of the velocity distance to the stage's start.
    reward_low: score at or below which a picture is certainly wrong; CLIP's scores run to 100.
    reward_high: score at or above which it is certainly right.
    behaviour_inertia: growth per iteration of the share of itself that the rollout policy keeps
      when it follows the parameters (DiffusionNFT's eta, its first schedule).
    behaviour_cap: the largest such share.
    time_max: noise levels are drawn up to this one.
    time_min: and from this one.
  """

  variant: str = 'negative_only'
  reward: str = 'emoji'
  judge: JudgeConfig = JudgeConfig()
  reward_model: str = ''
  reward_anchors: str = ''
  doubtful: tuple[str, ...] = ()
  doubtful_weight: float = 0.0
  reward_scale: str = 'absolute'
  advantage_clip: float = 5.0
  drop_solved: bool = False
  nft_weights: str = 'shared'
  positive_weight: float = 0.0
  clip_range: float | None = None
  dynamics: str = 'cps'
  noise_level: float = 0.8
  sharpness: float = 1.0
  prompts_per_step: int = 16
  images_per_prompt: int = 4
  rollout_steps: int = 8
  rollout_batch: int = 0
  cfg_scale: float = 1.0
  timesteps_per_image: int = 2
  updates_per_step: int = 2
  explicit_share: float = 0.25
  text_noise: float = 0.0
  beta: float = 1.0
  reference_weight: float = 0.05
  reward_low: float = 0.0
  reward_high: float = 1.0
  behaviour_inertia: float = 0.02
  behaviour_cap: float = 0.5
  time_min: float = 0.3
  time_max: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    counts = ('images_per_prompt', 'rollout_steps', 'timesteps_per_image', 'updates_per_step')
    require(self, **{name: (getattr(self, name) >= 1, 'at least 1') for name in counts})
    images = self.prompts_per_step * self.images_per_prompt
    on_steps = self.variant == 'policy_gradient'
    usual = (self.reward_low, self.reward_high) == (0, 1)
    require(
      self,
      variant=one_of(self.variant, no_rl_variants.VARIANTS),
      reward=one_of(self.reward, ('emoji', 'judge', *SCORES)),
      judge=(
        bool(self.judge.url) == (self.reward == 'judge'),
        "given its url and model for reward 'judge', and left out for others",
      ),
      reward_model=(
        bool(self.reward_model) == (self.reward in SCORES),
        "the directory of a CLIPModel for 'clip_score' and 'sci_score', and '' for others",
      ),
      doubtful_weight=(
        0 <= self.doubtful_weight <= (self.variant != 'negatives_subset'),
        "in [0, 1], and 0 for 'negatives_subset', which knows no weights",
      ),
      reward_scale=one_of(self.reward_scale, no_rl_variants.REWARD_SCALES),
      advantage_clip=(self.advantage_clip > 0, 'positive'),
      nft_weights=one_of(self.nft_weights, ('shared', 'branch')),
      positive_weight=(self.positive_weight >= 0, 'zero or more'),
      clip_range=(self.clip_range is None or self.clip_range > 0, 'positive, or None'),
      dynamics=one_of(self.dynamics, ('sde', 'cps')),
      noise_level=(
        self.noise_level > 0 and (self.dynamics == 'sde' or self.noise_level <= 1),
        "positive, and at most 1 for 'cps'",
      ),
      sharpness=(self.sharpness > 0, 'positive'),
      timesteps_per_image=(
        not on_steps or self.timesteps_per_image < self.rollout_steps,
        "fewer than rollout_steps for 'policy_gradient', whose last step has no noise",
      ),
      prompts_per_step=(
        images > 0 and images % (self.updates_per_step * self.accumulation) == 0,
        'positive and such that prompts_per_step * images_per_prompt is a multiple of '
        'updates_per_step * accumulation',
      ),
      rollout_batch=(
        self.rollout_batch >= 0 and images % (self.rollout_batch or 1) == 0,
        'a divisor of prompts_per_step * images_per_prompt, or 0 for all of them',
      ),
      cfg_scale=(self.cfg_scale >= 0, 'zero or more'),
      explicit_share=(0 <= self.explicit_share <= 1, 'in [0, 1]'),
      text_noise=(self.text_noise >= 0, 'zero or more'),
      beta=(0 < self.beta <= 1, 'in (0, 1]'),
      reference_weight=(self.reference_weight >= 0, 'zero or more'),
      reward_high=(self.reward_high > self.reward_low, 'above reward_low'),
      reward_anchors=(
        not self.reward_anchors or (usual and self.reward != 'judge'),
        "'' if reward_low and reward_high are set, which it stands in for, and for a judge",
      ),
      behaviour_inertia=(self.behaviour_inertia >= 0, 'zero or more'),
      behaviour_cap=(0 <= self.behaviour_cap <= 1, 'in [0, 1]'),
      time_min=(0 <= self.time_min < self.time_max <= 1, 'below time_max, both in [0, 1]'),
    )
    absolute = self.reward_scale == 'absolute' or self.drop_solved
    if usual and absolute and self.reward in SCORES and not self.reward_anchors:
      raise UserError(
        f'NoRlStage config: {self.reward} runs to 100, so reward_low = 0 and reward_high = 1 would '
        'call every picture right: set both, or reward_anchors.'
      )

  @property
  def kinds(self) -> dict[str, int]:
    images = self.prompts_per_step * self.images_per_prompt
    states = images * self.timesteps_per_image
    updates = self.updates_per_step
    return {
      f'rollouts ({self.prompts_per_step} prompts x {self.images_per_prompt} images)': images,
      f'states ({self.timesteps_per_image} timesteps each) in {updates} updates': states,
    }

  @property
  def split(self) -> tuple[int, ...]:
    return (self.prompts_per_step * self.images_per_prompt // self.updates_per_step,)

  def on(self, share: int) -> StageConfig:
    settled, images = super().on(share), self.prompts_per_step * self.images_per_prompt
    at_once = share * self.per_device
    if not at_once or self.rollout_batch or images % at_once:
      return settled
    return dataclasses.replace(settled, rollout_batch=at_once)


STAGE_CONFIGS = {
  'autoencoder': AutoencoderStageConfig,
  'reward': RewardStageConfig,
  'flow_matching': FlowMatchingStageConfig,
  'dk_dm': DkDmStageConfig,
  'no_rl': NoRlStageConfig,
}
