"""What every report about the emoji world relies on: that no prompt gives its answer away.

Nor may an unseen wording be a training wording written anew. Both are judged by words: what asks
for the same in other words is found by no rule here, and neither is a hint that is too broad.
"""

import collections
import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Container, Iterator, Sequence

from eru_jax.data import emoji as emoji_lib
from eru_jax.data import spelling
from eru_jax.data.emoji_pairs import (
  CATEGORIES,
  HELD_OUT_WORDINGS,
  TRAIN_WORDINGS,
  UNSEEN_WORDINGS,
  Fact,
)

# Share of content words from which an unseen wording counts as a training wording written anew.
NEAR_DUPLICATE = 0.5
# Share of the shorter wording's content words above which it is a piece of the longer one, which
# the share of all words misses. Exactly 0.8, four words of five, are also a phrase that facts of
# one kind have in common ("draw that nation's flag").
CONTAINED = 0.8
# Two content words, such as "ape" and "Fossey", may well be the topic of two wordings.
CONTAINED_WORDS = 3
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


def validate_facts(
  facts: Sequence[Fact],
  dictionary: Container[str] | None = None,
  count_tokens: Callable[[str], int] | None = None,
) -> list[str]:
  """Checks everything a report about the emoji world relies on.

  Ids, emoji, kinds of knowledge and numbers of wordings; that no wording names its answer
  (plurals, derivatives and demonyms included), is the name of any emoji, or holds an emoji or
  another character that is no text; that no wording occurs twice, and no unseen one shares half of
  its content words with a training wording of any fact, is contained in one or contains one; that
  an emoji is held out with all of its facts; spelling, and that models read wordings to their end.

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
        shorter = min(len(words), len(others))
        if count / len(words | others) >= NEAR_DUPLICATE:
          relation = 'is nearly'
        elif shorter >= CONTAINED_WORDS and count / shorter > CONTAINED:
          relation = 'contains' if len(words) > len(others) else 'is contained in'
        else:
          continue
        owner = '' if other == fact.id else f' of {other}'
        yield (
          f'{fact.id}: the unseen wording {unseen!r} {relation} the training wording '
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
    if signs := no_text(wording):
      yield f'{", ".join(map(repr, signs))} is no text: {wording}'
    if word := leak(names.get(fact.emoji, ''), wording):
      yield f'{word!r} names the answer {names[fact.emoji]!r}: {wording}'
    if _key(wording) in keys_of_names:
      yield f'this is the name of an emoji: {wording}'


@functools.cache
def _names() -> tuple[dict[str, str], frozenset[str]]:
  names = {e.character: e.name for e in emoji_lib.catalogue()}
  return names, frozenset(_key(name) for name in names.values())


def no_text(wording: str) -> list[str]:
  """Characters of a wording that are neither letters, digits nor punctuation of a sentence.

  That is every emoji, its invisible parts included, and letters in disguise ('ℹ', full width).
  """
  return [c for c in unicodedata.normalize('NFC', wording) if not _is_text(c)]


def _is_text(character: str) -> bool:
  if character.isascii():
    return character.isprintable()
  is_letter = unicodedata.category(character).startswith('L')
  plain = unicodedata.normalize('NFKC', character) == character
  return (is_letter and plain) or character in '‘’“”–—…'


def overlap(a: str, b: str) -> float:
  """Content words two prompts share over content words they have together (Jaccard), 0 to 1."""
  first, second = _content(a), _content(b)
  return len(first & second) / max(1, len(first | second))


def _content(text: str) -> set[str]:
  return {spelling.singular(word) for word in _words(text) if word not in _FUNCTION_WORDS}


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
      if prompt_word in forms or spelling.singular(prompt_word) in forms:
        return prompt_word
      if len(word) >= 4 and prompt_word.startswith(stem):
        return prompt_word
    if len(word) >= 6 and word in ''.join(prompt_words):
      return word
  return None


def _forms(word: str) -> set[str]:
  stem = spelling.singular(word)
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


def _key(text: str) -> str:
  return ' '.join(_words(text))
