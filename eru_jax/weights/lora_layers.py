"""Adapters layer by layer: our stacked arrays, and one low-rank update per linear layer."""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from eru_jax.errors import UserError
from eru_jax.models import lora
from eru_jax.models.flux import FluxConfig, FluxTransformer, image_ids
from eru_jax.types import Conditioning
from eru_jax.weights import flux as flux_table

PyTree = Any


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
def layers(config: FluxConfig) -> Mapping[str, Layer]:
  """Every linear layer of an architecture, by the reference's (diffusers') module name."""

  def init():
    text = Conditioning(
      tokens=jnp.zeros((1, 1, config.joint_attention_dim)),
      mask=None,
      pooled=jnp.zeros((1, config.pooled_projection_dim)),
    )
    x, t = jnp.zeros((1, 1, config.in_channels)), jnp.zeros(1)
    model = FluxTransformer(config)
    return nn.unbox(model.init(jax.random.key(0), x, t, text, image_ids(1, 1), t)['params'])

  kernels = traverse_util.flatten_dict(jax.eval_shape(init), sep='/')
  counts, found = flux_table.counts(config), {}
  for row in flux_table.rows(config):
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
      raise UserError(f'The adapter is of another model: this one has no linear layer {layer!r}.')
    shape = (*a.shape[:-1], flat[f'{layer}/b'].shape[-1])
    wanted = (*paths[layer].stack, paths[layer].n_in, paths[layer].n_out)
    if shape != wanted:
      raise UserError(
        f'The adapter is of another model: it maps {shape} at {layer!r}, this model {wanted}.'
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
