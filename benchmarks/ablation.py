"""Every variant of DK-DM and NO-RL, adapters, and amounts of data, on the emoji world.

    python benchmarks/ablation.py                                  # some 2.5 hours a seed, 2 cores
    python benchmarks/ablation.py --rows='base,mixture,N1' --seeds=1

One row after the other, the seeds around them, so that a run that is stopped has whole rows; what
is there is not run again. Writes results.json (every prompt's verdict), results.md and curves.png
into --output. Rows, and what they have in common, are in `ablation_rows.py`.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time

import numpy as np
from ablation_bias import make_biased_base
from ablation_results import SPLITS, draw_curves, summarise, table
from ablation_rows import COMMON, chosen_rows, compared_with, config_of, slug
from absl import app, flags

_ALL_SEEDS = 3
_RECORDED = pathlib.Path(__file__).parent / 'results' / 'ablation'

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where checkpoints and scores are kept; runs/ablation, or runs/ablation-quick.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Where the results go; benchmarks/results/ablation if all rows run, else the '
  'workdir.'
)  # fmt: skip
_SEEDS = flags.DEFINE_integer('seeds', _ALL_SEEDS, 'Training seeds, from 0.', lower_bound=1)
_ROWS = flags.DEFINE_list(
  'rows',
  [],
  'Only these rows, by name, or all whose names begin so. "Names, with commas" are quoted.',
)
_QUICK = flags.DEFINE_bool('quick', False, 'A few steps on a few facts: does everything run?')

# Pictures of one prompt whose mutual distance is the diversity, and of how many prompts.
_COPIES, _DIVERSITY_PROMPTS = 4, 32


def made_with(config, row):
  """All that a row's scores depend on, as JSON data."""
  from eru_jax.data.emoji_pairs import FACTS_FILE
  from eru_jax.training.config import to_json

  facts = hashlib.sha256(FACTS_FILE.read_bytes()).hexdigest()
  # The directory of the biased base is nothing that scores depend on.
  biased = {'base': 'biased', 'copies': row.copies} if row.biased else {}
  made = {'config': to_json(config), 'start': row.start, 'facts': facts, **biased}
  return json.loads(json.dumps(made))


def facts_of(data, max_prompts):
  """Split -> what each of its prompts is about that `measure` asks for."""
  from eru_jax.data.clusters import clusters_of
  from eru_jax.training.evaluation import spread
  from eru_jax.training.experiment import open_world

  found, splits = {}, open_world(data).splits
  for split in SPLITS:
    pairs = splits[split].pairs
    found[split] = clusters_of([pairs[row] for row in spread(len(pairs), max_prompts)])
  return found


def diversity(experiment, snapshot, judge):
  """Mean distance (root mean square of pixels in [0, 1]) of pictures of one prompt."""
  from eru_jax.training.evaluation import generate, spread

  pairs = experiment.prompts('wording')
  prompts = [pairs[row].implicit for row in spread(len(pairs), _DIVERSITY_PROMPTS)]
  repeated = [prompt for prompt in prompts for _ in range(_COPIES)]
  images = generate(experiment, snapshot, judge, repeated, 'diversity').images
  images = images.reshape(len(prompts), _COPIES, -1).astype(np.float32) / 255
  distances = [
    np.sqrt(np.mean(np.square(images[:, i] - images[:, j]), -1))
    for i in range(_COPIES)
    for j in range(i)
  ]
  return float(np.mean(distances))


def measure(experiment, snapshot, judge, base, copies=1):
  """A model's scores, and the pictures of unrelated prompts.

  Args:
    experiment, snapshot, judge: what draws and judges.
    base: the base's pictures of unrelated prompts, None for the base.
    copies: pictures of each prompt.

  Returns:
    {'right': {split: '0110...'}, 'drift', 'diversity'}; of several copies of a prompt, the digit
    says how many are right, and 'copies' how many there are.
  """
  from eru_jax.training.evaluation import generate, selected

  right, unrelated = {}, None
  for split in SPLITS:
    pairs, answers = selected(experiment, split)
    prompts = [pair.implicit for pair in pairs for _ in range(copies)]
    drawn = generate(experiment, snapshot, judge, prompts, split)
    hits = (drawn.shown == np.repeat(answers, copies)).reshape(-1, copies).sum(1)
    right[split] = ''.join(map(str, hits))
    if split == 'unrelated':
      unrelated = drawn.images.astype(np.float32) / 255
  before = unrelated if base is None else base
  drift = float(np.sqrt(np.mean(np.square(unrelated - before), axis=(1, 2, 3))).mean())
  scores = {'right': right, 'drift': drift, 'diversity': diversity(experiment, snapshot, judge)}
  return scores | ({'copies': copies} if copies > 1 else {}), unrelated


class Runner:
  """Runs rows; keeps the base's pictures between rows that share data and sampler."""

  def __init__(self, root, quick):
    self._root, self._quick = root, quick
    self._base = {}

  def __call__(self, row, seed):
    """The row's scores under a seed: those on disk, or new ones."""
    directory = self._root / f'{slug(row.name)}-{seed}'
    path, settings = directory / 'scores.json', directory / 'settings.json'
    mine = made_with(config_of(row, seed, self._quick), row)
    if directory.is_dir() and (not settings.is_file() or json.loads(settings.read_text()) != mine):
      raise app.UsageError(
        f'{directory} was made with other settings or facts: remove it, or give another --workdir.'
      )
    if not path.is_file():
      directory.mkdir(parents=True, exist_ok=True)
      settings.write_text(json.dumps(mine, indent=1))
      scores = self._run(row, seed, directory)
      path.write_text(json.dumps(scores))
    return json.loads(path.read_text())

  def _run(self, row, seed, directory):
    from eru_jax import sharding
    from eru_jax.rewards.emoji import TemplateJudge
    from eru_jax.training.experiment import open_experiment

    source = make_biased_base(self._root, self._quick) if row.biased else None
    config = config_of(row, seed, self._quick, source)
    mesh = sharding.make_mesh(config.mesh)
    experiment, snapshot = open_experiment(config, mesh)
    judge = TemplateJudge(experiment.world.pictures.images)
    key = repr((config.model, config.data, config.sampling, config.evaluation, row.copies))
    with sharding.use_mesh(mesh):
      if key not in self._base:
        self._base[key] = measure(experiment, snapshot, judge, None, row.copies)
      scores, unrelated = self._base[key]
      if row.group == 'base':
        return {**scores, 'seconds': 0.0}
      snapshot, seconds = self._train(row, seed, directory, experiment, snapshot)
      scores, _ = measure(experiment, snapshot, judge, unrelated, row.copies)
    return {**scores, 'seconds': seconds}

  def _train(self, row, seed, directory, experiment, snapshot):
    """The row's last stage, from the base or from another row's DK-DM result."""
    from eru_jax.training.loop import load_result, run_stage
    from eru_jax.training.metrics import MetricWriter
    from eru_jax.training.stages import STAGES

    config, mesh, seconds = experiment.config, experiment.mesh, 0.0
    for name in config.stages:
      settings = config.stage(name)
      stage = STAGES[name].build(experiment, snapshot, settings)
      if name != config.stages[-1]:
        start = self._root / f'{slug(row.start)}-{seed}'
        params = load_result(name, stage, settings, mesh, start)
        if params is None:
          raise app.UsageError(f'{row.name} begins with the row {row.start!r}: run that first.')
      else:
        # Of the processor: the machine may be shared.
        began = time.process_time()
        with MetricWriter(directory, None) as writer:
          key = experiment.key(f'stage {name}')
          params = run_stage(name, stage, settings, key, mesh, directory, writer, config.stages)
        seconds = _kept(directory / 'seconds.json', time.process_time() - began)
      snapshot = STAGES[name].absorb(experiment, snapshot, params)
    return snapshot, seconds


def _kept(path, seconds):
  """What training took the first time: a killed row is only measured when it is run again."""
  if not path.is_file():
    path.write_text(json.dumps(seconds))
  return json.loads(path.read_text())


def main(argv):
  del argv
  import jax

  from eru_jax.training.run import enable_compilation_cache, versions

  rows = chosen_rows(_ROWS.value)
  enable_compilation_cache()
  root = pathlib.Path(_WORKDIR.value or f'runs/ablation{"-quick" * _QUICK.value}').absolute()
  whole = not _ROWS.value and not _QUICK.value and _SEEDS.value >= _ALL_SEEDS
  # What is recorded is never overwritten by a part of it.
  output = pathlib.Path(_OUTPUT.value or (_RECORDED if whole else root))
  output.mkdir(parents=True, exist_ok=True)
  runner = Runner(root, _QUICK.value)
  asked = functools.cache(facts_of)
  configs = [(row, config_of(row, 0, _QUICK.value)) for row in rows]
  per_row, began = {}, time.monotonic()
  for seed in range(_SEEDS.value):
    for row in rows:
      if row.group == 'base' and seed:
        continue
      per_row.setdefault(row.name, []).append(runner(row, seed))
      jax.clear_caches()
      summaries = {
        row.name: summarise(
          per_row[row.name],
          asked(config.data, config.evaluation.max_prompts),
          per_row.get(compared_with(row), ()),
        )
        for row, config in configs
        if row.name in per_row
      }
      found = summaries[row.name]
      scores = ', '.join(f'{split} {100 * found[split][0]:.1f}' for split in SPLITS)
      print(f'{time.monotonic() - began:6.0f} s  seed {seed}  {row.name:32s} {scores}', flush=True)
      results = {
        'versions': versions(),
        'rows': [dataclasses.asdict(row) for row in rows],
        'common': COMMON,
        'summary': summaries,
        'per seed': per_row,
      }
      (output / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
      (output / 'results.md').write_text(table(rows, summaries))
  draw_curves(output / 'curves.png', rows, summaries)
  print(table(rows, summaries))
  print(json.dumps(summaries))


if __name__ == '__main__':
  app.run(main)
