"""Which pairs are about one thing, so that pictures of them are right or wrong together."""

from collections.abc import Sequence

from eru_jax.data.pairs import EXPLICIT_SPLITS, KnowledgePair, fact_of, without_article


def clusters_of(pairs: Sequence[KnowledgePair]) -> list[str]:
  """A name of what each pair is about: the answer of one of its cluster.

  Wordings of a fact (`fact_of`) are about one thing, and so are facts with the same answer: a model
  that cannot draw a thing, or that a judge does not believe it of, is wrong under all prompts that
  ask for it. In the emoji world clusters are emoji, of which a single one has two facts.
  """
  parents: dict[tuple[str, str], tuple[str, str]] = {}

  def root(node: tuple[str, str]) -> tuple[str, str]:
    parents.setdefault(node, node)
    while parents[node] != node:
      parents[node] = node = parents[parents[node]]
    return node

  answers = [('answer', without_article(pair.explicit)) for pair in pairs]
  for pair, answer in zip(pairs, answers, strict=True):
    # The ids of bare names, 'explicit/red-apple', have their split in front.
    fact = '' if pair.split in EXPLICIT_SPLITS else fact_of(pair)
    if fact:
      parents[root(('fact', fact))] = root(answer)
  return [root(answer)[1] for answer in answers]
