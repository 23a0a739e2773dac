"""What `python -m eru_jax.diagnose` does: a run's stages, or one model, compared from inside."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence

from eru_jax import distributed
from eru_jax.data.pairs import KnowledgePair, by_split, read_prompt_file
from eru_jax.errors import UserError
from eru_jax.files import check_directory, replace_file
from eru_jax.training.diagnosis import (
  MEASURES,
  Diagnosis,
  check_timesteps,
  diagnose,
  pairs_to_compare,
)
from eru_jax.training.report import write_diagnosis
from eru_jax.training.report_structure import undefined
from eru_jax.training.restore import open_model, read_config, snapshots
from eru_jax.training.run import enable_compilation_cache


def diagnose_model(
  model: str,
  output: str,
  *,
  prompts: str | None = None,
  max_prompts: int = 128,
  timesteps: Sequence[str | float] = (0.9, 0.6, 0.3),
  seed: int = 0,
  mesh: str | None = None,
) -> Diagnosis:
  """Writes output/diagnosis.json and output/diagnosis.html, and prints a short table.

  Args:
    model: workdir, model directory or 'emoji_base'.
    output: directory.
    prompts: JSON Lines file of knowledge pairs; None takes those of the run's own world.
    max_prompts: at most this many pairs of a split.
    timesteps: noise levels in (0, 1].
    seed: of the noise.
    mesh: as of `open_model`.

  Raises:
    UserError: for whatever the user can mend.
  """
  directory = pathlib.Path(output).expanduser()
  check_directory(directory)
  levels = _numbers(timesteps)
  given = None if prompts is None else read_prompt_file(pathlib.Path(prompts).expanduser())
  # Whatever can be refused is refused before weights are read.
  if given is None:
    _check_has_prompts(model)
  else:
    _check_anchors(pairs_to_compare(by_split(given), max_prompts), f'--prompts={prompts}')
  texts = [text for pair in given or () for text in (pair.implicit, pair.explicit)]
  enable_compilation_cache()
  experiment, base, workdir = open_model(model, texts, mesh)
  if given is None:
    splits = {name: split.pairs for name, split in experiment.world.splits.items()}
  else:
    splits = by_split(given)
  groups = pairs_to_compare(splits, max_prompts)
  _check_anchors(groups, f'--model={model} without --prompts')
  found = diagnose(experiment, snapshots(experiment, base, workdir), groups, levels, seed)
  replace_file(
    directory / 'diagnosis.json', (json.dumps(found.to_json(), indent=1) + '\n').encode()
  )
  page = write_diagnosis(directory / 'diagnosis.html', experiment.config.title, found)
  print(describe(found), flush=True)
  print(f'Charts: {page}')
  return found


def _check_has_prompts(model: str) -> None:
  with distributed.main_first():
    config, workdir = read_config(model)
  if workdir is None and config.data.world == 'prompts' and not config.data.pairs:
    raise UserError(
      f'--model={model} has no prompts of its own to compare: name a JSON Lines file of knowledge '
      'pairs with --prompts=FILE.'
    )


def _check_anchors(groups: Mapping[str, Sequence[KnowledgePair]], source: str) -> None:
  count = len({pair.explicit for group in groups.values() for pair in group})
  if count < 2:
    raise UserError(
      f'{source}: the pairs that ask implicitly have {count} different explicit prompts, and are '
      'told apart by those: name a file with at least two of them with --prompts=FILE.'
    )


def _numbers(timesteps: Sequence[str | float]) -> tuple[float, ...]:
  try:
    return check_timesteps([float(t) for t in timesteps])
  except ValueError as error:
    if isinstance(error, UserError):
      raise
    raise UserError(
      f'--timesteps={",".join(map(str, timesteps))}: write numbers with commas between, such as '
      '0.9,0.6,0.3.'
    ) from error


def describe(found: Diagnosis) -> str:
  """A short table: every split's measures at every stage, at the highest timestep."""
  lines = [
    f'Image stream at t = {found.timesteps[0]:g}, mean of {len(found.blocks)} blocks; '
    f'{found.anchors} anchors (chance {100 / found.anchors:.1f} %, no information: distance '
    f'{found.centre["image"][0].mean():.2f})',
    f'{"":24}' + ''.join(f'{stage:>14}' for stage in found.stages),
  ]
  lacking = False
  for split, count in found.prompts.items():
    for measure in MEASURES:
      name = f'{split} ({count})' if measure == MEASURES[0] else ''
      values = [found.mean(split, stage, measure) for stage in found.stages]
      lacking |= not all(map(math.isfinite, values))
      shown = [_shown(value, measure) for value in values]
      lines.append(f'{name[:13]:14}{measure:10}' + ''.join(f'{text:>14}' for text in shown))
  return '\n'.join(lines + [undefined(found)] * lacking)


def _shown(value: float, measure: str) -> str:
  if not math.isfinite(value):
    return '–'
  return f'{100 * value:.1f} %' if measure == 'retrieval' else f'{value:.2f}'
