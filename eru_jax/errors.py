"""The one exception that is meant for users, and the system errors that are theirs to mend."""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_REFUSED = (
  errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN,
  errno.EBUSY, errno.ELOOP, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN,
)  # fmt: skip
# Characters of an item in a list; beyond, they are a stranger's joke.
_LONGEST = 240


class UserError(ValueError):
  """A mistake the user can mend: the message says what was wrong, where, and what to do.

  The commands print it without a traceback and exit with status 2. Library callers see an ordinary
  ValueError.

  Attributes:
    sentence: the message.
    details: what it lists, one item a line below it; mostly nothing.
  """

  def __init__(self, sentence: str, details: Iterable[str] = ()):
    self.sentence, self.details = sentence, tuple(details)
    super().__init__('\n  '.join((sentence, *self.details)))

  def at(self, where: Any) -> 'UserError':
    """The same mistake, and where it is."""
    return UserError(f'{where}: {self.sentence}', self.details)


def listed(problems: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
  """The details of an error: each item of each kind of problem.

  Args:
    problems: kind -> items. These may be a stranger's: each stays on its line, and short.
  """
  return tuple(
    f'{kind}: {item if item.isprintable() and len(item) <= _LONGEST else repr(item[:_LONGEST])}'
    for kind, items in problems.items()
    for item in items
  )


def causes(error: BaseException | None) -> Iterator[BaseException]:
  """An exception, what it was raised from, and so on."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def full_disk(error: BaseException | None) -> str | None:
  """Why files cannot be written here any more, in the system's words; None for other errors."""
  return _system_words(error, _FULL)


def refused(error: BaseException | None) -> str | None:
  """Why a file cannot be read that may well be whole, in the system's words; None for others."""
  return _system_words(error, _REFUSED)


def _system_words(error: BaseException | None, codes: tuple[int, ...]) -> str | None:
  for cause in causes(error):
    for code in codes:
      # TensorStore passes on the words, but not the number.
      if getattr(cause, 'errno', None) == code or os.strerror(code) in str(cause):
        return os.strerror(code)
  return None
