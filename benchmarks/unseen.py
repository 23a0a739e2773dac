"""How a finished emoji run does on the unseen wordings that its own evaluation did not draw.

    python benchmarks/unseen.py --model=runs/emoji

A run draws at most `evaluation.max_prompts` unseen wordings, and its settings may have been chosen
by them. This draws all of them, at every stage, and tells both parts apart; then it counts what
NO-RL won and lost. The last line is JSON.
"""

import json

import numpy as np
from absl import app, flags

_MODEL = flags.DEFINE_string('model', None, 'Workdir of a run.', required=True)


def main(argv):
  del argv
  from eru_jax.rewards.emoji import TemplateJudge
  from eru_jax.training.evaluation import accuracy, generate, spread
  from eru_jax.training.restore import open_model, snapshots

  experiment, base, workdir = open_model(_MODEL.value, [])
  judge = TemplateJudge(experiment.world.pictures.images)
  table = experiment.world.splits['wording']
  prompts, answers = [pair.implicit for pair in table.pairs], np.asarray(table.index)
  drawn = np.isin(
    np.arange(len(prompts)), spread(len(prompts), experiment.config.evaluation.max_prompts)
  )
  right, result = {}, {}
  for label, snapshot in snapshots(experiment, base, workdir):
    right[label] = generate(experiment, snapshot, judge, prompts, 'wording').shown == answers
    parts = {'evaluated': drawn, 'others': ~drawn, 'all': drawn | True}
    result[label] = {
      part: accuracy(right[label][rows], [table.pairs[row] for row in np.flatnonzero(rows)])
      for part, rows in parts.items()
      if rows.any()
    }
  if {'dk_dm', 'no_rl'} <= right.keys():
    before, after = right['dk_dm'], right['no_rl']
    result['no_rl'] |= {'won': int((after & ~before).sum()), 'lost': int((before & ~after).sum())}
  print(json.dumps(result))


if __name__ == '__main__':
  app.run(main)
