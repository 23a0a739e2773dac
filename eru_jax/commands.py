"""What the commands have in common: quick flags, one-sentence errors, no noise."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from eru_jax.errors import UserError


def run(main: Callable[[], None]) -> None:
  """Runs a command: flags are parsed first, then `main` may import what is slow.

  A UserError becomes one line on stderr and exit status 2; so does a bad flag or config file.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)

  def wrapped(argv: Sequence[str]) -> None:
    if len(argv) > 1:
      fail(f'unexpected argument {argv[1]!r}; every option is a --flag, see --help')
    try:
      main()
    except UserError as error:
      fail(str(error))
    except KeyboardInterrupt:
      fail('interrupted; run the same command again to continue', status=130)

  app.run(wrapped, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    return fail(f'{error}; see --help')
  except (AttributeError, KeyError) as error:
    # What config_flags raises for an override of a key the config does not have.
    return fail(f'config: {error.args[0] if error.args else error}')
  except (FileNotFoundError, OSError) as error:
    return fail(f'cannot read the config file: {error}')
  except UserError as error:
    return fail(str(error))


def fail(message: str, status: int = 2) -> None:
  """Prints one line and ends the process."""
  sys.stdout.flush()
  print(f'error: {" ".join(message.split())}', file=sys.stderr)
  sys.exit(status)
