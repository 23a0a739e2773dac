"""A base whose anchors are biased, so that NO-RL has something to correct.

The shipped base draws every explicit name right. DK-DM itself makes one of it that does not: its
pairs lead each name as often to the picture of another fact as to its own, as a prompt of a large
model that leads now to what is meant and now to what is more common. Like any base, it is made once
and serves all seeds.
"""

import pathlib

from ablation_rows import BIASED, config_values


def biased_pairs(names):
  """Pairs that lead every name to itself and to the next one, the last to the first."""
  from eru_jax.data.pairs import KnowledgePair

  following = [*names[1:], *names[:1]]
  return [
    KnowledgePair(name, shown, id=f'{row}/{kind}')
    for row, (name, other) in enumerate(zip(names, following, strict=True))
    for kind, shown in (('own', name), ('other', other))
  ]


def make_biased_base(root: pathlib.Path, quick: bool) -> pathlib.Path:
  """The model directory of the biased base, made in `root` or found there.

  Args:
    root: of the ablation; 'biased-base' in it becomes the workdir of an ordinary run.
    quick: whether a few steps suffice.
  """
  from eru_jax.data.pairs import write_prompt_file
  from eru_jax.data.world import load_emoji_world
  from eru_jax.files import cache_directory
  from eru_jax.training.run import train

  path = root / 'biased-base.jsonl'
  own = {'data.pairs': str(path), 'evaluation.diagnosis': 0}
  values = config_values(quick, **BIASED, **own)
  values |= {'stages': ('dk_dm',), 'title': 'A base with biased anchors'}
  facts = values['data']['max_facts']
  world = load_emoji_world('emoji_knowledge', cache_directory(), max_facts=facts)
  write_prompt_file(path, biased_pairs([pair.explicit for pair in world.splits['explicit'].pairs]))
  train(values, str(root / 'biased-base'))
  return root / 'biased-base' / 'model'
