"""FLUX.1-dev's full size on one GPU, beside diffusers on the same GPU in the same run.

    python benchmarks/gpu.py                        # writes benchmarks/results/gpu.json and gpu.md
    python benchmarks/gpu.py --rows='peak-*,*-1024-*' --time_limit=580
    python benchmarks/gpu.py --quick                # tiny sizes on any device, writes nothing

Needs jax[cuda13], a CUDA build of PyTorch, diffusers and peft; weights are random, made on the GPU
in bfloat16. First both sides must agree on a tiny network in float32: loss, velocity, gradients of
all parameters and of adapters, samples. Then rows, each in a process of its own, so that memory is
given back, the two never hold the GPU at once, and a row that fails ends alone:

* `peak`: a bfloat16 product of 8192-wide matrices.
* `attention`: our kernels, masked or not, and PyTorch's.
* `sample`: Euler steps of the sampler. Our blocks run as a loop, or `unrolled`.
* `lora`: flow matching with adapters of rank 64 on every linear layer of the blocks.
* `full`: flow matching of all parameters.

Both train in bfloat16 throughout: parameters, gradients, both moments of AdamW, and the parameters'
average, five copies of what is trained and no float32 one. A step draws noise and times, clips the
gradient and updates the average. Ours is `compile_stage`'s, with a rematerialisation policy of
FluxTransformer; diffusers' has gradient checkpointing (`checkpoint`) and torch.compile of its
repeated blocks (`compiled`), or not. Batch 1 comes first, then the largest of 8, 4 and 2 that fits.

What a process finds is written at once. A run of the same day, device and software goes on where it
stopped: rows that finished are not measured again without --again. JAX takes 94 % of the memory at
its start and PyTorch uses expandable segments, unless the environment says otherwise.

The last line is JSON: {"rows", "train_mfu", "sample_mfu", "train_ratio", "sample_ratio"}. Training
there means all parameters, both are at 1024 pixels, MFU is relative to the published peak, and a
ratio is PyTorch's time a picture over ours, each side at its best. null: not measured, or no
published peak is known.
"""

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import gpu_results
from absl import app, flags
from gpu_rows import (
  AGREEMENT,
  FULL,
  MARK,
  QUICK,
  ROWS,
  chosen_rows,
  merge,
  reason,
  row_named,
  tell,
)
from side_by_side import FORMULAS, processor

_QUICK = flags.DEFINE_bool('quick', False, 'Tiny sizes, on whatever device there is.')
_ROWS = flags.DEFINE_list('rows', [], 'Patterns of the rows to measure, e.g. "sample-1024-*".')
_LIST = flags.DEFINE_bool('list', False, 'Print the names of all rows and leave.')
_AGAIN = flags.DEFINE_bool('again', False, 'Measure rows that this run has finished once more.')
_TIME = flags.DEFINE_integer('time_limit', 1800, 'Seconds for all of it.', lower_bound=1)
_ROW_TIME = flags.DEFINE_integer('row_limit', 200, 'Seconds for one row.', lower_bound=1)
_PEAK = flags.DEFINE_float(
  'peak_tflops', None, 'Published dense bfloat16 peak of the GPU; known for H100 and H200.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'File of the results, benchmarks/results/gpu.json. With --quick none.'
)
_MEASURE = flags.DEFINE_string('measure', None, 'Measure this one row here, for the parent.')
_EXCHANGE = flags.DEFINE_string('exchange', None, 'File through which the sides are compared.')

_MODULES = {'ours': 'gpu_ours', 'diffusers': 'gpu_diffusers'}
_PACKAGES = ('jax', 'jaxlib', 'flax', 'torch', 'diffusers', 'peft')
# Less than this is not enough to start a row: imports, weights, compilation.
_LEAST_SECONDS = 30
_REPORTED = ('XLA_FLAGS', 'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
_REPORTED += ('XLA_PYTHON_CLIENT_PREALLOCATE', 'PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF')


def environment():
  """The rows' environment: each side may have the whole GPU while it runs."""
  values = dict(os.environ)
  if not {'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'} & values.keys():
    # Left to itself JAX takes three quarters; libraries need a few GiB outside of its share.
    values['XLA_CLIENT_MEM_FRACTION'] = '0.94'
  if not {'PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'} & values.keys():
    values['PYTORCH_ALLOC_CONF'] = 'expandable_segments:True'
  return values


def device_name():
  """The GPU's name as its driver has it, or the processor's."""
  if shutil.which('nvidia-smi'):
    command = ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader']
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode == 0 and found.stdout.strip():
      return found.stdout.splitlines()[0].strip()
  return processor()


def versions():
  found = {'python': platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'none'
  return found


def run_row(row, seconds, exchange, report):
  """Measures a row in a process of its own, and reports what it found whenever it finds something.

  Args:
    row: the row.
    seconds: after which its process is ended.
    exchange: file through which the sides are compared.
    report: called with {'...': ...} to merge into the row's results.
  """
  command = [sys.executable, os.path.abspath(__file__), f'--measure={row.name}']
  command += [f'--row_limit={int(seconds)}', f'--exchange={exchange}']
  command += ['--quick'] if _QUICK.value else []
  values = environment()
  if row.side == 'diffusers':
    values['JAX_PLATFORMS'] = 'cpu'  # It imports our configurations, and JAX with them.
  expired, failed = threading.Event(), False
  began = time.perf_counter()
  with tempfile.TemporaryFile('w+') as errors:
    # A group of its own: compilers leave workers that would hold the pipe open.
    process = subprocess.Popen(
      command, env=values, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
    )

    def expire():
      if process.poll() is None:
        expired.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
      for line in process.stdout:
        if line.startswith(MARK):
          found = json.loads(line.removeprefix(MARK))
          failed = failed or 'failed' in found
          report(found)
      process.wait()
    finally:
      timer.cancel()
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if expired.is_set():
      report({'failed': f'stopped after {int(seconds)} s'})
    elif process.returncode and not failed:
      errors.seek(0)
      lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
      report({'failed': lines[-1][:500] if lines else f'ended with {process.returncode}'})
    elif not process.returncode:
      report({'finished': True})
    report({'row_seconds': round(time.perf_counter() - began, 1)})


def measure_rows(rows, run, save):
  """Fills run['rows'], after both sides have agreed; `save` is called after every finding."""
  ends = time.monotonic() + _TIME.value

  def measure(row, exchange):
    found = run['rows'][row.name] = {}
    print(row.name, flush=True)

    def report(part):
      merge(found, part)
      gpu_results.derive(run)
      save()
      print('  ' + json.dumps(part), flush=True)

    left = ends - time.monotonic()
    run_row(row, max(1, min(_ROW_TIME.value, left)), exchange, report)
    return found

  with tempfile.TemporaryDirectory() as scratch:
    exchange = os.path.join(scratch, 'tiny.npz')
    if _AGAIN.value or not all(run['rows'].get(row.name, {}).get('finished') for row in AGREEMENT):
      for row in AGREEMENT:
        found = measure(row, exchange)
        if not found.get('finished'):
          raise SystemExit(f'{row.name}: {found["failed"]}')
    for row in rows:
      if run['rows'].get(row.name, {}).get('finished') and not _AGAIN.value:
        print(f'{row.name}: measured before')
      elif ends - time.monotonic() < min(_LEAST_SECONDS, _ROW_TIME.value):
        print(f'{row.name}: no time left')
      else:
        measure(row, exchange)


def main(argv):
  del argv
  if _LIST.value:
    print('\n'.join(row.name for row in ROWS))
    return
  sizes = QUICK if _QUICK.value else FULL
  if _MEASURE.value:
    row = row_named(_MEASURE.value)
    module = importlib.import_module(_MODULES[row.side])
    try:
      module.measure(row, sizes, _ROW_TIME.value, _EXCHANGE.value)
    except Exception as error:
      # JAX ends its tracebacks with advice, where the parent would look for the reason.
      tell(failed=reason(error))
      raise
    return
  try:
    rows = chosen_rows(_ROWS.value)
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  # Interrupted, it still ends its row's process and prints what there is.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  output = _OUTPUT.value or (None if _QUICK.value else 'benchmarks/results/gpu.json')
  device = device_name()
  values = environment()
  runs = gpu_results.load_runs(output) if output else []
  run = gpu_results.open_run(
    runs,
    {
      'date': datetime.date.today().isoformat(),
      'device': device,
      'versions': versions(),
      'environment': {name: values[name] for name in _REPORTED if name in values},
      'published_tflops': _PEAK.value or gpu_results.PUBLISHED_TFLOPS.get(device),
    },
  )
  for name, formula in FORMULAS.items():
    print(f'FLOP, {name}: {formula}')
  try:
    measure_rows(rows, run, lambda: output and gpu_results.save(output, runs))
  finally:
    print(gpu_results.table(run))
    print(json.dumps(gpu_results.summary(run)))


if __name__ == '__main__':
  app.run(main)
