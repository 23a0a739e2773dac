"""Science-T2I (Li et al., arXiv:2504.13129): laws of nature, asked for in three ways.

Implicit prompts need the law, explicit ones say what it leads to, and superficial ones say what a
reader who does not know it would draw. Its data sets are on the Hugging Face hub (Apache-2.0), and
--data takes their ids, such as Jialuo21/Science-T2I-S, or directories.

`Science-T2I-S` had 671 rows at first and has 227 since March 2026, `-C` has 227, `Science-T2I` is
the new S and C together, `-Trainset` (whose prompts are lists) is for training, and `-Fullset` has
all splits. Rows are {"implicit_prompt", "explicit_prompt", "superficial_prompt", "category", "law"}
and, in test sets, "scene_scoring" and "real_scoring", a judge's rubrics; pictures are not read.
"""

import pathlib
import re
from collections.abc import Iterator, Mapping

from eru_jax.benchmarks import hub
from eru_jax.benchmarks.base import CLIP_PROTOCOLS, Benchmark, Protocol, Question
from eru_jax.benchmarks.files import (
  SUFFIXES,
  data_directory,
  optional_text,
  read_rows,
  text_of,
  texts_of,
)
from eru_jax.data.pairs import KnowledgePair, normalise
from eru_jax.errors import UserError

_DOWNLOAD = 'give --data=Jialuo21/Science-T2I-S, or a directory that `hf download` made'
_PROMPTS = {name: f'{name}_prompt' for name in ('implicit', 'explicit', 'superficial')}
_HUB_NAME = re.compile(r'science-t2i-([sc])$', re.IGNORECASE)
_RUBRIC = {'scene': 'scene_scoring', 'reality': 'real_scoring'}
_COLUMNS = (*_PROMPTS.values(), *_RUBRIC.values(), 'category', 'law')
# SciScore's published two-choice accuracy on S and C is at most 81 % for these.
UNRELIABLE_LAWS = ('absorption', 'buoyancy', 'immiscibility')
# Set -> rows -> what that edition is called.
EDITIONS = {
  'S': {671: 'first edition, 671 rows', 227: 'edition of March 2026, 227 rows'},
  'C': {227: '227 rows'},
  'test': {454: 'S and C of March 2026 together, 454 rows'},
}


def reality(score: Mapping[str, float]) -> float:
  """The second protocol's reality score in percent: 0 to 3 marks, none if the scene is incomplete.

  Args:
    score: 'scene', 1 if everything the prompt names is there and 0 if not, and 'reality', 0 to 3.
  """
  return 100 * score['reality'] / 3 if score['scene'] >= 1 else 0.0


def read_questions(data: str | None) -> list[Question]:
  """Questions of all test sets below a directory, or of one file.

  Args:
    data: an id of the hub, or a directory of .json, .jsonl or .parquet files, or one of these.

  Returns:
    Questions in order of set, file and row; `split` is 'S', 'C' or what the file's name says. Each
    is on its own, as no column says which rows are about one thing.

  Raises:
    UserError: if there is no test set, or a row is malformed.
  """
  questions: list[Question] = []
  counts: dict[str, int] = {}
  for split, where, row in _rows(data, training=False):
    prompts = {name: texts_of(row, key, where) for name, key in _PROMPTS.items()}
    for name, texts in prompts.items():
      if len(texts) > 1:
        raise UserError(
          f'{where}: {_PROMPTS[name]!r} has {len(texts)} texts, which only the training set has: '
          'name a test set, or call the file train.'
        )
    number = counts[split] = counts.get(split, 0) + 1
    questions.append(
      Question(
        id=f'{split}-{number:04d}',
        category=text_of(row, 'category', where).casefold(),
        prompts={name: texts[0] for name, texts in prompts.items()},
        subcategory=law_of(row, where),
        split=split,
        rubric={
          name: text for name, key in _RUBRIC.items() if (text := optional_text(row, key, where))
        },
      )
    )
  return questions


def read_training(data: str) -> list[KnowledgePair]:
  """Knowledge pairs of the training set, of split 'train', with the law as category.

  A row's k-th implicit prompt goes with its k-th explicit one, the shorter list beginning again: so
  every wording is trained, and a prompt may have several anchors. What a row says twice counts
  once.

  Raises:
    UserError: if there is no training set, or a row is malformed.
  """
  return [
    KnowledgePair(
      question.implicit, question.prompts['explicit'], question.subcategory, 'train', question.id
    )
    for question in read_training_questions(data)
  ]


def read_training_questions(data: str | None) -> list[Question]:
  """The training set as questions, say for reward anchors; a score of them says nothing.

  They go together as in `read_training`, superficial prompts likewise; a row is a cluster.

  Raises:
    UserError: if there is no training set, or a row is malformed.
  """
  questions: list[Question] = []
  for number, (_, where, row) in enumerate(_rows(data, training=True), start=1):
    texts = {
      name: texts_of(row, key, where)
      for name, key in _PROMPTS.items()
      if name != 'superficial' or row.get(key)
    }
    law, seen = law_of(row, where), set()
    for k in range(max(len(texts['implicit']), len(texts['explicit']))):
      prompts = {name: found[k % len(found)] for name, found in texts.items()}
      if (same := tuple(normalise(prompts[name]) for name in ('implicit', 'explicit'))) not in seen:
        seen.add(same)
        category = (optional_text(row, 'category', where) or law).casefold()
        questions.append(
          Question(f'{number:05d}/{k}', category, prompts, law, 'train', cluster=f'{number:05d}')
        )
  return questions


def law_of(row: dict, where: str) -> str:
  """The law of a row in small letters and single spaces, 'light requirement'."""
  return normalise(text_of(row, 'law', where).replace('_', ' '))


def edition(split: str, rows: int) -> str:
  """Which edition of a test set has so many rows: scores of two of them cannot be compared."""
  return EDITIONS.get(split, {}).get(rows, f'{rows} rows, of no edition that is known')


def _rows(data: str | None, training: bool) -> Iterator[tuple[str, str, dict]]:
  """(split, where, row) of the training set, or of all the others."""
  named = data is not None and not pathlib.Path(data).expanduser().exists() and hub.is_id(data)
  root = hub.download(data) if named else data_directory(data, 'science_t2i', _DOWNLOAD)
  files = [root] if root.is_file() else sorted(p for p in root.rglob('*') if _is_data(p, root))
  named = [(_split(path, root), path) for path in files]
  chosen = [(split, path) for split, path in named if (split == 'train') == training]
  if not chosen:
    wanted = 'training set' if training else 'test set'
    found = ', '.join(dict.fromkeys(split for split, _ in named)) or 'no .parquet or .json files'
    raise UserError(
      f'--data={data} holds no {wanted} of Science-T2I, but {found}: {_DOWNLOAD}, or another of '
      "its sets; a training set's files are named train."
    )
  for split, path in chosen:
    for where, row in read_rows(path, _COLUMNS):
      yield split, where, row


def _is_data(path: pathlib.Path, root: pathlib.Path) -> bool:
  """Whether a file holds rows: the hub keeps others beside them, and some in hidden folders."""
  hidden = any(part.startswith('.') for part in path.relative_to(root).parts)
  notes = path.name in ('dataset_infos.json', 'dataset_info.json', 'state.json')
  return path.is_file() and path.suffix.lower() in SUFFIXES and not hidden and not notes


def _split(path: pathlib.Path, root: pathlib.Path) -> str:
  """What a file is a part of: 'train', 'S', 'C', or its own name without the shard's number."""
  stem = re.sub(r'-\d{5}-of-\d{5}.*$', '', path.stem)
  top = (root.parent if root.is_file() else root).absolute().parent
  # The hub's cache: datasets--OWNER--NAME/snapshots/COMMIT.
  top = top.parent.parent if top.name == 'snapshots' else top
  folders = [part for part in path.absolute().relative_to(top).parts[:-1] if part != 'data']
  for name in (stem, *reversed(folders)):
    if re.search(r'(?:^|[-_])train', name, re.IGNORECASE):
      return 'train'
    if found := re.search(r'(?:^|[-_])([SC])$', name) or _HUB_NAME.search(name):
      return found[1].upper()
  return stem


BENCHMARKS = (
  Benchmark(
    name='science_t2i',
    title='Science-T2I',
    read=read_questions,
    protocols={
      **CLIP_PROTOCOLS,
      'science_t2i': Protocol(('scene', 'reality'), reality, span=(0, 100), digits=1),
    },
    images_per_prompt=2,
    training=read_training,
    edition=edition,
    about='SciScore holds every picture against the implicit prompt, whatever it was drawn of; it '
    'is least reliable on absorption, buoyancy and immiscibility.',
  ),
  Benchmark(
    name='science_t2i_train',
    title='Science-T2I, training set',
    read=read_training_questions,
    protocols=CLIP_PROTOCOLS,
    images_per_prompt=2,
    about='Prompts that may be trained on: for reward anchors, not a measure of any model.',
  ),
)
