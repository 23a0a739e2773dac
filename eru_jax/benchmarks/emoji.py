"""The emoji world's own questions: what a run knows, what the package ships, or a prompt file."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eru_jax.benchmarks.base import CLIP_PROTOCOLS, Benchmark, Question, single
from eru_jax.data.clusters import clusters_of
from eru_jax.data.pairs import EXPLICIT_SPLITS, KnowledgePair, read_prompt_file

if TYPE_CHECKING:
  from eru_jax.training.config import DataConfig

# Of the package's knowledge, in the order of what they say of a model: unseen wordings of facts
# that it was trained on, facts that it was not trained on, and what it was trained on.
_SPLITS = ('wording', 'fact', 'train')


def read(data: str | None) -> list[Question]:
  """Questions with an implicit and an explicit prompt.

  Args:
    data: a JSON Lines file of knowledge pairs, or None for those of the package.

  Raises:
    UserError: for a bad file, or if the emoji packages are missing.
  """
  if data is not None:
    return from_pairs(read_prompt_file(pathlib.Path(data).expanduser()))
  from eru_jax.data.emoji_knowledge import load_pairs  # takes seconds
  from eru_jax.files import cache_directory

  tables = load_pairs(cache_directory() / 'datasets')
  return from_pairs([pair for split in _SPLITS for pair in tables[split].pairs])


def of_run(data: 'DataConfig') -> list[Question]:
  """The same of one run: in 'train' and 'wording', what it has really been trained on.

  Raises:
    UserError: if its prompt file is bad or gone, or the emoji packages are missing.
  """
  from eru_jax.data.world import load_emoji_world
  from eru_jax.files import cache_directory

  splits = load_emoji_world(
    data.pairs, cache_directory(), data.wordings_per_fact, data.max_facts, data.leave_out
  ).splits
  names = [split for split in _SPLITS if split in splits]
  names += [split for split in splits if split not in (*_SPLITS, *EXPLICIT_SPLITS)]
  return from_pairs([pair for split in names for pair in splits[split].pairs])


def from_pairs(pairs: Sequence[KnowledgePair]) -> list[Question]:
  """Pairs as questions, with their split if they have several, and clusters as `clusters_of`."""
  several = len({pair.split for pair in pairs}) > 1
  return [
    Question(
      id=pair.id,
      category=pair.category or 'all',
      prompts={'implicit': pair.implicit, 'explicit': pair.explicit},
      split=pair.split if several else '',
      cluster=cluster,
    )
    for pair, cluster in zip(pairs, clusters_of(pairs), strict=True)
  ]


_ACCURACY = single('right', span=(0, 1), digits=1, percent=True, proportion=True)

BENCHMARKS = (
  Benchmark(
    name='emoji',
    title='Emoji',
    read=read,
    protocols={'emoji': _ACCURACY, **CLIP_PROTOCOLS},
    of_run=of_run,
    headline='wording',
    about='Share of pictures that the judge, the nearest picture of the world, calls right.',
  ),
)
