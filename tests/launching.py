"""A clone, and stand-ins for the tools that launchers call: they note how, and play along."""

import dataclasses
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
FILES = ('LICENSE', 'README.md', 'pyproject.toml', 'requirements.txt', 'setup.cfg')
# All that launchers may use of a system without being told what is missing.
TOOLS = 'bash sh awk cat cp cut date dirname env flock grep hostname kill mkdir mktemp rm sed seq'
TOOLS += ' setsid sleep tail tar true gzip'

# Every stand-in notes its arguments and what it was told by the environment.
_NOTE = """
import json, os, sys, tempfile
name = os.path.basename(sys.argv[0])
with open(os.path.join(os.environ['NOTES'], name), 'a') as file:
  ours = ('ERU_', 'JAX_', 'XLA_', 'CUDA_', 'LIBTPU_')
  told = {k: v for k, v in os.environ.items() if k.startswith(ours)}
  file.write(json.dumps({'arguments': sys.argv[1:], 'environment': told}) + '\\n')
"""

# Runs what is meant for the workers of a TPU, each with a home of its own.
_GCLOUD = """
import pathlib, shutil, subprocess
arguments = sys.argv[1:]
flags = dict(a[2:].split('=', 1) for a in arguments if a.startswith('--') and '=' in a)
workers = range(2) if flags.get('worker') == 'all' else [int(flags.get('worker', 0))]
for worker in workers:
  home = pathlib.Path(os.environ['NOTES'], f'worker{worker}')
  home.mkdir(exist_ok=True)
  if 'scp' in arguments:
    shutil.copy(arguments[arguments.index('scp') + 1], home)
  elif 'ssh' in arguments:
    # The home alone tells them apart: nothing else of the user's computer reaches them.
    environment = {k: os.environ[k] for k in ('PATH', 'NOTES', 'TRAIN') if k in os.environ}
    result = subprocess.run(
      ['bash', '-c', flags['command']], cwd=home, env=environment | {'HOME': str(home)}
    )
    if result.returncode:
      sys.exit(result.returncode)
"""

# The batch script as Slurm would run it: from a copy, with the directory kept.
_SBATCH = """
import pathlib, shutil, subprocess
at = next(i for i, a in enumerate(sys.argv[1:], 1) if not a.startswith('-'))
copy = pathlib.Path(os.environ['NOTES'], 'spool', 'slurm_script')
copy.parent.mkdir(exist_ok=True)
shutil.copy(sys.argv[at], copy)
environment = os.environ | {'SLURM_JOB_ID': '7'}
if any(a.startswith('--array') for a in sys.argv):
  environment['SLURM_ARRAY_JOB_ID'] = '7'
sys.exit(subprocess.run(['bash', str(copy), *sys.argv[at + 1 :]], env=environment).returncode)
"""

_SRUN = """
at = next(i for i, a in enumerate(sys.argv[1:], 1) if not a.startswith('-'))
os.execvp(sys.argv[at], sys.argv[at:])
"""

# What was laid upon the image is kept, as the pods would find it.
_XPK = """
import shutil
for argument in sys.argv:
  if argument.startswith('--script-dir='):
    shutil.copytree(argument.split('=', 1)[1], os.path.join(os.environ['NOTES'], 'app'))
"""

_NVIDIA_SMI = """
for index in range(4):
  print(f'GPU {index}: NVIDIA H100')
"""

# Training: ends at once, fails, or waits for SIGTERM and saves, as TRAIN says.
_TRAIN = """
import pathlib, signal, time
how = os.environ.get('TRAIN', 'finish')
workdir = pathlib.Path(next(a.split('=', 1)[1] for a in sys.argv if a.startswith('--workdir=')))
if how == 'finish':
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'summary.json').write_text('{}')
if how == 'fail':
  sys.exit(3)
if how == 'wait':
  def save(*_):
    print('saved', flush=True)
    sys.exit(0)
  signal.signal(signal.SIGTERM, save)
  print('training', flush=True)
  deadline = time.time() + 600
  while time.time() < deadline:
    time.sleep(0.05)
"""

_PYTHON = """#!/bin/sh
case "$1 $2" in
  '-m venv')
    for place; do :; done
    mkdir -p "$place/bin"
    cp "$0" "$place/bin/python"
    echo "PATH='$(cd "$place/bin" && pwd)':\\$PATH" >"$place/bin/activate" ;;
  '-m pip') shift 2; exec pip "$@" ;;
  '-m eru_jax.train') shift 2; exec train "$@" ;;
  *) exec {python} "$@" ;;
esac
"""


@dataclasses.dataclass
class Desk:
  """A clone on a computer where every tool is a stand-in."""

  clone: pathlib.Path
  notes: pathlib.Path
  bin: pathlib.Path

  def environment(self, **more):
    return {'PATH': str(self.bin), 'HOME': str(self.clone.parent), 'NOTES': str(self.notes)} | more

  def run(self, *command, check=True, cwd=None, **environment):
    result = subprocess.run(
      ['bash', *map(str, command)],
      cwd=cwd or self.clone,
      env=self.environment(**environment),
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=300,
    )
    assert not check or result.returncode == 0, result.stderr
    return result

  def calls(self, tool):
    """What a stand-in was called with, from the first time to the last."""
    path = self.notes / tool
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def arguments(self, tool):
    return [call['arguments'] for call in self.calls(tool)]

  def forget(self):
    shutil.rmtree(self.notes)
    self.notes.mkdir()

  def install(self, name, text):
    path = self.bin / name
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(stat.S_IRWXU)


def make_desk(directory, tools):
  """A Desk in an empty directory, with those of the stand-ins that `tools` names."""
  clone = directory / 'a clone'
  for name in ('launch', 'configs'):
    shutil.copytree(ROOT / name, clone / name)
  (clone / 'eru_jax').mkdir()
  (clone / 'eru_jax' / '__init__.py').touch()
  for name in FILES:
    shutil.copy(ROOT / name, clone)
  place = directory / 'bin'
  place.mkdir()
  for tool in TOOLS.split():
    found = shutil.which(tool)
    if found:
      (place / tool).symlink_to(found)
  desk = Desk(clone, directory / 'notes', place)
  desk.notes.mkdir()
  played = {
    'gcloud': _GCLOUD, 'sbatch': _SBATCH, 'srun': _SRUN, 'xpk': _XPK, 'train': _TRAIN,
    'nvidia-smi': _NVIDIA_SMI,
  }  # fmt: skip
  for tool in ('train', 'pip', *tools):
    desk.install(tool, f'#!{sys.executable} -S\n{_NOTE}{played.get(tool, "")}')
  for name in ('python', 'python3', 'python3.12'):
    desk.install(name, _PYTHON.format(python=sys.executable))
  return desk


def kill_group(pid_file):
  """Ends what a test may have left running."""
  try:
    os.killpg(int(pid_file.read_text()), 9)
  except (OSError, ValueError):
    pass
