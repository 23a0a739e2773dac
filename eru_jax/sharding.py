"""The device mesh, the one table of logical axis rules, and shardings of training states."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eru_jax.errors import UserError

PyTree = Any

# Logical axis (named in the modules) -> mesh axis or axes. First match wins.
RULES = (
  ('batch', ('data', 'fsdp')),
  ('length', 'sequence'),
  ('act_embed', None),
  ('embed', 'fsdp'),
  ('mlp', 'tensor'),
  ('heads', 'tensor'),
  ('vocab', 'tensor'),
  ('conv_in', None),
  ('conv_out', 'fsdp'),
  ('lora_rank', None),
  ('norm', None),
  ('layers', None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; -1, once, means all remaining devices.

  Attributes:
    data: copies of the parameters, each with its share of the batch.
    fsdp: parameters and batch split along it.
    tensor: heads and MLP channels split along it.
    sequence: long sequences split along it.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
  """Builds the mesh over all devices, or the given ones.

  Raises:
    UserError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dataclasses.asdict(config)
  given = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  valid = all(size == -1 or size >= 1 for size in sizes.values()) and len(free) <= 1
  if not valid or len(devices) % given or (not free and given != len(devices)):
    raise UserError(
      f'mesh {sizes} does not fit {len(devices)} devices: the sizes must multiply to that number, '
      'and at most one may be -1 (the rest).'
    )
  for name in free:
    sizes[name] = len(devices) // given
  # Linen's logical constraints need Auto axes; make_mesh would default to Explicit ones.
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices
  )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
  """What a model must be traced in for the constraints in its modules to hold.

  Linen skips them without a word unless it finds both a mesh and rules; then nothing but the
  parameters is split, and every device computes the whole batch.
  """
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def logical_shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
  """Shardings of a tree whose leaves carry linen's logical axis names (abstract or not).

  Raises:
    UserError: if the mesh does not divide an array, naming both.
  """
  shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
  leaves, _ = jax.tree_util.tree_flatten_with_path(shardings)
  for (path, sharding), array in zip(leaves, jax.tree.leaves(boxed), strict=True):
    for size, axes in zip(array.shape, sharding.spec, strict=False):
      names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
      if size % math.prod(mesh.shape[name] for name in names):
        where = jax.tree_util.keystr(path, simple=True, separator='/')
        sizes = ' x '.join(f'{name} = {mesh.shape[name]}' for name in names)
        raise UserError(
          f'mesh {sizes} does not divide the {size} channels of {where}, of shape {array.shape}.'
        )
  return shardings


def unboxed(boxed: PyTree) -> PyTree:
  """Abstract parameters without the names of their axes.

  Unlike linen's, this puts no constraint on them, which under a mesh only compiled code may.
  """

  def is_box(node: Any) -> bool:
    return isinstance(node, nn.meta.AxisMetadata)

  return jax.tree.map(lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def shardings_like(tree: PyTree, params: PyTree, param_shardings: PyTree, mesh: Mesh) -> PyTree:
  """Shardings of a training state: every subtree shaped like the parameters shares theirs.

  Adam's moments, averages and policies repeat the parameter tree; counters are replicated. Muon
  keeps two such trees, each with gaps where the other one has moments. Where several networks are
  trained at once, each has a state of its own.

  Args:
    tree: the (abstract) state.
    params: the (abstract) parameters, or a tuple of one tree for each of several networks.
    param_shardings: their shardings.
    mesh: where scalars are replicated.
  """
  pairs = [(params, param_shardings)]
  if isinstance(params, tuple):
    pairs += zip(params, param_shardings, strict=True)
  known = {jax.tree.structure(part): shardings for part, shardings in pairs}

  def is_gap(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)

  def is_params(node: Any) -> bool:
    return jax.tree.structure(node, is_leaf=is_gap) in known

  def assign(node: Any) -> Any:
    if not is_params(node):
      return replicated(mesh)
    shardings = known[jax.tree.structure(node, is_leaf=is_gap)]
    return jax.tree.map(lambda x, where: x if is_gap(x) else where, node, shardings, is_leaf=is_gap)

  return jax.tree.map(assign, tree, is_leaf=is_params)
