"""The emoji world's own questions: what the package ships, or a prompt file about it."""

import pathlib
from collections.abc import Sequence

from eru_jax.benchmarks.base import CLIP_PROTOCOLS, Benchmark, Question, single
from eru_jax.data.pairs import KnowledgePair, read_prompt_file

# Of the package's knowledge, in the order of what they say of a model.
_SPLITS = ('wording', 'fact', 'train')


def read(data: str | None) -> list[Question]:
  """Questions with an implicit and an explicit prompt; their split is what scores are told by.

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


def from_pairs(pairs: Sequence[KnowledgePair]) -> list[Question]:
  """Pairs as questions: told by split if they have several, else by category."""
  several = len({pair.split for pair in pairs}) > 1
  return [
    Question(
      id=pair.id,
      category=pair.split if several else pair.category or 'all',
      prompts={'implicit': pair.implicit, 'explicit': pair.explicit},
      subcategory=(pair.category or '') if several else '',
    )
    for pair in pairs
  ]


_ACCURACY = single('right', span=(0, 1), digits=1, percent=True, proportion=True)

BENCHMARKS = (
  Benchmark(
    name='emoji',
    title='Emoji',
    read=read,
    protocols={'emoji': _ACCURACY, **CLIP_PROTOCOLS},
    about='Share of pictures that the judge, the nearest picture of the world, calls right.',
  ),
)
