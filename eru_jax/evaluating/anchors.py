"""Reward anchors of NO-RL, out of an evaluation of the base."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from eru_jax.benchmarks.base import CLIP_PROTOCOLS
from eru_jax.files import replace_file

if TYPE_CHECKING:
  from eru_jax.evaluating.evaluator import Evaluated


def write_anchors(evaluated: 'Evaluated') -> None:
  """Writes reward_anchors.jsonl, if the evaluation has what it takes, and says so.

  Raises:
    UserError: if it cannot be written.
  """
  found, left_out = reward_anchors(evaluated)
  if not found:
    return
  path = evaluated.output / 'reward_anchors.jsonl'
  lines = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in found)
  replace_file(path, lines.encode())
  print(
    f'Reward anchors of {len(found)} prompts: {path}; {left_out} prompts have none, as their '
    'explicit pictures score no better than the superficial ones.'
  )


def reward_anchors(evaluated: 'Evaluated') -> tuple[list[dict[str, Any]], int]:
  """The first model's mean scores of superficial and explicit pictures, as NO-RL takes them.

  Returns:
    [{'prompt': implicit prompt, 'low', 'high'}], see `rewards.anchors`, and for how many prompts
    there is none as high is not above low; nothing unless CLIP has scored pictures of both kinds.
  """
  if evaluated.scorer is None or evaluated.scorer.name not in CLIP_PROTOCOLS:
    return [], 0
  base = next(iter(evaluated.values().values()))
  if not {'superficial', 'explicit'} <= base.keys():
    return [], 0
  scores: dict[str, tuple[list[float], list[float]]] = {}
  for row, question in enumerate(evaluated.questions):
    # A prompt that is there with several answers has anchors once.
    for mine, name in zip(
      scores.setdefault(question.implicit, ([], [])), ('superficial', 'explicit'), strict=True
    ):
      mine.extend(base[name][row][np.isfinite(base[name][row])])
  both = {prompt: found for prompt, found in scores.items() if all(found)}
  rows = [
    {'prompt': prompt, 'low': float(np.mean(low)), 'high': float(np.mean(high))}
    for prompt, (low, high) in both.items()
  ]
  kept = [row for row in rows if row['high'] > row['low']]
  return kept, len(rows) - len(kept)
