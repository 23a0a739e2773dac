"""Makes pictures with fixed seeds and scores them: the same code for train and evaluate."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eru_jax import sharding
from eru_jax.benchmarks import statistics
from eru_jax.benchmarks.proportions import proportion_interval
from eru_jax.benchmarks.statistics import Design, Sample
from eru_jax.data.clusters import clusters_of
from eru_jax.data.pairs import EXPLICIT_SPLITS, KnowledgePair
from eru_jax.distributed import to_host
from eru_jax.models.registry import DiffusionModel
from eru_jax.rewards.emoji import TemplateJudge
from eru_jax.training.batches import Rows, on_mesh
from eru_jax.training.experiment import Experiment, Snapshot
from eru_jax.training.watch import rest, tick
from eru_jax.types import Conditioning

PyTree = Any
# The order in which they are told; splits of a user's own come after them.
SPLITS = ('explicit', 'train', 'wording', 'fact', 'unrelated')


@dataclasses.dataclass(frozen=True)
class Generated:
  """Pictures of a list of prompts.

  Attributes:
    images: (N, H, W, 3) uint8.
    shown: (N,) int32, the class the judge sees in each; zeros where none was asked.
    latents: (N, S, C) float32 final packed latents, or None where they were not kept.
  """

  images: np.ndarray
  shown: np.ndarray
  latents: np.ndarray | None = None


def judge_of(experiment: Experiment) -> TemplateJudge | None:
  """What says which of the world's pictures a picture shows; None where the world has none."""
  pictures = experiment.world.pictures
  return None if pictures is None else TemplateJudge(pictures.images)


def start_noise(model: DiffusionModel, seed: int, name: str, rows: np.ndarray) -> jax.Array:
  """Start noise (N, S, C) float32 that depends on (seed, name, row) only.

  So a prompt gets the same noise whatever the batch size, and at every stage of a run.
  """
  key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
  keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(rows))
  return jax.vmap(lambda k: jax.random.normal(k, model.latent_shape))(keys)


def sample_and_decode(
  model: DiffusionModel,
  judge: TemplateJudge | None,
  cfg_scale: float,
  backbone: PyTree,
  trainable: PyTree | None,
  autoencoder: PyTree,
  noise: jax.Array,
  conditioning: Conditioning,
  null: Conditioning,
  schedule: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One batch of `draw`: pictures (B, H, W, 3) uint8, what the judge sees (B,), and latents."""
  velocity_fn = model.velocity(backbone, trainable)
  latents = model.sample(velocity_fn, noise, conditioning, schedule, null, cfg_scale)
  images = model.decode(autoencoder, latents)
  shown = jnp.zeros(images.shape[0], jnp.int32) if judge is None else judge(images)
  return jnp.round(images * 255).astype(jnp.uint8), shown, latents


def draw(
  experiment: Experiment,
  snapshot: Snapshot,
  judge: TemplateJudge | None,
  prompts: Sequence[str],
  noise: jax.Array,
  schedule: jax.Array | None = None,
) -> Generated:
  """Makes one picture of each prompt with the deployed sampler.

  Args:
    experiment: text, sampler settings and batch size.
    snapshot: the model.
    judge: says what each picture shows, or None.
    prompts: N prompts, all in the experiment's text table.
    noise: (N, S, C) start noise, or states at the schedule's first time.
    schedule: the solver's grid; None is the experiment's, from pure noise.
  """
  sampling = experiment.config.sampling
  backbone, trainable = snapshot.backbone, snapshot.trainable
  if trainable is not None and not snapshot.model.lora:
    # In place of the base, so that one compiled program serves both.
    backbone, trainable = trainable, None
  schedule = experiment.schedule(snapshot.model) if schedule is None else schedule
  program = sharding.compiled_whole(sample_and_decode, experiment.mesh, (0, 1, 2))
  text = experiment.text.index(prompts)
  size = min(experiment.config.evaluation.batch_size, len(prompts))
  parts = []
  noise = np.asarray(noise)
  for start in range(0, len(prompts), size):
    # The last batch is filled up, so that one compiled program serves them all.
    rows = np.resize(np.arange(start, min(start + size, len(prompts))), size)
    batch = on_mesh((noise[rows], Rows(experiment.text.take, text[rows])), experiment.mesh)
    with sharding.use_mesh(experiment.mesh):
      part = program(
        snapshot.model,
        judge,
        sampling.cfg_scale,
        backbone,
        trainable,
        snapshot.autoencoder,
        *batch,
        experiment.text.null,
        schedule,
      )
    kept = min(size, len(prompts) - start)
    parts.append(jax.tree.map(lambda x, kept=kept: x[:kept], to_host(part)))
    tick(f'picture {start + kept} of {len(prompts)}')
  rest()
  return Generated(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def generate(
  experiment: Experiment,
  snapshot: Snapshot,
  judge: TemplateJudge | None,
  prompts: Sequence[str],
  noise_name: str,
  noise_rows: np.ndarray | None = None,
) -> Generated:
  """`draw` from the run's own noise, without latents.

  Args:
    experiment, snapshot, judge, prompts: as in `draw`.
    noise_name: pictures made under the same name share their noise, row by row.
    noise_rows: (N,) rows; 0 .. N-1 if not given.
  """
  rows = np.arange(len(prompts)) if noise_rows is None else noise_rows
  seed = experiment.config.evaluation.seed
  noise = start_noise(snapshot.model, seed, noise_name, rows)
  return dataclasses.replace(draw(experiment, snapshot, judge, prompts, noise), latents=None)


def spread(count: int, limit: int) -> np.ndarray:
  """At most `limit` of `count` rows, evenly spread, always the same."""
  if count <= limit:
    return np.arange(count)
  return np.linspace(0, count - 1, limit).round().astype(np.int64)


def accuracy(right: np.ndarray, pairs: Sequence[KnowledgePair]) -> dict[str, Any]:
  """Share of right pictures (N,) with its 95 % interval, in which pairs about one thing count once.

  Args:
    right: whether each picture is right.
    pairs: that they are of.
  """
  design, sample = _measured(right, pairs)
  return {
    'accuracy': float(right.mean()),
    **_counted(design),
    'ci95': proportion_interval(design, sample),
  }


def _measured(values: np.ndarray, pairs: Sequence[KnowledgePair]) -> tuple[Design, Sample]:
  """A value (N,) of each pair as statistics have it."""
  design = Design.of([''] * len(pairs), None, clusters_of(pairs))
  return design, Sample.of(values.astype(np.float64)[:, None])


def _counted(design: Design) -> dict[str, int]:
  return {'n': len(design.clusters), 'clusters': len(set(design.clusters.tolist()))}


def pixel_distance(images: np.ndarray, others: np.ndarray) -> np.ndarray:
  """Root mean square difference of (N, H, W, 3) uint8 pictures in [0, 1] units: (N,) float32."""
  difference = images.astype(np.float32) / 255 - others.astype(np.float32) / 255
  return np.sqrt(np.mean(np.square(difference), axis=(1, 2, 3)))


def mean_distance(distances: np.ndarray, pairs: Sequence[KnowledgePair]) -> dict[str, Any]:
  """Mean distance (N,) to the anchors' pictures with its 95 % interval, as `accuracy`.

  The interval is None where there is one cluster, or all are alike.
  """
  design, sample = _measured(distances, pairs)
  return {
    'anchor_distance': float(distances.mean()),
    **_counted(design),
    'ci95': statistics.interval(design, sample),
  }


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What a model does at one point of a run.

  Attributes:
    scores: split -> accuracy(...), or without a judge mean_distance(...) from what the base draws
      of the anchors; and `unrelated_drift` if a base was given.
    generated: split -> pictures of its prompts, in the order of `selected(split)`. The base's
      also has '<split> anchors': what it draws for the explicit prompts of `anchored(split)`, from
      the noise of their implicit ones.
  """

  scores: dict[str, Any]
  generated: dict[str, Generated]


def selected(experiment: Experiment, split: str) -> tuple[list[KnowledgePair], np.ndarray | None]:
  """The pairs of a split that are evaluated, and their answers if the world has pictures."""
  table = experiment.world.splits[split]
  rows = spread(len(table.pairs), experiment.config.evaluation.max_prompts)
  return [table.pairs[row] for row in rows], None if table.index is None else table.index[rows]


def gallery(experiment: Experiment, split: str) -> np.ndarray:
  """Rows of `selected(split)` that the report shows: evenly spread, never picked by result."""
  return spread(len(selected(experiment, split)[0]), experiment.config.evaluation.gallery)


def anchored(experiment: Experiment, split: str) -> np.ndarray:
  """Rows of `selected(split)` whose anchors the base draws: those of the gallery, or, where there
  is no judge, all of them, because pictures are then measured by theirs."""
  if split in EXPLICIT_SPLITS:
    return np.arange(0)
  if experiment.world.pictures is None:
    return np.arange(len(selected(experiment, split)[0]))
  return gallery(experiment, split)


def evaluate(
  experiment: Experiment,
  snapshot: Snapshot,
  judge: TemplateJudge | None,
  base: Evaluation | None = None,
) -> Evaluation:
  """Scores every split; with the base's evaluation also the drift on unrelated prompts.

  Without a judge, a split's score is the distance of its pictures from those that the base draws of
  their anchors from the same noise. Drift is the distance of what this model draws of unrelated
  prompts from what the base does.
  """
  generated = {}
  splits = experiment.world.splits
  for split in dict.fromkeys((*SPLITS, *splits)):
    if split not in splits or not splits[split].pairs:
      continue
    pairs, _ = selected(experiment, split)
    generated[split] = generate(
      experiment, snapshot, judge, [pair.implicit for pair in pairs], split
    )
    rows = anchored(experiment, split)
    if base is None and len(rows):
      anchors = [pairs[row].explicit for row in rows]
      generated[f'{split} anchors'] = generate(experiment, snapshot, judge, anchors, split, rows)
  return scored(experiment, judge, generated, base)


def scored(
  experiment: Experiment,
  judge: TemplateJudge | None,
  generated: dict[str, Generated],
  base: Evaluation | None = None,
) -> Evaluation:
  """What `evaluate` says of pictures that it has made, now or in an earlier run of the workdir.

  Args:
    experiment, judge, base: as in `evaluate`.
    generated: as of `Evaluation`.
  """
  scores: dict[str, Any] = {}
  for split, drawn in generated.items():
    if split not in experiment.world.splits:
      continue
    pairs, answers = selected(experiment, split)
    if judge is not None:
      scores[split] = accuracy(drawn.shown == answers, pairs)
    elif len(anchored(experiment, split)):
      anchors = (generated if base is None else base.generated)[f'{split} anchors']
      scores[split] = mean_distance(pixel_distance(drawn.images, anchors.images), pairs)
  if 'unrelated' in generated:
    now = generated['unrelated'].images
    before = now if base is None else base.generated['unrelated'].images
    scores['unrelated_drift'] = float(pixel_distance(now, before).mean())
  return Evaluation(scores, generated)
