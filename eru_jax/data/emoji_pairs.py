"""The knowledge of the emoji world as pairs: facts, their wordings, and the five splits.

`knowledge/facts.jsonl` holds one fact a line: an emoji, a kind of knowledge, and ways of asking for
the emoji without naming it. Eight of a fact were written together, and the two with the largest
sha256 set aside; six more, for training, were written later without sight of those two. About an
eighth of the *emoji* are held out with all their facts: the smallest sha256 of the character within
each kind of knowledge. Both choices were made once and are stored in the file, so that later facts
move none. What came near a wording of another split, of whichever fact, was written anew. Facts
stand in an order that mixes the kinds, later ones at the end of their split, so that the first
hundred (`data.max_facts`) stay the first hundred. The splits:

  train      the wordings of each fact that is trained
  wording    two unseen ones: known fact, new words
  fact       all wordings of held-out facts: emoji that no training prompt asks for
  explicit   the names of the emoji that training asks for (implicit == explicit)
  unrelated  names of emoji that no fact mentions (implicit == explicit): did anything else move?

`python -m eru_jax.data.emoji_pairs` checks the file (`emoji_checks.py`), spelling and lengths
included where the packages for that are installed, and prints how much there is of everything.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import sys
import unicodedata
from collections.abc import Sequence

from eru_jax.data import emoji as emoji_lib
from eru_jax.data import spelling
from eru_jax.data.pairs import KnowledgePair, hold_out
from eru_jax.errors import UserError

FACTS_FILE = pathlib.Path(__file__).parent / 'knowledge' / 'facts.jsonl'
SPLITS = ('train', 'wording', 'fact', 'unrelated', 'explicit')
CATEGORIES = ('culture', 'time', 'space', 'biology', 'physics', 'chemistry', 'geography')
TRAIN_WORDINGS = 12
UNSEEN_WORDINGS = 2
HELD_OUT_WORDINGS = 8
UNRELATED = 128


@dataclasses.dataclass(frozen=True)
class Fact:
  """One piece of knowledge about one emoji.

  Attributes:
    id: slug, e.g. 'red-apple-doctor'.
    emoji: the character that answers every wording.
    category: kind of knowledge, one of CATEGORIES.
    split: 'train', or 'fact' when the emoji is held out.
    wordings: TRAIN_WORDINGS prompts that ask for the emoji without naming it; none if held out.
    unseen: the same, for evaluation: UNSEEN_WORDINGS, or HELD_OUT_WORDINGS if held out.
  """

  id: str
  emoji: str
  category: str
  split: str
  wordings: tuple[str, ...]
  unseen: tuple[str, ...]


@functools.cache
def read_facts(path: pathlib.Path = FACTS_FILE) -> tuple[Fact, ...]:
  """Reads a file of facts, by default the one in the package, without checking its contents.

  Raises:
    UserError: if the file is missing or a line is no fact.
  """
  if not path.is_file():
    raise UserError(f'There is no file of facts {path}: install eru_jax with its package data.')
  facts = []
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), start=1):
    try:
      row = json.loads(line)
      texts = {key: tuple(row[key]) for key in ('wordings', 'unseen')}
      facts.append(Fact(**{**row, **texts}))
    except (ValueError, TypeError, KeyError) as error:
      raise UserError(f'{path}, line {number}: this is no fact: {error!r}.') from error
  return tuple(facts)


def emoji_pairs(
  wordings_per_fact: int = TRAIN_WORDINGS,
  facts: Sequence[Fact] | None = None,
  leave_out: str = '',
) -> list[KnowledgePair]:
  """Expands facts into pairs of all five SPLITS.

  Args:
    wordings_per_fact: 1 to TRAIN_WORDINGS wordings a fact in split 'train', the first ones. The
      other splits do not change.
    facts: by default those of the package.
    leave_out: a kind of knowledge or a fact's id, held out with all its wordings by
      `pairs.hold_out`; '' leaves everything where it is.

  Returns:
    Pairs whose `explicit` is an emoji's name. Ids are '<fact>/<wording>',
    '<fact>/unseen/<wording>' and '<split>/<name>'.
    `category` is the kind of knowledge of a fact, and of a bare name that of its emoji.

  Raises:
    UserError: for another number of wordings, if there is nothing to leave out under that name,
      or if the emoji packages are missing.
  """
  if not 1 <= wordings_per_fact <= TRAIN_WORDINGS:
    raise UserError(f'wordings_per_fact is {wordings_per_fact}: choose 1 to {TRAIN_WORDINGS}.')
  facts = read_facts() if facts is None else facts
  by_character = {e.character: e for e in emoji_lib.catalogue()}
  pairs: dict[str, list[KnowledgePair]] = {split: [] for split in SPLITS}
  spare: set[str] = set()

  for fact in facts:
    unseen_split = 'fact' if fact.split == 'fact' else 'wording'
    texts = [('train', f'{fact.id}/{i}', text) for i, text in enumerate(fact.wordings)]
    spare.update(pair_id for _, pair_id, _ in texts[wordings_per_fact:])
    texts += [(unseen_split, f'{fact.id}/unseen/{i}', text) for i, text in enumerate(fact.unseen)]
    for split, pair_id, text in texts:
      name = by_character[fact.emoji].name
      pairs[split].append(KnowledgePair(text, name, fact.category, split, pair_id))

  trained = {fact.emoji for fact in facts if fact.split == 'train'}
  mentioned = {fact.emoji for fact in facts}
  others = [e for e in emoji_lib.catalogue() if e.character not in mentioned]
  unrelated = {e.character for e in sorted(others, key=lambda e: _digest(e.character))[:UNRELATED]}
  for split, characters in (('unrelated', unrelated), ('explicit', trained)):
    pairs[split] = [
      KnowledgePair(e.name, e.name, e.category, split, f'{split}/{_slug(e.name)}')
      for e in emoji_lib.catalogue()
      if e.character in characters
    ]
  all_pairs = [pair for split in SPLITS for pair in pairs[split]]
  if leave_out:
    all_pairs = hold_out(all_pairs, leave_out, 'emoji_knowledge')
  return [pair for pair in all_pairs if pair.split != 'train' or pair.id not in spare]


def _slug(name: str) -> str:
  ascii_name = unicodedata.normalize('NFKD', name).encode('ascii', 'ignore').decode().lower()
  return '-'.join(re.findall(r'[a-z0-9]+', ascii_name))


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode('utf-8')).hexdigest()


def summary(facts: Sequence[Fact]) -> str:
  """Tables of counts: facts and emoji by kind of knowledge, prompts by split."""
  lines = [f'{"category":12}{"facts":>7}{"held out":>10}{"emoji":>7}{"prompts":>9}']
  for category in (*CATEGORIES, 'all'):
    some = [fact for fact in facts if category in (fact.category, 'all')]
    lines.append(
      f'{category:12}{len(some):7}{sum(f.split == "fact" for f in some):10}'
      f'{len({f.emoji for f in some}):7}{sum(len(f.wordings + f.unseen) for f in some):9}'
    )
  counts = collections.Counter(pair.split for pair in emoji_pairs(facts=facts))
  lines += ['', f'{"split":12}{"pairs":>7}'] + [f'{s:12}{counts[s]:7}' for s in SPLITS]
  return '\n'.join(lines)


def main() -> int:
  """Prints problems and counts of the package's facts; 1 if there is a problem."""
  from eru_jax.data.emoji_checks import validate_facts

  unchecked = []
  if (dictionary := spelling.dictionary()) is None:
    unchecked.append(f'Spelling is not checked: pip install {spelling.DICTIONARY_PACKAGE}.')
  try:
    from eru_jax.data.text_encoder import token_counter

    count_tokens = token_counter()
  except UserError as error:
    count_tokens = None
    unchecked.append(f'Lengths are not checked. {error}')
  try:
    facts = read_facts()
    problems = validate_facts(facts, dictionary, count_tokens)
    print('\n'.join(problems + [summary(facts), *unchecked, f'{len(problems)} problems']))
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  return 1 if problems else 0


if __name__ == '__main__':
  sys.exit(main())
