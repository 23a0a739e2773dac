"""How attention is split over a mesh, sequence axis included.

Between the blocks, tokens are split over `sequence`. Attention needs every key for every query, and
there are two ways to see to it. Ulysses (Jacobs et al., arXiv:2309.14509) turns the split of tokens
into one of heads by an all-to-all, and back after: of queries, keys, values and result each device
sends (n - 1) / n^2 of what there is. Gathering keys and values sends (n - 1) / n of both, n / 2
times as much, but takes any number of heads. FLUX.1's 24 heads serve `tensor` x `sequence` up to 8
and more, so the first is the rule here, the second what is left where heads do not divide.
"""

import dataclasses
import math

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where (B, L, H, D) lies in attention.

  Attributes:
    query: of queries and the result.
    key: of keys and values.
    batch_size: devices that share the examples.
    query_size: devices that share the queries of an example: 1, or all of `sequence` where heads
      do not divide.
    sequence_size: devices that share the tokens of an example between the blocks.
  """

  query: P
  key: P
  batch_size: int
  query_size: int
  sequence_size: int

  @classmethod
  def of(cls, heads: int) -> 'Layout | None':
    """The layout on the mesh in context by the logical rules in context; None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not nn.get_logical_axis_rules():
      return None

    def axes(name: str) -> tuple[str, ...]:
      found = nn.logical_to_mesh_axes((name,))[0] or ()
      return (found,) if isinstance(found, str) else tuple(found)

    def size(names: tuple[str, ...]) -> int:
      return math.prod(mesh.shape[name] for name in names)

    batch, length, across = axes('batch'), axes('length'), axes('heads')
    if heads % size(across):
      across = ()
    if heads % size(across + length) == 0:
      whole = P(batch, None, across + length)
      return cls(whole, whole, size(batch), 1, size(length))
    return cls(P(batch, length, across), P(batch, None, across), size(batch), *[size(length)] * 2)


def place(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
  """Puts (B, L, H, D) where attention wants them, if tokens are split at all.

  Parts of a sequence had better be placed before they are joined: joined tokens that are split
  would have to be moved twice.
  """
  layout = Layout.of(query.shape[2])
  if layout is None or layout.sequence_size == 1:
    return query, key, value
  specs = (layout.query, layout.key, layout.key)
  constrain = jax.lax.with_sharding_constraint
  return tuple(constrain(x, spec) for x, spec in zip((query, key, value), specs, strict=True))
