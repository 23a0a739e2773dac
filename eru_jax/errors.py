"""The one exception that is meant for users."""


class UserError(ValueError):
  """A mistake the user can mend: the message says what was wrong, where, and what to do.

  The commands print it as one line, without a traceback, and exit with status 2.
  Library callers see an ordinary ValueError.
  """
