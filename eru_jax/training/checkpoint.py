"""Checkpoints of one stage: atomic, checked when read, the last good one wins.

A thin layer over Orbax, so that its API is named in this file only. Every checkpoint carries the
checksum of each of its arrays: storage that silently returns other bytes counts as damage too.

In a run of several processes all of them save and restore together. Each reads its parts on its
own, so that what one finds damaged keeps nobody waiting; then they agree on what to do.
"""

import contextlib
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from eru_jax import distributed
from eru_jax.errors import UserError, causes, full_disk, refused
from eru_jax.files import as_path
from eru_jax.training.checksums import checksums

PyTree = Any
# What Orbax and this file raise when a file is missing, cut off or holds other bytes. Whatever else
# is raised, memory that ran out or a mistake in a program, says nothing about the checkpoint.
_DAMAGE = (ValueError, KeyError, EOFError, FileNotFoundError, NotADirectoryError, IsADirectoryError)


def _crcs(tree: PyTree) -> dict[str, int]:
  """CRC-32 of every leaf this process holds whole: the checksums that earlier versions kept."""
  sums = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if getattr(leaf, 'is_fully_addressable', True):
      data = np.ascontiguousarray(np.asarray(leaf))
      sums[jax.tree_util.keystr(path)] = zlib.crc32(data.tobytes())
  return sums


def _layout(tree: PyTree) -> dict[str, str]:
  """Dtype and shape of every leaf, as JSON data."""
  return {
    jax.tree_util.keystr(path): f'{np.dtype(leaf.dtype)}{list(leaf.shape)}'
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


class StageCheckpoints:
  """Saves and restores (state, data position) under one directory, keeping the newest few."""

  def __init__(self, directory: str | os.PathLike, keep: int = 2):
    """Opens (or makes) the directory; `keep` checkpoints survive, the oldest go first."""
    self._directory = as_path(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    self._keep = keep
    self._checkpointer = self._open()

  def _open(self) -> ocp.training.Checkpointer:
    # Orbax says at length, and again at each look, which metadata it misses; `_read` says it once.
    with _quiet():
      return ocp.training.Checkpointer(
        str(self._directory),
        preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
      )

  @property
  def steps(self) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    return sorted(metadata.step for metadata in self._checkpointer.checkpoints)

  def save(self, step: int, state: PyTree, position: dict[str, Any]) -> None:
    """Saves the state and the JSON-serialisable position of the data iterator.

    Raises:
      UserError: if the disk is full or not writable. Earlier checkpoints are intact.
    """
    if distributed.agreed(lambda: step in self.steps):
      return
    metadata = {
      'position': position,
      'checksums': checksums(state),
      'layout': _layout(state),
    }
    try:
      with _quiet():
        self._checkpointer.save_pytree(step, state, custom_metadata=metadata)
    except Exception as error:
      reason = full_disk(error)
      if reason is None:
        raise
      if jax.process_count() == 1:
        # Orbax would raise the same error again at whatever it is asked next.
        with _quiet(), contextlib.suppress(Exception):
          self._checkpointer.close()
        self._checkpointer = self._open()
      # What was written of the new one would only keep the disk full.
      for part in self._directory.glob(f'{step}.*'):
        with contextlib.suppress(OSError):
          epath.Path(part).rmtree()
      earlier = f'the one of step {self.steps[-1]} is intact' if self.steps else 'there is none yet'
      raise UserError(
        f'Could not save the checkpoint of step {step} in {self._directory}: '
        f'{reason}. Of earlier checkpoints, {earlier}; free some space and run the '
        'same command again to continue.'
      ) from error

  def restore(self, like: PyTree, *, repair: bool = True) -> tuple[PyTree, dict[str, Any]] | None:
    """Reads the newest checkpoint that is whole.

    Args:
      like: the state to restore into: its structure, shapes, dtypes and shardings.
      repair: move damaged checkpoints aside, so that training can save their steps again. False
        changes nothing on disk.

    Returns:
      (state, position), or None if nothing has been saved.

    Raises:
      UserError: if there are checkpoints but all of them are damaged; if they hold arrays of other
        names, shapes or dtypes, or the system refuses to read them: these are left as they are.
    """
    steps = distributed.agreed(lambda: self.steps)
    for step in reversed(steps):
      found = self._read(step, like)
      if found is not None:
        return found
      if repair:
        self._set_aside(step)
    if steps and not repair:
      raise UserError(
        f'None of the checkpoints {steps} in {self._directory} can be read: run `train` again on '
        'this workdir to make them anew.'
      )
    if steps:
      raise UserError(
        f'None of the checkpoints {steps} in {self._directory} can be read; they were set aside '
        f'as {self._directory.name}.damaged-*. Run the same command again to start this stage anew.'
      )
    return None

  def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """(state, position) of a checkpoint, or None, with a warning, if a part of it is damaged."""
    state = sums = position = None
    try:
      path = str(self._directory / str(step))
      with _alone():
        with _quiet():
          metadata = ocp.metadata(path).custom_metadata or {}
        if 'layout' not in metadata:
          raise ValueError('its metadata is missing')
        self._check_layout(step, metadata['layout'], _layout(like))
        sums, position = metadata['checksums'], metadata['position']
        state = ocp.load_pytree(path, like)
    except UserError:
      raise
    except Exception as error:
      self._check_damaged(step, error)
      self._warn(step, _first_line(error))
    if not distributed.all_true(state is not None):
      return None
    changed = _changed(state, sums)
    if changed is not None:
      self._warn(step, f'the bytes of {changed} have changed')
      return None
    return state, position

  def _warn(self, step: int, why: str) -> None:
    logging.warning(
      'Checkpoint %s/%d is damaged (%s); trying the one before it.', self._directory, step, why
    )

  def _check_damaged(self, step: int, error: Exception) -> None:
    """Returns only if an error of reading is evidence that the checkpoint is damaged.

    Raises:
      UserError: if the system refuses to read it.
      BaseException: the error itself, if it is about something else, such as memory.
    """
    reason = refused(error) or self._refusal(step)
    if reason is not None:
      raise UserError(
        f'Checkpoint {self._directory}/{step} cannot be read ({reason}). It may well be whole, so '
        'nothing was changed: mend that and run the same command again to continue.'
      ) from error
    for cause in causes(error):
      # Orbax turns all that interrupts it into a KeyError, Ctrl-C too.
      if not isinstance(cause, Exception):
        raise cause
      out_of_memory = isinstance(cause, MemoryError) or 'RESOURCE_EXHAUSTED' in str(cause)
      if out_of_memory or isinstance(cause, jax.errors.JaxRuntimeError):
        raise error
    # Of arrays that several processes read in parts, Orbax says it in an exception of no kind.
    if not any(isinstance(cause, _DAMAGE) for cause in causes(error)):
      raise error

  def _refusal(self, step: int) -> str | None:
    """Why a file of a checkpoint cannot be read: Orbax takes one that it may not open for empty."""

    def fail(error: OSError):
      raise error

    if not isinstance(self._directory, pathlib.Path):
      return None  # An object store says itself what it refuses.
    try:
      for directory, _, names in os.walk(self._directory / str(step), onerror=fail):
        for name in names:
          with open(os.path.join(directory, name), 'rb') as file:
            while file.read(1 << 20):
              pass
    except OSError as error:
      return refused(error)
    return None

  def _check_layout(self, step: int, stored: dict[str, str], wanted: dict[str, str]) -> None:
    names = [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]
    if names:
      name = names[0]
      raise UserError(
        f'Checkpoint {self._directory}/{step} is of another model or optimizer: {name} is '
        f'{stored.get(name, "absent")} there and {wanted.get(name, "absent")} here '
        f'({len(names)} arrays differ); continue it with the config and version it was made with, '
        'or choose another --workdir.'
      )

  def _set_aside(self, step: int) -> None:
    """Moves a damaged checkpoint out of the way, so that its step can be saved again."""
    if distributed.is_main():
      target = self._directory.with_name(f'{self._directory.name}.damaged-{step}')
      serial = 0
      while target.exists():
        serial += 1
        target = target.with_name(f'{self._directory.name}.damaged-{step}.{serial}')
      (self._directory / str(step)).rename(target)
    distributed.barrier()
    self._checkpointer.reload()

  def close(self) -> None:
    """Waits for what is being written and releases the directory."""
    self._checkpointer.close()


def _changed(state: PyTree, stored: dict[str, Any]) -> str | None:
  """The first array that is not the one that was saved; the same answer in every process."""
  if any(isinstance(value, int) for value in stored.values()):
    wrong = [path for path, crc in _crcs(state).items() if stored.get(path) != crc]
    return (wrong or ['an array'])[0] if not distributed.all_true(not wrong) else None
  return next((path for path, one in checksums(state).items() if stored.get(path) != one), None)


def _alone() -> ocp.Context:
  """Within it, Orbax reads what this process holds without waiting for the others."""
  context = ocp.Context()
  if jax.process_count() > 1:
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
  return context


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences Orbax's threads, which print the traceback of what they also raise."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
  text = str(error).strip().splitlines()
  return (text[0] if text else type(error).__name__)[:200]
