"""The Colab notebook runs from top to bottom, with a tiny model in place of the toy FLUX."""

import contextlib
import json
import os
import pathlib
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


def test_it_runs(tiny_config, tmp_path, monkeypatch):
  nbformat = pytest.importorskip('nbformat')
  nbclient = pytest.importorskip('nbclient')
  pytest.importorskip('ipykernel')
  del tiny_config['title'], tiny_config['stages']
  tiny_config['dk_dm']['accumulation'] = 1
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
