"""The numbers at the top of `gallery.html`: a card for each model, and a table by category."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eru_jax.benchmarks.base import Protocol
from eru_jax.evaluating.results import shown
from eru_jax.training.report_scores import STAGES, text

if TYPE_CHECKING:
  from eru_jax.evaluating.evaluator import Evaluated

# From here on a difference is said to be one.
_SIGNIFICANT = 0.05


def title_of(model: str) -> str:
  """A model as people read it: 'dk_dm' -> 'DK-DM', 'runs dk_dm' -> 'runs DK-DM'."""
  name, _, stage = model.rpartition(' ')
  return f'{name} {STAGES.get(stage, stage)}'.strip()


def summary(evaluated: 'Evaluated', result: Mapping[str, Any]) -> str:
  """HTML of everything above the pictures."""
  parts = [f'<p class="quiet">{_sets(evaluated, result)}</p>']
  if evaluated.protocol is None:
    return ''.join(parts) + '<p>Nobody has scored these pictures.</p>'
  parts.append(f'<p>{text(evaluated.benchmark.about)}</p>' if evaluated.benchmark.about else '')
  unscored = sum(told['unscored'] for found in result['stages'].values() for told in found.values())
  if unscored:
    parts.append(
      f'<p><b>{unscored} pictures are unscored</b> and left out of every mean; they count as '
      'nothing, not as wrong.</p>'
    )
  cards = ''.join(_card(evaluated, result, model) for model in result['stages'])
  parts.append(f'<div class="models">{cards}</div>')
  tables = {'': result['stages'], **result.get('splits', {})}
  for split, models in tables.items():
    name = f'Set {split}' if split else 'By category'
    opened = '' if split else ' open'
    parts.append(
      f'<details{opened}><summary>{text(name)}</summary>'
      f'{_table(evaluated.protocol, models, split)}</details>'
    )
  return ''.join(parts)


def _sets(evaluated: 'Evaluated', result: Mapping[str, Any]) -> str:
  told = []
  for split, found in result['sets'].items():
    line = found['edition'] or f'{found["questions"]} prompts'
    if found['asked'] < found['questions']:
      line += f', {found["asked"]} of them asked'
    told.append(f'{split}: {line}' if split else line)
  scorer = evaluated.scorer.name.replace('_', ' ') if evaluated.scorer else 'nobody'
  told.append(f'scored by {scorer}, seed {evaluated.seed}')
  return text('; '.join(told) + '; the same prompt starts from the same noise everywhere.')


def _card(evaluated: 'Evaluated', result: Mapping[str, Any], model: str) -> str:
  """A model's score under implicit prompts, large, and what goes with it."""
  protocol, conditions = evaluated.protocol, result['stages'][model]
  main = 'implicit' if 'implicit' in conditions else next(iter(conditions))
  told = conditions[main]
  rows = [(f'{name} prompts', shown(protocol, one['score'])) for name, one in conditions.items()
          if name != main]  # fmt: skip
  rows = [(name, text(value)) for name, value in rows]
  for one in result['comparisons']:
    against = one['against']
    if one['model'] != model or one['condition'] != main:
      continue
    what = title_of(against['model'])
    if against['condition'] != main:
      what += f'’s {against["condition"]}'
    rows.append((f'against {what}', _difference(protocol, one)))
  found = result['ratios'].get(model, {})
  if 'ri' in found:
    rows.append(('of the base’s gap closed', f'{100 * found["ri"]["value"]:.0f} %'))
  if 'nd' in found:
    rows.append(('superficial to explicit', f'{100 * found["nd"]["value"]:.0f} %'))
  inner = ''.join(f'<dt>{text(name)}</dt><dd>{value}</dd>' for name, value in rows)
  extent = _range(protocol, told)
  if told['score'] is None and told.get('missing'):
    extent = text(f'no overall score without {", ".join(told["missing"])}')
  return (
    f'<section class="model"><h3>{text(title_of(model))}, {text(main)} prompts</h3>'
    f'<div class="big">{text(shown(protocol, told["score"]))}</div>'
    f'<div class="range">{extent}</div>{f"<dl>{inner}</dl>" if inner else ""}</section>'
  )


def _difference(protocol: Protocol, one: Mapping[str, Any]) -> str:
  kind = ''
  if one['p'] < _SIGNIFICANT:
    kind = 'up' if one['difference'] > 0 else 'down'
  low, high = (shown(protocol, bound, True) for bound in one['ci95'])
  hint = f'95 % interval {low} to {high}, p = {one["p"]:.2g}, {one["n"]} prompts'
  value = shown(protocol, one['difference'], True)
  return f'<span class="{kind}" title="{text(hint)}">{text(value)}</span>'


def _range(protocol: Protocol, told: Mapping[str, Any]) -> str:
  parts = []
  if told['ci95']:
    low, high = (shown(protocol, bound) for bound in told['ci95'])
    parts.append(f'95 %: {low} to {high}')
  parts.append(f'{told["n"]} pictures')
  if told['unscored']:
    parts.append(f'{told["unscored"]} unscored')
  return text(', '.join(parts))


def _table(protocol: Protocol, models: Mapping[str, Mapping[str, Any]], split: str) -> str:
  """Categories and kinds by model and condition."""
  columns = [(model, condition) for model, found in models.items() for condition in found]
  head = ''.join(
    f'<th scope="col">{text(title_of(model))}<br>{text(condition)}</th>'
    for model, condition in columns
  )
  rows = [('All', '', 'overall')]
  for kind in ('categories', 'subcategories'):
    names = dict.fromkeys(name for m, c in columns for name in models[m][c][kind])
    rows += [(name, 'finer' if kind == 'subcategories' else '', kind) for name in names]
  body = ''
  for name, style, kind in rows:
    cells = ''
    for model, condition in columns:
      told = models[model][condition]
      one = told if kind == 'overall' else told[kind].get(name)
      cells += '<td>–</td>' if one is None else _cell(protocol, one)
    body += f'<tr class="{style}"><th scope="row">{text(name)}</th>{cells}</tr>'
  caption = f'Scores with 95 % intervals{f", set {split}" if split else ""}'
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
    f'<caption>{text(caption)}</caption><thead><tr><th scope="col">Group</th>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _cell(protocol: Protocol, told: Mapping[str, Any]) -> str:
  return (
    f'<td><b>{text(shown(protocol, told["score"]))}</b><small>{_range(protocol, told)}</small></td>'
  )
