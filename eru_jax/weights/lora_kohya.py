"""Low-rank updates in FLUX.1's original layout of layers, which kohya and ComfyUI name.

There the projections of one input are one layer: q, k and v of each stream of a double-stream
block, and q, k, v and the MLP of a single-stream block. The output layer's modulation has its
shift first, diffusers' and ours its scale.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from eru_jax.models import registry
from eru_jax.weights import layouts
from eru_jax.weights.lora_layers import Layer, Update
from eru_jax.weights.table import cells


@dataclasses.dataclass(frozen=True)
class Original:
  """A linear layer of the original layout.

  Attributes:
    name: its name there.
    parts: the reference's (diffusers') modules that it computes, outputs in this order.
    swapped: whether the two halves of the outputs have changed places.
  """

  name: str
  parts: tuple[str, ...]
  swapped: bool = False


def originals(config: Any) -> list[Original]:
  """All linear layers of an architecture in the original layout, out of the two weight tables."""
  component = layouts.backbone(registry.family_of(config))
  counts, tables = component.counts(config), component.layouts
  reference = {cell.path: cell.parts for cell in cells(tables['diffusers'].rows(config), counts)}
  parts: dict[str, list[str]] = {}
  swapped = set()
  for cell in cells(tables['original'].rows(config), counts):
    if cell.row.op != 'linear':
      continue
    for (name, _), (part, _) in zip(cell.parts, reference[cell.path], strict=True):
      parts.setdefault(name, []).append(part.removesuffix('.weight'))
      if list(cell.row.ranges) != sorted(cell.row.ranges):
        swapped.add(name)
  return [
    Original(name.removesuffix('.weight'), tuple(found), name in swapped)
    for name, found in parts.items()
  ]


def fuse(
  original: Original, updates: Mapping[str, Update], known: Mapping[str, Layer]
) -> Update | None:
  """The update of an original layer out of those of its parts.

  Its rank is the sum of the parts', each writing to its own outputs; parts with the same `down`
  share it. Alpha is the rank: scales of the parts are in `up`.

  Args:
    original: the layer.
    updates: by the reference's module name; parts without one stay as they are.
    known: shapes of the parts.

  Returns:
    The update, or None if no part has one.
  """
  downs: list[np.ndarray] = []
  starts: dict[str, int] = {}
  for part in original.parts:
    if part not in updates:
      continue
    down, start = updates[part].down, 0
    for other in downs:
      if np.array_equal(other, down):
        break
      start += len(other)
    else:
      downs.append(down)
    starts[part] = start
  if not downs:
    return None
  down = np.concatenate(downs)
  up = np.zeros((sum(known[part].n_out for part in original.parts), len(down)), np.float32)
  row = 0
  for part in original.parts:
    if part in starts:
      update, start = updates[part], starts[part]
      rows, columns = slice(row, row + known[part].n_out), slice(start, start + update.rank)
      up[rows, columns] = update.scale * update.up
    row += known[part].n_out
  return Update(down, _swap(up) if original.swapped else up, float(len(down)))


def split(original: Original, update: Update, known: Mapping[str, Layer]) -> dict[str, Update]:
  """The updates of the parts of an original layer: the inverse of `fuse`.

  Each part gets the components that write to its outputs, and those that write to none, as all
  do at the start of a training. A part whose outputs only others' components reach gets no update.
  """
  up = _swap(update.up) if original.swapped else update.up
  ends = np.cumsum([known[part].n_out for part in original.parts])
  blocks = np.split(up, ends[:-1])
  writes = np.stack([block.any(axis=0) for block in blocks])
  updates = {}
  for part, block, own in zip(original.parts, blocks, writes, strict=True):
    kept = own | ~writes.any(axis=0)
    if kept.any():
      alpha = update.alpha * (int(kept.sum()) / update.rank)
      updates[part] = Update(update.down[kept], block[:, kept], alpha)
  return updates


def _swap(up: np.ndarray) -> np.ndarray:
  return np.roll(up, len(up) // 2, axis=0)
