"""What devices send to each other, read from a compiled program's HLO text."""

import collections
import dataclasses
import math
import re

import numpy as np

_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_COLLECTIVE = re.compile(rf' ({"|".join(_KINDS)})(?:-start)?\((.*)')
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_CALLED = re.compile(r'(?:body|calls|to_apply|called_computations)=\{?([^,{}]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')
_BOUND = re.compile(r' compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT')
_SHAPE = re.compile(r'\b(pred|[suf]\d+\w*|bf16|c64|c128)\[([\d,]*)\]')
_BITS = {'pred': 8, 'bf16': 16, 'c64': 64, 'c128': 128}


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind along the same mesh axes.

  Attributes:
    kind: 'all-gather' and so on.
    axes: names of the mesh axes, joined by '+'.
    count: how often a device takes part, loops counted.
    bytes: what one device receives.
  """

  kind: str
  axes: str
  count: int
  bytes: int


def collectives(hlo: str, mesh_shape: dict[str, int]) -> list[Traffic]:
  """Collectives of a program, the most bytes first.

  Args:
    hlo: text of an optimised module.
    mesh_shape: sizes of the mesh's axes, in its order; a partition's number is its place in it.
  """
  bodies = _computations(hlo)
  turns = _turns(bodies)
  found: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
  for name, lines in bodies.items():
    for line in lines:
      match = _COLLECTIVE.search(line)
      if not match or not turns[name]:
        continue
      kind = match[1]
      groups = _groups(match[2], math.prod(mesh_shape.values()))
      size = 2 if kind == 'collective-permute' else groups.shape[1]
      if size == 1:
        continue
      total = found[kind, _axes(groups, mesh_shape)]
      total[0] += turns[name]
      total[1] += turns[name] * _received(kind, size, line[: match.start()], '-start(' in line)
  traffic = [Traffic(*key, *value) for key, value in found.items()]
  return sorted(traffic, key=lambda t: -t.bytes)


def _computations(hlo: str) -> dict[str, list[str]]:
  """Name -> lines, the entry computation's name being ''."""
  bodies: dict[str, list[str]] = {}
  name = None
  for line in hlo.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      name = '' if line.startswith('ENTRY') else head[1]
      bodies[name] = []
    elif name is not None:
      bodies[name].append(line)
  return bodies


def _turns(bodies: dict[str, list[str]]) -> dict[str, int]:
  """How often each computation runs."""
  calls: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
  for name, lines in bodies.items():
    for line in lines:
      times = _trips(line, bodies) if ' while(' in line else 1
      names = [n for found in _BRANCHES.findall(line) for n in found.split(',')]
      names += _CALLED.findall(line)
      for called in {n.strip().removeprefix('%') for n in names}:
        if called in bodies:
          calls[called].append((name, times))
  found: dict[str, int] = {'': 1}

  def turns(name: str) -> int:
    if name not in found:
      found[name] = 0
      found[name] = sum(turns(caller) * times for caller, times in calls[name])
    return found[name]

  return {name: turns(name) for name in bodies}


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
  """Of a loop: as it is annotated, or up to what its condition compares its counter with.

  Loops of JAX count from 0. One whose end depends on what it computes counts once.
  """
  known = _TRIPS.search(line)
  if known:
    return int(known[1])
  condition = _CONDITION.search(line)
  for step in bodies.get(condition[1], ()) if condition else ():
    bound = _BOUND.search(step)
    if bound and 'ROOT' in step:
      for other in bodies[condition[1]]:
        number = re.search(rf'%?{re.escape(bound[1])} = .* constant\((\d+)\)', other)
        if number:
          return int(number[1])
  return 1


def _groups(options: str, devices: int) -> np.ndarray:
  """(groups, members) of a collective; a permutation's pairs."""
  pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', options)
  if pairs:
    numbers = [int(n) for n in re.findall(r'\d+', pairs[1])]
    return np.array(numbers).reshape(-1, 2)
  iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', options)
  if iota:
    shape, dims = ([int(n) for n in iota[i].split(',')] for i in (1, 2))
    order = [int(n) for n in iota[3].split(',')] if iota[3] else range(len(dims))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
  named = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}', options
  )
  if named:
    return _named_groups(named[1], named[2])
  listed = re.search(r'replica_groups=\{(\{.*?\})\}', options)
  if listed:
    return np.array([[int(n) for n in re.findall(r'\d+', g)] for g in listed[1].split('},')])
  return np.arange(devices)[None]


def _named_groups(axes: str, members: str) -> np.ndarray:
  """Groups as some axes of a mesh ('a'=4,'b'=2), or as factors of such ('a':(2)2)."""
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
  dims: list[int] = []
  chosen: list[int] = []
  for name, size in sizes.items():
    parts = re.findall(rf"'{name}'(?::\((\d+)\)(\d+))?", members)
    # An axis is a major part, what is meant, and a minor one.
    before, taken = (int(n or 1) for n in parts[0]) if parts and parts[0][0] else (1, size)
    split = [before, taken, size // (before * taken)]
    if parts:
      chosen.append(len(dims) + 1)
    dims += split
  rest = [axis for axis in range(len(dims)) if axis not in chosen]
  order = np.arange(math.prod(dims)).reshape(dims).transpose(rest + chosen)
  return order.reshape(-1, math.prod(dims[axis] for axis in chosen))


def _axes(groups: np.ndarray, mesh_shape: dict[str, int]) -> str:
  """The axes along which members of a group differ."""
  places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
  differ = (places != places[:, :, :1]).any(axis=(1, 2))
  return '+'.join(name for name, moved in zip(mesh_shape, differ, strict=True) if moved)


def _received(kind: str, size: int, result: str, is_start: bool) -> int:
  """Bytes that one member of a group receives, of what the line says of its result."""
  sizes = [_bytes(*shape) for shape in _SHAPE.findall(result)]
  # What starts returns its operands, too, and some numbers.
  if is_start and kind != 'all-reduce':
    sizes = [max(sizes)] if kind != 'reduce-scatter' else [max(sizes) // size]
  whole = sum(sizes)
  if kind == 'collective-permute':
    return whole
  if kind == 'all-reduce':
    return 2 * whole * (size - 1) // size
  return whole * (size - 1) if kind == 'reduce-scatter' else whole * (size - 1) // size


def _bytes(dtype: str, dims: str) -> int:
  bits = _BITS.get(dtype) or int(re.search(r'\d+', dtype)[0])
  return math.prod(int(n) for n in dims.split(',') if n) * bits // 8
