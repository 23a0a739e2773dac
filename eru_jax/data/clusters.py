"""Which pairs are about one thing, so that pictures of them are right or wrong together."""

import collections
from collections.abc import Sequence

from eru_jax.data.pairs import EXPLICIT_SPLITS, KnowledgePair, fact_of, without_article


def clusters_of(pairs: Sequence[KnowledgePair]) -> list[str]:
  """A name of what each pair is about: the answer of one of its cluster.

  Pairs with the same answer are about one thing: a model that cannot draw a thing, or that a judge
  does not believe it of, is wrong under all prompts that ask for it. In the emoji world clusters
  are emoji, of which a single one has two facts. Wordings of a fact (`fact_of`) are about one thing
  too, even if some have the answer in other words. But 'animals/0', 'animals/1' are of a kind of
  knowledge, whose answers differ: an id makes a fact where one answer has more than half of its
  pairs, or where it is a number, as that of a row of Science-T2I's training set.
  """
  parents: dict[tuple[str, str], tuple[str, str]] = {}

  def root(node: tuple[str, str]) -> tuple[str, str]:
    parents.setdefault(node, node)
    while parents[node] != node:
      parents[node] = node = parents[parents[node]]
    return node

  answers = [('answer', without_article(pair.explicit)) for pair in pairs]
  asked = collections.defaultdict(list)
  for pair, answer in zip(pairs, answers, strict=True):
    # The ids of bare names, 'explicit/red-apple', have their split in front.
    if pair.split not in EXPLICIT_SPLITS:
      asked[fact_of(pair)].append(answer)
  for fact, of_fact in asked.items():
    most = max(collections.Counter(of_fact).values())
    if fact and (2 * most > len(of_fact) or fact.isdecimal()):
      for answer in of_fact:
        parents[root(answer)] = root(of_fact[0])
  return [root(answer)[1] for answer in answers]
