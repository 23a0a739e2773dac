"""Adapters layer by layer: our stacked arrays, and one low-rank update per linear layer."""

import dataclasses
import functools
import json
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from eru_jax.errors import UserError
from eru_jax.models import lora, registry
from eru_jax.weights import layouts, lora_peft

PyTree = Any
# Key of the metadata of files that we wrote.
_SIZES = 'eru_jax.layers'


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
  """alpha / rank * up @ down: what an adapter adds to a linear layer's weight (out, in).

  Attributes:
    down: (rank, in) float32.
    up: (out, rank) float32.
    alpha: scales the update by alpha / rank.
  """

  down: np.ndarray
  up: np.ndarray
  alpha: float

  @property
  def rank(self) -> int:
    return self.down.shape[0]

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Layer:
  """Where a linear layer of the reference is in our parameters.

  Attributes:
    path: of our layer.
    stack: leading axes of its kernel.
    place: the reference's layer on these axes.
    n_in: its input size.
    n_out: its output size.
  """

  path: str
  stack: tuple[int, ...]
  place: tuple[int, ...]
  n_in: int
  n_out: int


@functools.cache
def layers(config: Any) -> Mapping[str, Layer]:
  """Every linear layer of an architecture, by the reference's (diffusers') module name."""
  component = layouts.backbone(registry.family_of(config))
  kernels = traverse_util.flatten_dict(component.shapes(config), sep='/')
  counts, found = component.counts(config), {}
  for row in component.layouts['diffusers'].rows(config):
    if row.op != 'linear':
      continue
    *stack, n_in, n_out = kernels[row.flax].shape
    axes = [name for name in counts if '{' + name + '}' in row.torch]
    for place in np.ndindex(*stack):
      module = row.torch.format(**dict(zip(axes, place, strict=True))).removesuffix('.weight')
      path = row.flax.removesuffix('/kernel')
      found[module] = Layer(path, tuple(stack), place, n_in, n_out)
  return types.MappingProxyType(found)


def to_updates(
  adapter: PyTree, rules: Sequence[lora.LoraRule], known: Mapping[str, Layer]
) -> dict[str, Update]:
  """The updates of an adapter, by the reference's module name.

  Args:
    adapter: nested dict of a (..., in, r) and b (..., r, out).
    rules: its rules.
    known: what `layers` found.

  Returns:
    Updates whose alpha is their rank, the rule's scale being in `up`. Components that are zero in
    both matrices, with which `from_updates` fills a stack up, are left out, and so are layers that
    have no others.

  Raises:
    UserError: if the adapter is of another model.
  """
  flat = traverse_util.flatten_dict(lora.variables(adapter, rules), sep='/')
  flat = {path: np.asarray(value, np.float32) for path, value in flat.items()}
  paths = {layer.path: layer for layer in known.values()}
  for path, a in flat.items():
    layer, _, leaf = path.rpartition('/')
    if leaf != 'a':
      continue
    if layer not in paths:
      raise UserError(
        f'The adapter is of another model: this one has no linear layer {layer!r}. Take the '
        'adapter that was trained on it.'
      )
    shape = (*a.shape[:-1], flat[f'{layer}/b'].shape[-1])
    wanted = (*paths[layer].stack, paths[layer].n_in, paths[layer].n_out)
    if shape != wanted:
      raise UserError(
        f'The adapter is of another model: it maps {shape} at {layer!r}, this model {wanted}. Take '
        'the adapter that was trained on it.'
      )
  updates = {}
  for module, layer in known.items():
    if f'{layer.path}/a' not in flat:
      continue
    a, b, scale = (flat[f'{layer.path}/{leaf}'][layer.place] for leaf in ('a', 'b', 'scale'))
    used = a.any(axis=0) | b.any(axis=1)
    if used.any():
      updates[module] = Update(a[:, used].T, scale * b[used].T, float(used.sum()))
  return updates


def sizes_to_metadata(sizes: Mapping[str, tuple[int, float]]) -> dict[str, str]:
  """What a file keeps of the ranks and alphas that an adapter was trained with.

  Args:
    sizes: path of our layer -> (rank, alpha).
  """
  return {_SIZES: json.dumps(sizes, sort_keys=True)}


def read_sizes(
  path: str | os.PathLike, metadata: Mapping[str, str]
) -> dict[str, tuple[int, float]]:
  """The inverse of `sizes_to_metadata`; nothing for a file that somebody else wrote.

  Args:
    path: the file, for messages.
    metadata: of the file.

  Raises:
    UserError: if they are damaged.
  """
  try:
    values = json.loads(metadata.get(_SIZES, '{}'))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{_SIZES} in {path} is no JSON ({error}): export it again.') from None

  def valid(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
      return False
    return type(value[0]) is int and all(lora_peft.valid_alpha(number) for number in value)

  if not isinstance(values, dict) or not all(valid(value) for value in values.values()):
    raise UserError(f'{_SIZES} in {path} names no ranks and alphas by layer: export it again.')
  return {layer: (rank, float(alpha)) for layer, (rank, alpha) in values.items()}


def unfold(
  updates: Mapping[str, Update],
  known: Mapping[str, Layer],
  sizes: Mapping[str, tuple[int, float]],
) -> dict[str, Update]:
  """The same updates, their scales taken out of `up` again where they were trained with one.

  Args:
    updates: by the reference's module name.
    known: what `layers` found.
    sizes: (rank, alpha) that layers were trained with, by our path.
  """
  unfolded = {}
  for module, update in updates.items():
    rank, alpha = sizes.get(known[module].path, (update.rank, update.alpha))
    # Components that are zero are not stored, and the scale is that of the whole rank.
    alpha = alpha if rank == update.rank else alpha * update.rank / rank
    up = update.up * np.float32(update.scale / (alpha / update.rank))
    unfolded[module] = dataclasses.replace(update, up=up, alpha=alpha)
  return unfolded


def from_updates(
  updates: Mapping[str, Update], known: Mapping[str, Layer]
) -> tuple[PyTree, tuple[lora.LoraRule, ...]]:
  """The adapter, float32 numpy arrays, and its rules, out of updates.

  The layers of a stack share a rule, that of the update of largest rank: the others are filled up
  with zeros, as are layers without an update, and their scales' ratio goes into b.

  Args:
    updates: by the reference's module name.
    known: what `layers` found.
  """
  stacks: dict[str, dict[str, Update]] = {}
  for module, layer in known.items():
    if module in updates:
      stacks.setdefault(layer.path, {})[module] = updates[module]
  adapter, sizes = {}, {}
  for path, members in stacks.items():
    largest = max(members.values(), key=lambda update: update.rank)
    first = known[next(iter(members))]
    a = np.zeros((*first.stack, first.n_in, largest.rank), np.float32)
    b = np.zeros((*first.stack, largest.rank, first.n_out), np.float32)
    for module, update in members.items():
      place = known[module].place
      a[place][:, : update.rank] = update.down.T
      b[place][: update.rank] = update.up.T * (update.scale / largest.scale)
    adapter[f'{path}/a'], adapter[f'{path}/b'] = a, b
    sizes[path] = (largest.rank, largest.alpha)
  return traverse_util.unflatten_dict(adapter, sep='/'), lora.exact_rules(sizes)
