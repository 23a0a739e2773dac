"""What a run writes down as it trains: metrics.jsonl, TensorBoard, Weights & Biases.

`metrics.jsonl` holds one JSON object a line, {"stage": ..., "step": ..., "time": ..., name: value}.
JSON has no word for values that are not finite: they are stored as "nan", "inf" and "-inf", and
`read_metrics` turns them back into floats.
"""

import importlib
import json
import logging
import math
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eru_jax.errors import UserError
from eru_jax.files import replace_file
from eru_jax.training.progress import Progress as Progress

_RESERVED = ('stage', 'step', 'time')
_NOT_FINITE = ('nan', 'inf', '-inf')


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
  """Wilson's score interval of a proportion (Wilson 1927), sound for small n, near 0 and near 1.

  Args:
    successes: how often it came out right, 0 <= successes <= n.
    n: number of independent trials; without any, nothing is known: (0, 1).
    z: standard normal quantile, 1.96 for 95 %.

  Raises:
    UserError: if successes is not within [0, n].
  """
  if not 0 <= successes <= n:
    raise UserError(f'{successes} successes in {n} trials: successes must lie between 0 and n.')
  if n == 0:
    return 0.0, 1.0
  share, spread = successes / n, z * z / n
  centre = (share + spread / 2) / (1 + spread)
  half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
  low = 0.0 if successes == 0 else max(0.0, centre - half)
  high = 1.0 if successes == n else min(1.0, centre + half)
  return low, high


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads metrics.jsonl in file order; a missing file has no rows, a torn last line is left out.

  Raises:
    UserError: if any other line is no metrics row; it names the line.
  """
  return [row for _, row in _read_lines(pathlib.Path(path))]


def _read_lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
  """The complete lines of a metrics file, without their newlines, and what they say."""
  if not path.is_file():
    return []
  rows = []
  lines = path.read_bytes().split(b'\n')
  for number, line in enumerate(lines, start=1):
    row = _parse(line)
    if row is not None:
      rows.append((line, row))
    elif number < len(lines):
      raise UserError(f'{path}, line {number} is not a row of metrics: delete that line.')
  return rows


def _parse(line: bytes) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except ValueError:
    return None
  if not isinstance(row, dict):
    return None
  if not isinstance(row.get('stage'), str) or not isinstance(row.get('step'), int):
    return None
  return {k: float(v) if k != 'stage' and v in _NOT_FINITE else v for k, v in row.items()}


class MetricWriter:
  """Writes metrics.jsonl, TensorBoard events (one run a stage) and, if asked, Weights & Biases.

  Every line reaches the file as it is written, so a killed run loses at most a part of one line.
  In a multi-host run only the first process should own one.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    wandb_project: str | None = None,
    after_flush: Callable[[], None] = lambda: None,
  ):
    """Opens (or goes on with) the metrics of a working directory.

    Args:
      workdir: made if missing.
      wandb_project: project at Weights & Biases, or None to leave it out.
      after_flush: called whenever everything has been put on disk.

    Raises:
      UserError: if Weights & Biases is asked for but not installed, or if metrics.jsonl is damaged
        elsewhere than in its last line.
    """
    self._workdir = pathlib.Path(workdir)
    self._path = self._workdir / 'metrics.jsonl'
    self._after_flush = after_flush
    self._boards: dict[str, Any] = {}
    self._written: set[tuple] = set()
    self._wandb_stages: set[str] = set()
    self._file = None
    self._wandb = _start_wandb(self._workdir, wandb_project) if wandb_project else None
    self._rewrite([line for line, _ in _read_lines(self._path)])

  def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends one line.

    Args:
      stage: name of the stage.
      step: iterations of the stage that are done.
      metrics: name -> float or () array, on host or device.

    Raises:
      UserError: if a metric is named stage, step or time.
    """
    for name in _RESERVED:
      if name in metrics:
        raise UserError(f'A metric of stage {stage!r} is named {name!r}: give it another name.')
    values = {name: float(value) for name, value in metrics.items()}
    if (stage, int(step), frozenset(values)) in self._written:
      return
    row = {'stage': stage, 'step': int(step), 'time': round(time.time(), 3)}
    row |= {name: v if math.isfinite(v) else str(v) for name, v in values.items()}
    self._file.write(json.dumps(row, allow_nan=False).encode() + b'\n')
    self._file.flush()
    board = self._board(stage)
    for name, value in values.items():
      board.add_scalar(name, value, int(step))
    if self._wandb is not None:
      logged = {f'{stage}/{name}': value for name, value in values.items()}
      if stage not in self._wandb_stages:
        # Stages count their own steps, and the one counter of W&B may not go back.
        self._wandb.define_metric(f'{stage}/*', step_metric=f'{stage}/step')
        self._wandb_stages.add(stage)
      self._wandb.log({f'{stage}/step': int(step)} | logged)

  def truncate_after(self, stage_order: Sequence[str], stage: str, step: int) -> None:
    """Forgets what a killed run wrote after the checkpoint that has just been restored.

    Kept are the lines of earlier stages and those of `stage` up to and including `step`; if the
    resumed run writes a kept line of that very step again, say because the checkpoint came after
    an evaluation, it is not repeated. With step = -1 nothing of `stage` is kept.

    Args:
      stage_order: the run's stages in order; lines of stages not among them are kept.
      stage: the stage that the checkpoint belongs to.
      step: iterations of it that the checkpoint has done.
    """
    order = {name: index for index, name in enumerate(stage_order)}
    if stage not in order:
      raise UserError(f'The stage {stage!r} is not among {", ".join(map(repr, stage_order))}.')
    kept = []
    self._written.clear()
    for line, row in _read_lines(self._path):
      position = (order.get(row['stage'], -1), row['step'])
      if position <= (order[stage], step):
        kept.append(line)
        if position == (order[stage], step):
          self._written.add((stage, step, frozenset(row) - set(_RESERVED)))
    self._rewrite(kept)
    for name in stage_order[order[stage] :]:
      if name in self._boards or self._board_directory(name).is_dir():
        self._board(name, purge_step=step + 1 if name == stage else 0)

  def flush(self) -> None:
    """Puts everything on disk for good; call it before saving a checkpoint."""
    self._file.flush()
    os.fsync(self._file.fileno())
    for board in self._boards.values():
      board.flush()
    self._after_flush()

  def close(self) -> None:
    """Flushes and closes; a second call does nothing."""
    if self._file is None or self._file.closed:
      return
    self.flush()
    self._file.close()
    for board in self._boards.values():
      board.close()
    if self._wandb is not None:
      self._wandb.finish()

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def _rewrite(self, lines: Sequence[bytes]) -> None:
    if self._file is not None:
      self._file.close()
    content = b''.join(line + b'\n' for line in lines)
    if not self._path.is_file() or self._path.read_bytes() != content:
      replace_file(self._path, content)
    self._file = open(self._path, 'ab')

  def _board_directory(self, stage: str) -> pathlib.Path:
    return self._workdir / 'tensorboard' / stage

  def _board(self, stage: str, purge_step: int | None = None) -> Any:
    """The stage's TensorBoard writer; with `purge_step`, a new one that voids later events."""
    if purge_step is not None and stage in self._boards:
      self._boards.pop(stage).close()
    if stage not in self._boards:
      # Files are named by the second; the suffix keeps two of one second apart, and in order.
      self._boards[stage] = _tensorboardx().SummaryWriter(
        str(self._board_directory(stage)),
        purge_step=purge_step,
        filename_suffix=f'.{time.time_ns()}',
      )
    return self._boards[stage]


def _tensorboardx() -> Any:
  # Where torch is installed tensorboardX imports it, two seconds and 200 MB for no use to us.
  hidden = 'torch' not in sys.modules and 'tensorboardX' not in sys.modules
  if hidden:
    sys.modules['torch'] = None
  try:
    module = importlib.import_module('tensorboardX')
  finally:
    if hidden:
      del sys.modules['torch']
  # It warns about every value that is not finite; skipped updates are reported elsewhere.
  logging.getLogger('tensorboardX.x2num').setLevel(logging.ERROR)
  return module


def _start_wandb(workdir: pathlib.Path, project: str) -> Any:
  try:
    wandb = importlib.import_module('wandb')
  except ImportError as error:
    raise UserError(
      f'Weights & Biases was asked for (project {project!r}) but is not installed: run '
      '`pip install wandb`, or leave the project empty.'
    ) from error
  identity = workdir / 'wandb_id.txt'
  if not identity.is_file():
    replace_file(identity, secrets.token_hex(4).encode())
  run_id = identity.read_text().strip()
  return wandb.init(project=project, dir=str(workdir), id=run_id, resume='allow')
