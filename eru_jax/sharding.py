"""The device mesh, the one table of logical axis rules, and shardings of training states."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eru_jax.errors import UserError

PyTree = Any
AXES = ('data', 'fsdp', 'tensor', 'sequence')

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
  ('lora_channels', 'fsdp'),
  ('lora_rank', None),
  ('norm', None),
  ('layers', None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; -1, once, means all remaining devices.

  The first four are sizes within a slice: devices that a fast network joins, as the chips of a TPU
  slice or the GPUs of a node. Several slices multiply the first two by the last two.

  Attributes:
    data: copies of the parameters, each with its share of the batch.
    fsdp: parameters and batch split along it.
    tensor: heads and MLP channels split along it.
    sequence: long sequences split along it.
    dcn_data: slices along `data`, which then exchange nothing but gradients; -1 is all that remain.
    dcn_fsdp: slices along `fsdp`: for parameters too large for one slice.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1
  dcn_data: int = -1
  dcn_fsdp: int = 1


def parse_mesh(text: str) -> MeshConfig:
  """Reads sizes such as 'fsdp=4' or 'data=2,fsdp=-1'.

  Without `data`, what the other sizes leave goes there.

  Raises:
    UserError: if it is written otherwise.
  """
  names = [field.name for field in dataclasses.fields(MeshConfig)]
  sizes: dict[str, int] = {}
  for part in text.split(','):
    found = re.fullmatch(r'\s*(\w+)\s*=\s*(-?\d+)\s*', part)
    if found is None or found[1] not in names or found[1] in sizes:
      raise UserError(
        f'--mesh={text}: give sizes of {", ".join(names)} with commas between, each once, such as '
        'data=1,fsdp=-1; -1 is what the others leave.'
      )
    sizes[found[1]] = int(found[2])
  data = 1 if -1 in sizes.values() else -1
  return MeshConfig(**{'data': data} | sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Builds the mesh over all devices, or the given ones.

  Raises:
    UserError: if the sizes do not multiply to the number of devices, or of slices.
  """
  devices = jax.devices() if devices is None else devices
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  sizes = _filled(
    {name: getattr(config, name) for name in AXES}, len(devices) // slices, 'devices', slices
  )
  across = {name: getattr(config, f'dcn_{name}') for name in ('data', 'fsdp')}
  across = _filled({f'dcn_{name}': size for name, size in across.items()}, slices, 'slices')
  shape = tuple(sizes.values())
  # Linen's logical constraints need Auto axes; make_mesh would default to Explicit ones.
  kinds = (AxisType.Auto,) * len(AXES)
  if slices == 1:
    return jax.make_mesh(shape, AXES, kinds, devices=devices)
  outer = (across['dcn_data'], across['dcn_fsdp'], 1, 1)
  arranged = mesh_utils.create_hybrid_device_mesh(shape, outer, devices)
  return Mesh(arranged, AXES, axis_types=kinds)


def _filled(sizes: dict[str, int], count: int, what: str, slices: int = 1) -> dict[str, int]:
  """Puts what is left in place of -1.

  Raises:
    UserError: if the sizes do not multiply to the count.
  """
  given = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  valid = all(size == -1 or size >= 1 for size in sizes.values()) and len(free) <= 1
  if not valid or count % given or (not free and given != count):
    where = f' of each of {slices} slices' if slices > 1 else ''
    raise UserError(
      f'mesh {sizes} does not fit {count} {what}{where}: the sizes must multiply to that number, '
      'and at most one may be -1 (the rest).'
    )
  return sizes | {name: count // given for name in free}


def this_device() -> Mesh:
  """The mesh of what a process computes for itself, on its first device."""
  return make_mesh(MeshConfig(), jax.local_devices()[:1])


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
          f'mesh {sizes} does not divide the {size} channels of {where}, of shape {array.shape}: '
          f'take a divisor of {size}.'
        )
  return shardings


def unboxed(boxed: PyTree) -> PyTree:
  """Abstract parameters without the names of their axes.

  Unlike linen's, this puts no constraint on them, which under a mesh only compiled code may.
  """

  def is_box(node: Any) -> bool:
    return isinstance(node, nn.meta.AxisMetadata)

  return jax.tree.map(lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box)


def batch_share(mesh: Mesh) -> int:
  """How many devices (or groups of such) split a batch."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def described(tree: PyTree, layout: PyTree) -> PyTree:
  """Shapes and dtypes of arrays (abstract or not), laid out as they would be on a mesh.

  Args:
    tree: the arrays.
    layout: their shardings, or one for all of them.
  """
  if isinstance(layout, jax.sharding.Sharding):
    layout = jax.tree.map(lambda _: layout, tree)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, layout
  )


def split_first(mesh: Mesh) -> NamedSharding:
  """Of arrays (N, ...) whose rows all devices share as they share the batch."""
  return NamedSharding(mesh, P(('data', 'fsdp')))


def split_second(mesh: Mesh) -> NamedSharding:
  """Of microbatches (M, N, ...), each of which all devices share."""
  return NamedSharding(mesh, P(None, ('data', 'fsdp')))


@functools.cache
def compiled_whole(
  function: Callable, mesh: Mesh, static_argnums: tuple[int, ...] = ()
) -> Callable:
  """A function compiled for a mesh, all of its results on every device.

  For what the host reads. Left to itself, the partitioner may split them as no array outside of a
  program can be: a batch that the devices cannot share evenly is an error then. And each process
  finds on its own devices what others have computed.
  """
  return jax.jit(function, static_argnums=static_argnums, out_shardings=replicated(mesh))


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
