"""Data sets of the Hugging Face hub, by id."""

import pathlib
import re

from eru_jax.benchmarks.files import SUFFIXES
from eru_jax.errors import UserError

_ID = re.compile(r'(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?')


def is_id(data: str) -> bool:
  """Whether a flag has the form of an id, OWNER/NAME or OWNER/NAME@REVISION."""
  return _ID.fullmatch(data) is not None


def download(data: str) -> pathlib.Path:
  """The files of a data set, in the hub's own cache ($HF_HOME); downloaded if they are not there.

  Args:
    data: OWNER/NAME, or OWNER/NAME@REVISION for one state of it.

  Returns:
    The directory of that state.

  Raises:
    UserError: if there is no such data set, no right to it or no way to the hub.
  """
  from huggingface_hub import errors, snapshot_download  # takes a second

  found = _ID.fullmatch(data)
  try:
    where = snapshot_download(
      found['id'],
      repo_type='dataset',
      revision=found['revision'],
      allow_patterns=[f'*{suffix}' for suffix in SUFFIXES],
    )
  except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip('.:') if lines else type(error).__name__
    raise UserError(
      f'--data={data} is no directory here, and the Hugging Face hub did not give it ({reason}): '
      'mend the id, log in with `hf auth login`, or give a directory of files that you have.'
    ) from error
  return pathlib.Path(where)
