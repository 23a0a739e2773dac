"""WISE (Niu et al., arXiv:2503.07265): a thousand prompts that take knowledge of the world.

Two releases with the same ids for other prompts: the first one, 'wise', judged by GPT-4o on three
scales, with an explicit rewrite of every prompt; and 'wise_verified' (April 2026), judged 0 or 1.
Both come in one repository without a licence, so users clone it themselves:

  git clone https://github.com/PKU-YuanGroup/WISE

Files are JSON lists of {"Prompt", "Explanation", "Category", "Subcategory", "prompt_id"}. All of it
is for testing: nothing here may be trained on.
"""

import pathlib
from collections.abc import Mapping

from eru_jax.benchmarks.base import CLIP_PROTOCOLS, Benchmark, Protocol, Question, single
from eru_jax.benchmarks.files import data_directory, integer_of, read_rows, text_of
from eru_jax.errors import UserError
from eru_jax.judges.protocols import wise_score

_CLONE = '`git clone https://github.com/PKU-YuanGroup/WISE`'
_SIZE = 1000
_FILES = ('cultural_common_sense', 'spatio-temporal_reasoning', 'natural_science')
# Last id of each category. The published scripts go by these, not by the field "Category".
_LEGACY_ENDS = {
  'culture': 400, 'time': 567, 'space': 700, 'biology': 800, 'physics': 900, 'chemistry': 1000,
}  # fmt: skip
_VERIFIED_ENDS = {
  'culture': 400, 'time': 520, 'space': 640, 'biology': 760, 'physics': 880, 'chemistry': 1000,
}  # fmt: skip
_LEGACY_WEIGHTS = {
  'culture': 0.4, 'time': 0.167, 'space': 0.133, 'biology': 0.1, 'physics': 0.1, 'chemistry': 0.1,
}  # fmt: skip
_VERIFIED_WEIGHTS = {
  'culture': 0.4, 'time': 0.12, 'space': 0.12, 'biology': 0.12, 'physics': 0.12, 'chemistry': 0.12,
}  # fmt: skip


def read_legacy(data: str | None) -> list[Question]:
  """Questions of the first release, with their rewrites as explicit prompts where there are files.

  Args:
    data: a clone of the repository, or the directory with the files themselves.

  Raises:
    UserError: if there is no file of it, or a row is malformed.
  """
  root = data_directory(data, 'wise', _CLONE)
  places = (root, root / 'WISE_legacy' / 'data', root / 'data')
  paths = _present(places, [f'{name}.json' for name in _FILES], 'wise', data)
  rows = _read(paths, _LEGACY_ENDS)
  rewrites: dict[int, tuple[str, str]] = {}
  for path in paths:
    rewritten = path.with_name(f'{path.stem}_rewrite.json')
    for where, row in read_rows(rewritten) if rewritten.is_file() else ():
      number = integer_of(row, 'prompt_id', where, 1, 1000)
      if number in rewrites or number not in rows:
        why = 'occurs twice' if number in rewrites else 'is that of no prompt'
        raise UserError(f"{where}: 'prompt_id' {number} {why}: clone the repository again.")
      rewrites[number] = where, text_of(row, 'Prompt', where)
  return [
    _question(row, number, _LEGACY_ENDS, rewrites[number][1] if number in rewrites else None)
    for number, row in sorted(rows.items())
  ]


def read_verified(data: str | None) -> list[Question]:
  """Questions of WISE_Verified, which has no explicit prompts.

  Args:
    data: a clone of the repository, or the directory with the files themselves.

  Raises:
    UserError: if there is no file of it, or a row is malformed.
  """
  root = data_directory(data, 'wise_verified', _CLONE)
  places = (root, root / 'data_verified')
  merged = [place / 'merge.json' for place in places if (place / 'merge.json').is_file()]
  names = [f'{name}_verified.json' for name in _FILES]
  paths = merged[:1] or _present(places, names, 'wise_verified', data)
  rows = _read(paths, _VERIFIED_ENDS)
  return [_question(row, number, _VERIFIED_ENDS, None) for number, row in sorted(rows.items())]


def _present(
  places: tuple[pathlib.Path, ...], names: list[str], benchmark: str, data: str | None
) -> list[pathlib.Path]:
  """The files of a release that are there, from the first place that has any."""
  for place in places:
    found = [place / name for name in names if (place / name).is_file()]
    if found:
      return found
  raise UserError(f'--data={data} holds none of {", ".join(names)} of {benchmark!r}: {_CLONE}.')


def _read(paths: list[pathlib.Path], ends: Mapping[str, int]) -> dict[int, tuple[str, dict]]:
  """Id -> (where, row)."""
  rows: dict[int, tuple[str, dict]] = {}
  for path in paths:
    for where, row in read_rows(path):
      number = integer_of(row, 'prompt_id', where, 1, max(ends.values()))
      if number in rows:
        raise UserError(
          f"{where}: 'prompt_id' {number} is that of {rows[number][0]} too: clone the repository "
          'again.'
        )
      rows[number] = where, row
  return rows


def _question(
  found: tuple[str, dict], number: int, ends: Mapping[str, int], rewrite: str | None
) -> Question:
  """A row as a question on its own: nothing in it says that two prompts are about one thing."""
  where, row = found
  prompts = {'implicit': text_of(row, 'Prompt', where)}
  if rewrite is not None:
    prompts['explicit'] = rewrite
  return Question(
    id=str(number),
    category=next(name for name, end in ends.items() if number <= end),
    prompts=prompts,
    subcategory=text_of(row, 'Subcategory', where),
    explanation=text_of(row, 'Explanation', where),
  )


def edition(split: str, rows: int) -> str:
  """Whether all of a release is there: a part's score cannot be compared."""
  del split
  return f'{rows} prompts' if rows == _SIZE else f'only {rows} of its {_SIZE} prompts'


BENCHMARKS = (
  Benchmark(
    name='wise',
    title='WISE',
    read=read_legacy,
    protocols={
      'wise': Protocol(
        ('consistency', 'realism', 'aesthetics'), wise_score, _LEGACY_WEIGHTS, (0, 1), 3
      ),
      **CLIP_PROTOCOLS,
    },
    edition=edition,
    size=_SIZE,
    about='WiScore from 0 to 1, by a judge on three scales; the scores of two judges, or of two '
    'snapshots of one, cannot be compared.',
  ),
  Benchmark(
    name='wise_verified',
    title='WISE Verified',
    read=read_verified,
    protocols={
      'wise_verified': single(
        'correct', weights=_VERIFIED_WEIGHTS, span=(0, 1), digits=3, proportion=True
      ),
      **CLIP_PROTOCOLS,
    },
    edition=edition,
    size=_SIZE,
    about='Share of pictures that a judge calls right, categories weighted as published.',
  ),
)
