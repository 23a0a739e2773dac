"""Stage `flow_matching`: trains on pictures and what they are called.

In the emoji world this is pretraining, on every picture and its name. In a world of prompts it is
supervised fine-tuning, on the pictures that its training pairs name.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eru_jax import flow, sharding
from eru_jax.data import pipeline
from eru_jax.data.image_files import check_image, read_image
from eru_jax.data.latents import LatentFile, write_latents
from eru_jax.data.pairs import KnowledgePair
from eru_jax.data.world import World
from eru_jax.distributed import main_first, to_host
from eru_jax.errors import UserError
from eru_jax.files import cache_directory
from eru_jax.losses.flow_matching import flow_matching
from eru_jax.models.registry import DiffusionModel
from eru_jax.training.batches import Rows
from eru_jax.training.config import DataConfig
from eru_jax.training.experiment import Experiment, Snapshot, open_world
from eru_jax.training.loop import Stage
from eru_jax.training.stage_config import FlowMatchingStageConfig
from eru_jax.training.stages.common import initial_trainable
from eru_jax.training.step import StageProgram
from eru_jax.training.text_dropout import perturb


def encode_pictures(snapshot: Snapshot, pictures: np.ndarray, batch_size: int = 64) -> jax.Array:
  """Packed latents (N, S, C) float32 of pictures (N, H, W, 3) uint8."""
  encode = encoder(snapshot)
  parts = [
    encode(snapshot.autoencoder, pictures[start : start + batch_size])
    for start in range(0, len(pictures), batch_size)
  ]
  return jnp.concatenate(parts)


def encoder(snapshot: Snapshot) -> Callable:
  """The compiled (autoencoder, pictures (B, H, W, 3) uint8) -> packed latents (B, S, C)."""
  return jax.jit(lambda p, x: snapshot.model.encode(p, x.astype(jnp.float32) / 127.5 - 1))


def encode_files(snapshot: Snapshot, files: list[str]) -> LatentFile:
  """Latents of picture files, out of the shared cache if they were encoded before.

  Raises:
    UserError: for a file that is missing or no picture.
  """
  model = snapshot.model
  digest = hashlib.sha256(repr((model.height, model.width, model.autoencoder.config)).encode())
  params = to_host(snapshot.autoencoder)
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  for file in files:
    try:
      digest.update(hashlib.sha256(pathlib.Path(file).read_bytes()).digest())
    except OSError as error:
      raise UserError(f'The picture {file} cannot be read: {error.strerror or error}.') from error
  path = cache_directory() / 'latents' / f'{digest.hexdigest()[:32]}.array_record'
  with main_first(), sharding.use_mesh(sharding.this_device()):
    if not path.is_file():
      write_latents(path, _encoded(snapshot, params, files))
  return LatentFile(path, model.latent_shape)


def _encoded(snapshot: Snapshot, params: Any, files: list[str]) -> Iterator[np.ndarray]:
  encode, params = encoder(snapshot), jax.device_put(params)
  for file in files:
    image = read_image(file, snapshot.model.height, snapshot.model.width)
    yield np.asarray(encode(params, image[None])[0])


def check_pictures(data: DataConfig) -> None:
  """Looks at the headers of the pictures that training pairs name, before hours of other things.

  Raises:
    UserError: if a training pair of a world of prompts has no picture, or a damaged one.
  """
  if data.world == 'prompts':
    for pair in _pictured(open_world(data)):
      check_image(pair.image, f'flow_matching: pair {pair.id!r}')


def _pictured(world: World) -> tuple[KnowledgePair, ...]:
  """The training pairs of a world of prompts, all of which name a picture.

  Raises:
    UserError: if one does not.
  """
  pairs = world.splits['train'].pairs if 'train' in world.splits else ()
  bare = [pair.id for pair in pairs if pair.image is None]
  if bare or not pairs:
    raise UserError(
      f'flow_matching: {len(bare)} of {len(pairs)} training pairs have no `image` '
      f'({", ".join(bare[:3])}): give each the path of its picture.'
    )
  return pairs


def _examples(experiment: Experiment, snapshot: Snapshot) -> tuple[list[str], Callable]:
  """Prompts of N pictures, and a function that makes rows -> latents (B, S, C) when it is needed.

  Raises:
    UserError: if a training pair of a world of prompts has no picture.
  """
  pictures = experiment.world.pictures

  def unknown(rows):
    return np.zeros((len(rows), *snapshot.model.latent_shape), np.float32)

  if pictures is not None:

    def encoded():
      if experiment.planned:
        return unknown
      return to_host(encode_pictures(snapshot, pictures.images)).__getitem__

    return list(pictures.names), encoded
  pairs = _pictured(experiment.world)
  files = [pair.image for pair in pairs]

  def stored():
    if experiment.planned:
      return unknown
    return encode_files(snapshot, files).take

  return [pair.implicit for pair in pairs], stored


def build(experiment: Experiment, snapshot: Snapshot, config: FlowMatchingStageConfig) -> Stage:
  """The stage that trains the backbone, or an adapter on it, from where the snapshot has it.

  Raises:
    UserError: if there are no pictures to learn from.
  """
  model = trained(experiment, snapshot)
  density = flow.TimestepDensity('logit_normal', config.time_mean, config.time_std)
  prompts, open_latents = _examples(experiment, snapshot)
  latents = functools.cache(open_latents)
  rows, null = experiment.text.index(prompts), experiment.text.null
  # Names are short: cutting the padding that all of them share changes nothing but the time.
  longest = None
  if null.mask is not None:
    longest = int(experiment.text.take(rows).mask.sum(axis=1).max())

  def cut(conditioning):
    if conditioning.mask is None:
      return conditioning
    return conditioning.replace(
      tokens=conditioning.tokens[:, :longest], mask=conditioning.mask[:, :longest]
    )

  def assemble(index):
    text = Rows(lambda picked: cut(experiment.text.take(picked)), rows[index])
    return {'latents': Rows(latents(), index), 'text': text}

  def loss(params, frozen, batch, key, step):
    del step
    time_key, noise_key, text_key = jax.random.split(key, 3)
    x_0 = batch['latents']
    noise = jax.random.normal(noise_key, x_0.shape)
    t = density.sample(time_key, x_0.shape[:1])
    conditioning = perturb(
      text_key,
      batch['text'],
      noise=config.text_noise,
      pooled_only=config.pooled_only,
      tokens_only=config.tokens_only,
      drop=config.drop_text,
      null=cut(null),
    )
    velocity = model.velocity(frozen.get('backbone'), params)
    return flow_matching(velocity, x_0, noise, t, conditioning)

  return Stage(
    program=StageProgram(loss, accumulation=config.accumulation),
    trainable=initial_trainable(experiment, snapshot) if model.lora else snapshot.backbone,
    make_frozen=lambda: {'backbone': snapshot.backbone} if model.lora else {},
    batches=pipeline.batches(len(prompts), config.batch_size, experiment.config.seed),
    assemble=assemble,
    # The diagnosis at the end of a run compares with the base.
    consumes=not model.lora and not experiment.config.evaluation.diagnosis,
  )


def trained(experiment: Experiment, snapshot: Snapshot) -> DiffusionModel:
  """The model with its adapters, or without where whole networks are pretrained."""
  if experiment.world.pictures is None:
    return snapshot.model
  return dataclasses.replace(snapshot.model, lora=())


def absorb(experiment: Experiment, snapshot: Snapshot, params) -> Snapshot:
  if trained(experiment, snapshot).lora:
    return dataclasses.replace(snapshot, trainable=params)
  return dataclasses.replace(snapshot, backbone=params, trainable=None)
