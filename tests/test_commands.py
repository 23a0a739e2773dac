"""Mistakes at the command line: exit status 2, one line on stderr, no traceback."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = f'--config={ROOT / "configs" / "emoji.py"}'
LONG = 300 * 'x'


def run(*arguments, directory, module='eru_jax.train'):
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  return subprocess.run(
    [sys.executable, '-m', module, *arguments],
    env=environment,
    cwd=directory,
    capture_output=True,
    text=True,
    timeout=300,
  )


def refusal(*arguments, directory, module='eru_jax.train'):
  """The one line on stderr that a command answers a mistake with."""
  result = run(*arguments, directory=directory, module=module)
  assert result.returncode == 2, result.stderr
  lines = result.stderr.splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: '), result.stderr
  assert 'Traceback' not in result.stdout
  return lines[0]


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['--nosuch=1'], ["Unknown command line flag 'nosuch'"]),
    ([], ['--config and --workdir must be given']),
    (['--workdir=w'], ['--config must be given']),
    ([CONFIG], ['--workdir must be given']),
    ([CONFIG, '--workdir'], ['Missing value for flag --workdir']),
    ([CONFIG, '--workdir=w', 'extra'], ["unexpected argument 'extra'"]),
    (['--config=nosuch.py', '--workdir=w'], ['nosuch.py does not exist']),
    (['--config=.', '--workdir=w'], ['is a directory']),
  ],
)
def test_bad_flags(arguments, words, tmp_path):
  line = refusal(*arguments, directory=tmp_path)
  assert all(word in line for word in words), line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('module', ['eru_jax.sample', 'eru_jax.evaluate', 'eru_jax.diagnose'])
def test_bad_flags_of_the_other_commands(module, tmp_path):
  assert '--model and' in refusal(directory=tmp_path, module=module)
  line = refusal('--config.seed=1', directory=tmp_path, module=module)
  assert "Unknown command line flag 'config.seed'" in line


GOOD = "def get_config(arg=''):\n  return {'stages': ('dk_dm',), 'title': 'T'}\n"


# The same process reads file and flags for all of these: what differs is cheap to call directly.
@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('def get_config(:\n  pass\n', ['line 1', 'invalid syntax']),
    ('import nosuchmodule\n', ['line 1', "No module named 'nosuchmodule'"]),
    ('\n\ndef get_config():\n  return 1 / 0\n', ['line 4', 'ZeroDivisionError']),
    ('def get_config():\n  return {}["nosuch"]\n', ['line 2', "KeyError: 'nosuch'"]),
    ('def get_config():\n  open("/nosuch/file")\n', ['line 2', 'FileNotFoundError']),
    ('x = 1\n', ['no function get_config()']),
    ('def get_config():\n  pass\n', ['must return a ConfigDict or a dict']),
    ('import ml_collections\ndef get_config():\n  c = ml_collections.ConfigDict({"a": 1})\n'
     '  c.a = "x"\n  return c\n', ['line 4', 'TypeError']),
  ],
)  # fmt: skip
def test_bad_config_files(text, words, tmp_path):
  from eru_jax.config_file import load_config
  from eru_jax.errors import UserError

  path = tmp_path / 'c.py'
  path.write_text(text)
  with pytest.raises(UserError) as caught:
    load_config(str(path), {})
  assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


@pytest.mark.parametrize(
  ('text', 'flag', 'words'),
  [
    ('def get_config(:\n', [], ['c.py, line 1 cannot be run: invalid syntax']),
    (GOOD.replace('title', 'titel'), [], ['unknown key `titel`', 'did you mean `title`']),
    (GOOD, ['--config.nosuch=1'], ['unknown key `nosuch`']),
    (GOOD, ['--config.dk_dm.num_step', '9'], ['did you mean `dk_dm.num_steps`']),
    (GOOD, ['--config.dk_dm.num_steps=many'], ["`dk_dm.num_steps` is 'many' but must be an int"]),
    (GOOD, ['--config.dk_dm.mixture=2'], ['`mixture` is 2.0 but must be in [0, 1]']),
    (GOOD, ['--config.title.x=2'], ["`title` is 'T' and has no keys"]),
    (GOOD, ['--config.model.source=nosuch'], ['no model directory nosuch']),
  ],
)
def test_bad_configs(text, flag, words, tmp_path, request):
  if 'source' in str(flag):
    request.getfixturevalue('emoji_cache')
  (tmp_path / 'c.py').write_text(text)
  line = refusal('--config=c.py', '--workdir=w', *flag, directory=tmp_path)
  assert all(word in line for word in words), line


def test_argument_of_a_config_file_that_takes_none(tmp_path):
  (tmp_path / 'c.py').write_text('def get_config():\n  return {}\n')
  line = refusal('--config=c.py:big', '--workdir=w', directory=tmp_path)
  assert 'takes 0 positional arguments' in line


PAIR = '{"implicit": "what a caterpillar becomes", "explicit": "butterfly", "id": "a"}'


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (None, ['There is no prompt file']),
    (f'{PAIR}\n{{"implicit": \n', ['line 2', 'malformed JSON']),
    (f'{PAIR}\n{{"implicit": "x"}}\n', ['line 2', "'explicit' is missing"]),
    (f'{PAIR}\n\n{PAIR.replace("what", "  ").replace("a caterpillar becomes", "")}\n',
     ['line 3', "'implicit' is empty"]),
    (f'{PAIR}\n{PAIR.replace("what", "that which")}\n', ['line 2', "id 'a' is already"]),
    (f'{PAIR.replace("butterfly", "butterflu")}\n', ["'butterflu'", 'butterfly']),
    ('', ['holds no prompts']),
  ],
)  # fmt: skip
def test_bad_prompt_files(content, words, tmp_path, tiny_config, capsys):
  """Through the command's own path from --config.data.pairs to the error, in this process."""
  from eru_jax.config_file import load_config
  from eru_jax.errors import UserError
  from eru_jax.training.run import train

  path = tmp_path / 'pairs.jsonl'
  if content is not None:
    path.write_text(content)
  (tmp_path / 'c.py').write_text(f'def get_config():\n  return {tiny_config!r}\n')
  config = load_config(str(tmp_path / 'c.py'), {'data.pairs': str(path)})
  with pytest.raises(UserError) as caught:
    train(config, str(tmp_path / 'w'))
  assert all(word in str(caught.value) for word in ['pairs.jsonl', *words]), caught.value
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('leave_out', 'words'),
  [
    ('pears:1', "leave_out is 'pears:1', which is no category .* nearest: pairs:1"),
    ('food', 'without \'food\' no pair of split "train" is left'),
  ],
)
def test_leaving_out_what_is_not_there_or_all_there_is(leave_out, words, tmp_path, tiny_config):
  """From --config.data.leave_out to the error, in this process."""
  from eru_jax.config_file import load_config
  from eru_jax.errors import UserError
  from eru_jax.training.run import train

  path = tmp_path / 'pairs.jsonl'
  path.write_text(PAIR.replace('"id": "a"', '"category": "food"') + '\n')
  (tmp_path / 'c.py').write_text(f'def get_config():\n  return {tiny_config!r}\n')
  overrides = {'data.pairs': str(path), 'data.leave_out': leave_out}
  with pytest.raises(UserError, match=words):
    train(load_config(str(tmp_path / 'c.py'), overrides), str(tmp_path / 'w'))


def test_bad_prompt_file_at_the_command_line(tmp_path, tiny_config):
  (tmp_path / 'c.py').write_text(f'def get_config():\n  return {tiny_config!r}\n')
  (tmp_path / 'mine.jsonl').write_text(f'{PAIR}\nnot json\n')
  line = refusal(
    '--config=c.py', '--workdir=w', '--config.data.pairs=mine.jsonl', directory=tmp_path
  )
  assert 'mine.jsonl, line 2: malformed JSON' in line


def truncate(path):
  path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
  ('damage', 'words'),
  [
    (lambda d: truncate(d / 'transformer' / 'diffusion_pytorch_model.safetensors'),
     ['diffusion_pytorch_model.safetensors']),
    (lambda d: (d / 'vae' / 'diffusion_pytorch_model.safetensors').unlink(), ['vae']),
    (lambda d: (d / 'transformer' / 'config.json').write_text('{'), ['config.json cannot be read']),
    (lambda d: (d / 'eru_jax.json').unlink(), ['eru_jax.json is missing']),
    (lambda d: (d / 'eru_jax.json').write_text('{"family": "sd9"}'), ['Unknown model family']),
    (lambda d: truncate(d / 'reward' / 'model.safetensors'), ['reward']),
  ],
)  # fmt: skip
def test_damaged_model_directory(damage, words, tmp_path, tiny_model_dir, tiny_config):
  from eru_jax.errors import UserError
  from eru_jax.training.run import train

  directory = tmp_path / 'model'
  shutil.copytree(tiny_model_dir, directory)
  damage(directory)
  tiny_config['model']['source'] = str(directory)
  with pytest.raises(UserError) as caught:
    train(tiny_config, str(tmp_path / 'w'))
  assert all(word in str(caught.value) for word in words), caught.value
  assert '\n' not in str(caught.value)


def test_model_without_reward_cannot_do_no_rl(tmp_path, tiny_model_dir, tiny_config):
  from eru_jax.errors import UserError
  from eru_jax.training.run import train

  directory = tmp_path / 'model'
  shutil.copytree(tiny_model_dir, directory)
  shutil.rmtree(directory / 'reward')
  tiny_config['model']['source'] = str(directory)
  tiny_config['stages'] = ('no_rl',)
  with pytest.raises(UserError, match='no_rl: the model directory holds no reward/ classifier'):
    train(tiny_config, str(tmp_path / 'w'))


@pytest.mark.parametrize('module', ['eru_jax.train', 'eru_jax.sample', 'eru_jax.evaluate'])
def test_flags_are_parsed_before_the_slow_imports(module, tmp_path):
  """A command without flags fails at once; by then neither jax nor its kin may be loaded."""
  script = (
    'import atexit, runpy, sys\n'
    'slow = ("jax", "flax", "numpy", "grain", "tensorflow_datasets", "orbax", "matplotlib")\n'
    'atexit.register(lambda: print("loaded:", [m for m in slow if m in sys.modules]))\n'
    f'sys.argv = ["x"]\nrunpy.run_module({module!r}, run_name="__main__")\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', script],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 2, result.stderr
  assert 'loaded: []' in result.stdout
  assert result.stderr.startswith('error: ')


def test_mistakes_in_a_config_file_are_found_before_jax_is_loaded(tmp_path):
  (tmp_path / 'c.py').write_text('def get_config(:\n')
  result = subprocess.run(
    [sys.executable, '-X', 'importtime', '-m', 'eru_jax.train', '--config=c.py', '--workdir=w'],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 2
  imported = {line.rpartition('|')[2].strip() for line in result.stderr.splitlines()}
  assert 'absl.flags' in imported and 'jax' not in imported


@pytest.mark.parametrize(
  ('code', 'name', 'words'),
  [
    ('ENOSPC', '"events.out"', 'free some space'),
    ('EDQUOT', '"events.out"', 'free some space'),
    ('EIO', '"events.out"', 'events.out: Input/output error: check this path'),
    ('EIO', 'None', None),
  ],
)
def test_what_the_system_refuses_is_one_line_if_it_names_a_file(code, name, words, tmp_path):
  """Curves are written by libraries that raise the system's own error."""
  script = (
    'import errno, os\nfrom eru_jax import commands\n'
    f'def main():\n  raise OSError(errno.{code}, os.strerror(errno.{code}), {name})\n'
    'commands.run(main)\n'
  )
  result = subprocess.run(
    [sys.executable, '-c', script],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=300,
  )
  if words:
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith('error: ') and 'events.out' in line and words in line
  else:
    assert result.returncode == 1 and 'Traceback' in result.stderr


@pytest.mark.parametrize(
  ('module', 'arguments'),
  [
    ('train', [CONFIG, f'--workdir={LONG}']),
    ('train', [CONFIG, '--workdir=w', f'--config.model.source={LONG}']),
    ('train', [f'--config={LONG}.py', '--workdir=w']),
    ('sample', [f'--model={LONG}', '--prompt=a cat', '--output=o']),
  ],
)
def test_names_too_long_for_the_system(module, arguments, tmp_path, request):
  request.getfixturevalue('emoji_cache')
  line = refusal(*arguments, directory=tmp_path, module=f'eru_jax.{module}')
  assert LONG in line, line


def test_help_names_the_flags(tmp_path):
  result = run('--help', directory=tmp_path)
  assert '--config' in result.stdout and '--workdir' in result.stdout
  assert 'Traceback' not in result.stderr


def test_what_an_error_lists_comes_a_line_each(monkeypatch, capsys):
  from eru_jax import commands
  from eru_jax.errors import UserError, listed

  def main():
    raise UserError('Not\nthis:', listed({'odd': ['a', 'b\nc'], 'even': ['d']})).at('file')

  monkeypatch.setattr(commands.app, 'run', lambda wrapped, **_: wrapped(['x']))
  with pytest.raises(SystemExit) as caught:
    commands.run(main)
  assert caught.value.code == 2
  assert capsys.readouterr().err == "error: file: Not this:\n  odd: a\n  odd: 'b\\nc'\n  even: d\n"
