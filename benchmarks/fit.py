"""Does it fit? Compiles what the README promises for TPU slices, and makes a table of it.

    python benchmarks/fit.py            # everything that is not in the results yet
    python benchmarks/fit.py --only=int8

Needs libtpu and no TPU. Results are kept program by program in benchmarks/results/fit.json, so
that it can be stopped at any time; delete a row there to have it compiled again.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from absl import app, flags

_ROOT = pathlib.Path(__file__).parent.parent
_RESULTS = _ROOT / 'benchmarks' / 'results' / 'fit.json'
_ONLY = flags.DEFINE_string('only', '', 'Regular expression on the names of rows.')
_PROGRAMS = flags.DEFINE_string('programs', '', 'Regular expression on the names of programs.')

_TEXT = ('prompts.t5', 'prompts.clip')
_DK_DM = (
  'dk_dm.train_step',
  'dk_dm.rollout',
  'dk_dm.teacher_pictures',
  'evaluate_dk_dm.sample_and_decode',
)
_NO_RL = ('no_rl.train_step', 'no_rl.rollout_and_reward', 'evaluate_no_rl.sample_and_decode')
_FULL = ('flow_matching.train_step', 'evaluate_flow_matching.sample_and_decode')


@dataclasses.dataclass(frozen=True)
class Row:
  """A run on a slice.

  Attributes:
    what: in words.
    config: as of --config.
    topology: the slice.
    programs: of the run, those that cost most first.
    overrides: of the config's values.
    thorough: compile as the run itself would, because it is close.
  """

  what: str
  config: str
  topology: str
  programs: tuple[str, ...]
  overrides: tuple[str, ...] = ()
  thorough: bool = False

  @property
  def name(self):
    thoroughly = ', thoroughly' if self.thorough else ''
    return f'{self.config.removeprefix("configs/")} on {self.topology}{thoroughly}'

  @property
  def command(self):
    changes = [f'--config.{change}' for change in self.overrides]
    thorough = ['--thorough'] if self.thorough else []
    return [f'--config={self.config}', f'--topology={self.topology}', *changes, *thorough]


def _full(topology, batch, *overrides):
  changes = (f'flow_matching.batch_size={batch}', 'flow_matching.optimizer.moments=bfloat16')
  config = 'configs/flux_finetune.py:full,res=1024'
  what = f'full fine-tuning, 1024 px, {batch} pictures a step'
  return Row(what, config, topology, _FULL, (*changes, *overrides))


_ROWS = (
  Row(
    'DK-DM, LoRA rank 16 on int8, 512 px',
    'configs/flux_dev_dk_dm.py:res=512,int8',
    'v5e:1x1',
    (*_DK_DM, *_TEXT),
  ),
  Row('DK-DM, LoRA rank 64, 1024 px', 'configs/flux_dev_dk_dm.py:res=1024', 'v5e:2x2', _DK_DM),
  Row('NO-RL, LoRA rank 64, 1024 px', 'configs/flux_dev_no_rl.py:res=1024', 'v5e:2x2', _NO_RL),
  _full('v5p:2x2x1', 8, 'flow_matching.per_device=2'),
  _full('v6e:2x4', 8),
  _full('v5e:4x4', 16),
  Row(
    'DK-DM, LoRA rank 64, 1024 px, each picture on 8 chips',
    'configs/flux_dev_dk_dm.py:res=1024',
    'v5e:16x16',
    _DK_DM,
    ('mesh.fsdp=32', 'mesh.sequence=8'),
  ),
  _full('v6e:16x16', 256),
)
# What comes within a twentieth of the limit is compiled once more, as the run would.
_CLOSE = ('v5e:1x1', 'v6e:2x4', 'v5e:4x4')
ROWS = (
  *_ROWS,
  *(
    dataclasses.replace(
      row, what=f'{row.what}; compiled thoroughly', programs=row.programs[:1], thorough=True
    )
    for row in _ROWS
    if row.topology in _CLOSE
  ),
)


def main(argv):
  del argv
  for row in ROWS:
    if not re.search(_ONLY.value, row.name):
      continue
    for program in row.programs:
      if re.search(_PROGRAMS.value, program) and program not in _known().get(row.name, {}):
        _compile(row, program)
  _write_table(_known())


def _known():
  """Row -> program -> what `plan` found."""
  return json.loads(_RESULTS.read_text())['rows'] if _RESULTS.exists() else {}


def _compile(row, program):
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / 'plan.json'
    command = [sys.executable, '-m', 'eru_jax.plan', *row.command, f'--json={path}']
    command.append(f'--only=^{re.escape(program)}$')
    environment = os.environ | {'PYTHONPATH': str(_ROOT)}
    result = subprocess.run(command, cwd=_ROOT, env=environment, check=False)
    if result.returncode or not path.exists():
      print(f'{row.name}: {program} could not be planned (status {result.returncode})')
      return
    found = json.loads(path.read_text())['programs']
  # Read again: another row may have been written meanwhile.
  rows = _known()
  rows.setdefault(row.name, {}).update(found)
  names = ('jax', 'libtpu', 'flax', 'optax')
  versions = {name: importlib.metadata.version(name) for name in names}
  _RESULTS.write_text(json.dumps({'versions': versions, 'rows': rows}, indent=1) + '\n')
  _write_table(rows)


def _write_table(rows):
  lines = [
    '| run | slice | program | needs, GiB a device | of | fits | at least | MFU at most | compile, '
    'CPU s |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for row in ROWS:
    for program in row.programs:
      found = rows.get(row.name, {}).get(program)
      if found is None:
        continue
      slow = found['step_seconds'] is None
      seconds = '' if slow else f'{found["step_seconds"]:.3g} s, by {found["bound"]}'
      mfu = '' if slow else f'{100 * found["mfu"]:.0f} %'
      cells = (
        row.what,
        row.topology,
        program,
        f'{found["hbm_bytes"] / 2**30:.2f}',
        f'{found["hbm_limit"] / 2**30:.2f}',
        'yes' if found['fits'] else 'no',
        seconds,
        mfu,
        f'{found["compile_cpu_seconds"]:.0f}',
      )
      lines.append(f'| {" | ".join(cells)} |')
  lines += ['', 'Every row is one of these, with `--only` and the name of the program:', '', '```']
  lines += [f'python -m eru_jax.plan {" ".join(row.command)}' for row in ROWS if row.name in rows]
  lines.append('```')
  _RESULTS.with_suffix('.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
  app.run(main)
