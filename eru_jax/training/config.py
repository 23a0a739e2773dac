"""The schema of an experiment: frozen dataclasses, read strictly from a config file's ConfigDict.

A config is data. Every key is a field below; an unknown one, a value of the wrong type or out of
range is answered by one sentence that names it.
"""

import dataclasses
import difflib
import itertools
import math
import pathlib
import sys
import types
import typing
from collections.abc import Container, Mapping
from typing import Any, get_args, get_origin

from eru_jax import __version__
from eru_jax.data.emoji_pairs import TRAIN_WORDINGS
from eru_jax.errors import UserError
from eru_jax.files import cache_directory
from eru_jax.flow import MAX_SHIFT_MU
from eru_jax.models.attention import IMPLEMENTATIONS
from eru_jax.models.lora import LoraRule
from eru_jax.models.stack import REMAT_POLICIES
from eru_jax.sharding import MeshConfig
from eru_jax.training.checks import one_of, require
from eru_jax.training.stage_config import STAGE_CONFIGS as STAGE_CONFIGS
from eru_jax.training.stage_config import (
  AutoencoderStageConfig,
  DkDmStageConfig,
  FlowMatchingStageConfig,
  NoRlStageConfig,
  RewardStageConfig,
  StageConfig,
)
from eru_jax.training.watch import WatchConfig

# MiniLM's token states and sentence vector, or its sentence vector alone; or T5's token states and
# CLIP's pooled ones, out of the model directory.
TEXT_ENCODERS = ('minilm', 'minilm_sentence', 'flux')


# What a model directory knows of itself -> (valid, wanted). Types are checked too, since the values
# may come from its eru_jax.json.
MODEL_OWN = {
  'text_encoder': (lambda value: value in TEXT_ENCODERS, f'one of {", ".join(TEXT_ENCODERS)}'),
  'text_length': (lambda value: type(value) is int and value > 2, 'at least 3'),
  'resolution': (
    lambda value: type(value) is int and value > 0 and value % 16 == 0,
    'a multiple of 16',
  ),
}
# Of the sampler: as the model directory says.
OWN = 'own'
# Values of `model.source` and `data.pairs` that are no paths.
MODEL_NAMES = ('emoji_base', 'tiny_flux', 'scratch')
# By world.
PAIRS_NAMES = {'emoji': ('emoji_knowledge',), 'prompts': ('sample', '')}
# Keys of `data` that name files, and what they may be instead.
DATA_FILES = ('pairs', 'others')
NO_PATHS = ('', *itertools.chain(*PAIRS_NAMES.values()))
# Keys of `no_rl` that name files or directories.
REWARD_FILES = ('reward_model', 'reward_anchors')
# Values of them that are no paths.
REWARD_NAMES = ('', 'tiny_clip')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Which model to train, and how it runs.

  Attributes:
    source: 'emoji_base' (the checkpoint in the package), a model directory or FLUX.1 snapshot in
      diffusers' layout, 'tiny_flux' (a tiny random one), or 'scratch'.
    architecture: for 'scratch': overrides of the family's architecture, keyed as its config.json.
    autoencoder: for 'scratch': the same for the autoencoder.
    family: for 'scratch': the model family.
    resolution: edge of the pictures in pixels. None, here and in the next two, is the model
      directory's own, or what `experiment.resolve_model` sets from scratch: 64, 'minilm' and 24.
    text_encoder: 'minilm' (token states and the sentence vector), 'minilm_sentence' (the sentence
      vector alone, as the pooled one and as the only token) or 'flux' (T5 and CLIP, which the model
      directory holds).
    text_length: tokens a prompt is padded or truncated to.
    dtype: 'float32' or 'bfloat16', of the computation.
    params: 'float32' or 'bfloat16', of the parameters that are loaded, or 'int8' for the kernels of
      a backbone's blocks, which can then only stay frozen.
    scan: compile each stack of blocks as a loop (fast compile) or unrolled (faster on CPU).
    remat: what the backward pass keeps: 'none' (all of it), 'names', 'attn' or 'full'.
    attention: attention implementation.
  """

  source: str = 'emoji_base'
  family: str = 'flux'
  architecture: dict = dataclasses.field(default_factory=dict)
  autoencoder: dict = dataclasses.field(default_factory=dict)
  resolution: int | None = None
  text_encoder: str | None = None
  text_length: int | None = None
  dtype: str = 'float32'
  params: str = 'float32'
  scan: bool = True
  remat: str = 'none'
  attention: str = 'auto'

  def __post_init__(self):
    for name, (valid, wanted) in MODEL_OWN.items():
      value = getattr(self, name)
      require(self, **{name: (value is None or valid(value), wanted)})
    require(
      self,
      dtype=one_of(self.dtype, ('float32', 'bfloat16')),
      params=one_of(self.params, ('float32', 'bfloat16', 'int8')),
      remat=(self.remat in REMAT_POLICIES, f'one of {", ".join(REMAT_POLICIES)}'),
      attention=(self.attention in IMPLEMENTATIONS, f'one of {", ".join(IMPLEMENTATIONS)}'),
    )

  @property
  def sentence_only(self) -> bool:
    """Whether the backbone sees a prompt's sentence vector alone."""
    return self.text_encoder == 'minilm_sentence'

  @property
  def num_text_tokens(self) -> int:
    """Text tokens the backbone attends to; of resolved settings only."""
    return 1 if self.sentence_only else self.text_length


def model_path(source: str) -> pathlib.Path:
  """The directory that `model.source` or `no_rl.reward_model` names."""
  if source == 'emoji_base':
    return pathlib.Path(__file__).parent.parent / 'assets' / 'emoji_base'
  if source in ('tiny_flux', 'tiny_clip'):
    return cache_directory() / 'models' / f'{source}-{__version__}'
  return pathlib.Path(source).expanduser()


def absolute(value: str, names: Container[str]) -> str:
  """A path as it reads from any working directory; the names that are no paths stay."""
  return value if value in names else str(pathlib.Path(value).expanduser().absolute())


def _scale(value: float) -> tuple[bool, str]:
  return 0 <= value < math.inf, 'a finite number, zero or more'


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How pictures are made, in rollouts and in evaluation.

  Attributes:
    num_steps: Euler steps. 'own', here and in the next two, is what the model directory says: 28
      steps, None and 3.5 of FLUX.1-dev, 4 steps, 0 and 0 of -schnell.
    shift_mu: FLUX's timestep shift; 0 is an even grid, None FLUX.1-dev's own choice, which grows
      with the number of image tokens.
    guidance: guidance scale fed to a guidance-distilled model; ignored by others.
    cfg_scale: true classifier-free guidance; 1 is off.
  """

  num_steps: int | str = 12
  shift_mu: float | str | None = 0.0
  guidance: float | str = 3.5
  cfg_scale: float = 1.0

  def __post_init__(self):
    limit = MAX_SHIFT_MU
    rules = {
      'num_steps': (lambda value: value >= 1, 'at least 1'),
      'shift_mu': (
        lambda value: value is None or abs(value) <= limit,
        f'from {-limit:g} to {limit:g}, or None',
      ),
      'guidance': (lambda value: _scale(value)[0], _scale(0)[1]),
    }
    for name, (valid, wanted) in rules.items():
      value = getattr(self, name)
      known = value == OWN or not isinstance(value, str) and valid(value)
      require(self, **{name: (known, f"{wanted}, or '{OWN}'")})
    require(self, cfg_scale=_scale(self.cfg_scale))

  def of(self, stored: Mapping[str, Any]) -> 'SamplingConfig':
    """With nothing left to the model.

    Args:
      stored: the sampler of a model directory, which may leave out what it does not know.
    """
    left = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) == OWN]
    usual = SamplingConfig()
    return dataclasses.replace(self, **{n: stored.get(n, getattr(usual, n)) for n in left})


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where prompts come from.

  Attributes:
    world: 'emoji', whose pictures are known, so that a judge and a reward can look; or 'prompts',
      any prompts, of whose pictures nothing is known.
    pairs: a JSON Lines file of knowledge pairs, or what the package has: 'emoji_knowledge', and
      'sample' for the world of prompts, where '' is nothing at all.
    others: for 'prompts': a text file of prompts, one a line, that ask for no knowledge and are to
      be drawn as before; '' preserves the anchors only. The emoji world has its own.
    wordings_per_fact: of the package's knowledge, training wordings used for each fact.
    max_facts: of the package's knowledge, the first so many facts are trained on; 0 takes all.
    leave_out: a category, a fact's id or a pair's, to be asked about and not trained: split 'fact'
      becomes all of its prompts, and nothing else with one of its answers stays. '' leaves every
      pair in its split.
  """

  world: str = 'emoji'
  pairs: str = 'emoji_knowledge'
  others: str = ''
  wordings_per_fact: int = TRAIN_WORDINGS
  max_facts: int = 0
  leave_out: str = ''

  def __post_init__(self):
    require(
      self,
      world=one_of(self.world, PAIRS_NAMES),
      pairs=(
        self.pairs not in NO_PATHS or self.pairs in PAIRS_NAMES.get(self.world, NO_PATHS),
        f'a JSON Lines file of knowledge pairs, since data.world is {self.world!r}',
      ),
      others=(not self.others or self.world == 'prompts', "'' in the emoji world"),
      wordings_per_fact=(
        1 <= self.wordings_per_fact <= TRAIN_WORDINGS,
        f'from 1 to {TRAIN_WORDINGS}',
      ),
      max_facts=(self.max_facts >= 0, 'zero or more'),
    )


def _seed(seed: int) -> tuple[bool, str]:
  # More a JAX key does not tell apart.
  return 0 <= seed < 2**32, f'from 0 to {2**32 - 1}'


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """What is measured before, between and after the stages.

  Attributes:
    max_prompts: at most this many prompts of a split, evenly spread over it.
    batch_size: pictures made at a time.
    seed: seed of the start noise; prompt k of a split always gets the same noise.
    gallery: prompts of each implicit split shown in the report.
    diagnosis: at the end of a run, inner features of at most so many prompts of each implicit split
      are compared with those of their anchors; 0 leaves this out.
  """

  max_prompts: int = 256
  batch_size: int = 64
  seed: int = 1234
  gallery: int = 8
  diagnosis: int = 64

  def __post_init__(self):
    require(
      self,
      max_prompts=(self.max_prompts >= 1, 'at least 1'),
      batch_size=(self.batch_size >= 1, 'at least 1'),
      seed=_seed(self.seed),
      gallery=(self.gallery >= 0, 'zero or more'),
      diagnosis=(self.diagnosis >= 0, 'zero or more'),
    )


# Stages that learn from the pictures of a world.
_OF_PICTURES = ('autoencoder', 'reward')
# Without a model to start from, what a stage's own networks must have been trained by.
_NEEDS = {
  'flow_matching': ('autoencoder',),
  'dk_dm': ('autoencoder', 'flow_matching'),
  'no_rl': ('autoencoder', 'reward', 'flow_matching'),
}


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """One experiment: a model, its data, and the stages it goes through.

  Attributes:
    title: headline of the report.
    seed: seed of initialisation, data order, rollouts and noise.
    stages: names of the stages, in the order of STAGE_CONFIGS, each with a section of that name
      below.
    lora: adapter rules; empty means the whole backbone is trained.
    adapter: a LoRA file to begin with, whose own layers, ranks and alphas take the place of `lora`
      (a run prints them); '' begins with the model alone.
    wandb_project: if not empty, metrics also go to this Weights & Biases project.
    model, data, sampling, evaluation, mesh, watch: see their classes.
    autoencoder, reward, flow_matching, dk_dm, no_rl: the stages' sections.
  """

  stages: tuple[str, ...]
  title: str = 'eru_jax run'
  seed: int = 0
  lora: tuple[LoraRule, ...] = ()
  adapter: str = ''
  wandb_project: str = ''
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  sampling: SamplingConfig = SamplingConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  mesh: MeshConfig = MeshConfig()
  watch: WatchConfig = WatchConfig()
  autoencoder: AutoencoderStageConfig = AutoencoderStageConfig()
  reward: RewardStageConfig = RewardStageConfig()
  flow_matching: FlowMatchingStageConfig = FlowMatchingStageConfig()
  dk_dm: DkDmStageConfig = DkDmStageConfig()
  no_rl: NoRlStageConfig = NoRlStageConfig()

  def __post_init__(self):
    unknown = [stage for stage in self.stages if stage not in STAGE_CONFIGS]
    if unknown or not self.stages or len(set(self.stages)) != len(self.stages):
      raise UserError(
        f'config: `stages` is {list(self.stages)} but must name different stages out of '
        f'{list(STAGE_CONFIGS)}.'
      )
    ordered = [stage for stage in STAGE_CONFIGS if stage in self.stages]
    if list(self.stages) != ordered:
      raise UserError(
        f'config: `stages` is {list(self.stages)} but must be in the order {ordered}: each stage '
        'builds on those before it.'
      )
    self._check_needs()
    if 'dk_dm' in self.stages and self.dk_dm.guidance == 'baked' and self.sampling.cfg_scale != 1:
      raise UserError(
        f"config: dk_dm.guidance is 'baked', so the trained model needs no guidance, but "
        f'sampling.cfg_scale is {self.sampling.cfg_scale:g}: set it to 1.'
      )
    require(self, seed=_seed(self.seed))

  def _check_needs(self) -> None:
    """Raises UserError if a stage would build on what nothing has trained for it."""
    for stage, needs in _NEEDS.items() if self.model.source == 'scratch' else ():
      if stage == 'no_rl' and self.no_rl.reward != 'emoji':
        needs = [name for name in needs if name != 'reward']
      missing = [name for name in needs if name not in self.stages]
      if stage in self.stages and missing:
        raise UserError(
          f'config: `stages` is {list(self.stages)}, but from scratch {stage} needs '
          f'{" and ".join(missing)} before it: add that, or set model.source to a trained model.'
        )
    tuned = [stage for stage in self.stages if stage in ('dk_dm', 'no_rl')]
    if 'autoencoder' in self.stages and tuned and 'flow_matching' not in self.stages:
      raise UserError(
        f'config: `stages` is {list(self.stages)}, but between autoencoder and {tuned[0]} there '
        'must be flow_matching: the backbone knows the latents of the old autoencoder only.'
      )
    if self.model.params == 'int8' and not self.lora and not self.adapter:
      raise UserError(
        "config: model.params is 'int8', which cannot be trained, and there are no adapters that "
        'could: give `lora` rules, or set model.params to float32 or bfloat16.'
      )
    if self.data.world == 'prompts':
      self._check_needs_no_pictures()

  def _check_needs_no_pictures(self) -> None:
    """Raises UserError if something learns from pictures, of which a world of prompts has none."""
    learns = [f'stage {name}' for name in self.stages if name in _OF_PICTURES]
    if 'dk_dm' in self.stages and self.dk_dm.variant == 'supervised':
      learns.append("dk_dm.variant 'supervised'")
    if learns:
      raise UserError(
        f"config: data.world is 'prompts', but {learns[0]} learns from the pictures of a world: "
        "leave it out, or set data.world to 'emoji'."
      )
    if 'no_rl' in self.stages and self.no_rl.reward == 'emoji':
      raise UserError(
        "config: data.world is 'prompts', but no_rl.reward is 'emoji', the classifier of another "
        "world: set it to 'sci_score' or 'clip_score' and no_rl.reward_model to a CLIP, or to "
        "'judge'."
      )

  def stage(self, name: str) -> StageConfig:
    return getattr(self, name)

  def on(self, share: int) -> 'ExperimentConfig':
    """The config with all accumulations settled, where `share` devices split batches."""
    return dataclasses.replace(self, **{name: self.stage(name).on(share) for name in self.stages})


def _convert(value: Any, hint: Any, where: str) -> Any:
  """Checks a config value against a type hint; nested dataclasses are read recursively."""
  origin = get_origin(hint)
  if dataclasses.is_dataclass(hint):
    return from_mapping(hint, value, where)
  if origin is tuple:
    if not isinstance(value, (list, tuple)):
      raise UserError(f'config: `{where}` is {value!r} but must be a list.')
    inner = get_args(hint)[0]
    return tuple(_convert(v, inner, f'{where}[{i}]') for i, v in enumerate(value))
  if origin in (typing.Union, types.UnionType):
    hints = [arg for arg in get_args(hint) if arg is not type(None)]
    if value is None and len(hints) < len(get_args(hint)):
      return None
    return value if isinstance(value, str) and str in hints else _convert(value, hints[0], where)
  if hint is dict:
    if not isinstance(value, Mapping):
      raise UserError(f'config: `{where}` is {value!r} but must be a mapping.')
    return {_key(k, where): _plain(v, f'{where}.{k}') for k, v in value.items()}
  if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    return _finite(value, where)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    article = 'an' if hint is int else 'a'
    raise UserError(f'config: `{where}` is {value!r} but must be {article} {hint.__name__}.')
  return value


def _key(key: Any, where: str) -> str:
  if not isinstance(key, str):
    raise UserError(f'config: the key {key!r} in `{where or "config"}` must be a str.')
  return key


def _finite(value: int | float, where: str) -> float:
  # Not math.isfinite, which whole numbers that are no float overflow.
  if not abs(value) <= sys.float_info.max:
    raise UserError(f'config: `{where}` is {value!r} but must be finite.')
  return float(value)


def _plain(value: Any, where: str) -> Any:
  """A value of a mapping that is not of this schema, as JSON would give it back."""
  if isinstance(value, float):
    return _finite(value, where)
  return list(value) if isinstance(value, tuple) else value


def from_mapping(cls: type, values: Any, where: str = '') -> Any:
  """Builds a config dataclass from a mapping, strictly.

  Args:
    cls: a dataclass of this module.
    values: a ConfigDict or dict.
    where: path of `values` in the whole config, for messages.

  Raises:
    UserError: for an unknown key (with the nearest known one), a missing or mistyped value.
  """
  if not isinstance(values, Mapping) and not hasattr(values, 'items'):
    raise UserError(f'config: `{where}` is {values!r} but must be a mapping.')
  hints = typing.get_type_hints(cls)
  prefix = f'{where}.' if where else ''
  kwargs = {}
  for key, value in values.items():
    if _key(key, where) not in hints:
      near = difflib.get_close_matches(key, hints, 1)
      hint = f'did you mean `{prefix}{near[0]}`?' if near else f'known: {", ".join(sorted(hints))}.'
      raise UserError(f'config: unknown key `{prefix}{key}`; {hint}')
    kwargs[key] = _convert(value, hints[key], prefix + key)
  for field in dataclasses.fields(cls):
    missing = field.default is field.default_factory is dataclasses.MISSING
    if missing and field.name not in kwargs:
      raise UserError(f'config: `{prefix}{field.name}` is missing.')
  return cls(**kwargs)


def to_json(config: ExperimentConfig) -> dict[str, Any]:
  """The config as plain JSON data; sections of stages that do not run are left out."""
  values = dataclasses.asdict(config)
  for stage in STAGE_CONFIGS:
    if stage not in config.stages:
      del values[stage]
  return values
