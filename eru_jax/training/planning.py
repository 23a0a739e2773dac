"""Compiles every program of a run for a TPU slice that is not here, and says what would happen."""

import contextlib
import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from eru_jax import sharding
from eru_jax.errors import UserError
from eru_jax.files import replace_file
from eru_jax.flops import traced_flops
from eru_jax.training import config as config_lib
from eru_jax.training.planning_chips import Slice, open_slice, quiet
from eru_jax.training.planning_hlo import Traffic, collectives
from eru_jax.training.planning_model import Planned, open_planned
from eru_jax.training.planning_programs import Program, bytes_per_device, programs, traced
from eru_jax.training.planning_remedies import remedies
from eru_jax.training.run import print_plan

# Of libtpu, which spends most of its time on speed that a plan has no use for.
_QUICKLY = {'exec_time_optimization_effort': -1.0}
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What is known of a program without running it.

  Attributes:
    name: the program's.
    fits: whether a device has the memory, with what else is on it.
    hbm: bytes per device by class: 'parameters', 'optimizer', 'inputs', 'temporaries' (the most
      that lives at once beyond those, results included), 'code', and 'resident', of what is there
      without being used; where it does not fit the compiler tells only what it would need.
    needs: bytes a device would need, resident ones included.
    limit: bytes it has.
    flops: operations of one run over all devices, as the mathematics asks.
    executed: with what the backward pass computes again.
    traffic: collectives.
    seconds: of one run, by the slowest of compute, memory and links at their published peaks.
    bound: which of them.
    mfu: flops over what the devices could do in that time.
    compile_seconds: wall time.
    compile_cpu_seconds: of all threads, which a busy machine does not stretch.
  """

  name: str
  fits: bool
  hbm: Mapping[str, int]
  needs: int
  limit: int
  flops: int
  executed: int
  traffic: tuple[Traffic, ...]
  seconds: float | None
  bound: str
  mfu: float | None
  compile_seconds: float
  compile_cpu_seconds: float

  def to_json(self) -> dict[str, Any]:
    return {
      'fits': self.fits,
      'hbm_bytes': self.needs,
      'hbm_limit': self.limit,
      'flops': self.flops,
      'step_seconds': self.seconds,
      'mfu': self.mfu,
      'compile_seconds': self.compile_seconds,
      'compile_cpu_seconds': self.compile_cpu_seconds,
      'hbm_by_class': dict(self.hbm),
      'executed_flops': self.executed,
      'bound': self.bound,
      'collectives': [dataclasses.asdict(part) for part in self.traffic],
    }


def plan(
  values: Any,
  topology: str,
  json_path: str | None = None,
  tell: Callable[[str], None] = print,
  only: str = '',
  thorough: bool = False,
) -> dict[str, Any]:
  """Plans the run of a config on a slice.

  Args:
    values: the config's.
    topology: name of the slice, 'v5e:2x4'.
    json_path: also write the result there.
    tell: takes lines for people.
    only: regular expression; programs in whose name it is not found are left out.
    thorough: as of `estimate_program`.

  Returns:
    {'topology', 'programs': {name: Estimate.to_json()}}.

  Raises:
    UserError: for whatever the user can mend; not where something does not fit.
  """
  config = config_lib.from_mapping(config_lib.ExperimentConfig, values)
  try:
    wanted = re.compile(only)
  except re.error as error:
    raise UserError(f'--only={only} is no regular expression: {error}.') from error
  target = open_slice(topology)
  mesh = sharding.make_mesh(config.mesh, target.devices)
  given, config = config, config.on(sharding.batch_share(mesh))
  print_plan(config, mesh)
  planned = open_planned(config, mesh)
  for note in planned.notes:
    tell(f'Note: {note}')
  found: dict[str, Any] = {}
  result = {'topology': topology, 'programs': found}

  def write() -> None:
    if json_path:
      replace_file(pathlib.Path(json_path), (json.dumps(result, indent=2) + '\n').encode())

  write()  # Before minutes of compilation: a place that cannot be written is told now.
  names = []
  for program, needed in zip(programs(planned), programs(_without_remat(planned)), strict=True):
    names.append(program.name)
    if not wanted.search(program.name):
      continue
    estimate = estimate_program(program, needed, target, thorough)
    found[estimate.name] = estimate.to_json()
    for line in describe(estimate, remedies(program.name, given, mesh)):
      tell(line)
    write()  # After each of them: the next may take minutes.
  if not found:
    raise UserError(f'--only={only} is found in no program; there are {", ".join(names)}.')
  return result


def _without_remat(planned: Planned) -> Planned:
  """The same run, computing nothing twice."""
  experiment, model = planned.experiment, planned.snapshot.model
  model = dataclasses.replace(model, backbone=model.backbone.clone(remat='none'))
  return dataclasses.replace(
    planned,
    experiment=experiment,
    snapshot=dataclasses.replace(planned.snapshot, model=model),
  )


def estimate_program(
  program: Program, needed: Program, target: Slice, thorough: bool = False
) -> Estimate:
  """Compiles a program for a slice.

  Args:
    program: what to compile.
    needed: the same without rematerialisation, to count what the mathematics asks.
    target: the slice.
    thorough: compile just as the run would, in five times the time.
  """
  executed = traced_flops(traced(program))
  flops = traced_flops(traced(needed))
  spent = _stopwatch()
  resident = bytes_per_device(program.resident)
  limit, devices = target.hbm_limit, program.mesh.devices.size
  try:
    with sharding.use_mesh(program.mesh), quiet(), _precision(program):
      lowered = program.function.lower(*program.arguments)
      compiled = lowered.compile(compiler_options=None if thorough else _QUICKLY)
  except jax.errors.JaxRuntimeError as error:
    needs = _out_of_memory(str(error))
    if needs is None:
      raise
    hbm = {'program': needs, 'resident': resident}
    needs += resident
    return Estimate(
      program.name, False, hbm, needs, limit, flops, executed, (), None, '', None, *spent()
    )
  compiling = spent()
  memory = compiled.memory_analysis()
  hbm = {kind: bytes_per_device(tree) for kind, tree in program.kinds.items()}
  # Those that a program does not use are no arguments of it any more, but they are there.
  arguments = max(bytes_per_device(program.arguments), memory.argument_size_in_bytes)
  hbm['inputs'] = arguments - sum(hbm.values())
  # Not temp_size_in_bytes: that is where all of them would lie, and not all live at once.
  hbm['temporaries'] = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
  hbm['code'] = memory.generated_code_size_in_bytes
  hbm['resident'] = resident
  needs = sum(hbm.values())
  traffic = tuple(collectives(compiled.as_text(), dict(program.mesh.shape)))
  weights = sum(hbm.get(kind, 0) for kind in ('parameters', 'optimizer'))
  times = {
    'compute': executed / devices / target.flops,
    'memory': (program.passes * hbm.get('parameters', 0) + weights + 2 * memory.temp_size_in_bytes)
    / target.bandwidth,
    'links': sum(part.bytes for part in traffic) / target.ici,
  }
  bound = max(times, key=times.get)
  seconds = times[bound]
  mfu = flops / devices / target.flops / seconds if seconds else 0.0
  return Estimate(
    program.name,
    needs <= limit,
    hbm,
    needs,
    limit,
    flops,
    executed,
    traffic,
    seconds,
    bound,
    mfu,
    *compiling,
  )


def _stopwatch() -> Callable[[], tuple[float, float]]:
  """A function that tells the seconds since now, of the clock and of all threads."""
  wall, processor = time.monotonic(), time.process_time()
  return lambda: (time.monotonic() - wall, time.process_time() - processor)


@contextlib.contextmanager
def _precision(program: Program) -> Iterator[None]:
  """Prompts are encoded with exact products."""
  if not program.name.startswith('prompts.'):
    yield
    return
  with jax.default_matmul_precision('highest'):
    yield


def _out_of_memory(message: str) -> int | None:
  """Bytes that the compiler says it would need, None if it says something else."""
  if 'RESOURCE_EXHAUSTED' not in message:
    return None
  found = re.search(r'Used ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT]?)\) exceeds', message)
  if not found:
    return None
  number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
  return int(float(number) * _UNITS[unit])


def describe(estimate: Estimate, helps: Sequence[str] = ()) -> Iterator[str]:
  """The lines that `plan` prints of a program.

  Args:
    estimate: of it.
    helps: what to do where it does not fit.
  """
  gib = {name: f'{size / 2**30:.2f}' for name, size in estimate.hbm.items()}
  needs, limit = estimate.needs / 2**30, estimate.limit / 2**30
  parts = ', '.join(f'{name} {size}' for name, size in gib.items())
  yield estimate.name
  verdict = 'fits: needs' if estimate.fits else 'does not fit: needs'
  yield f'  {verdict} {needs:.2f} of {limit:.2f} GiB a device ({parts})'
  again = estimate.executed / max(estimate.flops, 1) - 1
  more = f', {100 * again:.0f} % more with what is computed again' if again > 0.005 else ''
  yield f'  {estimate.flops:.3g} operations by formula{more}'
  for part in estimate.traffic[:4]:
    yield (
      f'  {part.kind} along {part.axes}: {part.count} times, {part.bytes / 2**30:.2f} GiB a device'
    )
  if estimate.seconds is not None:
    yield (
      f'  at least {estimate.seconds:.3g} s, bound by {estimate.bound}, so at most '
      f'{100 * estimate.mfu:.0f} % MFU'
    )
  yield (
    f'  compiled in {estimate.compile_seconds:.0f} s '
    f'({estimate.compile_cpu_seconds:.0f} s of processor time)'
  )
  if not estimate.fits:
    yield f'  What helps: {"; ".join(helps)}.'
