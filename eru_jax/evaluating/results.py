"""The numbers of an evaluation: evaluation.json, two CSV files, and lines for the terminal."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eru_jax.benchmarks.base import Protocol, Question
from eru_jax.evaluating.aggregation import aggregate, comparisons, ratios
from eru_jax.evaluating.anchors import write_anchors
from eru_jax.evaluating.drawing import directory_of
from eru_jax.files import replace_file
from eru_jax.judges.summary import Summary
from eru_jax.training.pictures import image_grid, save_png

if TYPE_CHECKING:
  from eru_jax.evaluating.evaluator import Evaluated

# Rows of the picture; the scores are of all prompts.
_GRID_ROWS = 24
# A spreadsheet takes a text that begins like this for a formula.
_FORMULA = ('=', '+', '-', '@', '\t', '\r')


def collect(evaluated: 'Evaluated') -> dict[str, Any]:
  """Everything that is told, as JSON data.

  Returns:
    {'settings': see `provenance.settings`, 'benchmark', 'scorer', 'judge' and 'rewriter' (who was
    asked over HTTP: 'model', 'url', 'total' and more of `judges.summary.Summary`), 'seed',
    'questions', 'sets': {split: {'questions', 'asked', 'edition'}}, 'headline': the split that
    'stages', 'comparisons' and 'ratios' are of, or None if they are of all questions, 'stages':
    {model: {condition: as `aggregation.aggregate` tells}}, 'splits': {split: {model: {condition:
    ...}}} where there are several, 'comparisons', 'ratios', 'pairs': [{'id', 'implicit',
    'explicit', '<model> <condition>': what its first picture is worth, or what it shows}]}.
    Without a scorer, scores are None.
  """
  values = evaluated.values()
  everything = list(range(len(evaluated.questions)))
  splits = list(dict.fromkeys(question.split for question in evaluated.questions))
  parts = {
    split: [row for row in everything if evaluated.questions[row].split == split]
    for split in splits
  }
  main = parts[evaluated.headline] if evaluated.headline else everything
  result: dict[str, Any] = {
    'settings': dict(evaluated.settings),
    'benchmark': evaluated.benchmark.name,
    'scorer': evaluated.scorer.name if evaluated.scorer else None,
    **_asked(evaluated),
    'seed': evaluated.seed,
    'questions': len(evaluated.questions),
    'sets': {
      split: {
        'questions': evaluated.sets.get(split, 0),
        'asked': len(rows),
        'edition': _edition(evaluated, split),
      }
      for split, rows in parts.items()
    },
    'headline': evaluated.headline or None,
    'stages': _aggregated(evaluated, values, main),
  }
  if len(splits) > 1:
    result['splits'] = {
      split: _aggregated(evaluated, values, rows) for split, rows in parts.items()
    }
  if evaluated.protocol is not None:
    asked = [evaluated.questions[row] for row in main]
    found = {
      model: {condition: array[main] for condition, array in arrays.items()}
      for model, arrays in values.items()
    }
    result['comparisons'] = comparisons(evaluated.protocol, asked, found, evaluated.seed)
    result['ratios'] = ratios(evaluated.protocol, asked, found)
  result['pairs'] = _pairs(evaluated, values)
  return result


def tables(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """Split -> its 'stages', the headline first; '' is all questions, if these have a score."""
  splits = result.get('splits', {})
  first = result.get('headline') or ''
  return {first: result['stages'], **splits}


def _asked(evaluated: 'Evaluated') -> dict[str, Any]:
  """What was asked over HTTP, with what it cost."""
  told = {}
  if evaluated.scorer is not None and evaluated.scorer.told is not None:
    told['judge'] = evaluated.scorer.told()
  if evaluated.rewriting is not None:
    told['rewriter'] = evaluated.rewriting.told()
  return told


def asked_lines(result: Mapping[str, Any]) -> list[str]:
  """What was asked over HTTP, for people: a line each, and one for each reason of a failure."""
  lines = []
  for who, verb in (('rewriter', 'rewritten'), ('judge', 'scored')):
    if who in result:
      told = result[who]
      text = Summary(**told['total']).describe(verb)
      lines += f'{who} {told["model"]} at {told["url"]}: {text}'.split('\n')
      if told.get('per_prompt'):
        each = told['per_prompt']
        line = f'{each["seconds"]:.2f} s (median {each["median_seconds"]:.2f} s) and '
        counted, prompts = each['metered'], each['prompts']
        line += (
          f'{each["prompt_tokens"]:.0f} + {each["completion_tokens"]:.0f} tokens'
          if counted
          else 'tokens that nobody counted'
        )
        line += f', cost {each["cost"]:.2g},' if 'cost' in each else ''
        line += ' for each rewritten prompt'
        line += f' (tokens of {counted} of {prompts} were counted)' if 0 < counted < prompts else ''
        lines.append(f'  {line}, at every use of the model')
  return lines


def _edition(evaluated: 'Evaluated', split: str) -> str | None:
  edition = evaluated.benchmark.edition
  return edition(split, evaluated.sets.get(split, 0)) if edition else None


def _aggregated(
  evaluated: 'Evaluated', values: Mapping[str, Mapping[str, np.ndarray]], rows: Sequence[int]
) -> dict[str, dict[str, Any]]:
  """Model -> condition -> numbers of the questions in some rows that have such a prompt."""
  protocol = evaluated.protocol or Protocol((), lambda score: 0.0)
  found: dict[str, dict[str, Any]] = {}
  for model, arrays in values.items():
    found[model] = {}
    for condition, array in arrays.items():
      asked = [row for row in rows if condition in evaluated.questions[row].prompts]
      part = [evaluated.questions[row] for row in asked]
      told = aggregate(protocol, part, array[asked])
      if protocol.percent:
        told = {'accuracy': told['score'], **told}
      found[model][condition] = told
  return found


def _pairs(
  evaluated: 'Evaluated', values: Mapping[str, Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
  records = [{'id': question.id, **question.prompts} for question in evaluated.questions]
  took = evaluated.rewriting.by_prompt() if evaluated.rewriting else {}
  for record in records:
    if record['implicit'] in took:
      record['rewriting'] = took[record['implicit']]
  say = evaluated.scorer.say if evaluated.scorer else None
  for model, pictures in evaluated.pictures.items() if evaluated.protocol else ():
    for index, picture in enumerate(pictures):
      if picture.k == 0:
        score = evaluated.scores[model][index]
        value = values[model][picture.condition][picture.row, 0]
        told = None if not np.isfinite(value) else say(score) if say else float(value)
        records[picture.row][f'{model} {picture.condition}'] = told
  return records


def write(evaluated: 'Evaluated', result: Mapping[str, Any]) -> None:
  """Writes evaluation.json and tables; of CLIP, reward anchors; of the emoji world, grid.png.

  Raises:
    UserError: if they cannot be written.
  """
  output = evaluated.output
  text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + '\n'
  replace_file(output / 'evaluation.json', text.encode())
  replace_file(output / 'summary.csv', _csv(_summary_rows(result)))
  replace_file(output / 'pictures.csv', _csv(_picture_rows(evaluated)))
  write_anchors(evaluated)
  if evaluated.scorer is not None and evaluated.scorer.targets is not None:
    _write_grid(evaluated, evaluated.scorer.targets)


def _write_grid(evaluated: 'Evaluated', targets: Callable[[Question], np.ndarray]) -> None:
  """The first questions down; right answers, conditions and models across."""
  from PIL import Image

  columns = []
  for model, pictures in evaluated.pictures.items():
    for condition in evaluated.conditions:
      files = {p.row: p.file for p in pictures if p.condition == condition and p.k == 0}
      if files:
        columns.append((f'{model}, {condition}', directory_of(evaluated.output, model), files))
  images, labels = [], []
  for row, question in enumerate(evaluated.questions[:_GRID_ROWS]):
    images.append(targets(question))
    labels.append(f'{question.implicit} ({question.prompts.get("explicit", "")})')
    for title, directory, files in columns:
      blank = np.full_like(images[0], 255)
      path = directory / files[row] if row in files else None
      images.append(blank if path is None else np.asarray(Image.open(path).convert('RGB')))
      labels.append(title)
  grid = image_grid(np.stack(images), 1 + len(columns), labels, scale=2)
  save_png(evaluated.output / 'grid.png', grid)


def _summary_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
  rows = []
  for split, models in tables(result).items():
    for model, conditions in models.items():
      for condition, told in conditions.items():
        groups = [('overall', '', told)]
        groups += [('category', name, one) for name, one in told['categories'].items()]
        groups += [('subcategory', name, one) for name, one in told['subcategories'].items()]
        for kind, name, one in groups:
          low, high = one['ci95'] or (None, None)
          rows.append(
            {
              'split': split, 'model': model, 'condition': condition, 'group': kind, 'name': name,
              'score': one['score'], 'ci95_low': low, 'ci95_high': high, 'pictures': one['n'],
              'unscored': one['unscored'], 'prompts': one['prompts'],
              'clusters': one['clusters'],
            }
          )  # fmt: skip
  return rows


def _picture_rows(evaluated: 'Evaluated') -> list[dict[str, Any]]:
  protocol, rows = evaluated.protocol, []
  keys = list(protocol.keys) if protocol else []
  for model, pictures in evaluated.pictures.items():
    scores = evaluated.scores.get(model, [None] * len(pictures))
    numbers = protocol.values(scores) if protocol else [np.nan] * len(pictures)
    for index, (picture, score, value) in enumerate(zip(pictures, scores, numbers, strict=True)):
      question = evaluated.questions[picture.row]
      file = directory_of(evaluated.output, model) / picture.file
      rows.append(
        {
          'model': model, 'condition': picture.condition, 'id': question.id, 'picture': picture.k,
          'split': question.split, 'category': question.category,
          'subcategory': question.subcategory, 'prompt': picture.prompt,
          'asked': question.implicit, 'file': str(file.relative_to(evaluated.output)),
          'value': float(value) if np.isfinite(value) else None,
          **{key: (score or {}).get(key) for key in keys},
          'unscored': evaluated.said(model, index) if score is None else '',
          'reason': evaluated.reason(model, index),
        }
      )  # fmt: skip
  return rows


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
  buffer = io.StringIO()
  if rows:
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    for row in rows:
      writer.writerow({key: _cell(value) for key, value in row.items()})
  return buffer.getvalue().encode()


def _cell(value: Any) -> Any:
  if isinstance(value, str) and value.startswith(_FORMULA):
    return f"'{value}"
  return value


def shown(protocol: Protocol, value: float | None, sign: bool = False) -> str:
  """A score as people read it."""
  if value is None:
    return '–'
  scaled = 100 * value if protocol.percent else value
  return f'{scaled:{"+" if sign else ""}.{protocol.digits}f}{" %" if protocol.percent else ""}'


def clustered(told: Mapping[str, Any], prompts: int) -> str:
  """How many clusters so many prompts are, for people; '' if each is one."""
  n = told['clusters']
  return f' in {n} cluster{"s" * (n != 1)}' if n < prompts else ''


def tell(evaluated: 'Evaluated', result: Mapping[str, Any]) -> None:
  """Prints the table and what follows from it."""
  protocol = evaluated.protocol
  for split, told in result['sets'].items():
    part = f', {told["asked"]} of them asked' if told['asked'] < told['questions'] else ''
    name = ' '.join(text for text in (evaluated.benchmark.title, split) if text)
    edition = told['edition'] or f'{told["questions"]} questions'
    print(f'{name}: {edition}{part}')
  if evaluated.benchmark.of_run is not None and evaluated.settings.get('questions'):
    print(f'Questions: {evaluated.settings["questions"]}')
  if result['headline']:
    print(f'Overall scores and differences are of {result["headline"]!r}.')
  for line in asked_lines(result):
    print(line)
  if protocol is None:
    return
  for split, models in tables(result).items():
    for model, conditions in models.items():
      for condition, told in conditions.items():
        name = f'{model:>12}, {f"{split}, " if split else ""}{condition}'
        print(f'{name}: {_line(protocol, told)}', flush=True)
  for one in result['comparisons']:
    against = one['against']
    line = f'{one["model"]:>12}, {one["condition"]} - {against["model"]}, {against["condition"]}: '
    line += shown(protocol, one['difference'], True)
    if one['ci95']:
      low, high = (shown(protocol, bound, True) for bound in one['ci95'])
      line += f'  [{low} to {high}]'
    print(f'{line}, p = {one["p"]:.2g}, {one["n"]} prompts{clustered(one, one["n"])}')
  for model, found in result['ratios'].items():
    told = [f'{name.upper()} {100 * one["value"]:.1f} %' for name, one in found.items()]
    if told and evaluated.benchmark.name == 'science_t2i':
      print(f'{model:>12}: {", ".join(told)}')


def _line(protocol: Protocol, told: Mapping[str, Any]) -> str:
  """A score with what goes with it."""
  line = shown(protocol, told['score'])
  if told['ci95']:
    low, high = (shown(protocol, bound) for bound in told['ci95'])
    line += f'  [{low} to {high}]'
  line += f'  {told["n"]} pictures{clustered(told, told["prompts"])}'
  if told['unscored']:
    line += f', {told["unscored"]} unscored and left out'
  if told['score'] is None and told.get('missing'):
    line += f'; no overall score without {", ".join(told["missing"])}'
  return line
