"""The one exception that is meant for users, and the one system error that is theirs to mend."""

import errno
import os

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class UserError(ValueError):
  """A mistake the user can mend: the message says what was wrong, where, and what to do.

  The commands print it as one line, without a traceback, and exit with status 2.
  Library callers see an ordinary ValueError.
  """


def full_disk(error: BaseException | None) -> str | None:
  """Why files cannot be written here any more, in the system's words; None for other errors."""
  while error is not None:
    for code in _FULL:
      # TensorStore passes on the words, but not the number.
      if getattr(error, 'errno', None) == code or os.strerror(code) in str(error):
        return os.strerror(code)
    error = error.__cause__ or error.__context__
  return None
