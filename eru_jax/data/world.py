"""A world: knowledge pairs by split, and in the emoji world the pictures they are about."""

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from eru_jax.data.emoji_knowledge import PairTable, PictureTable, load_pairs, load_pictures
from eru_jax.data.emoji_pairs import TRAIN_WORDINGS
from eru_jax.data.pairs import (
  KnowledgePair,
  by_split,
  hold_out,
  normalise,
  read_lines,
  read_prompt_file,
  without_article,
)
from eru_jax.errors import UserError

# A few pairs about anything, for trying a published model; each has a picture.
SAMPLE_PAIRS = pathlib.Path(__file__).parent / 'knowledge' / 'sample.jsonl'


@dataclasses.dataclass(frozen=True)
class World:
  """What a run draws, learns from and is judged by.

  Attributes:
    splits: pairs by split, with the class each of them asks for where there are pictures.
    others: prompts that ask for no knowledge; training preserves what the base draws of them.
    pictures: the pictures and their names, a row's number being its class; None in a world of
      prompts only, which no judge can look at.
  """

  splits: Mapping[str, PairTable]
  others: tuple[str, ...] = ()
  pictures: PictureTable | None = None

  @property
  def all_prompts(self) -> list[str]:
    """Every prompt there is."""
    pairs = [pair for table in self.splits.values() for pair in table.pairs]
    prompts = [pair.implicit for pair in pairs] + [pair.explicit for pair in pairs]
    return [*self.others, *prompts]


def answers(pictures: PictureTable, pairs: Sequence[KnowledgePair], source: str) -> np.ndarray:
  """The class every pair's explicit prompt names, (N,) int32.

  Raises:
    UserError: if one names no picture of the world, quoting the nearest names.
  """
  known = {normalise(name): index for index, name in enumerate(pictures.names)}
  found = []
  for pair in pairs:
    bare = without_article(pair.explicit)
    index = known.get(normalise(pair.explicit), known.get(bare))
    if index is None:
      near = difflib.get_close_matches(bare, known, 3)
      hint = f'Near ones: {", ".join(near)}.' if near else 'See `eru_jax.data.emoji.catalogue()`.'
      raise UserError(
        f'{source}: the explicit prompt {pair.explicit!r} of {pair.id!r} is not the name of a '
        f'picture the judge knows. {hint}'
      )
    found.append(index)
  return np.array(found, np.int32)


def load_prompt_world(pairs: str, leave_out: str = '', others: str = '') -> World:
  """Opens a world of prompts without pictures.

  Args:
    pairs: path of a JSON Lines file of knowledge pairs, whose `image` paths begin where it lies; ''
      for a world without any.
    leave_out: as of `load_emoji_world`.
    others: path of a text file of prompts, one a line, that are to stay as they are; '' for none.

  Raises:
    UserError: for a bad file, a file without training pairs, or nothing to leave out.
  """
  tables = {}
  if pairs:
    beside = pathlib.Path(pairs).expanduser().parent
    given = [
      pair if pair.image is None else dataclasses.replace(pair, image=str(beside / pair.image))
      for pair in _training_pairs(pairs, leave_out)
    ]
    groups = by_split(given)
    tables = {split: PairTable(tuple(rows)) for split, rows in groups.items()}
    tables.setdefault('explicit', PairTable(_anchors(groups['train'])))
  return World(tables, tuple(dict.fromkeys(read_lines(others))) if others else ())


def _training_pairs(path: str, leave_out: str) -> list[KnowledgePair]:
  """The pairs of a prompt file, after something has been left out of training."""
  given = read_prompt_file(path)
  if all(pair.split != 'train' for pair in given):
    raise UserError(f'{path}: no pair has split "train", so there is nothing to learn from.')
  return hold_out(given, leave_out, path) if leave_out else given


def _anchors(pairs: Sequence[KnowledgePair]) -> tuple[KnowledgePair, ...]:
  """What asks for the anchors themselves, one pair for each that is different."""
  different = {pair.explicit: pair for pair in pairs}
  return tuple(
    dataclasses.replace(pair, implicit=pair.explicit, split='explicit', subject_span=None)
    for pair in different.values()
  )


def load_emoji_world(
  pairs: str,
  cache: pathlib.Path,
  wordings_per_fact: int = TRAIN_WORDINGS,
  max_facts: int = 0,
  leave_out: str = '',
) -> World:
  """Opens the emoji world with its own knowledge, or with a user's prompt file about it.

  Args:
    pairs: 'emoji_knowledge' or the path of a JSON Lines file of knowledge pairs.
    cache: where prepared datasets live.
    wordings_per_fact: training wordings used per fact of 'emoji_knowledge'.
    max_facts: only its first so many facts in the splits train, wording and explicit; 0 takes
      all.
    leave_out: a category, a fact or a pair that is asked about in split 'fact' and not trained, see
      `pairs.hold_out`; '' leaves every pair in its split.

  Raises:
    UserError: for a bad file, a file without training pairs, or nothing to leave out.
  """
  pictures = load_pictures(cache / 'datasets')
  if pairs == 'emoji_knowledge':
    own = load_pairs(cache / 'datasets', wordings_per_fact, leave_out)
    return World(_fewer_facts(own, max_facts) if max_facts else own, pictures.names, pictures)
  groups = by_split(_training_pairs(pairs, leave_out))
  groups.setdefault('explicit', _anchors(groups['train']))
  tables = {
    split: PairTable(tuple(rows), answers(pictures, rows, pairs)) for split, rows in groups.items()
  }
  # Of all that the file asks for, so that every fold is compared on the same unrelated names.
  taken = answers(pictures, read_prompt_file(pairs), pairs)
  unrelated = _without(load_pairs(cache / 'datasets')['unrelated'], taken)
  return World({'unrelated': unrelated, **tables}, pictures.names, pictures)


def _without(table: PairTable, taken: np.ndarray) -> PairTable:
  """The rows of a table whose answer is not among `taken`."""
  kept = np.flatnonzero(~np.isin(table.index, taken))
  return PairTable(tuple(table.pairs[row] for row in kept), table.index[kept])


def _fewer_facts(tables: Mapping[str, PairTable], count: int) -> dict[str, PairTable]:
  """Leaves the first `count` facts to learn from; what else is measured stays the same."""
  facts = list(dict.fromkeys(pair.explicit for pair in tables['train'].pairs))
  kept = set(facts[:count])

  def fewer(table: PairTable) -> PairTable:
    chosen = [row for row, pair in enumerate(table.pairs) if pair.explicit in kept]
    return PairTable(tuple(table.pairs[row] for row in chosen), table.index[chosen])

  learnt = {split: fewer(tables[split]) for split in ('train', 'wording', 'explicit')}
  return {**tables, **learnt}
