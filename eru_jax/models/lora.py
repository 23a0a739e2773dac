"""Low-rank adapters as a removable parameter delta beside frozen weights.

An adapter is a nested dict that mirrors the parameters: wherever a `Dense` kernel (..., in, out)
is adapted it holds `a` (..., in, r) and `b` (..., r, out), leading axes being scanned layers.
`variables()` turns it into the `lora` collection that `eru_jax.models.layers.Dense` reads.
Leaving the collection out is the frozen base: a teacher costs no second copy of the weights.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021).
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from eru_jax.errors import UserError

PyTree = Any


@dataclasses.dataclass(frozen=True)
class LoraRule:
  """Which layers get an adapter of which size.

  Attributes:
    pattern: regular expression, searched in the layer's path, e.g. 'attn/(to|add)_' or '.*'.
    rank: inner size of the update.
    alpha: the update is scaled by alpha / rank.
  """

  pattern: str
  rank: int
  alpha: float

  def __post_init__(self):
    if self.rank < 1 or self.alpha <= 0:
      raise UserError(
        f'LoRA rule {self.pattern!r}: rank ({self.rank}) and alpha ({self.alpha}) must be positive.'
      )
    try:
      re.compile(self.pattern)
    except re.error as error:
      raise UserError(f'LoRA pattern {self.pattern!r} is no regular expression: {error}.') from None


def rule_of(path: str, rules: Sequence[LoraRule]) -> LoraRule | None:
  """The first rule that matches a layer's path, or None."""
  return next((rule for rule in rules if re.search(rule.pattern, path)), None)


def exact_rules(sizes: Mapping[str, tuple[int, float]]) -> tuple[LoraRule, ...]:
  """The rules that give exactly these layers adapters of these sizes.

  Args:
    sizes: layer path -> (rank, alpha).

  Returns:
    One rule for each distinct (rank, alpha), in the order in which they come.
  """
  layers: dict[tuple[int, float], list[str]] = {}
  for path, size in sizes.items():
    layers.setdefault(size, []).append(re.escape(path))
  return tuple(
    LoraRule(f'^({"|".join(paths)})$', rank, alpha) for (rank, alpha), paths in layers.items()
  )


def sizes(adapter: PyTree, rules: Sequence[LoraRule]) -> dict[str, tuple[int, float]]:
  """(rank, alpha) of each layer that an adapter adapts, by the layer's path.

  Raises:
    UserError: if the adapter has a layer that no rule matches.
  """
  found = {}
  for path in traverse_util.flatten_dict(adapter, sep='/'):
    layer, _, leaf = path.rpartition('/')
    if leaf == 'a':
      rule = _matching(layer, rules)
      found[layer] = (rule.rank, rule.alpha)
  return found


def _matching(layer: str, rules: Sequence[LoraRule]) -> LoraRule:
  """The rule of an adapted layer."""
  rule = rule_of(layer, rules)
  if rule is None:
    raise UserError(f'No LoRA rule matches {layer!r}: give the adapter with its own rules.')
  return rule


def init(key: jax.Array, params: PyTree, rules: Sequence[LoraRule]) -> PyTree:
  """Creates an adapter that changes nothing yet: a is random, b is zero.

  Args:
    key: randomness; each layer's share depends on its path alone.
    params: the backbone's parameters; if they still carry linen's partitioning boxes, so will
      the adapter (logical axes 'lora_channels' and 'lora_rank').
    rules: the first rule that matches a layer's path decides; unmatched layers stay frozen.

  Returns:
    The adapter, float32.

  Raises:
    UserError: if a rule matches no layer, naming it.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  adapter, used = {}, set()
  for path, boxed in flat.items():
    kernel = boxed.unbox() if isinstance(boxed, nn.meta.AxisMetadata) else boxed
    layer, _, leaf = path.rpartition('/')
    # Convolutions and embeddings are not Dense kernels; a stack adds one axis to a matrix.
    if leaf != 'kernel' or kernel.ndim not in (2, 3):
      continue
    rule = rule_of(layer, rules)
    if rule is None:
      continue
    used.add(rule)
    *stack, n_in, n_out = kernel.shape
    bound = n_in**-0.5
    a = jax.random.uniform(
      jax.random.fold_in(key, zlib.crc32(layer.encode())),
      (*stack, n_in, rule.rank),
      jnp.float32,
      -bound,
      bound,
    )
    b = jnp.zeros((*stack, rule.rank, n_out), jnp.float32)
    if isinstance(boxed, nn.LogicallyPartitioned):
      # Along the kernel's own axes, half of the adapter, its moments and its averages would lie on
      # every device of a mesh without `tensor`.
      *lead, axis_in, axis_out = boxed.names
      axis_in, axis_out = (axis and 'lora_channels' for axis in (axis_in, axis_out))
      a = nn.LogicallyPartitioned(a, (*lead, axis_in, 'lora_rank'))
      b = nn.LogicallyPartitioned(b, (*lead, 'lora_rank', axis_out))
    adapter[f'{layer}/a'], adapter[f'{layer}/b'] = a, b
  for rule in rules:
    if rule not in used:
      raise UserError(
        f'LoRA pattern {rule.pattern!r} matches no layer that an earlier rule has not taken; '
        f'layers are named like {next(iter(flat)).rpartition("/")[0]!r}.'
      )
  return traverse_util.unflatten_dict(adapter, sep='/')


def variables(
  adapter: PyTree, rules: Sequence[LoraRule], strength: jax.Array | float = 1.0
) -> PyTree:
  """The `lora` collection for `module.apply`.

  Args:
    adapter: what `init` made.
    rules: the same rules.
    strength: multiplies the update; () for all examples, or (B,) to gate it per example.

  Returns:
    The adapter with a `scale` beside every a and b.

  Raises:
    UserError: if the adapter has a layer that no rule matches.
  """
  strength = jnp.asarray(strength, jnp.float32)
  flat = traverse_util.flatten_dict(adapter, sep='/')
  out = dict(flat)
  for path, a in flat.items():
    layer, _, leaf = path.rpartition('/')
    if leaf == 'a':
      rule = _matching(layer, rules)
      stack = a.shape[:-2]
      scale = strength * (rule.alpha / rule.rank)
      out[f'{layer}/scale'] = jnp.broadcast_to(scale, (*stack, *scale.shape))
  return traverse_util.unflatten_dict(out, sep='/')


def merge(
  params: Mapping[str, Any], adapter: PyTree, rules: Sequence[LoraRule], strength: float = 1.0
) -> PyTree:
  """Parameters with the adapter folded in, for export and inference; never differentiate it.

  Args:
    params: the backbone's parameters.
    adapter: what `init` made, trained.
    rules: the same rules.
    strength: multiplies the update.

  Raises:
    UserError: if a kernel it would change is quantised.
  """
  flat = dict(traverse_util.flatten_dict(params, sep='/'))
  deltas = traverse_util.flatten_dict(variables(adapter, rules, strength), sep='/')
  for path, a in deltas.items():
    layer, _, leaf = path.rpartition('/')
    if leaf == 'a':
      if f'{layer}/kernel_scale' in flat:
        raise UserError(
          f'The kernel of {layer!r} is quantised, and its integers cannot take an adapter: merge '
          'into the parameters as they were before `quantize`, then quantise the result.'
        )
      scale = deltas[f'{layer}/scale'][..., None, None]
      kernel = flat[f'{layer}/kernel']
      delta = scale * (a @ deltas[f'{layer}/b'])
      flat[f'{layer}/kernel'] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
  return traverse_util.unflatten_dict(flat, sep='/')


def is_zero(adapter: PyTree) -> bool:
  """Whether an adapter changes nothing."""
  flat = traverse_util.flatten_dict(adapter, sep='/')
  return not any(np.any(value) for path, value in flat.items() if path.endswith('/b'))


def combine(
  parts: Sequence[tuple[PyTree, Sequence[LoraRule], float]],
) -> tuple[PyTree, tuple[LoraRule, ...]]:
  """One adapter that does what several do together, their ranks side by side.

  Args:
    parts: (adapter, its rules, strength) of each; a strength may be zero or negative.

  Returns:
    (adapter, rules): alpha equals the rank everywhere, strengths and scales are in b. A layer is
    adapted if any of the adapters adapts it.

  Raises:
    UserError: if two adapters are of models with different layers.
  """
  sides: dict[str, list[tuple[jax.Array, jax.Array]]] = {}
  for adapter, rules, strength in parts:
    flat = traverse_util.flatten_dict(variables(adapter, rules, strength), sep='/')
    for path, a in flat.items():
      layer, _, leaf = path.rpartition('/')
      if leaf == 'a':
        b = flat[f'{layer}/scale'][..., None, None] * flat[f'{layer}/b']
        sides.setdefault(layer, []).append((jnp.asarray(a), b))
  combined, sizes = {}, {}
  for layer, pairs in sides.items():
    if len({(*a.shape[:-1], b.shape[-1]) for a, b in pairs}) > 1:
      shapes = ', '.join(f'{a.shape} {b.shape}' for a, b in pairs)
      raise UserError(
        f'These adapters are not of one model: at {layer!r} they have shapes {shapes}.'
      )
    combined[f'{layer}/a'] = jnp.concatenate([a for a, _ in pairs], axis=-1)
    combined[f'{layer}/b'] = jnp.concatenate([b for _, b in pairs], axis=-2)
    rank = combined[f'{layer}/a'].shape[-1]
    sizes[layer] = (rank, float(rank))
  return traverse_util.unflatten_dict(combined, sep='/'), exact_rules(sizes)
