"""What a training stage asks of a reward, whatever it looks with."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from eru_jax.data.emoji_knowledge import PairTable

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Reward:
  """A judge of pictures that runs in compiled code.

  Attributes:
    params: its parameters, laid out over the devices.
    score: (params, images, targets) -> (B,) float32, the higher the better; pure. Images are
      (B, H, W, 3) in [0, 1], targets (B, ...) what each of them is held against.
    targets: the pairs of a split -> those targets, a pytree of numpy arrays (N, ...). A picture is
      held against what its pair's implicit prompt asks for, whatever it was drawn of; the pairs
      that ask for the anchors themselves have the anchor for their implicit prompt.
  """

  params: PyTree
  score: Callable[[PyTree, jax.Array, PyTree], jax.Array]
  targets: Callable[[PairTable], PyTree]


@dataclasses.dataclass(frozen=True)
class HostReward:
  """A judge of pictures that does not run in compiled code, and may fail on some of them.

  Attributes:
    score: (images, targets) -> scores (N,) float32, (N,) float32 which is 1 where there is one and
      0 where not, and measurements of the iteration, name -> () float32. Images are (N, H, W, 3)
      uint8 on all devices. Every process must call it.
    targets: as of Reward, numpy arrays (N, ...).
  """

  score: Callable[[Any, Any], tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]]
  targets: Callable[[PairTable], PyTree]
