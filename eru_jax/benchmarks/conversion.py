"""What `python -m eru_jax.benchmarks` does: pairs in, a filtered prompt file out."""

import dataclasses
import pathlib
from collections.abc import Sequence

from eru_jax.benchmarks.base import Question, as_pairs, benchmark
from eru_jax.benchmarks.contamination import decontaminate
from eru_jax.data.pairs import KnowledgePair, read_prompt_file, write_prompt_file
from eru_jax.errors import UserError
from eru_jax.files import check_directory


def convert(
  name: str | None,
  data: str | None,
  pairs: str | None,
  held_out: Sequence[str],
  threshold: float,
  output: str,
) -> list[KnowledgePair]:
  """Writes a prompt file and says what was left out of it.

  Args:
    name, data: a benchmark and its files.
    pairs: or a prompt file.
    held_out: NAME=DIR of each test set; needed where there is something to train on.
    threshold: as of `decontaminate`.
    output: the file to write.

  Returns:
    The pairs that were written.

  Raises:
    UserError: for flags that do not go together, bad files, or if nothing is left.
  """
  if (name is None) == (pairs is None):
    raise UserError('Give either --benchmark=NAME with --data=DIR, or --pairs=FILE.')
  path = pathlib.Path(output).expanduser()
  check_directory(path.parent)
  if pairs is not None:
    given = read_prompt_file(pathlib.Path(pairs).expanduser())
  else:
    found = benchmark(name)
    # Its reader says how to get the files if there are none.
    if found.training is None or data is None:
      questions = found.read(data)
      if any(question.split == 'train' for question in questions):
        raise UserError(
          f'--benchmark={name} is for `evaluate`: give --benchmark={name.removesuffix("_train")}, '
          'which reads pairs to train on and filters them.'
        )
      given = as_pairs(questions, found.name)
    else:
      given = found.training(data)
  training = [pair for pair in given if pair.split == 'train']
  kept = given
  if not given:
    raise UserError(f'--data={data} has no explicit prompts, so there are no pairs to write.')
  if not training:
    print(f'All {len(given)} pairs are for testing: a run is asked about them and trains on none.')
  elif not held_out:
    raise UserError(
      f'{len(training)} of these pairs are to be trained on: name the test sets that they must not '
      'be near, such as --held_out=wise=DIR --held_out=science_t2i=DIR.'
    )
  else:
    report = decontaminate(training, _held_out(held_out), threshold)
    print('\n'.join(report.lines()))
    if not report.kept:
      raise UserError('Nothing is left to train on: name fewer test sets, or raise --threshold.')
    chosen = set(report.kept)
    kept = [pair for pair in given if pair.split != 'train' or pair in chosen]
  if path.parent != pathlib.Path(pairs or path).expanduser().parent:
    # A picture's path begins where the file lies that names it.
    kept = [dataclasses.replace(pair, image=None) for pair in kept]
  write_prompt_file(path, kept)
  print(f'{len(kept)} pairs: {path}')
  return kept


def _held_out(flags: Sequence[str]) -> dict[str, list[Question]]:
  """Name of each test set -> its questions; two directories of one benchmark are told apart."""
  found: dict[str, list[Question]] = {}
  for flag in flags:
    name, equals, directory = flag.partition('=')
    if not equals or not directory:
      raise UserError(f'--held_out={flag}: give NAME=DIR, such as wise=WISE.')
    key = f'{name} ({directory})' if name in found else name
    found[key], size = benchmark(name).read(directory), benchmark(name).size
    if size is not None and len(found[key]) < size:
      raise UserError(
        f'--held_out={flag} has {len(found[key])} of {size} questions, so pairs near the others '
        'would be kept: get all of its files.'
      )
  return found
