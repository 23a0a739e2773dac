"""Batches of indices into in-memory tables: shuffled, endless, sharded, resumable exactly.

Everything this project trains on fits in memory as tables (prompt embeddings, latents), so the
pipeline moves row numbers only. The batch of a step is a pure function of (sizes, seed, step):
that is why the iterator's whole state is one step count, why a resumed run sees what the
uninterrupted one would have seen, and why the number of processes does not matter.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from eru_jax.errors import UserError


class IndexBatches(Iterator[dict[str, np.ndarray]]):
  """Endless iterator of index batches from several tables, a fixed number from each.

  Every table is walked in a fresh random order each epoch; a batch may straddle two epochs, so
  no row is ever dropped. Made by `mixture_batches`.
  """

  def __init__(
    self,
    sources: Mapping[str, tuple[int, int]],
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    if not 0 <= process_index < process_count:
      raise UserError(
        f'process_index is {process_index} of process_count {process_count}: it must be below it.'
      )
    sizes = {name: [int(size) for size in pair] for name, pair in sources.items()}
    self._step = 0
    self._identity = {'seed': int(seed), 'sources': sizes}
    self._batches: dict[str, grain.MapDataset] = {}
    self._slices: dict[str, slice] = {}
    for name, (num_examples, per_batch) in sources.items():
      local, rest = divmod(per_batch, process_count)
      if per_batch < 0 or rest:
        raise UserError(
          f'{per_batch} examples of {name!r} a batch cannot be split over {process_count} '
          'processes: use a multiple of their number.'
        )
      self._slices[name] = slice(process_index * local, (process_index + 1) * local)
      if per_batch == 0:
        continue
      if num_examples <= 0:
        raise UserError(f'There are no examples of {name!r} to draw {per_batch} a batch from.')
      self._batches[name] = (
        grain.MapDataset.range(num_examples)
        .seed(_source_seed(seed, name))
        .shuffle()
        .repeat()
        .batch(per_batch)
      )

  def __next__(self) -> dict[str, np.ndarray]:
    step, self._step = self._step, self._step + 1
    return {
      name: np.asarray(self._batches[name][step][part], np.int32)
      if name in self._batches
      else np.zeros(0, np.int32)
      for name, part in self._slices.items()
    }

  def get_state(self) -> dict[str, Any]:
    """The position, as JSON-serialisable values; the same in every process."""
    return {'step': self._step, **self._identity}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues after the batch at which `get_state` was called, on any number of processes.

    Raises:
      UserError: if the state comes from other tables, batch sizes or another seed, as the
        batches could not be those of the interrupted run.
    """
    identity = {key: value for key, value in state.items() if key != 'step'}
    if identity != self._identity or not isinstance(state.get('step'), int):
      raise UserError(
        f'The saved data position is of {identity}, but this run reads {self._identity}: '
        'restore the settings of the run or start a new one.'
      )
    self._step = state['step']


class SingleSource(Iterator[np.ndarray]):
  """The only source of an IndexBatches, without its name."""

  def __init__(self, mixture: IndexBatches):
    self._mixture = mixture
    self.get_state = mixture.get_state
    self.set_state = mixture.set_state

  def __next__(self) -> np.ndarray:
    (batch,) = next(self._mixture).values()
    return batch


def batches(
  num_examples: int,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> SingleSource:
  """Endless shuffled index batches of one table.

  Args:
    num_examples: rows of the table.
    batch_size: global batch size, over all processes.
    seed: any integer; neighbouring seeds give unrelated orders.
    process_index: this process, usually `jax.process_index()`.
    process_count: number of processes; process p gets the p-th contiguous part of each batch.

  Returns:
    Iterator of (batch_size / process_count,) int32, with `get_state()` and `set_state(state)`.

  Raises:
    UserError: if a batch cannot be split evenly, or there is nothing to draw from.
  """
  return SingleSource(
    mixture_batches({'examples': (num_examples, batch_size)}, seed, process_index, process_count)
  )


def mixture_batches(
  sources: Mapping[str, tuple[int, int]],
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> IndexBatches:
  """Endless shuffled index batches of several tables, a fixed number of rows from each.

  Args:
    sources: {name: (num_examples, per_batch)}; 0 per batch turns a source off. The order of one
      source does not depend on which others there are.
    seed, process_index, process_count: as in `batches`.

  Returns:
    Iterator of {name: (per_batch / process_count,) int32}, with `get_state` and `set_state`.

  Raises:
    UserError: as `batches`.
  """
  return IndexBatches(sources, seed, process_index, process_count)


def _source_seed(seed: int, name: str) -> int:
  # grain shuffles epoch e with seed + e, so run 0's second epoch would be run 1's first.
  digest = hashlib.sha256(f'{seed}/{name}'.encode()).digest()
  return int.from_bytes(digest[:4], 'little')
