"""Takes out of a training set whatever is near a test prompt, or has a test prompt's answer.

Published prompt sets copy from each other. A training pair goes if one of its prompts shares at
least half of its words with a test prompt (Jaccard similarity of the sets of words), explicit and
superficial prompts and rewrites included, or if it asks for what a test prompt asks for: its
explicit prompt is short, and is that prompt's too or what the prompt's explanation refers to, or
has several words and stands in either.
"""

import collections
import dataclasses
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from eru_jax.benchmarks.base import Question
from eru_jax.data.pairs import KnowledgePair, without_article
from eru_jax.data.spelling import singular

THRESHOLD = 0.5
# Longer explicit prompts describe a scene; shorter ones name what is asked for.
_ENTITY_WORDS = 4
# 'This refers to mooncakes, the round pastries ...' -> 'mooncakes'
_REFERS = re.compile(r'\b(?:refers? to|known as|called)\s+([^,.;:()]+)', re.IGNORECASE)
# Kana, Chinese characters and Hangul: without spaces between words, each counts as one.
_ALONE = '\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af'
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+(?:'[^\W{_ALONE}]+)*")
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Report:
  """What was taken out of a training set.

  Attributes:
    total: pairs that there were.
    kept: pairs that are left, in order.
    near: test set -> pairs with a prompt near one of its prompts.
    same: test set -> pairs with the answer of one of its questions.
    dropped: pairs that went, some for several reasons.
    example: (training prompt, test prompt) of the nearest that went, or None.
    threshold: share of words from which two prompts were near.
  """

  total: int
  kept: tuple[KnowledgePair, ...]
  near: Mapping[str, int]
  same: Mapping[str, int]
  dropped: int
  example: tuple[str, str] | None
  threshold: float

  def lines(self) -> list[str]:
    """For people: a line for each test set, and one for all."""
    told = [
      f'{name}: {self.near[name]} pairs share {self.threshold:.0%} of the words of one of its '
      f'prompts, {self.same[name]} ask for the same thing'
      for name in self.near
    ]
    if self.example is not None:
      told.append('such as {!r}, near {!r}'.format(*self.example))
    return [*told, f'{self.dropped} of {self.total} pairs dropped, {len(self.kept)} kept']


def _word_list(text: str) -> list[str]:
  text = unicodedata.normalize('NFKC', text).casefold().replace('’', "'")
  # Of signs alone, such as emoji, the signs.
  return _WORD.findall(text) or list(''.join(text.split()))


def words(prompt: str) -> frozenset[str]:
  """The different words of a prompt, in small letters, without punctuation."""
  return frozenset(_word_list(prompt))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
  """Shared words by all words of two sets; 0 if both are empty."""
  together = len(first | second)
  return len(first & second) / together if together else 0.0


def plain(text: str) -> str:
  """A text's words in order, in a form to compare: singular, small letters, no punctuation."""
  found = map(singular, _word_list(text))
  # 'movies' may be those of a 'movie' or, by rule, of a 'movy'.
  return ' '.join(f'{word[:-2]}y' if word.endswith('ie') else word for word in found)


def entity(text: str) -> str:
  """What a short prompt names, as `plain`: 'The Mooncakes.' -> 'mooncake'; '' if it is long."""
  found = plain(without_article(unicodedata.normalize('NFKC', text)))
  return found if len(found.split()) <= _ENTITY_WORDS else ''


def entities(question: Question) -> set[str]:
  """What a question asks for, as far as its explicit prompt or its explanation names it."""
  texts = [question.prompts.get('explicit', '')]
  texts += _REFERS.findall(question.explanation)
  return {name for text in texts if (name := entity(text))}


class _Answers:
  """What the questions of a test set ask for."""

  def __init__(self, questions: Sequence[Question]):
    self._named = set().union(*(entities(question) for question in questions))
    texts = [(q.prompts.get('explicit', ''), q.explanation) for q in questions]
    self._told = '\n'.join(f' {plain(text)} ' for both in texts for text in both)

  def __contains__(self, asked: str) -> bool:
    # One word alone is in many explanations that are about something else.
    return asked in self._named or (' ' in asked and f' {asked} ' in self._told)


class _Nearest:
  """Finds a test prompt that shares enough words with a training prompt, without trying them all.

  Sets with a Jaccard similarity of t or more share at least t |A| words: so one of any
  |A| - ceil(t |A|) + 1 words of A is in both, and the rarest of them are looked up.
  """

  def __init__(self, prompts: Iterable[str]):
    self._prompts = list(dict.fromkeys(prompts))
    self._words = [words(prompt) for prompt in self._prompts]
    self._rows = collections.defaultdict(list)
    for row, found in enumerate(self._words):
      for word in found:
        self._rows[word].append(row)

  def __call__(self, prompt: str, threshold: float) -> tuple[float, str] | None:
    mine = words(prompt)
    looked_up = len(mine) - math.ceil(threshold * len(mine) - _ROUNDING) + 1
    rarest = sorted(mine, key=lambda word: (len(self._rows.get(word, ())), word))[:looked_up]
    rows = {row for word in rarest for row in self._rows.get(word, ())}
    best = max(((jaccard(mine, self._words[row]), -row) for row in rows), default=(0.0, 0))
    enough = rows and best[0] >= threshold - _ROUNDING
    return (best[0], self._prompts[-best[1]]) if enough else None


def decontaminate(
  pairs: Sequence[KnowledgePair],
  held_out: Mapping[str, Sequence[Question]],
  threshold: float = THRESHOLD,
) -> Report:
  """Drops training pairs that are near a test set.

  Args:
    pairs: to train on.
    held_out: name of a test set -> its questions.
    threshold: Jaccard similarity from which two prompts count as the same.
  """
  nearest = {
    name: _Nearest(prompt for question in questions for prompt in question.prompts.values())
    for name, questions in held_out.items()
  }
  answers = {name: _Answers(questions) for name, questions in held_out.items()}
  near, same = dict.fromkeys(held_out, 0), dict.fromkeys(held_out, 0)
  kept, example = [], (0.0, '', '')
  for pair in pairs:
    clean = True
    for name in held_out:
      found = [
        (*hit, prompt)
        for prompt in (pair.implicit, pair.explicit)
        if (hit := nearest[name](prompt, threshold))
      ]
      if found:
        share, test, prompt = max(found)
        example = max(example, (share, prompt, test))
        near[name] += 1
      asked = entity(pair.explicit)
      if asked and asked in answers[name]:
        same[name] += 1
      clean = clean and not found and asked not in answers[name]
    if clean:
      kept.append(pair)
  shown = example[1:] if example[0] else None
  dropped = len(pairs) - len(kept)
  return Report(len(pairs), tuple(kept), near, same, dropped, shown, threshold)
