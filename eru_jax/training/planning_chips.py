"""TPU slices by name: their chips' published peaks, and their devices without having them."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from eru_jax.errors import UserError

_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBIC = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16')


@dataclasses.dataclass(frozen=True)
class Chip:
  """A generation of TPUs, per chip.

  Attributes:
    flops: peak bfloat16 operations a second.
    hbm: bytes of memory, as advertised.
    usable: GiB that the compiler lets the programs of one device have.
    bandwidth: bytes a second from and to that memory.
    ici: bytes a second to the neighbours, in one direction over all links: half of what is
      published as bidirectional.
    devices: devices that a chip appears as.
    shapes: usual slices.
    source: where the peaks are published.
  """

  flops: float
  hbm: float
  usable: float
  bandwidth: float
  ici: float
  devices: int
  shapes: tuple[str, ...]
  source: str


_DOCS = 'https://docs.cloud.google.com/tpu/docs'
CHIPS = {
  'v5e': Chip(197e12, 16e9, 15.75, 819e9, 200e9, 1, _FLAT, f'{_DOCS}/v5e'),
  'v5p': Chip(459e12, 95e9, 95.74, 2765e9, 600e9, 1, _CUBIC, f'{_DOCS}/v5p'),
  'v6e': Chip(918e12, 32e9, 31.25, 1638e9, 400e9, 1, _FLAT, f'{_DOCS}/v6e'),
  'tpu7x': Chip(2307e12, 192e9, 94.75, 7380e9, 600e9, 2, _CUBIC, f'{_DOCS}/tpu7x'),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice that is not here.

  Attributes:
    name: 'v5e:2x4'.
    chip: its chips.
    devices: what a mesh is made of.
  """

  name: str
  chip: Chip
  devices: list[Any]

  @property
  def flops(self) -> float:
    """Peak operations a second of one device."""
    return self.chip.flops / self.chip.devices

  @property
  def bandwidth(self) -> float:
    """Of one device's memory, bytes a second."""
    return self.chip.bandwidth / self.chip.devices

  @property
  def ici(self) -> float:
    """Of one device, bytes a second."""
    return self.chip.ici / self.chip.devices

  @property
  def hbm_limit(self) -> int:
    """Bytes a device's programs may have."""
    return int(self.chip.usable * 2**30)


def open_slice(name: str) -> Slice:
  """Describes a slice with libtpu, on any Linux machine.

  Raises:
    UserError: if there is no such slice (listing those there are), or no libtpu.
  """
  found = re.fullmatch(r'(\w+):(\d+(?:x\d+){1,2})', name)
  chip = CHIPS.get(found[1]) if found else None
  if chip is None or len(found[2].split('x')) != len(chip.shapes[0].split('x')):
    raise _unknown(name)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      'Compiling for TPUs needs the package libtpu, which is not installed: in the clone of '
      "eru_jax, pip install -e '.[plan]' (Linux on x86; no TPU is needed)."
    )
  # Otherwise it asks a cloud that may not be there what machine this is, and refuses to be loaded
  # by two processes at once.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  from jax.experimental import topologies

  # A host of these has more chips than that.
  options = {'chips_per_host_bounds': (1, 1, 1)} if found[2] == '1x1' else {}
  try:
    with quiet():
      topology = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
  except Exception as error:  # of whatever class the plugin's is
    if 'INVALID_ARGUMENT' in str(error):
      raise _unknown(name) from error
    reason = str(error).strip().partition('\n')[0]
    raise UserError(f'libtpu cannot describe {name}: {reason}.') from error
  return Slice(name, chip, list(topology.devices))


def _unknown(name: str) -> UserError:
  flat = ', '.join(_FLAT)
  cubic = ', '.join(_CUBIC)
  return UserError(
    f'--topology={name} is no TPU slice; there are v5e and v6e with {flat}, and v5p and tpu7x '
    f'with {cubic}, such as v5e:2x4 and v5p:2x2x1.'
  )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps what libraries below Python write to stderr from the terminal, unless there is an error.

  libtpu tells at length that it has found no TPU.
  """
  sys.stderr.flush()
  kept = os.dup(2)
  with tempfile.TemporaryFile() as sink:
    os.dup2(sink.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(kept, 2)
      os.close(kept)
