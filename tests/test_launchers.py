"""Launchers: what they call, with which words, and what happens on the machines they reach.

The cloud's tools are stand-ins (tests/launching.py) that run what they are given, so that words go
through every shell on their way, and the scripts on the other side are those that would run there.
"""

import fcntl
import json
import pathlib
import shlex
import shutil
import signal
import subprocess
import time

import launching
import pytest

LAUNCHERS = ('local.sh', 'gpu.sh', 'slurm.sh', 'tpu_vm.sh', 'xpk.sh')
# All that shells could stumble over.
NASTY = """--config.title=it's "a" (b) $HOME `c` \\ ; d & e | f > g * {h} #i  ~"""
RUN = ('--config=configs/flux_dev_dk_dm.py:res=512,int8', '--workdir=/shared/dk_dm', NASTY)
BUCKET = (RUN[0], '--workdir=gs://bucket/dk_dm', NASTY)
# Launcher, its arguments, and the stand-in that its work ends in.
COMMANDS = {
  'local': ('local.sh', ('--workdir=my runs', NASTY), 'train'),
  'gpu': ('gpu.sh', ('--gpus=2', '--flags=h100', *RUN), 'train'),
  'slurm': ('slurm.sh', ('--nodes=2', '--time=1:00:00', '--pass=--mem=0', *RUN), 'sbatch'),
  'array': ('slurm.sh', ('--resumes=3', '--name=a b', *RUN), 'sbatch'),
  'create': (
    'tpu_vm.sh',
    ('create', '--name=t', '--zone=z', '--accelerator=v6e-8', '--spot'),
    'gcloud',
  ),
  'tpu': ('tpu_vm.sh', ('run', '--name=t', '--zone=z', '--flags=v5e', *RUN), 'gcloud'),
  'status': ('tpu_vm.sh', ('status', '--name=t', '--zone=z', '--pass=--internal-ip'), 'gcloud'),
  'delete': ('tpu_vm.sh', ('delete', '--name=t', '--zone=z', '--project=p'), 'gcloud'),
  'xpk': ('xpk.sh', ('run', '--name=w', '--cluster=c', '--tpu=v5litepod-16', *BUCKET), 'xpk'),
  'xpk-gpu': ('xpk.sh', ('run', '--name=w', '--cluster=c', '--gpu=h100-8', *BUCKET), 'xpk'),
  'xpk-follow': ('xpk.sh', ('follow', '--name=w', '--cluster=c'), 'kubectl'),
  'xpk-delete': ('xpk.sh', ('delete', '--name=w', '--cluster=c', '--zone=z'), 'xpk'),
}


@pytest.fixture
def desk(tmp_path):
  tools = ('gcloud', 'kubectl', 'nvidia-smi', 'sbatch', 'scontrol', 'srun', 'xpk')
  desk = launching.make_desk(tmp_path, tools)
  yield desk
  for worker in (0, 1):
    launching.kill_group(desk.notes / f'worker{worker}' / 'eru_jax' / 'run' / 'pid')


@pytest.fixture
def bare(tmp_path):
  """A computer without any of those tools."""
  return launching.make_desk(tmp_path, ())


def launcher(desk, script, *arguments, **options):
  return desk.run(f'launch/{script}', *arguments, **options)


def files_of(directory):
  return {path.relative_to(directory): path.stat().st_mtime_ns for path in directory.rglob('*')}


def test_scripts_are_clean():
  shellcheck = shutil.which('shellcheck')
  if not shellcheck:
    pytest.skip("shellcheck is missing: pip install '.[test]'")
  scripts = sorted((launching.ROOT / 'launch').rglob('*.sh'))
  assert len(scripts) > 15
  subprocess.run([shellcheck, '--external-sources', *scripts], cwd=launching.ROOT, check=True)


@pytest.mark.parametrize('script', LAUNCHERS)
def test_help_is_the_comment_a_launcher_begins_with(bare, script):
  comment = (bare.clone / 'launch' / script).read_text().splitlines()[1:]
  for arguments in (('--help',), ('run', '--help'), ('--name=x', '-h')):
    if script in ('local.sh', 'gpu.sh', 'slurm.sh') and arguments[0] != '--help':
      continue
    if arguments[0] == '--name=x':
      continue
    text = launcher(bare, script, *arguments).stdout.splitlines()
    assert text[0] == comment[0].removeprefix('# ') and len(text) > 10
    assert any(line.startswith('--dry_run') for line in text)


@pytest.mark.parametrize('name', COMMANDS)
def test_a_dry_run_changes_nothing_and_needs_no_tool(bare, name):
  script, arguments, tool = COMMANDS[name]
  before = files_of(bare.clone)
  printed = launcher(bare, script, *arguments, '--dry_run').stdout
  assert files_of(bare.clone) == before
  assert not list(bare.notes.iterdir())
  assert {'train': 'python -m eru_jax.train'}.get(tool, tool) in printed


@pytest.mark.parametrize('name', COMMANDS)
def test_what_a_dry_run_prints_is_what_a_run_does(desk, name):
  script, arguments, _ = COMMANDS[name]
  environment = {'TRAIN': 'none'}
  checks = ('nvidia-smi', 'pip')

  def called():
    if name == 'tpu':
      wait_for_the_end(desk)
    tools = [path.name for path in desk.notes.iterdir() if path.is_file()]
    return {tool: desk.calls(tool) for tool in sorted(tools) if tool not in checks}

  printed = launcher(desk, script, *arguments, '--dry_run', **environment).stdout
  desk.run('-euc', printed, **environment)
  pasted = called()
  desk.forget()
  launcher(desk, script, *arguments, **environment)
  done = called()
  assert done and pasted.keys() == done.keys()
  # A run's own files lie in a temporary directory, a pasted one's where it is pasted.
  words = [word for calls in done.values() for call in calls for word in call['arguments']]
  for word in words:
    if word.startswith('--script-dir='):
      pasted = json.loads(json.dumps(pasted).replace('--script-dir=eru_jax_workload', word))
    elif word.endswith('/eru_jax.tar.gz'):
      pasted = json.loads(json.dumps(pasted).replace('"eru_jax.tar.gz"', json.dumps(word)))
  assert pasted == done


def wait_for_workers(desk, text, times=1):
  """Until the logs of a TPU's workers say something for the n-th time."""
  for worker in (0, 1):
    log = desk.notes / f'worker{worker}' / 'eru_jax' / 'run' / 'log'
    deadline = time.monotonic() + 300
    while not log.exists() or log.read_text().count(text) < times:
      assert time.monotonic() < deadline, log.exists() and log.read_text()
      time.sleep(0.05)


def wait_for_the_end(desk):
  """Until what was started on a TPU's workers has gone, which may be after its last words."""
  for worker in (0, 1):
    with open(desk.notes / f'worker{worker}' / 'eru_jax' / 'run' / 'lock') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)


MISTAKES = [
  ('gpu.sh', RUN[:1], '--workdir must be given; see --help'),
  ('gpu.sh', RUN[1:], '--config must be given; see --help'),
  ('gpu.sh', ('--config=configs/none.py:x', RUN[1]), 'configs/none.py does not exist; --config'),
  ('gpu.sh', ('--config', *RUN), 'write --config=VALUE, with an equals sign'),
  ('gpu.sh', ('--config.a.b', *RUN), 'write --config.a.b=VALUE, with an equals sign'),
  ('gpu.sh', ('--gpu=1', *RUN), 'there is no flag --gpu; see --help'),
  ('gpu.sh', ('--fast', *RUN), 'there is no flag --fast; see --help'),
  ('gpu.sh', ('fast', *RUN), "unexpected argument 'fast'; every option is a --flag"),
  ('gpu.sh', ('--gpus=0', *RUN), "--gpus must be a whole number from 1, not '0'"),
  ('gpu.sh', ('--flags=v9', *RUN), "there are no flags 'v9'; there are a100, cpu, h100, tpu7x"),
  ('gpu.sh', RUN, 'nvidia-smi is not installed here'),
  ('slurm.sh', ('--nodes=two', *RUN), "--nodes must be a whole number from 1, not 'two'"),
  ('slurm.sh', BUCKET, 'on Slurm --workdir is a directory that every node sees, not a bucket'),
  ('slurm.sh', ('--time=5', '--dry_run', *RUN), '--grace=300 is not below the 300 s of --time=5'),
  ('local.sh', ('--gpus=1',), 'there is no flag --gpus; see --help'),
  ('slurm.sh', RUN, 'sbatch is not installed here: run this on a login node'),
  ('tpu_vm.sh', (), "no '': the first word says what to do: create, run, follow"),
  ('tpu_vm.sh', ('go', '--name=t'), "no 'go': the first word says"),
  ('tpu_vm.sh', ('run', *RUN), '--name must be given; see --help'),
  ('tpu_vm.sh', ('run', '--name=t', *RUN), '--zone must be given, such as --zone=us-west4-a'),
  ('tpu_vm.sh', ('run', '--name=t', '--zone=z', *RUN), 'gcloud is not installed here'),
  ('tpu_vm.sh', ('run', '--name=t', '--zone=z', '--dry_run'), '--config must be given'),
  (
    'tpu_vm.sh',
    ('create', '--name=t', '--zone=z', '--dry_run'),
    '--accelerator must be given; see --help',
  ),
  (
    'tpu_vm.sh',
    ('create', '--name=t', '--zone=z', '--dry_run', '--accelerator=x-1'),
    "'x-1' needs is not",
  ),
  (
    'tpu_vm.sh',
    ('run', '--name=t', '--zone=z', '--dry_run', '--include=p.jsonl', *RUN),
    'p.jsonl does not',
  ),
  ('xpk.sh', ('run', '--name=w', *BUCKET), '--cluster must be given; see --help'),
  ('xpk.sh', ('run', '--name=A_b', '--cluster=c', *BUCKET), 'a letter first'),
  ('xpk.sh', ('run', '--name=w', '--cluster=c', *BUCKET), 'xpk is not installed here'),
  ('xpk.sh', ('follow', '--name=w', '--cluster=c'), 'xpk is not installed here'),
  (
    'xpk.sh',
    ('run', '--name=w', '--cluster=c', '--tpu=t', '--restarts=-1', '--dry_run', *BUCKET),
    "--restarts must be a whole number from 1, not '-1'",
  ),
  ('xpk.sh', ('run', '--name=w', '--cluster=c', '--dry_run', *BUCKET), 'either --tpu=TYPE or'),
  (
    'xpk.sh',
    ('run', '--name=w', '--cluster=c', '--dry_run', '--tpu=t', RUN[0], '--workdir=runs/x'),
    '--workdir=runs/x would be lost with the pod',
  ),
]


@pytest.mark.parametrize(
  ('script', 'arguments', 'message'), MISTAKES, ids=[message for *_, message in MISTAKES]
)
def test_mistakes_are_one_sentence(bare, script, arguments, message):
  result = launcher(bare, script, *arguments, check=False)
  assert result.returncode == 2
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ') and message in line
  assert not bare.calls('train') and not bare.calls('pip')


def test_gpus_are_the_first_ones_that_may_be_used(desk):
  launcher(desk, 'gpu.sh', '--gpus=2', '--flags=h100', *RUN, XLA_FLAGS='--mine')
  (call,) = desk.calls('train')
  assert call['arguments'] == list(RUN)
  assert call['environment']['CUDA_VISIBLE_DEVICES'] == '0,1'
  assert call['environment']['XLA_FLAGS'].startswith('--xla_gpu')
  assert call['environment']['XLA_FLAGS'].endswith(' --mine')
  assert float(call['environment']['XLA_PYTHON_CLIENT_MEM_FRACTION']) > 0.75
  launcher(desk, 'gpu.sh', '--gpus=2', *RUN, CUDA_VISIBLE_DEVICES='3,1,0')
  assert desk.calls('train')[1]['environment']['CUDA_VISIBLE_DEVICES'] == '3,1'
  launcher(desk, 'gpu.sh', *RUN)
  assert not {'CUDA_VISIBLE_DEVICES', 'XLA_FLAGS'} & set(desk.calls('train')[2]['environment'])
  result = launcher(desk, 'gpu.sh', '--gpus=3', *RUN, CUDA_VISIBLE_DEVICES='1,0', check=False)
  assert '--gpus=3 is more than CUDA_VISIBLE_DEVICES=1,0 names' in result.stderr
  result = launcher(desk, 'gpu.sh', '--gpus=5', *RUN, check=False)
  assert '--gpus=5, but nvidia-smi lists 4' in result.stderr
  # CUDA's packages once, over all these starts.
  assert [a for a in desk.arguments('pip') if '.[cuda]' in a] == [desk.arguments('pip')[3]]


def test_slurm_jobs_put_themselves_back_until_they_are_finished(desk, tmp_path):
  workdir = tmp_path / 'run'
  run = ('--nodes=2', '--gpus=4', RUN[0], f'--workdir={workdir}/', NASTY)
  launcher(desk, 'slurm.sh', *run, TRAIN='none', SLURM_CPUS_PER_TASK='6')
  (submitted,) = desk.arguments('sbatch')
  flags = submitted[: submitted.index('launch/slurm_job.sh')]
  assert {'--nodes=2', '--ntasks-per-node=4', '--gpus-per-node=4'} < set(flags)
  assert {'--signal=TERM@300', '--requeue', '--open-mode=append', '--job-name=run'} < set(flags)
  (step,) = desk.arguments('srun')
  assert step[:2] == ['--kill-on-bad-exit=1', '--cpus-per-task=6']
  assert desk.arguments('train') == [[RUN[0], f'--workdir={workdir}/', NASTY]]
  assert desk.arguments('scontrol') == [['requeue', 'Incomplete', '7']]

  for how, status in (('fail', 3), ('finish', 0)):
    result = launcher(desk, 'slurm.sh', *run, TRAIN=how, check=False)
    assert result.returncode == status
    assert len(desk.arguments('scontrol')) == 1


@pytest.mark.parametrize(
  ('time', 'seconds'),
  [
    ('7', 420),
    ('08:09', 489),
    ('1:02:03', 3723),
    ('2-3', 183600),
    ('1-02:03', 93780),
    ('1-02:03:04', 93784),
  ],
)
def test_slurm_saves_within_the_time_limit(bare, time, seconds):
  """Slurm's manual: minutes, minutes:seconds, hours:minutes:seconds, days-hours..."""
  arguments = (f'--time={time}', *RUN, '--dry_run')
  launcher(bare, 'slurm.sh', f'--grace={seconds - 1}', *arguments)
  late = launcher(bare, 'slurm.sh', f'--grace={seconds}', *arguments, check=False)
  assert late.returncode == 2
  assert f'--grace={seconds} is not below the {seconds} s of --time={time}' in late.stderr
  launcher(bare, 'slurm.sh', '--time=UNLIMITED', *RUN, '--dry_run')


def test_slurm_arrays_leave_the_rest_to_the_next_job(desk):
  launcher(desk, 'slurm.sh', '--resumes=5', '--grace=60', *RUN, TRAIN='none')
  (submitted,) = desk.arguments('sbatch')
  assert {'--array=1-5%1', '--no-requeue', '--signal=TERM@60'} < set(submitted)
  assert not desk.arguments('scontrol') and len(desk.arguments('train')) == 1


def test_a_tpu_run_from_start_to_stop(desk):
  tpu = ('--name=eru', '--zone=z')
  (desk.clone / 'my pairs.jsonl').write_text('{}')
  include = '--include=my pairs.jsonl'
  launcher(desk, 'tpu_vm.sh', 'run', *tpu, include, '--flags=v5e', *BUCKET, TRAIN='wait')
  wait_for_workers(desk, 'training')
  calls = desk.calls('train')
  assert [call['arguments'] for call in calls] == [list(BUCKET)] * 2
  assert all('async' in call['environment']['LIBTPU_INIT_ARGS'] for call in calls)
  home = desk.notes / 'worker1' / 'eru_jax'
  assert (home / 'my pairs.jsonl').exists() and (home / 'eru_jax' / '__init__.py').exists()
  installed = desk.arguments('pip')
  assert sum('.[tpu]' in arguments for arguments in installed) == 2  # once a worker

  again = launcher(desk, 'tpu_vm.sh', 'run', *tpu, *BUCKET, check=False)
  assert again.returncode == 2 and 'a run is on; stop it first' in again.stderr
  status = launcher(desk, 'tpu_vm.sh', 'status', *tpu).stdout.splitlines()
  assert len(status) == 2 and all(': running; training' in line for line in status)

  stopped = launcher(desk, 'tpu_vm.sh', 'stop', *tpu).stdout
  assert stopped.count('stopped; --- ') == 2 and stopped.count('ended with status 0') == 2
  assert 'saved' in (home / 'run' / 'log').read_text()
  assert launcher(desk, 'tpu_vm.sh', 'stop', *tpu).stdout.count('nothing runs') == 2

  # The same command continues, installs nothing anew, and leaves no file that is gone here.
  (desk.clone / 'configs' / 'emoji.py').unlink()
  launcher(desk, 'tpu_vm.sh', 'run', *tpu, *BUCKET, TRAIN='wait')
  wait_for_workers(desk, 'training', 2)
  assert desk.arguments('pip') == installed and len(desk.calls('train')) == 4
  assert not (home / 'configs' / 'emoji.py').exists()
  launcher(desk, 'tpu_vm.sh', 'kill', *tpu)
  status = launcher(desk, 'tpu_vm.sh', 'status', *tpu).stdout
  assert status.count(': broken off; ') == 2


def test_tpu_slices_are_reached_through_their_queued_resource(desk):
  tpu = ('--name=eru', '--slices=2', '--zone=z')
  launcher(desk, 'tpu_vm.sh', 'create', *tpu, '--accelerator=v5litepod-16')
  launcher(desk, 'tpu_vm.sh', 'run', *tpu, *BUCKET)
  wait_for_the_end(desk)
  create, send, install, start = desk.arguments('gcloud')
  assert create[:5] == ['compute', 'tpus', 'queued-resources', 'create', 'eru']
  assert {'--node-count=2', '--node-prefix=eru', '--zone=z'} < set(create)
  assert '--runtime-version=v2-alpha-tpuv5-lite' in create and '--spot' not in create
  for call in (send, install, start):
    assert call[:3] == ['compute', 'tpus', 'queued-resources']
    assert {'--node=all', '--worker=all', '--zone=z'} < set(call)
  result = launcher(desk, 'tpu_vm.sh', 'follow', *tpu, '--worker=3', '--dry_run').stdout
  words = shlex.split(result)
  assert '--worker=3' in words and words[-1].endswith('bash launch/tpu_worker.sh follow)')


def test_a_failed_run_on_a_tpu_says_so(desk):
  launcher(desk, 'tpu_vm.sh', 'status', '--name=eru', '--zone=z')  # nothing was ever sent
  launcher(desk, 'tpu_vm.sh', 'run', '--name=eru', '--zone=z', *BUCKET, TRAIN='fail')
  wait_for_the_end(desk)
  status = launcher(desk, 'tpu_vm.sh', 'status', '--name=eru', CLOUDSDK_COMPUTE_ZONE='z').stdout
  assert status.count(': ended with status 3; --- ') == 2


def pod(desk, **environment):
  """Runs, in what was laid upon the image, what XPK would run in every container."""
  (command,) = (
    word.split('=', 1)[1] for word in desk.arguments('xpk')[-1] if word.startswith('--command=')
  )
  # XPK copies the command between parentheses, in a block of YAML and in a quoted string of YAML.
  assert not set('\n"\'\\:{}$') & set(command)
  # The container's shell has the command beside it, and hands the signal on.
  shell = "trap 'kill -TERM $!' TERM; "
  shell += f'({command}) & while kill -0 $!; do sleep 0.1; done; wait $!'
  return subprocess.Popen(
    ['bash', '-c', shell],
    cwd=desk.notes / 'app',
    env=desk.environment(**environment),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_xpk_workloads_carry_their_clone(desk):
  launch = ('run', '--name=w', '--cluster=c', '--project=p', '--pass=--priority=high', *BUCKET)
  launcher(desk, 'xpk.sh', *launch, '--tpu=v5litepod-16', '--slices=2', '--flags=v5e')
  (created,) = desk.arguments('xpk')
  assert created[:2] == ['workload', 'create']
  expected = {'--workload=w', '--cluster=c', '--project=p', '--tpu-type=v5litepod-16'}
  expected |= {'--num-slices=2', '--base-docker-image=python:3.12', '--max-restarts=50'}
  expected |= {'--restart-on-exit-codes=1', '--termination-grace-period-seconds=300'}
  assert expected | {'--priority=high'} < set(created)
  (script_dir,) = (w.split('=', 1)[1] for w in created if w.startswith('--script-dir='))
  assert not pathlib.Path(script_dir).exists()  # removed once it was laid upon the image

  for _ in range(2):
    process = pod(desk, TRAIN='none')
    assert process.wait(60) == 0, process.stdout.read()
  assert desk.arguments('train') == [list(BUCKET)] * 2
  assert 'async' in desk.calls('train')[0]['environment']['LIBTPU_INIT_ARGS']
  assert sum('.[tpu]' in arguments for arguments in desk.arguments('pip')) == 1
  process = pod(desk, TRAIN='fail')
  assert process.wait(60) == 3, process.stdout.read()


def test_xpk_pods_that_are_taken_away_save_and_ask_to_be_started_again(desk):
  launcher(desk, 'xpk.sh', 'run', '--name=w', '--cluster=c', '--tpu=v5litepod-16', *BUCKET)
  process = pod(desk, TRAIN='wait')
  for line in process.stdout:
    if line == 'training\n':
      break
  process.send_signal(signal.SIGTERM)
  assert 'saved' in process.stdout.read()
  assert process.wait(60) == 143


@pytest.mark.parametrize('before', ['python -m eru_jax', 'child=', 'wait'])
def test_xpk_pods_may_be_taken_away_as_training_begins(desk, tmp_path, before):
  """The signal comes before the first command of the worker that begins so."""
  launcher(desk, 'xpk.sh', 'run', '--name=w', '--cluster=c', '--tpu=v5litepod-16', *BUCKET)
  signals = f'*xpk_worker.sh:"{before}"*) trap - DEBUG; kill -TERM $$ ;;'
  (tmp_path / 'early.sh').write_text(f"trap 'case $0:$BASH_COMMAND in {signals} esac' DEBUG\n")
  process = pod(desk, TRAIN='wait', BASH_ENV=str(tmp_path / 'early.sh'))
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 143, output


def test_xpk_restarts_and_logs_are_those_that_were_asked_for(desk):
  place = ('--name=w', '--cluster=c', '--zone=z', '--project=p')
  launcher(desk, 'xpk.sh', 'run', *place, '--tpu=v5litepod-16', '--restarts=0', *BUCKET)
  assert '--max-restarts=0' in desk.arguments('xpk')[0]
  launcher(desk, 'xpk.sh', 'follow', *place)
  listed = desk.arguments('xpk')[1]
  assert listed[:2] == ['workload', 'list']
  assert {'--cluster=c', '--zone=z', '--project=p', '--filter-by-job=w'} < set(listed)
  (followed,) = desk.arguments('kubectl')
  assert followed[0] == 'logs' and '--selector=xpk.google.com/workload=w' in followed


def test_xpk_tells_gpu_nodes_who_they_are(desk):
  launcher(desk, 'xpk.sh', 'run', '--name=w', '--cluster=c', '--gpu=h100-8', '--nodes=2', *BUCKET)
  assert {'--device-type=h100-8', '--num-nodes=2'} < set(desk.arguments('xpk')[0])
  # As XPK sets them: the address has no port.
  told = dict(JAX_COORDINATOR_ADDRESS='w-slice-job-0-0.w', JAX_COORDINATOR_PORT='6002')
  process = pod(desk, TRAIN='none', NNODES='2', NODE_RANK='1', **told)
  assert process.wait(60) == 0, process.stdout.read()
  (call,) = desk.calls('train')
  environment = call['environment']
  assert environment['ERU_JAX_COORDINATOR'] == 'w-slice-job-0-0.w:6002'
  assert environment['ERU_JAX_NUM_PROCESSES'] == '2' and environment['ERU_JAX_PROCESS_ID'] == '1'
  assert 'JAX_COORDINATOR_ADDRESS' not in environment
  assert any('.[cuda]' in arguments for arguments in desk.arguments('pip'))
