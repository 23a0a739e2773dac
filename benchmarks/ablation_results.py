"""Summaries, tables and the picture of `ablation.py`'s results."""

import numpy as np

SPLITS = ('train', 'wording', 'fact', 'explicit', 'unrelated')
GAINS = {'gain': 'wording', 'gain explicit': 'explicit'}


def resampled(verdicts, facts, draws=2000):
  """Mean and 95 % interval of verdicts, or differences; seeds and facts are resampled.

  Args:
    verdicts: (seeds, prompts).
    facts: (prompts,) what each is about: wordings of one fact are right or wrong together.
    draws: how often.
  """
  rng = np.random.default_rng(0)
  _, numbers = np.unique(facts, return_inverse=True)
  members = numbers == np.arange(numbers.max() + 1)[:, None]
  seeds, count = len(verdicts), len(members)
  # How often each seed and each fact is drawn.
  s = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws)
  f = rng.multinomial(count, np.full(count, 1 / count), draws)
  sums, sizes = verdicts @ members.T, members.sum(1)
  means = np.einsum('ds,sf,df->d', s, sums, f) / (seeds * (f @ sizes))
  low, high = np.quantile(means, (0.025, 0.975))
  return float(verdicts.mean()), float(low), float(high)


def _verdicts(per_seed, split):
  """(seeds, prompts) shares of right pictures."""
  return np.array(
    [[int(c) / scores.get('copies', 1) for c in scores['right'][split]] for scores in per_seed]
  )


def summarise(per_seed, facts, reference=()):
  """What a table has of a row.

  Args:
    per_seed: its scores, a seed each.
    facts: split -> what its prompts are about, see `resampled`.
    reference: those of the row that it is compared with, of which it takes as many seeds; the base
      has one for all.

  Returns:
    {split: [mean, low, high, sd over seeds], 'drift', 'diversity', 'seconds', 'seeds'}, and over
    the reference, prompt by prompt, [mean, low, high] as 'gain' of unseen wordings and
    'gain explicit' of the names.
  """
  result = {'seeds': len(per_seed)}
  for name, split in GAINS.items():
    if reference:
      before = _verdicts(reference, split)
      if len(before) == 1:
        before = np.repeat(before, len(per_seed), axis=0)
      both = min(len(before), len(per_seed))
      result[name] = resampled(_verdicts(per_seed, split)[:both] - before[:both], facts[split])
  for split in SPLITS:
    verdicts = _verdicts(per_seed, split)
    deviation = float(verdicts.mean(1).std(ddof=1)) if len(per_seed) > 1 else None
    result[split] = [*resampled(verdicts, facts[split]), deviation]
  for name in ('drift', 'diversity'):
    result[name] = float(np.mean([scores[name] for scores in per_seed]))
  # The first seed compiles.
  result['seconds'] = min(scores['seconds'] for scores in per_seed)
  return result


def table(rows, summaries):
  """Markdown, one table a group."""
  lines = []
  for group in dict.fromkeys(row.group for row in rows if row.name in summaries):
    # Names are what is to be corrected where anchors are biased; elsewhere they are right.
    biased = any(row.biased for row in rows if row.group == group and row.group != 'base')
    columns = ['seeds', 'unseen wordings', 'gain', 'trained', 'new facts', 'explicit']
    columns += ['gain'] * biased + ['unrelated', 'drift', 'diversity', 'processor s']
    lines += [
      '',
      f'**{group}**',
      '',
      f'| | {" | ".join(columns)} |',
      '|---' * (len(columns) + 1) + '|',
    ]
    for row in rows:
      if row.group != group or row.name not in summaries:
        continue
      found = summaries[row.name]
      mean, low, high, deviation = found['wording']
      spread = '' if deviation is None else f' ± {100 * deviation:.1f}'
      cells = [f'{100 * mean:.1f}{spread} ({100 * low:.0f}-{100 * high:.0f})', _gain(found, 'gain')]
      for split in ('train', 'fact', 'explicit', 'unrelated'):
        mean, low, high, _ = (None if x is None else 100 * x for x in found[split])
        cells.append(f'{mean:.1f} ({low:.0f}-{high:.0f})')
        if biased and split == 'explicit':
          cells.append(_gain(found, 'gain explicit'))
      cells += [f'{found["drift"]:.3f}', f'{found["diversity"]:.3f}', f'{found["seconds"]:.0f}']
      lines.append(f'| {row.name} | {found["seeds"]} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines[1:]) + '\n'


def _gain(found, name):
  if name not in found:
    return ''
  mean, low, high = (100 * x for x in found[name])
  return f'{mean:+.1f} ({low:+.0f} to {high:+.0f})'


def draw_curves(path, rows, summaries):
  """Accuracy against wordings a fact and against facts: how far what is learnt carries over."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
  for axis, group, whole, label in (
    (panels[0], 'wordings', 12, 'training wordings of each fact (same budget)'),
    (panels[1], 'facts', 48, 'facts (each prompt seen as often)'),
  ):
    found = {int(r.name.split()[0]): summaries[r.name] for r in rows if r.group == group
             and r.name in summaries}  # fmt: skip
    if 'mixture' in summaries:
      found[whole] = summaries['mixture']
    counts = sorted(found)
    for split, name, color in (
      ('train', 'trained wordings', '#8a8f98'),
      ('wording', 'unseen wordings', '#c2410c'),
      ('fact', 'facts never trained', '#1d4ed8'),
    ):
      mean, low, high = (np.array([100 * found[c][split][i] for c in counts]) for i in range(3))
      axis.errorbar(counts, mean, (mean - low, high - mean), label=name, color=color, marker='o',
                    capsize=3, linewidth=1.6, markersize=4)  # fmt: skip
    axis.set(xscale='log', xlabel=label, ylim=(-3, 103))
    axis.set_xticks(counts, [str(c) for c in counts])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
  panels[0].set_ylabel('right pictures, %')
  panels[0].legend(frameon=False, fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=140)
  plt.close(figure)
