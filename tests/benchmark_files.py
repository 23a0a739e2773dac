"""Small synthetic files in the exact forms of the published benchmarks; not a word of theirs."""

import json

WISE_FILES = {
  'cultural_common_sense': [1, 2, 400],
  'spatio-temporal_reasoning': [401, 567, 568, 700],
  'natural_science': [701, 800, 801, 900, 901, 1000],
}
VERIFIED_FILES = {
  'cultural_common_sense': [1, 400],
  'spatio-temporal_reasoning': [401, 520, 521, 640],
  'natural_science': [641, 760, 761, 880, 881, 1000],
}


def wise_row(number, prompt=None, **changed):
  return {
    'Prompt': prompt or f'riddle number {number}',
    'Explanation': f'This refers to answer{number}, a thing made up for tests',
    'Category': 'whatever it says',
    'Subcategory': 'odd' if str(number)[-1] in '13579' else 'even',
    'prompt_id': number,
  } | changed


def write_wise(root, rewrites=True):
  """A clone of the repository, as far as its data goes."""
  legacy, verified = root / 'WISE_legacy' / 'data', root / 'data_verified'
  legacy.mkdir(parents=True)
  verified.mkdir()
  for name, numbers in WISE_FILES.items():
    rows = [wise_row(number) for number in numbers]
    (legacy / f'{name}.json').write_text(json.dumps(rows, indent=4))
    if rewrites:
      rows = [wise_row(n, f'Answer{n}.', Subcategory='spelt otherwise') for n in numbers]
      (legacy / f'{name}_rewrite.json').write_text(json.dumps(rows, indent=2))
  for name, numbers in VERIFIED_FILES.items():
    rows = [wise_row(n, f'verified riddle {n}') for n in numbers]
    (verified / f'{name}_verified.json').write_text(json.dumps(rows))
  return root


LAWS = {
  'physics': ('gravity', 'buoyancy'),
  'chemistry': ('flame reaction',),
  'biology': ('seasonal change',),
}


def science_row(index, **changed):
  category = list(LAWS)[index % 3]
  return {
    'implicit_prompt': f'object {index} left to itself',
    'explicit_prompt': f'object {index} lying on the floor',
    'superficial_prompt': f'object {index} floating in the air',
    'explicit_image': [{'bytes': b'\x89PNG', 'path': None}],
    'superficial_image': [{'bytes': b'\x89PNG', 'path': None}],
    'scene_scoring': f'1 if object {index} is there',
    'real_scoring': 'marks from 0 to 3',
    'category': category,
    'law': LAWS[category][index % len(LAWS[category])],
  } | changed


def without_pictures(row):
  return {key: value for key, value in row.items() if not key.endswith('_image')}


def training_row(index, implicit=2, explicit=3):
  row = science_row(index)
  for key in ('scene_scoring', 'real_scoring'):
    del row[key]
  row['implicit_prompt'] = [f'wording {k} of object {index}' for k in range(implicit)]
  row['explicit_prompt'] = [f'object {index}, told outright, {k}' for k in range(explicit)]
  row['superficial_prompt'] = [f'object {index} as it looks']
  return row


def write_lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(without_pictures(row)) + '\n' for row in rows))
  return path


def write_parquet(path, rows):
  import pyarrow
  import pyarrow.parquet

  path.parent.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
  return path
