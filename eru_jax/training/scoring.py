"""What `python -m eru_jax.evaluate --prompts=FILE` does: a user's own pairs, at every stage."""

import json
import pathlib
from typing import Any

import numpy as np

from eru_jax.data.pairs import read_prompt_file
from eru_jax.data.world import answers
from eru_jax.errors import UserError
from eru_jax.files import check_directory, replace_file
from eru_jax.training.evaluation import accuracy, draw, judge_of, start_noise
from eru_jax.training.pictures import image_grid, save_png
from eru_jax.training.restore import open_model, snapshots
from eru_jax.training.run import enable_compilation_cache

# Rows of the picture; the scores are of all prompts.
_GRID_ROWS = 24


def score_prompt_file(
  model: str, prompts: str, output: str, seed: int, mesh: str | None = None
) -> dict[str, Any]:
  """Scores implicit and explicit prompts of a file at every stage of a run.

  Args:
    model: workdir, model directory or 'emoji_base'.
    prompts: JSON Lines file of knowledge pairs.
    output: directory for evaluation.json and grid.png.
    seed: of the start noise, which prompt k gets at every stage, for both of its forms.
    mesh: as of `open_model`.

  Returns:
    The contents of evaluation.json: {'stages': {label: {'implicit': {'accuracy', 'n', 'ci95'},
    'explicit': {...}}}, 'pairs': [...]}.

  Raises:
    UserError: for a bad file, an explicit prompt the judge has no picture of, or a model that draws
      pictures of another size than the judge knows.
  """
  directory = pathlib.Path(output).expanduser()
  check_directory(directory)
  pairs = read_prompt_file(pathlib.Path(prompts).expanduser())
  forms = {
    'implicit': [pair.implicit for pair in pairs],
    'explicit': [pair.explicit for pair in pairs],
  }
  enable_compilation_cache()
  experiment, base, workdir = open_model(model, [*forms['implicit'], *forms['explicit']], mesh)
  pictures = experiment.world.pictures
  if pictures is None:
    raise UserError(
      f'--model={model}: no judge knows what its pictures should show, as its data.world is '
      f'{experiment.config.data.world!r}; `sample` can draw these prompts.'
    )
  size, known = (base.model.height, base.model.width), pictures.images.shape[1:3]
  if size != known:
    raise UserError(
      f'--model={model} draws pictures of {size[0]} x {size[1]} pixels, but the judge knows those '
      f'of {known[0]} x {known[1]} only: `sample` can draw with this model, nothing can score it.'
    )
  targets = answers(pictures, pairs, prompts)
  judge = judge_of(experiment)
  noise = start_noise(base.model, seed, 'evaluate', np.arange(len(pairs)))
  stages = {}
  records = [{'id': p.id, 'implicit': p.implicit, 'explicit': p.explicit} for p in pairs]
  columns, titles = [pictures.images[targets]], ['target']
  for label, snapshot in snapshots(experiment, base, workdir):
    stages[label] = {}
    for form, texts in forms.items():
      generated = draw(experiment, snapshot, judge, texts, noise)
      right = generated.shown == targets
      stages[label][form] = accuracy(right)
      for record, seen in zip(records, generated.shown, strict=True):
        record[f'{label} {form}'] = pictures.names[seen]
      columns.append(generated.images)
      titles.append(f'{label}, {form}')
    print(
      f'{label:>8}: implicit {100 * stages[label]["implicit"]["accuracy"]:.1f} %, explicit '
      f'{100 * stages[label]["explicit"]["accuracy"]:.1f} % of {len(pairs)}', flush=True
    )  # fmt: skip
  if not stages:
    raise UserError(f'--model={model}: this run has not finished a stage that draws pictures yet.')
  result = {'stages': stages, 'pairs': records}
  replace_file(directory / 'evaluation.json', (json.dumps(result, indent=2) + '\n').encode())
  shown = min(len(pairs), _GRID_ROWS)
  images = np.stack([column[row] for row in range(shown) for column in columns])
  labels = [
    text for pair in pairs[:shown] for text in (f'{pair.implicit} ({pair.explicit})', *titles[1:])
  ]
  save_png(directory / 'grid.png', image_grid(images, len(columns), labels, scale=2))
  print(f'Scores: {directory / "evaluation.json"}')
  return result
