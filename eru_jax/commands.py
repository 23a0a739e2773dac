"""What the commands have in common: quick flags, one-sentence errors, no noise."""

import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from eru_jax.errors import UserError, full_disk

_OVERRIDE = 'config.'


def run(main: Callable[[], None]) -> None:
  """Runs a command: flags are parsed first, then `main` may import what is slow.

  A UserError becomes one line on stderr, with one more for each thing it lists, and exit status 2;
  so does a bad flag or config file, and a file that the system refuses to open or write.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)

  def wrapped(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      fail(f'unexpected argument {argv[1]!r}; every option is a --flag, see --help')
    try:
      main()
    except (UserError, OSError, KeyboardInterrupt) as error:
      found = explain(error)
      if found is None:
        raise
      fail(*found, details=getattr(error, 'details', ()))

  app.run(wrapped, flags_parser=_parse_flags)


def explain(error: BaseException) -> tuple[str, int] | None:
  """What to tell a user about an error, and the exit status; None if it is none of theirs."""
  if isinstance(error, KeyboardInterrupt):
    return 'interrupted; run the same command again to continue', 130
  if isinstance(error, UserError):
    return error.sentence, 2
  if isinstance(error, OSError):
    # Files that are no result, such as curves, are written by libraries that know no UserError.
    if full_disk(error) is not None:
      return f'{error}: free some space and run the same command again', 2
    # Without a file's name, nobody could tell what to mend.
    if isinstance(error.filename, str):
      return f'{error.filename}: {error.strerror}: check this path and the rights to it', 2
  return None


def define_seed() -> flags.FlagHolder[int]:
  """The flag --seed, within what a JAX key tells apart."""
  return flags.DEFINE_integer(
    'seed', 0, 'Seed of the start noise.', lower_bound=0, upper_bound=2**32 - 1
  )


def define_mesh() -> flags.FlagHolder[str | None]:
  """The flag --mesh, as `sharding.parse_mesh` reads it."""
  return flags.DEFINE_string(
    'mesh', None, 'Sizes of the axes of the device mesh, such as fsdp=4 or data=2,fsdp=-1; by '
    'default the model is copied to all devices if it is small beside the memory of one, else '
    'split over them.'
  )  # fmt: skip


def config_overrides() -> dict[str, str]:
  """The flags --config.KEY=VALUE: dotted key -> value as it was typed."""
  values = flags.FLAGS.flag_values_dict()
  return {
    name.removeprefix(_OVERRIDE): value
    for name, value in values.items()
    if name.startswith(_OVERRIDE)
  }


def _define_overrides(argv: Sequence[str]) -> None:
  """Makes a flag of every --config.KEY, for a command that has --config."""
  if 'config' not in flags.FLAGS:
    return
  for argument in argv[1:]:
    if argument == '--':
      return
    found = re.match(rf'--?({re.escape(_OVERRIDE)}[^=]+)', argument)
    if found and found[1] not in flags.FLAGS:
      flags.DEFINE_string(found[1], None, 'Override of a value of the config.')


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    _define_overrides(argv)
    return flags.FLAGS(argv)
  except flags.Error as error:
    missing = re.findall(r'Flag (--\w+) must have a value other than None', str(error))
    if missing:
      return fail(f'{" and ".join(missing)} must be given; see --help')
    return fail(f'{error}; see --help')


def fail(message: str, status: int = 2, details: Sequence[str] = ()) -> None:
  """Prints one line, or one and a line for each detail, and ends the process."""
  sys.stdout.flush()
  print(f'error: {" ".join(message.split())}', file=sys.stderr)
  for detail in details:
    print(f'  {detail}', file=sys.stderr)
  sys.exit(status)
