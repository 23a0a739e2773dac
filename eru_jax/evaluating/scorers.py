"""What looks at pictures: the emoji world's judge, and CLIP; `judging` has judges over HTTP.

A scorer is a function of pictures and their questions. None says that a picture could not be
scored; nothing here makes a number of that.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eru_jax import distributed, sharding
from eru_jax.benchmarks.base import Question
from eru_jax.data.pairs import KnowledgePair
from eru_jax.errors import UserError
from eru_jax.evaluating.drawing import source_stamp

# The scorer that looks for pictures it knows, those of a world.
KNOWN_PICTURES = 'emoji'
# Pictures in one call of a scorer.
BATCH = 32

Score = Mapping[str, float] | None


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Something that looks at pictures.

  Attributes:
    name: among the protocols of the benchmark.
    identity: what scores depend on beside picture and question: another identity, other scores.
    score: (pictures (N, H, W, 3) uint8, their N questions) -> a score or None for each.
    files: in its place, (a model's files, their questions, what the model is called) -> the same.
    say: score -> what people are told that the picture shows, or None.
    why: a file that has no score -> why it has none.
    words: a file that has one -> what was said beside it, such as a judge's reason, or ''.
    targets: a right answer's picture by question, (H, W, 3) uint8, or None.
    size: (height, width) of the pictures that it can look at, or None for any.
    ready: called before anything is drawn; raises UserError if it could not score.
    told: () -> what its work came to, as JSON data.
    keep: whether the evaluator keeps its scores; not of one that keeps them itself.
  """

  name: str
  identity: str
  score: Callable[[np.ndarray, list[Question]], Sequence[Score]] | None = None
  files: Callable[[Sequence[pathlib.Path], list[Question], str], Sequence[Score]] | None = None
  say: Callable[[Mapping[str, float]], str] | None = None
  why: Callable[[pathlib.Path], str] | None = None
  words: Callable[[pathlib.Path], str] | None = None
  targets: Callable[[Question], np.ndarray] | None = None
  size: tuple[int, int] | None = None
  ready: Callable[[], None] | None = None
  told: Callable[[], Mapping[str, Any]] | None = None
  keep: bool = True


def open_scorer(
  name: str, model: str | None, questions: Sequence[Question], source: str, mesh: str | None
) -> Scorer:
  """A scorer that comes with the package.

  Args:
    name: 'emoji', 'sci_score' or 'clip_score'.
    model: of the latter two, the directory of a CLIPModel.
    questions: all that will be scored.
    source: what an error calls the questions.
    mesh: as of `sharding.parse_mesh`; in several processes, all of this one's own devices score.

  Raises:
    UserError: if files are missing or damaged, or there is no such scorer.
  """
  if name in ('sci_score', 'clip_score'):
    if model is None:
      raise UserError(
        f'--scorer={name} needs --scorer_model=DIR, a CLIPModel in the Hugging Face layout.'
      )
    return _clip(name, model, mesh)
  if model is not None:
    raise UserError(f'--scorer_model is given, but --scorer={name} reads none: leave it out.')
  if name == KNOWN_PICTURES:
    return _emoji(questions, source)
  raise UserError(
    f'--scorer={name} is a judge: give --judge=URL and --judge_model=NAME, or --scorer=none to '
    'draw only.'
  )


def _emoji(questions: Sequence[Question], source: str) -> Scorer:
  from eru_jax.data.emoji_knowledge import load_pictures  # takes a second
  from eru_jax.data.world import answers
  from eru_jax.files import cache_directory
  from eru_jax.rewards.emoji import TemplateJudge

  pictures = load_pictures(cache_directory() / 'datasets')
  pairs = [KnowledgePair(q.implicit, q.prompts['explicit'], id=q.id) for q in questions]
  found = answers(pictures, pairs, source)
  target = {question.id: int(index) for question, index in zip(questions, found, strict=True)}
  judge = jax.jit(TemplateJudge(pictures.images))

  def score(images: np.ndarray, asked: list[Question]) -> list[Score]:
    rows = np.resize(np.arange(len(images)), BATCH)  # one compiled program for all
    shown = np.asarray(judge(jnp.asarray(images[rows], jnp.float32) / 255))
    return [
      {'right': float(seen == target[question.id]), 'class': int(seen)}
      for seen, question in zip(shown, asked, strict=False)
    ]

  return Scorer(
    'emoji',
    'emoji/1',
    score,
    say=lambda score: pictures.names[int(score['class'])],
    targets=lambda question: pictures.images[target[question.id]],
    size=pictures.images.shape[1:3],
    keep=False,
  )


def _clip(name: str, model: str, mesh: str | None) -> Scorer:
  from eru_jax.rewards.clip import load_clip_reward
  from eru_jax.training.batches import on_mesh
  from eru_jax.training.config import model_path
  from eru_jax.training.experiment import prepare_model

  prepare_model(model)
  root = model_path(model)
  reward = load_clip_reward(root, name)
  sizes = sharding.MeshConfig() if mesh is None else sharding.parse_mesh(mesh)
  devices = sharding.make_mesh(sizes)
  if distributed.process_count() > 1:  # process 0 scores alone, whatever all draw on
    devices = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())
  features: dict[str, np.ndarray] = {}

  @functools.cache
  def program() -> Any:
    params = jax.device_put(reward.params, reward.shardings(devices))

    def scores(params: Any, images: jax.Array, text: jax.Array) -> jax.Array:
      # Accelerators would otherwise round float32 products.
      with jax.default_matmul_precision('highest'):
        return reward.score(params, images.astype(jnp.float32) / 255, text)

    return functools.partial(sharding.compiled_whole(scores, devices), params)

  def score(images: np.ndarray, asked: list[Question]) -> list[Score]:
    texts = [question.implicit for question in asked]
    unknown = list(dict.fromkeys(text for text in texts if text not in features))
    if unknown:
      features.update(zip(unknown, reward.text_features(unknown), strict=True))
    rows = np.resize(np.arange(len(images)), BATCH)
    text = np.stack([features[texts[row]] for row in rows])
    with sharding.use_mesh(devices):
      found = np.asarray(program()(*on_mesh((images[rows], text), devices)))
    return [{name: float(value)} for value in found[: len(images)]]

  # By contents: fine-tuned models have the names and sizes of their base.
  identity = f'{name}/2/{source_stamp(str(root))}'
  return Scorer(name, identity, score)
