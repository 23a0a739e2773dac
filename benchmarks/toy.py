"""The toy laboratory: every variant of DK-DM and NO-RL where right and wrong are known exactly.

    python benchmarks/toy.py                    # 5 seeds, writes benchmarks/results/toy
    python benchmarks/toy.py --quick            # 1 seed, writes runs/toy
    python benchmarks/toy.py --variant=a --variant='N1, branch weights'

The world is in `toy_world.py`, the variants in `toy_variants.py`. DK-DM starts from the base, NO-RL
from the mixture's model and, for a few variants, from the base. Writes `results.json`, `results.md`
and pictures of what is drawn: to benchmarks/results/toy, where the measured results are kept, only
if all variants run on five seeds; a partial run goes to runs/toy. The last line of the output is
JSON: {variant: {"correct": mean over seeds, "sd": ..., "worst": ..., "balance": ...,
"explicit": ..., "early": {the same after fewer steps}}}.
"""

import json
import math
import pathlib
import sys
import time

from absl import app, flags

_QUICK = flags.DEFINE_bool('quick', False, 'One seed.')
_SEEDS = flags.DEFINE_integer('seeds', 5, 'Seeds of everything, the base included.', lower_bound=1)
_VARIANTS = flags.DEFINE_multi_string('variant', [], 'Only this one; may be repeated.')
_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'Directory of the results. By default benchmarks/results/toy for all variants on 5 seeds, else '
  'runs/toy, so that a partial run does not overwrite what was measured.',
)

_RECORDED, _PARTIAL, _RECORDED_SEEDS = 'benchmarks/results/toy', 'runs/toy', 5
# Samples of each concept in a picture.
_DRAWN = 250
# What is added to the name of a NO-RL variant that did not start from the mixture.
_FROM_BASE = ', from the base'
_COLORS = ('#c1443c', '#d79b2b', '#4c9a4a', '#3a8f96', '#4a63b8', '#8b4f9f')


def _number(values):
  """Mean and standard deviation over seeds, rounded; one seed has no deviation."""
  mean = sum(values) / len(values)
  spread = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
  return round(mean, 4), round(math.sqrt(spread), 4)


def summarise(scores):
  """{metric: one value a seed} -> {'correct', 'sd', 'worst', 'balance', 'explicit', ...}."""
  result = {}
  for name in ('correct', 'worst', 'balance', 'explicit'):
    mean, spread = _number(scores[name])
    result[name] = mean
    result['sd' if name == 'correct' else f'{name}_sd'] = spread
  # Means hide a seed that lost a concept.
  result['lowest_seed'] = round(min(scores['correct']), 4)
  return result


def laboratory(num_seeds, budget, variants, report=lambda *args: None):
  """Runs variants on all seeds at once.

  Args:
    num_seeds: number of seeds.
    budget: a `toy_variants.Budget`.
    variants: (DK-DM names, NO-RL names, NO-RL names from the base).
    report: called as (name, scores early, scores at the end, samples of the first seed).

  Returns:
    {name: {'early', 'end': {metric: one float a seed}}}, `base`, `explicit prompt` included.
  """
  import jax
  import numpy as np
  import toy_variants
  import toy_world as world

  keys = jax.random.split(jax.random.key(0), num_seeds)

  def stream(number):
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

  @jax.jit
  def measure(params):
    return jax.vmap(lambda p, key: world.evaluate(world.velocity(p), key, budget.samples))(
      params, stream(1)
    )

  def score(params):
    measured = jax.device_get(measure(params))
    pictures = measured.pop('samples')
    return {name: np.asarray(v, float).tolist() for name, v in measured.items()}, pictures[0]

  results = {}

  def record(name, early, end):
    scores, samples = score(end)
    results[name] = {'early': scores if early is end else score(early)[0], 'end': scores}
    report(name, results[name]['early'], scores, samples)

  base = jax.jit(jax.vmap(lambda key: toy_variants.pretrain(key, budget.pretraining)))(stream(2))
  record('base', base, base)
  teacher = jax.jit(jax.vmap(toy_variants.make_teacher))(base, stream(3))
  dk_dm, no_rl, from_base = variants
  # NO-RL starts from the mixture, whether or not its own row is asked for.
  start = None
  for name in dict.fromkeys([*dk_dm, *(['mix'] if no_rl else [])]):
    train = jax.jit(
      jax.vmap(lambda t, key, name=name: toy_variants.train_dk_dm(name, t, key, budget))
    )
    out = train(teacher, stream(4))
    record(name, out['early'], out['end'])
    start = out['end'] if name == 'mix' else start
  for names, origin, label in ((no_rl, start, ''), (from_base, base, _FROM_BASE)):
    for name in names:
      train = jax.jit(
        jax.vmap(lambda p, key, name=name: toy_variants.train_no_rl(name, p, key, budget))
      )
      out = train(origin, stream(5))
      record(name + label, out['early'], out['end'])
  return results


def table(results, budget):
  """The results as a Markdown table."""
  lines = [
    '| variant | steps | correct ± sd | lowest seed | worst concept | balance | explicit |',
    '|---|---|---|---|---|---|---|',
  ]
  import toy_variants

  for name, parts in results.items():
    known = name in toy_variants.DK_DM or name in toy_variants.DMD
    steps = budget.dk_dm if known else budget.no_rl
    steps = (0,) if name == 'base' else steps
    for count, part in zip(steps, ('end', 'early'), strict=False):
      s = summarise(parts[part])
      lines.append(
        f'| {name} | {count or ""} | {s["correct"]:.3f} ± {s["sd"]:.3f} | {s["lowest_seed"]:.3f} '
        f'| {s["worst"]:.3f} | {s["balance"]:.2f} ± {s["balance_sd"]:.2f} | {s["explicit"]:.3f} |'
      )
  return '\n'.join(lines)


def output_directory(given, variants, seeds):
  """Where results go: `given`, or the recorded results' place for a whole run only.

  Args:
    given: of --output, or None.
    variants: of --variant; empty means all.
    seeds: number of seeds.
  """
  whole = not variants and seeds == _RECORDED_SEEDS
  return pathlib.Path(given or (_RECORDED if whole else _PARTIAL))


def groups(names, no_rl):
  """{picture: variants in it} of the variants that ran; a picture of nothing new is left out.

  Args:
    names: of `laboratory`'s results, in their order.
    no_rl: which of them are NO-RL's, from the mixture.
  """
  from_base = [n for n in names if n.endswith(_FROM_BASE)]
  dk_dm = [n for n in names if n != 'base' and n not in no_rl and n not in from_base]
  starts = {'dk_dm': 'base', 'no_rl': 'mix', 'from_base': 'base'}
  ran = {'dk_dm': dk_dm, 'no_rl': [n for n in names if n in no_rl], 'from_base': from_base}
  return {group: [starts[group], *found] for group, found in ran.items() if found}


def draw(path, panels):
  """Writes a PNG: one panel of samples (6, n, 2) a variant, circles where right answers are."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  import toy_world as world

  columns = min(5, len(panels))
  rows = -(-len(panels) // columns)
  figure, axes = plt.subplots(rows, columns, figsize=(2.5 * columns, 2.7 * rows), squeeze=False)
  for axis in axes.flat:
    axis.axis('off')
  for axis, (title, samples) in zip(axes.flat, panels.items(), strict=False):
    for concept, color in enumerate(_COLORS):
      x = samples[concept, :_DRAWN]
      axis.scatter(x[:, 0], x[:, 1], s=1.5, color=color, linewidths=0)
      for centre in world.RIGHT[concept]:
        axis.add_patch(plt.Circle(centre, world.RADIUS, fill=False, color=color, linewidth=0.8))
    axis.set(xlim=(-5.6, 5.6), ylim=(-5.6, 5.6), aspect='equal')
    axis.set_title(title, fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def run(seeds, budget, variants, output):
  """Runs variants as `laboratory`, writes everything to `output` and prints it."""
  output.mkdir(parents=True, exist_ok=True)
  panels, started = {}, time.time()

  def report(name, early, end, samples):
    panels[name] = samples
    e, s = summarise(early), summarise(end)
    print(
      f'{time.time() - started:6.0f} s  {name:45s} early {e["correct"]:.3f} ± {e["sd"]:.3f}  '
      f'end {s["correct"]:.3f} ± {s["sd"]:.3f}  balance {s["balance"]:.2f}  '
      f'explicit {s["explicit"]:.3f}',
      flush=True,
    )

  results = laboratory(seeds, budget, variants, report)
  summary = {n: summarise(r['end']) | {'early': summarise(r['early'])} for n, r in results.items()}
  (output / 'results.json').write_text(
    json.dumps({'seeds': seeds, 'summary': summary, 'per seed': results}, indent=1) + '\n'
  )
  (output / 'results.md').write_text(table(results, budget) + '\n')
  for group, names in groups(panels, variants[1]).items():
    draw(output / f'{group}.png', {n: panels[n] for n in names})
  print(table(results, budget))
  print(f'Written to {output}.')
  print(json.dumps(summary))


def main(argv):
  del argv
  sys.path.insert(0, str(pathlib.Path(__file__).parent))
  import toy_variants

  dk_dm = [*toy_variants.DK_DM, *toy_variants.DMD]
  no_rl, from_base = list(toy_variants.NO_RL), list(toy_variants.FROM_BASE)
  if _VARIANTS.value:
    unknown = set(_VARIANTS.value) - set(dk_dm) - set(no_rl)
    if unknown:
      raise app.UsageError(f'No variant is called {sorted(unknown)}; there are {dk_dm + no_rl}.')
    dk_dm, no_rl = ([n for n in names if n in _VARIANTS.value] for names in (dk_dm, no_rl))
    from_base = []
  seeds = 1 if _QUICK.value else _SEEDS.value
  output = output_directory(_OUTPUT.value, _VARIANTS.value, seeds)
  run(seeds, toy_variants.Budget(), (dk_dm, no_rl, from_base), output)


if __name__ == '__main__':
  app.run(main)
