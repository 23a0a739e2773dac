"""Knowledge structure: where a network's features of implicit prompts lie, seen from their anchors.

Every prompt is shown to the network with the same states x_t: what the base draws of the anchors,
averaged, under one noise. Then only the prompt can tell features apart. (With states of their own,
noised pictures of each anchor, features are told apart by the picture: the empty prompt then has a
CKA of 0.6 to 0.9 with the anchors, more than any prompt; docs/method.md.) Compared are the features
of an implicit prompt at each stage of a run with those of its anchor under the base, which is the
teacher. EruDiff's abstract speaks of a chaotic organisation of implicit prompts; these measures are
ours.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eru_jax import flow, sharding, similarity
from eru_jax.data.pairs import EXPLICIT_SPLITS, KnowledgePair
from eru_jax.distributed import is_main, to_host
from eru_jax.errors import UserError
from eru_jax.models.registry import DiffusionModel
from eru_jax.rewards.emoji import TemplateJudge
from eru_jax.training.batches import Rows, on_mesh
from eru_jax.training.evaluation import SPLITS, draw, spread, start_noise
from eru_jax.training.experiment import Experiment, Snapshot
from eru_jax.training.progress import Progress
from eru_jax.training.watch import mark
from eru_jax.types import Conditioning

PyTree = Any
STREAMS = ('image', 'text')
MEASURES = ('retrieval', 'distance', 'cka')
TIMESTEPS = (0.9, 0.6, 0.3)
# The group of the explicit prompts themselves: how far do they move? No split is called like this.
ANCHORS = '(anchors)'
# Unseen wordings say most, see the report; a file of a user's own has whichever it has.
_SHOWN = ('wording', 'train', 'fact')
# The average picture of so many anchors hardly depends on which.
_AVERAGED = 64


@dataclasses.dataclass(frozen=True)
class Picture:
  """Features of one split in the plane of the base's anchors.

  Attributes:
    split: whose prompts.
    timestep: of the states.
    block: index of the block, the one halfway; the stream is 'image'.
    explained: (2,) share of the anchors' variance along each axis.
    anchors: (A, 2) under the base.
    own: (N,) row of each prompt's anchor.
    prompts: stage -> (N, 2).
    names: (N,) what each prompt is, and means.
  """

  split: str
  timestep: float
  block: int
  explained: np.ndarray
  anchors: np.ndarray
  own: np.ndarray
  prompts: Mapping[str, np.ndarray]
  names: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """What was measured, by timestep and block.

  Attributes:
    timesteps: (T,) of the states, noise first.
    blocks: (B,) names, in the order in which they run.
    anchors: how many there are to choose among.
    prompts: split -> how many prompts; ANCHORS is one of the splits.
    stages: labels, the base first.
    values: split -> stage -> stream -> one of MEASURES -> (T, B).
    centre: stream -> (T, B), the distance of a feature that says nothing.
    picture: one split's features, to be looked at.
  """

  timesteps: tuple[float, ...]
  blocks: tuple[str, ...]
  anchors: int
  prompts: Mapping[str, int]
  stages: tuple[str, ...]
  values: Mapping[str, Any]
  centre: Mapping[str, np.ndarray]
  picture: Picture

  def mean(self, split: str, stage: str, measure: str, timestep: int = 0) -> float:
    """A measure of the image stream, averaged over the blocks at one timestep."""
    return float(np.mean(self.values[split][stage]['image'][measure][timestep]))

  def to_json(self) -> dict[str, Any]:
    """As JSON data; what is not defined (CKA of three prompts) becomes None."""
    return _plain({'chance': 1 / self.anchors, **dataclasses.asdict(self)})


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _plain(inner) for key, inner in value.items()}
  if isinstance(value, (tuple, list)):
    return [_plain(inner) for inner in value]
  if isinstance(value, np.ndarray):
    return _plain(value.tolist())
  if isinstance(value, float):
    return round(value, 5) if np.isfinite(value) else None
  return value


def pairs_to_compare(
  splits: Mapping[str, Sequence[KnowledgePair]], limit: int
) -> dict[str, list[KnowledgePair]]:
  """At most `limit` pairs of every split that asks implicitly, evenly spread, always the same."""
  order = [s for s in dict.fromkeys((*SPLITS, *splits)) if s not in EXPLICIT_SPLITS]
  found = {split: splits.get(split, ()) for split in order}
  return {
    s: [pairs[row] for row in spread(len(pairs), limit)] for s, pairs in found.items() if pairs
  }


def diagnose(
  experiment: Experiment,
  stages: Iterable[tuple[str, Snapshot]],
  groups: Mapping[str, Sequence[KnowledgePair]],
  timesteps: Sequence[float] = TIMESTEPS,
  seed: int = 0,
  judge: TemplateJudge | None = None,
) -> Diagnosis:
  """Compares the features of implicit prompts, at every stage, with their anchors' at the base.

  Args:
    experiment: text of all prompts, sampler and batch size.
    stages: (label, model), the base first; read once, one model at a time.
    groups: split -> pairs. The anchors of all splits are what retrieval chooses among.
    timesteps: of the states, in (0, 1].
    seed: of the noise.
    judge: for the sake of its compiled program, where there is one; it is not asked.

  Raises:
    UserError: for fewer than two different anchors, bad timesteps, or a run without any stage.
  """
  timesteps = check_timesteps(timesteps)
  pairs = [pair for group in groups.values() for pair in group]
  anchors = list(dict.fromkeys(pair.explicit for pair in pairs))
  if len(anchors) < 2:
    raise UserError(
      f'There are {len(anchors)} different explicit prompts, and implicit ones are to be told '
      'apart by theirs: give at least two.'
    )
  prompts = list(dict.fromkeys([*anchors, *(pair.implicit for pair in pairs)]))
  row = {prompt: index for index, prompt in enumerate(prompts)}
  # Rows of the prompts of each group, and of their anchors, which come first and in their order.
  rows = {s: np.array([(row[p.implicit], row[p.explicit]) for p in g]) for s, g in groups.items()}
  rows[ANCHORS] = np.arange(len(anchors))[:, None].repeat(2, axis=1)
  shown = next((split for split in _SHOWN if split in groups), next(iter(groups)))

  values: dict[str, Any] = {split: {} for split in rows}
  base, points = None, {}
  for label, snapshot in stages:
    if base is None:
      states = shared_states(experiment, snapshot, anchors, timesteps, seed, judge)
    blocks, features = prompt_features(experiment, snapshot, prompts, states, timesteps, label)
    if base is None:
      base = _Anchors.of({s: x[:, :, : len(anchors)] for s, x in features.items()})
    for split, (of_prompt, own) in ((split, found.T) for split, found in rows.items()):
      chosen = {stream: x[:, :, of_prompt] for stream, x in features.items()}
      values[split][label] = base.compare(chosen, own)
    points[label] = base.project(features)[rows[shown][:, 0]]
  if base is None:
    raise UserError('This run has not finished a stage that draws pictures yet.')
  picture = Picture(
    shown, timesteps[0], base.halfway, base.plane.explained, base.project(base.features),
    rows[shown][:, 1], points, [f'{p.implicit} → {p.explicit}' for p in groups[shown]],
  )  # fmt: skip
  counts = {split: len(found) for split, found in rows.items()}
  return Diagnosis(
    timesteps, tuple(blocks), len(anchors), counts, tuple(points), values, base.centre, picture
  )


def check_timesteps(timesteps: Sequence[float]) -> tuple[float, ...]:
  """The timesteps, noise first.

  Raises:
    UserError: if there is none, or one is not in (0, 1].
  """
  if not timesteps or not all(0 < t <= 1 for t in timesteps):
    raise UserError(
      f'Timesteps are {", ".join(map(str, timesteps)) or "missing"}: give numbers above 0 and up '
      'to 1, which is pure noise.'
    )
  return tuple(sorted(set(map(float, timesteps)), reverse=True))


@dataclasses.dataclass(frozen=True)
class _Anchors:
  """The base's features of the anchors, stream -> (T, B, A, W), and what follows from them."""

  features: Mapping[str, np.ndarray]
  units: Mapping[str, np.ndarray]
  centre: Mapping[str, np.ndarray]
  plane: similarity.Plane
  halfway: int

  @classmethod
  def of(cls, features: Mapping[str, np.ndarray]) -> '_Anchors':
    units = {s: _each(similarity.typical_distance, x) for s, x in features.items()}
    centre = {s: _each(similarity.central_distance, x, units[s]) for s, x in features.items()}
    halfway = features['image'].shape[1] // 2
    plane = similarity.principal_plane(features['image'][0, halfway])
    return cls(features, units, centre, plane, halfway)

  def project(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
    """Where features lie in the plane of the picture, (N, 2)."""
    return self.plane.project(features['image'][0, self.halfway])

  def compare(self, features: Mapping[str, np.ndarray], own: np.ndarray) -> dict[str, Any]:
    """stream -> measure -> (T, B), of features (T, B, N, W) whose anchors are rows `own`."""
    found = {}
    for stream, x in features.items():
      anchors, units = self.features[stream], self.units[stream]
      right = _each(lambda x, a: similarity.retrieval(x, a, own).mean(), x, anchors)
      distance = _each(
        lambda x, a, u: similarity.relative_distance(x, a[own], u), x, anchors, units
      )
      cka = _each(lambda x, a: similarity.linear_cka(x, a[own]), x, anchors)
      found[stream] = {'retrieval': right, 'distance': distance, 'cka': cka}
    return found


def _each(function: Any, *arrays: np.ndarray) -> np.ndarray:
  """A function of arrays at every timestep and block, (T, B)."""
  steps, blocks = arrays[0].shape[:2]
  return np.array(
    [[function(*(x[t, b] for x in arrays)) for b in range(blocks)] for t in range(steps)]
  )


def shared_states(
  experiment: Experiment,
  base: Snapshot,
  anchors: Sequence[str],
  timesteps: Sequence[float],
  seed: int,
  judge: TemplateJudge | None = None,
) -> np.ndarray:
  """The states (T, S, C) at which all prompts are compared, in the order of `timesteps`.

  The mean of what the base draws of the anchors stands for all of them alike: it is what they have
  in common, and favours none. (The velocity of an average state is no average of velocities: these
  states are a common ground, not ones that sampling visits, less and less so as t falls.)
  """
  drawn = [anchors[row] for row in spread(len(anchors), _AVERAGED)]
  noise = start_noise(base.model, seed, 'diagnosis', np.arange(len(drawn) + 1))
  size = min(experiment.config.evaluation.batch_size, len(drawn))
  latents = []
  with _progress(len(drawn), 'anchors') as progress:
    for start in range(0, len(drawn), size):
      rows = _batch(start, len(drawn), size)
      part = draw(experiment, base, judge, [drawn[row] for row in rows], noise[1:][rows])
      latents.append(part.latents[: len(drawn) - start])
      progress.update(min(start + size, len(drawn)))
  mean = np.concatenate(latents).mean(0)
  t = jnp.asarray(timesteps, jnp.float32)
  return np.asarray(flow.interpolate(jnp.asarray(mean)[None], noise[:1], t))


def prompt_features(
  experiment: Experiment,
  snapshot: Snapshot,
  prompts: Sequence[str],
  states: np.ndarray,
  timesteps: Sequence[float],
  label: str = 'model',
) -> tuple[list[str], dict[str, np.ndarray]]:
  """Features of N prompts at T states.

  Args:
    experiment: has the prompts in its text table.
    snapshot: the model.
    prompts: N prompts.
    states: (T, S, C), shared by all prompts.
    timesteps: (T,) of the states.
    label: what the model is called where progress is shown.

  Returns:
    Names of the B blocks, and stream -> (T, B, N, W) float32.
  """
  mark(f'the features of {label}')
  text = experiment.text.index(prompts)
  size = min(experiment.config.evaluation.batch_size, len(prompts))
  blocks, steps, done = [], [], 0
  with _progress(len(timesteps) * len(prompts), label) as progress:
    for state, t in zip(states, timesteps, strict=True):
      parts = []
      for start in range(0, len(prompts), size):
        rows = _batch(start, len(prompts), size)
        found = _features(experiment, snapshot, state, t, Rows(experiment.text.take, text[rows]))
        blocks, part = _in_order(snapshot.model, found)
        parts.append({stream: x[:, : len(prompts) - start] for stream, x in part.items()})
        done += min(size, len(prompts) - start)
        progress.update(done)
      steps.append({s: np.concatenate([part[s] for part in parts], axis=1) for s in STREAMS})
  return blocks, {s: np.stack([step[s] for step in steps]) for s in STREAMS}


def _batch(start: int, count: int, size: int) -> np.ndarray:
  """Rows of a batch; the last is filled up, so that one compiled program serves them all."""
  return np.resize(np.arange(start, min(start + size, count)), size)


def _progress(total: int, what: str) -> Progress:
  return Progress(total, f'diagnosis: {what}', quiet=not is_main())


def _features(
  experiment: Experiment, snapshot: Snapshot, state: np.ndarray, t: float, text: Rows
) -> dict[str, Any]:
  backbone, trainable = snapshot.backbone, snapshot.trainable
  if trainable is not None and not snapshot.model.lora:
    # In place of the base, so that one compiled program serves both.
    backbone, trainable = trainable, None
  size = len(text.rows)
  x_t, times = np.broadcast_to(state, (size, *state.shape)), np.full(size, t, np.float32)
  program = sharding.compiled_whole(_forward, experiment.mesh, (0,))
  batch = on_mesh((x_t, times, text), experiment.mesh)
  with sharding.use_mesh(experiment.mesh):
    found = program(snapshot.model, backbone, trainable, *batch)
  return to_host(found)


def _forward(
  model: DiffusionModel,
  backbone: PyTree,
  trainable: PyTree | None,
  x_t: jax.Array,
  t: jax.Array,
  text: Conditioning,
) -> dict[str, dict[str, jax.Array]]:
  return model.features(backbone, trainable, x_t, t, text)


def _in_order(
  model: DiffusionModel, found: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[list[str], dict[str, np.ndarray]]:
  """Names of all blocks in the order in which they run, and stream -> (blocks, B, width)."""
  stacks = model.family.stacks
  names = [
    f'{label} {index + 1}'
    for stack, label in stacks.items()
    for index in range(len(found[stack]['image']))
  ]
  return names, {s: np.concatenate([found[stack][s] for stack in stacks]) for s in STREAMS}
