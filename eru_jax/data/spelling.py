"""Spelling of the facts: an English dictionary, and what people wrote that it does not know.

`knowledge/words.txt` holds names, terms and British spellings, one a line, in alphabetical order.
Every line was read by somebody before it was added: the list says that a word is right, not merely
that it occurs.
"""

import functools
import importlib.util
import pathlib
import re
import unicodedata
from collections.abc import Container

WORDS_FILE = pathlib.Path(__file__).parent / 'knowledge' / 'words.txt'
# Installed with the tests only.
DICTIONARY_PACKAGE = 'pyspellchecker'


# 3, 1840s, 38th, platform 9b. Other words that hold a digit are names (H2O), or a word in disguise.
_NUMBER = re.compile(r"\d+(?:[A-Za-z]|st|nd|rd|th)?(?:'s)?")


@functools.cache
def read_words(path: pathlib.Path = WORDS_FILE) -> frozenset[str]:
  """The words of a list, by default the package's."""
  return frozenset(path.read_text(encoding='utf-8').split())


@functools.cache
def dictionary() -> Container[str] | None:
  """English words in lower case; None where DICTIONARY_PACKAGE is not installed."""
  if importlib.util.find_spec('spellchecker') is None:
    return None
  import spellchecker

  return spellchecker.SpellChecker(language='en', distance=1)


def words(text: str) -> list[str]:
  """The words of a text as they are spelt, without numbers ('3', '1840s', '38th')."""
  text = unicodedata.normalize('NFC', text).replace('’', "'")
  found = re.findall(r"\w+(?:'\w+)*", text)
  return [word for word in found if not _NUMBER.fullmatch(word)]


def misspelt(text: str, known: Container[str], listed: Container[str]) -> list[str]:
  """Words of a text that are neither known nor listed.

  Args:
    text: any.
    known: words in lower case, such as `dictionary()`; the case they are written in is free.
    listed: words as `read_words()`; one with capitals has to be written with them.
  """

  def is_right(word: str) -> bool:
    return word in listed or word.casefold() in listed or word.casefold() in known

  return [w for w in words(text) if not is_right(w) and not is_right(w.removesuffix("'s"))]


def singular(word: str) -> str:
  """A noun in small letters without its regular plural's ending."""
  if word.endswith('ies') and len(word) > 5:
    return word[:-3] + 'y'
  if word.endswith(('ches', 'shes', 'sses', 'xes', 'oes')) and len(word) > 4:
    return word[:-2]
  if word.endswith('s') and not word.endswith('ss') and len(word) > 3:
    return word[:-1]
  return word
