"""The numbers at the top of `gallery.html`: a card for each model, and a table by category."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eru_jax.benchmarks.base import Protocol
from eru_jax.evaluating.results import asked_lines, clustered, shown, tables
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
  parts += [f'<p class="quiet">{text(line.strip())}</p>' for line in asked_lines(result)]
  if evaluated.protocol is None:
    return ''.join(parts) + '<p>Nobody has scored these pictures.</p>'
  parts.append(f'<p>{text(evaluated.benchmark.about)}</p>' if evaluated.benchmark.about else '')
  # Of all questions: splits are parts of them, and the overall score may be of one alone.
  every = result['splits'] if 'splits' in result else {'': result['stages']}
  unscored = sum(
    told['unscored'] for models in every.values() for m in models.values() for told in m.values()
  )
  if unscored:
    parts.append(
      f'<p><b>{unscored} pictures are unscored</b> and left out of every mean; they count as '
      'nothing, not as wrong.</p>'
    )
  cards = ''.join(_card(evaluated, result, model) for model in result['stages'])
  parts.append(f'<div class="models">{cards}</div>')
  for split, models in tables(result).items():
    name = f'Set {split}, by category' if split else 'By category'
    parts.append(
      f'<details><summary>{text(name)}</summary>{_table(evaluated, models, split)}</details>'
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
  rows = [
    (f'{name} prompts', _shown(protocol, one['score']))
    for name, one in conditions.items()
    if name != main
  ]
  for one in result['comparisons']:
    against = one['against']
    if one['model'] != model or one['condition'] != main:
      continue
    what, same = title_of(against['model']), against['condition'] == main
    if not same:
      what += f'’s {against["condition"]} prompts'
    rows.append((f'against {what}', _difference(protocol, one, same)))
  found = result['ratios'].get(model, {})
  if 'ri' in found:
    rows.append(('RI: of the base’s gap closed', f'{100 * found["ri"]["value"]:.0f} %'))
  if 'nd' in found:
    rows.append(('ND: from superficial to explicit', f'{100 * found["nd"]["value"]:.0f} %'))
  title = f'{main} prompts' + (f', set {result["headline"]}' if result['headline'] else '')
  inner = ''.join(f'<dt>{text(name)}</dt><dd>{value}</dd>' for name, value in rows)
  extent = _range(protocol, told)
  if told['score'] is None and told.get('missing'):
    extent = text(f'no overall score without {", ".join(told["missing"])}')
  return (
    f'<section class="model"><h3>{text(title_of(model))}, {text(title)}</h3>'
    f'<div class="big">{_shown(protocol, told["score"])}</div>'
    f'<div class="range">{extent}</div>{f"<dl>{inner}</dl>" if inner else ""}</section>'
  )


def _difference(protocol: Protocol, one: Mapping[str, Any], coloured: bool) -> str:
  kind = ''
  if coloured and one['p'] < _SIGNIFICANT:
    kind = 'up' if one['difference'] > 0 else 'down'
  hint, extent = f'p = {one["p"]:.2g}, {one["n"]} prompts{clustered(one, one["n"])}', ''
  if one['ci95']:
    low, high = (_shown(protocol, bound, True) for bound in one['ci95'])
    extent = f'{low} to {high}'
    hint = f'95 % interval {extent}, {hint}'
  value = _shown(protocol, one['difference'], True)
  return f'<span class="{kind}" title="{text(hint)}">{value}<small>{extent}</small></span>'


def _range(protocol: Protocol, told: Mapping[str, Any]) -> str:
  parts = []
  if told['ci95']:
    low, high = (shown(protocol, bound) for bound in told['ci95'])
    parts.append(f'95 %: {low} to {high}'.replace('-', '−'))
  parts.append(f'{told["n"]} pictures{clustered(told, told["prompts"])}')
  if told['unscored']:
    parts.append(f'{told["unscored"]} unscored')
  return text(', '.join(parts))


def _table(evaluated: 'Evaluated', models: Mapping[str, Mapping[str, Any]], split: str) -> str:
  """Categories, each with its kinds, by model and condition."""
  columns = [(model, condition) for model, found in models.items() for condition in found]
  head = ''.join(
    f'<th scope="col">{text(title_of(model))}<br>{text(condition)}</th>'
    for model, condition in columns
  )
  kinds: dict[str, list[str]] = {}
  for question in evaluated.questions:
    if question.split == split or not split:
      mine = kinds.setdefault(question.category, [])
      if question.subcategory and question.subcategory not in mine:
        mine.append(question.subcategory)
  body = _row(evaluated.protocol, 'All', '', [models[m][c] for m, c in columns])
  told = set()
  for category, names in kinds.items():
    parts = [models[m][c]['categories'].get(category) for m, c in columns]
    body += _row(evaluated.protocol, category, '', parts)
    for name in names:
      if name not in told:  # a kind of two categories is told once
        told.add(name)
        parts = [models[m][c]['subcategories'].get(name) for m, c in columns]
        body += _row(evaluated.protocol, name, 'finer', parts)
  caption = f'Scores with 95 % intervals{f", set {split}" if split else ""}'
  return (
    f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
    f'<caption>{text(caption)}</caption><thead><tr><th scope="col">Group</th>{head}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _row(
  protocol: Protocol, name: str, style: str, parts: Sequence[Mapping[str, Any] | None]
) -> str:
  counts = {part['n'] + part['unscored'] for part in parts if part}
  pictures = f'<small>{max(counts)} pictures</small>' if counts else ''
  cells = ''.join('<td>–</td>' if part is None else _cell(protocol, part) for part in parts)
  return f'<tr class="{style}"><th scope="row">{text(name)}{pictures}</th>{cells}</tr>'


def _cell(protocol: Protocol, told: Mapping[str, Any]) -> str:
  notes = []
  if told['ci95']:
    low, high = (_shown(protocol, bound) for bound in told['ci95'])
    notes.append(f'{low} to {high}')
  if told['unscored']:
    notes.append(f'{told["unscored"]} unscored')
  score = _shown(protocol, told['score'])
  return f'<td><b>{score}</b><small>{", ".join(notes)}</small></td>'


def _shown(protocol: Protocol, value: float | None, sign: bool = False) -> str:
  """A score for HTML, with a minus that is one."""
  return text(shown(protocol, value, sign)).replace('-', '−')
