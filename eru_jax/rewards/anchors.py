"""Rewards on a scale of their own for every prompt: from what is wrong there to what is right."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping

import jax
import numpy as np

from eru_jax.data.emoji_knowledge import PairTable
from eru_jax.data.pairs import read_lines
from eru_jax.errors import UserError
from eru_jax.losses.advantages import optimality
from eru_jax.rewards.base import PyTree, Reward

_KEYS = ('prompt', 'low', 'high')


def anchored(reward: Reward, anchors: Mapping[str, tuple[float, float]]) -> Reward:
  """A reward in [0, 1]: clip((score - low) / (high - low), 0, 1), with each prompt's own low, high.

  For knowledge pairs, low is the mean score of the base's pictures of the superficial prompt, high
  that of its pictures of the explicit one, both held against the implicit prompt (Science-T2I's
  normalised difference, arXiv:2504.13129, a picture).

  Args:
    reward: what scores.
    anchors: implicit prompt -> (low, high).

  Returns:
    A Reward whose targets are those of `reward` and the anchors of each pair; asking it for those
    of a pair without anchors raises UserError.
  """

  def score(params: PyTree, images: jax.Array, targets: PyTree) -> jax.Array:
    found = reward.score(params, images, targets['of'])
    return optimality(found, targets['low'], targets['high'])

  def targets(table: PairTable) -> PyTree:
    prompts = [pair.implicit for pair in table.pairs]
    missing = [prompt for prompt in prompts if prompt not in anchors]
    if missing:
      raise UserError(
        f'{len(missing)} of {len(prompts)} prompts have no reward anchors, the first is '
        f'{missing[0]!r}: add them, or set no_rl.reward_low and no_rl.reward_high instead.'
      )
    low, high = np.array([anchors[prompt] for prompt in prompts], np.float32).T
    return {'of': reward.targets(table), 'low': low, 'high': high}

  return dataclasses.replace(reward, score=score, targets=targets)


def read_anchors(path: str | os.PathLike) -> dict[str, tuple[float, float]]:
  """Reads anchors from a JSON Lines file: {"prompt": TEXT, "low": NUMBER, "high": NUMBER} each.

  Raises:
    UserError: if the file cannot be read, or a line is not of that form, names a prompt again, or
      has a high that is not above its low.
  """
  anchors: dict[str, tuple[float, float]] = {}
  for line in read_lines(path):
    try:
      row = json.loads(line)
      prompt, low, high = (row[key] for key in _KEYS)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise UserError(
        f'{path}: {line[:200]!r} is no JSON object with {", ".join(_KEYS)}: write one a line.'
      ) from error
    numbers = all(type(x) in (int, float) and abs(x) < math.inf for x in (low, high))
    if not isinstance(prompt, str) or not numbers or not high > low:
      raise UserError(
        f'{path}: {line[:200]!r} must have a text for prompt and numbers for low and high, high '
        'above low. Leave prompts out of the run whose explicit pictures score no better.'
      )
    if prompt in anchors:
      raise UserError(f'{path} has the prompt {prompt!r} twice: keep one line.')
    anchors[prompt] = (float(low), float(high))
  return anchors
