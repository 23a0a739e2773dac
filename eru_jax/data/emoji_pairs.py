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

`python -m eru_jax.data.emoji_pairs` checks the file, spelling and lengths included where the
packages for that are installed, and prints how much there is of everything.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
import sys
import unicodedata
from collections.abc import Callable, Container, Iterator, Sequence

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

# Share of content words from which an unseen wording counts as a training wording written anew.
NEAR_DUPLICATE = 0.5
# What the models of the emoji world read of a prompt, the encoder's two marks included.
MAX_TOKENS = 24

# Words of a name that give nothing away when a prompt holds them.
_STOP_WORDS = frozenset(
  'a an the of in on and with for at to de la face symbol flag sign no showing'.split()
)
# Words that say little about what a sentence is about.
_FUNCTION_WORDS = frozenset(
  'a an the this that these those it its he his him she her they their them i me my you your we '
  'our who whom whose what which where when how why of in on at to for from by with into over '
  'under after before as and or but not no than is are was were be been do does did has have had '
  'will would can could one some any'.split()
)
_SUFFIXES = (
  's es ies ed d ing er ers r rs y ly ish like ful less an ian n ese i ic ical al ous ness'.split()
)
# What a name turns into where no suffix rule gets there.
_IRREGULAR = {
  'belgium': 'belgian', 'china': 'chinese', 'denmark': 'danish dane', 'england': 'english',
  'finland': 'finnish finn', 'france': 'french', 'germany': 'german', 'greece': 'greek hellenic',
  'ireland': 'irish', 'italy': 'italian', 'malta': 'maltese', 'mexico': 'mexican',
  'netherlands': 'dutch', 'norway': 'norwegian', 'peru': 'peruvian', 'philippines': 'filipino',
  'poland': 'polish', 'portugal': 'portuguese', 'scotland': 'scottish scots',
  'spain': 'spanish', 'sweden': 'swedish swede', 'switzerland': 'swiss',
  'thailand': 'thai', 'türkiye': 'turkish turkey', 'turkey': 'turkish',
  'ukraine': 'ukrainian', 'wales': 'welsh',
  'child': 'children', 'foot': 'feet', 'goose': 'geese', 'knife': 'knives', 'leaf': 'leaves',
  'loaf': 'loaves', 'mouse': 'mice', 'person': 'people', 'tooth': 'teeth', 'wolf': 'wolves',
}  # fmt: skip


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


def validate_facts(
  facts: Sequence[Fact],
  dictionary: Container[str] | None = None,
  count_tokens: Callable[[str], int] | None = None,
) -> list[str]:
  """Checks everything a report about the emoji world relies on.

  Ids, emoji, kinds of knowledge and numbers of wordings; that no wording names its answer
  (plurals, derivatives and demonyms included) or is the name of any emoji; that no wording
  occurs twice, and no unseen one shares half of its content words with a training wording of any
  fact; that an emoji is held out with all of its facts; spelling, and that models read wordings to
  their end.

  Args:
    facts: all of them, as wordings are compared with those of other facts.
    dictionary: English words in lower case, for what `knowledge/words.txt` does not list; None
      leaves spelling unchecked.
    count_tokens: counts the tokens of a text; None leaves lengths unchecked.

  Returns:
    One line a problem, none if all is well.
  """
  problems: list[str] = []
  ids: set[str] = set()
  used: dict[str, str] = {}
  split_of: dict[str, str] = {}
  for fact in facts:
    found = list(_problems_within(fact))
    if fact.id in ids:
      found.append('the id is used twice')
    ids.add(fact.id)
    if split_of.setdefault(fact.emoji, fact.split) != fact.split:
      found.append(f'{fact.emoji} is in split {split_of[fact.emoji]!r} too')
    for wording in (*fact.wordings, *fact.unseen):
      if (key := _key(wording)) in used:
        found.append(f'{used[key]} has the same wording: {wording}')
      used[key] = fact.id
      if dictionary is not None:
        wrong = spelling.misspelt(wording, dictionary, spelling.read_words())
        found += [f'{word!r} is in no dictionary and not in words.txt: {wording}' for word in wrong]
      if count_tokens is not None and (count := count_tokens(wording)) > MAX_TOKENS:
        found.append(f'{count} tokens are more than {MAX_TOKENS}, the end is not read: {wording}')
    problems += [f'{fact.id}: {text}' for text in found]
  return problems + list(_near_duplicates(facts))


def _near_duplicates(facts: Sequence[Fact]) -> Iterator[str]:
  trained = [(fact.id, text, _content(text)) for fact in facts for text in fact.wordings]
  # Few pairs of wordings share a word at all: looking those up beats comparing all with all.
  places: dict[str, list[int]] = collections.defaultdict(list)
  for place, (_, _, words) in enumerate(trained):
    for word in words:
      places[word].append(place)
  for fact in facts:
    for unseen in fact.unseen:
      words = _content(unseen)
      shared = collections.Counter(itertools.chain(*(places.get(word, ()) for word in words)))
      for place, count in shared.items():
        other, wording, others = trained[place]
        if count / len(words | others) >= NEAR_DUPLICATE:
          owner = '' if other == fact.id else f' of {other}'
          yield (
            f'{fact.id}: the unseen wording {unseen!r} is nearly the training wording '
            f'{wording!r}{owner}'
          )


def _problems_within(fact: Fact) -> Iterator[str]:
  names, keys_of_names = _names()
  if not re.fullmatch(r'[a-z0-9]+(-[a-z0-9]+)*', fact.id):
    yield 'the id is no slug'
  if fact.category not in CATEGORIES:
    yield f'unknown category {fact.category!r}'
  if fact.split not in ('train', 'fact'):
    yield f'unknown split {fact.split!r}'
  if fact.emoji not in names:
    yield f'{fact.emoji!r} is not in the catalogue'
  held_out = fact.split == 'fact'
  for what, texts, count in (
    ('wordings', fact.wordings, 0 if held_out else TRAIN_WORDINGS),
    ('unseen wordings', fact.unseen, HELD_OUT_WORDINGS if held_out else UNSEEN_WORDINGS),
  ):
    if len(texts) != count:
      yield f'{len(texts)} {what} instead of {count}'
  for wording in (*fact.wordings, *fact.unseen):
    if wording != wording.strip() or not _words(wording):
      yield f'stray space or no words: {wording!r}'
    if word := leak(names.get(fact.emoji, ''), wording):
      yield f'{word!r} names the answer {names[fact.emoji]!r}: {wording}'
    if _key(wording) in keys_of_names:
      yield f'this is the name of an emoji: {wording}'


@functools.cache
def _names() -> tuple[dict[str, str], frozenset[str]]:
  names = {e.character: e.name for e in emoji_lib.catalogue()}
  return names, frozenset(_key(name) for name in names.values())


def overlap(a: str, b: str) -> float:
  """Content words two prompts share over content words they have together (Jaccard), 0 to 1."""
  first, second = _content(a), _content(b)
  return len(first & second) / max(1, len(first | second))


def _content(text: str) -> set[str]:
  return {_singular(word) for word in _words(text) if word not in _FUNCTION_WORDS}


def leak(name: str, prompt: str) -> str | None:
  """The first word of a prompt that is a form of a word of the answer's name, if there is one.

  Forms are plurals, possessives, derivatives ('snowy', 'baking', 'Kenyan'), demonyms, words that
  begin with the name's ('buoyant', and 'Tomatina' for a long one), and compounds of long words
  ('sun flower', 'sunflowers').
  """
  prompt_words = _words(prompt)
  for word in _words(name):
    if word in _STOP_WORDS or (len(word) == 1 and word.isalpha()):
      continue
    forms = _forms(word)
    # The last letter of a long word is the ending's ('tomat-o', 'tomat-ina').
    stem = word[:-1] if len(word) >= 6 else word
    for prompt_word in prompt_words:
      if prompt_word in forms or _singular(prompt_word) in forms:
        return prompt_word
      if len(word) >= 4 and prompt_word.startswith(stem):
        return prompt_word
    if len(word) >= 6 and word in ''.join(prompt_words):
      return word
  return None


def _forms(word: str) -> set[str]:
  stem = _singular(word)
  roots = {stem, stem + stem[-1]}  # 'bagged'
  if len(stem) > 3 and stem[-1] in 'aeiouy':
    roots.add(stem[:-1])  # 'Kenyan', 'Italian', and 'smiling' for 'smile'
  if stem.endswith('ing') and len(stem) > 5:
    base = stem[:-3]
    roots |= {base, base[:-1] if base[-1] == base[-2] else base + 'e'}  # 'run', 'smile'
  return (
    {word, stem, *_IRREGULAR.get(word, '').split()}
    | roots
    | {root + suffix for root in roots for suffix in _SUFFIXES}
  )


def _words(text: str) -> list[str]:
  text = unicodedata.normalize('NFC', text).casefold()
  return re.findall(r'\w+', re.sub(r"[’']s\b", '', text))


def _singular(word: str) -> str:
  if word.endswith('ies') and len(word) > 5:
    return word[:-3] + 'y'
  if word.endswith(('ches', 'shes', 'sses', 'xes', 'oes')) and len(word) > 4:
    return word[:-2]
  if word.endswith('s') and not word.endswith('ss') and len(word) > 3:
    return word[:-1]
  return word


def _key(text: str) -> str:
  return ' '.join(_words(text))


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
