"""The Colab notebook runs from top to bottom, with a tiny model in place of the toy FLUX."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / 'launch' / 'colab_tpu.ipynb'


def overrides(values, prefix='config'):
  """Nested values of a config as flags of the training command."""
  for key, value in values.items():
    if isinstance(value, dict):
      yield from overrides(value, f'{prefix}.{key}')
    else:
      yield f'--{prefix}.{key}={value}'


def test_it_is_stored_without_outputs():
  cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
  code = [cell for cell in cells if cell['cell_type'] == 'code']
  assert len(code) > 8 and len(cells) > 1.5 * len(code)
  assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in code)


# Runs the cells before the first training in one kernel that knows no eru_jax, the second of them
# as often as it is told, with stand-ins for git and pip.
_INSTALLS = """
import importlib.machinery, importlib.util, json, sys
from IPython.core.interactiveshell import InteractiveShell
start = list(sys.path)
importlib.util.find_spec = lambda name: importlib.machinery.PathFinder.find_spec(
  name, [place for place in sys.path if place not in start]
)
imports, install = json.loads(sys.argv[1])
shell = InteractiveShell()
shell.run_cell(imports.replace("SOURCE = ''", "SOURCE = 'somewhere'"))
for _ in range(int(sys.argv[2])):
  shell.run_cell(install)
  print('ROOT is', shell.user_ns.get('ROOT'))
"""


@pytest.mark.parametrize(('pip', 'pips'), [('exit 0', 2), ('[ -f failed ] || ! touch failed', 3)])
def test_installing_can_be_run_again(pip, pips, tmp_path):
  """In a kernel that was started before; pip may fail when it is first asked."""
  pytest.importorskip('IPython')
  tools = tmp_path / 'tools'
  tools.mkdir()
  clone = 'for last; do :; done; mkdir "$last" && mkdir "$last/eru_jax"'
  clone += ' && touch "$last/eru_jax/__init__.py"'
  for name, does in (('git', clone), ('pip', pip)):
    (tools / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/asked\n{does}\n')
    (tools / name).chmod(0o755)
  cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
  code = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
  result = subprocess.run(
    [sys.executable, '-c', _INSTALLS, json.dumps(code[:2]), '3'],
    env=os.environ | {'PATH': f'{tools}:{os.environ["PATH"]}', 'IPYTHONDIR': str(tmp_path / 'i')},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.stdout.count(f'ROOT is {tmp_path / "clone"}\n') == 3, result
  asked = (tmp_path / 'asked').read_text().splitlines()
  assert sum(line.startswith('git clone') for line in asked) == 1
  assert sum(line.startswith('pip install') for line in asked) == pips
  failed = pips > 2
  assert result.stdout.count('It could not be installed') == failed
  assert 'Traceback' not in result.stdout


def test_it_runs(tiny_config, tmp_path, monkeypatch):
  nbformat = pytest.importorskip('nbformat')
  nbclient = pytest.importorskip('nbclient')
  pytest.importorskip('ipykernel')
  del tiny_config['title'], tiny_config['stages']
  # Each command is a process of its own and compiles anew: what this shows is that they fit.
  tiny_config['dk_dm'] |= dict(accumulation=1, num_steps=2)
  tiny_config['no_rl'] |= dict(num_steps=1, updates_per_step=1)
  tiny_config['sampling']['num_steps'] = 1
  monkeypatch.setenv('ERU_JAX_NOTEBOOK_FLAGS', ' '.join(overrides(tiny_config)))
  # `python` and `import eru_jax` as in a runtime where it is installed.
  monkeypatch.setenv('PATH', f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}')
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))

  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  client = nbclient.NotebookClient(
    notebook, timeout=3600, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}
  )
  with contextlib.suppress(nbclient.exceptions.CellExecutionError):  # told below, with the reason
    client.execute()

  outputs = [o for cell in notebook.cells if cell.cell_type == 'code' for o in cell.outputs]
  printed = ''.join(o.get('text', '') for o in outputs)
  assert 'error' not in [o.output_type for o in outputs], printed
  assert 'error:' not in printed and 'Traceback' not in printed
  assert 'CpuDevice' in printed and 'a tiny random model stands in' in printed
  assert 'unseen wordings' in printed and printed.count('Report: ') == 2
  shown = [data for output in outputs for data in output.get('data', {}).items()]
  (page,) = (text for kind, text in shown if kind == 'text/html')
  assert page.startswith('<iframe srcdoc="&lt;!doctype html') and '<table' not in page
  assert sum(kind == 'image/png' for kind, _ in shown) == 3
  before, after = (
    (tmp_path / 'out' / name / 'grid.png').read_bytes() for name in ('before', 'after')
  )
  assert before != after
