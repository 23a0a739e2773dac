"""How often are the judge and the reward wrong on generated pictures?

    python benchmarks/judge.py --model=runs/emoji --output=/tmp/judge            # to label
    python benchmarks/judge.py --model=runs/emoji --output=/tmp/judge \\
      --labels=benchmarks/results/judge_labels.json                              # error rates

The first call draws `--count` pictures of every stage, half under implicit prompts of split
`wording` and half under explicit ones, and writes contact sheets: each cell shows the right answer
on the left and the generated picture on the right. A person decides for each whether it shows the
answer, without seeing what the models say, and lists the numbers of the right ones:
{"right": [0, 3, ...], "unsure": [7], "labelled by": "...", "date": "..."}. The second call
compares.
"""

import json
import pathlib

import jax
import numpy as np
from absl import app, flags

_MODEL = flags.DEFINE_string('model', None, 'Workdir of a run.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Directory for contact sheets.', required=True)
_LABELS = flags.DEFINE_string('labels', None, 'JSON file of labels; without it, sheets are drawn.')
_COUNT = flags.DEFINE_integer('count', 48, 'Pictures of each stage.')


def main(argv):
  del argv
  from eru_jax.rewards.emoji import EmojiReward, TemplateJudge
  from eru_jax.training.evaluation import generate, selected, spread
  from eru_jax.training.pictures import image_grid, save_png
  from eru_jax.training.restore import open_model, snapshots

  experiment, base, workdir = open_model(_MODEL.value, [])
  pictures = experiment.world.pictures
  judge = TemplateJudge(pictures.images)
  score = jax.jit(EmojiReward(len(pictures.names)))
  images, targets, says, rewards, stages = [], [], [], [], []
  for label, snapshot in snapshots(experiment, base, workdir):
    for split in ('wording', 'explicit'):
      pairs, answers = selected(experiment, split)
      rows = spread(len(pairs), _COUNT.value // 2)
      prompts = [pairs[row].implicit for row in rows]
      made = generate(experiment, snapshot, judge, prompts, split, rows)
      images.append(made.images)
      targets.append(answers[rows])
      says.append(made.shown == answers[rows])
      rewards.append(score(base.reward, made.images.astype(np.float32) / 255, answers[rows]))
      stages += [f'{label} {split}'] * len(rows)
  images, targets = np.concatenate(images), np.concatenate(targets)
  says = np.concatenate(says)
  # The score at which NO-RL's optimality is one half: below it, a picture is learnt from as wrong.
  settings = experiment.config.no_rl
  threshold = (settings.reward_low + settings.reward_high) / 2
  rewarded = np.concatenate(rewards) > threshold
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(parents=True, exist_ok=True)

  if _LABELS.value is None:
    cells = np.concatenate([pictures.images[targets], images], axis=2)
    for start in range(0, len(cells), 48):
      part = cells[start : start + 48]
      numbers = [str(start + offset) for offset in range(len(part))]
      save_png(output / f'sheet_{start:03d}.png', image_grid(part, 8, numbers, scale=1))
    print(f'{len(cells)} pictures in {output}')
    return

  labels = json.loads(pathlib.Path(_LABELS.value).read_text())
  right = np.isin(np.arange(len(images)), labels['right'])
  sure = ~np.isin(np.arange(len(images)), labels.get('unsure', []))
  result = {
    'pictures': int(sure.sum()),
    'right by eye': int(right[sure].sum()),
    'reward threshold': threshold,
  }
  for name, verdict in (('judge', says), ('reward', rewarded)):
    result[name] = {
      'agrees': float(np.mean(verdict[sure] == right[sure])),
      'says right, is wrong': int(np.sum(verdict & ~right & sure)),
      'says wrong, is right': int(np.sum(~verdict & right & sure)),
    }
  print(json.dumps(result))


if __name__ == '__main__':
  app.run(main)
