"""Stage `no_rl`: corrects the model's remaining mistakes, learning from its bad pictures only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from eru_jax import distributed, flow
from eru_jax.data import pipeline
from eru_jax.data.emoji_knowledge import PairTable
from eru_jax.data.pairs import normalise
from eru_jax.errors import UserError
from eru_jax.losses import policy_gradient
from eru_jax.rewards.anchors import anchored, read_anchors
from eru_jax.rewards.base import HostReward, Reward
from eru_jax.rewards.clip import describe_clip_reward, load_clip_reward, read_clip_directory
from eru_jax.rewards.doubt import believed, doubted
from eru_jax.rewards.emoji import EmojiReward
from eru_jax.rewards.judge import check_judge, judge_reward
from eru_jax.training.batches import Rows
from eru_jax.training.config import model_path
from eru_jax.training.experiment import Experiment, Snapshot, prepare_model
from eru_jax.training.loop import Stage
from eru_jax.training.stage_config import NoRlStageConfig
from eru_jax.training.stages.common import initial_trainable, unstacked
from eru_jax.training.step import StageProgram, joined_leading, split_leading
from eru_jax.training.text_dropout import perturb
from eru_jax.training.variants import no_rl as variants


def check_reward(config: NoRlStageConfig) -> None:
  """Looks at what the reward will need, before hours of other stages.

  Raises:
    UserError: if a file is missing or damaged, or a judge cannot judge.
  """
  if config.reward == 'judge' and distributed.is_main():
    check_judge(config.judge)
  if config.reward_model:
    prepare_model(config.reward_model)
    read_clip_directory(model_path(config.reward_model))
  if config.reward_anchors:
    read_anchors(config.reward_anchors)


def open_reward(
  experiment: Experiment, snapshot: Snapshot, config: NoRlStageConfig
) -> Reward | HostReward:
  """Loads what `no_rl.reward` names, its parameters onto the mesh.

  The emoji classifier's targets are the pairs' classes, CLIP's the features of their implicit
  prompts. A judge's are rows of all pairs.

  Raises:
    UserError: if a file is missing, damaged or of another model.
  """
  if config.reward == 'judge':
    splits = experiment.world.splits
    pairs = [*splits['train'].pairs, *splits['explicit'].pairs]
    return judge_reward(config.judge, pairs, experiment.directory)
  if config.reward == 'emoji':
    judge = EmojiReward(len(experiment.world.pictures.names))
    reward = Reward(snapshot.reward, judge, lambda table: table.index)
  else:
    dtype = experiment.config.model.dtype
    load = describe_clip_reward if experiment.planned else load_clip_reward
    clip = load(model_path(config.reward_model), config.reward, jnp.dtype(dtype))

    def text_features(table):
      if experiment.planned:
        return np.zeros((len(table.pairs), clip.config.vision.projection_dim), np.float32)
      return clip.text_features([pair.implicit for pair in table.pairs])

    params = experiment.place(clip.params, clip.shardings(experiment.mesh))
    reward = Reward(params, clip.score, text_features)
  if config.reward_anchors:
    reward = anchored(reward, read_anchors(config.reward_anchors))
  return reward


def led_to(anchors: PairTable, pairs: PairTable) -> PairTable:
  """The first pair that leads to each anchor; of an anchor that none leads to, its own."""
  first = {normalise(pair.explicit): pair for pair in reversed(pairs.pairs)}
  found = (first.get(normalise(anchor.explicit), anchor) for anchor in anchors.pairs)
  return dataclasses.replace(anchors, pairs=tuple(found))


def build(experiment: Experiment, snapshot: Snapshot, config: NoRlStageConfig) -> Stage:
  """The NO-RL stage; rollouts, reward and update all run in compiled code on one mesh.

  All but the reward 'judge', which is asked between rollouts and updates, about whole iterations.

  Every picture is held against an implicit prompt, one of an explicit anchor against the first
  that leads to it: so all rewards are on one scale.

  Raises:
    UserError: if there is no reward model, or nothing to train on.
  """
  model = snapshot.model
  if config.reward == 'emoji' and snapshot.reward is None:
    raise UserError(
      'no_rl: the model directory holds no reward/ classifier; use a model whose pretraining had '
      'the stage `reward`.'
    )
  if not experiment.prompts('train'):
    raise UserError('no_rl: there is no pair with split "train" to learn from.')
  splits = experiment.world.splits
  tables, trust = {}, {}
  for name, split in (('implicit', 'train'), ('explicit', 'explicit')):
    tables[name], trust[name] = believed(splits[split], config.doubtful, config.doubtful_weight)
  rows = {
    name: experiment.text.index([pair.implicit for pair in table.pairs])
    for name, table in tables.items()
  }
  explicit_prompts = round(config.explicit_share * config.prompts_per_step)
  counts = {'implicit': config.prompts_per_step - explicit_prompts, 'explicit': explicit_prompts}
  drawn = [name for name in tables if counts[name]]
  if config.doubtful and not all(tables[name].pairs for name in drawn):
    raise UserError(
      f'no_rl: every training pair is of no_rl.doubtful = {", ".join(config.doubtful)}: name fewer '
      'categories, or set no_rl.doubtful_weight.'
    )
  weighted = any((trust[name] != 1).any() for name in drawn)

  # Both only if there is anything left to train, as a CLIP takes its time.
  @functools.cache
  def reward():
    return open_reward(experiment, snapshot, config)

  @functools.cache
  def targets():
    asked = tables | {'explicit': led_to(tables['explicit'], tables['implicit'])}
    return {name: reward().targets(asked[name]) for name in drawn}

  schedule = experiment.schedule(model, config.rollout_steps)
  density = flow.TimestepDensity('uniform', t_min=config.time_min, t_max=config.time_max)
  variant, dynamics = variants.VARIANTS[config.variant], variants.dynamics(config)
  start = initial_trainable(experiment, snapshot)

  on_host = config.reward == 'judge'

  def make_frozen():
    return {
      'backbone': snapshot.backbone,
      'reference': start,
      'autoencoder': snapshot.autoencoder,
      'reward': None if on_host else reward().params,
    }

  def assemble(index):
    picked = np.concatenate([rows[name][index[name]] for name in drawn])
    parts = [unstacked(targets()[name], index[name]) for name in drawn]
    answers = jax.tree.map(lambda *part: np.concatenate(part), *parts)
    # Neighbours in the batch land in different updates; images of a prompt stay together.
    order = np.argsort(np.arange(len(picked)) % config.updates_per_step, kind='stable')
    picked, answers = jax.tree.map(
      lambda x: np.repeat(x[order], config.images_per_prompt, axis=0), (picked, answers)
    )
    batch = {'text': Rows(experiment.text.take, picked), 'answer': answers}
    if weighted:
      each = np.concatenate([trust[name][index[name]] for name in drawn])[order]
      batch['trust'] = np.repeat(each, config.images_per_prompt)
    return batch

  def policy_field(frozen, params):
    """The field that draws the pictures. Under guidance that is the guided one, in the loss too:
    were it another, right pictures would already lie off it, and be pushed at."""
    velocity_fn = model.velocity(frozen['backbone'], params)
    return flow.classifier_free_guidance(velocity_fn, experiment.text.null, config.cfg_scale)

  def prepare(policy, frozen, batch, key):
    """Pictures of the rollout policy and how right they are."""
    noise_key, text_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (batch['text'].tokens.shape[0], *model.latent_shape))
    # The picture is learnt from under the very text that it was made of.
    prompts = perturb(text_key, batch['text'], noise=config.text_noise)
    field = policy_field(frozen, policy)

    def draw(noise, prompts, answer, step_key):
      """Examples of pictures, the picture that each is of, and the pictures' scores.

      For a judge on the host, the pictures themselves.
      """
      if variant.on_steps:
        x_0, steps, row = policy_gradient.sample_transitions(
          step_key, field, noise, schedule, prompts, dynamics, config.timesteps_per_image
        )
        log_prob = policy_gradient.transition_log_prob(
          field, steps, unstacked(prompts, row), dynamics
        )
        # A scalar, which cannot be split into updates.
        examples = {'transitions': steps.replace(t_clamp=None), 'old_log_prob': log_prob}
      else:
        x_0 = model.sample(field, noise, prompts, schedule)
        row = jnp.arange(x_0.shape[0])
        examples = {'x_0': x_0}
      images = model.decode(frozen['autoencoder'], x_0)
      if on_host:
        return examples, row, jnp.round(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)
      return examples, row, reward().score(frozen['reward'], images, answer)

    drawn = (noise, prompts, batch['answer'])
    step_key = jax.random.fold_in(key, 1)
    count = noise.shape[0]
    size = config.rollout_batch or count
    if size == count:
      examples, row, score = draw(*drawn, step_key)
    else:
      parts = count // size
      inputs = (*split_leading(drawn, parts), jax.random.split(step_key, parts))
      examples, row, score = jax.lax.map(lambda part: draw(*part), inputs)
      row = row + size * jnp.arange(parts)[:, None]
      examples, row, score = joined_leading((examples, row, score))
    examples['text'] = unstacked(prompts, row) if variant.on_steps else prompts
    trusted = {name: batch[name] for name in ('trust',) if name in batch}
    if on_host:
      answer = batch['answer']
      return {'examples': examples, 'row': row, 'images': score, 'answer': answer, **trusted}, {}
    examples |= unstacked(variants.ratings(score, config, **trusted), row)
    return examples, {'reward': jnp.mean(score)}

  def ask(prepared):
    return reward().score(prepared['images'], prepared['answer'])

  def rate(prepared, found):
    """Examples of the pictures with what the host has found of them."""
    score, known, told = found
    ratings = variants.ratings(score, config, known, prepared.get('trust'))
    rated = unstacked(ratings, prepared['row'])
    mean = jnp.sum(score * known) / jnp.maximum(jnp.sum(known), 1)
    unscored = 1 - jnp.mean(known)
    return prepared['examples'] | rated, {'reward': mean, 'unscored': unscored, **told}

  def noised(examples, key):
    """Every picture at several noise levels."""
    time_key, noise_key = jax.random.split(key)
    row = jnp.tile(jnp.arange(examples['r'].shape[0]), config.timesteps_per_image)
    examples = unstacked(examples, row)
    t = density.sample(time_key, row.shape)
    noise = jax.random.normal(noise_key, examples['x_0'].shape)
    return variants.Examples(**examples, t=t, noise=noise)

  def stepped(examples):
    steps = examples['transitions'].replace(t_clamp=schedule[1])
    return variants.Examples(**{**examples, 'transitions': steps})

  def loss(params, frozen, examples, key, step):
    del step
    fields = variants.Fields(
      policy_field(frozen, params),
      policy_field(frozen, frozen['policy']),
      policy_field(frozen, frozen['reference']),
    )
    examples = stepped(examples) if variant.on_steps else noised(examples, key)
    return variant.loss(fields, examples, config)

  def behaviour_rate(step):
    return 1 - jnp.minimum(config.behaviour_inertia * step, config.behaviour_cap)

  return Stage(
    program=StageProgram(
      loss,
      prepare=prepare,
      host=ask if on_host else None,
      rate=rate if on_host else None,
      updates_per_batch=config.updates_per_step,
      accumulation=config.accumulation,
      behaviour_rate=behaviour_rate,
    ),
    trainable=start,
    make_frozen=make_frozen,
    note=doubted(splits['train'], config.doubtful, config.doubtful_weight),
    batches=pipeline.mixture_batches(
      {name: (len(table.pairs), counts[name]) for name, table in tables.items()},
      experiment.config.seed,
    ),
    assemble=assemble,
  )


def absorb(experiment: Experiment, snapshot: Snapshot, params) -> Snapshot:
  del experiment
  return dataclasses.replace(snapshot, trainable=params)
