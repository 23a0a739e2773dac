"""The emoji world as a TensorFlow Datasets builder, written and read without TensorFlow.

Two configs: `pictures` (one split, `train`: every emoji with its name) and `pairs` (the five splits
of `emoji_pairs`). Most callers want `load_pictures` and `load_pairs`, which prepare the dataset
on first use, in a few seconds, and return whole in-memory tables.

Importing this module imports tensorflow_datasets, which takes a second: import it where needed.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from eru_jax.data import emoji as emoji_lib
from eru_jax.data.emoji_pairs import SPLITS, TRAIN_WORDINGS, emoji_pairs
from eru_jax.data.pairs import KnowledgePair
from eru_jax.errors import UserError

PICTURE_SIZE = 64
_ASIDE = '.building-'
_MANIFEST = 'complete.json'


@dataclasses.dataclass(frozen=True, eq=False)
class PictureTable:
  """Every emoji of the catalogue; row i is the emoji with index i.

  Attributes:
    images: (N, 64, 64, 3) uint8, on white.
    names: N explicit prompts.
    categories: N catalogue categories.
    characters: N emoji.
  """

  images: np.ndarray
  names: tuple[str, ...]
  categories: tuple[str, ...]
  characters: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class PairTable:
  """The pairs of one split.

  Attributes:
    pairs: M knowledge pairs.
    index: (M,) int32, the row of each pair's answer in the PictureTable; None in a world without
      pictures.
  """

  pairs: tuple[KnowledgePair, ...]
  index: np.ndarray | None = None


class EmojiKnowledge(tfds.core.GeneratorBasedBuilder):
  """Emoji pictures with their names, and knowledge that asks for them without naming them."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Twemoji pictures, CLDR names, our own facts.'}
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name='pictures', description='Every emoji and its name.'),
    tfds.core.BuilderConfig(name='pairs', description='Implicit and explicit prompts.'),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    text, integer = tfds.features.Text(), tfds.features.Scalar(np.int32)
    if self.builder_config.name == 'pictures':
      features = {
        'image': tfds.features.Image(shape=(PICTURE_SIZE, PICTURE_SIZE, 3), encoding_format='png'),
        'name': text,
        'category': text,
        'emoji': text,
        'index': integer,
      }
    else:
      features = {key: text for key in ('implicit', 'explicit', 'category', 'id')}
      features['index'] = integer
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__,
      features=tfds.features.FeaturesDict(features),
      # Graphics: CC-BY 4.0, Twitter and contributors.
      homepage='https://github.com/jdecked/twemoji',
      # Rows come in catalogue order; shuffling is the pipeline's work.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Everything is installed already.
    if self.builder_config.name == 'pictures':
      return {'train': self._generate_pictures()}
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_pictures(self):
    from PIL import Image

    for i, (emoji, pixels) in enumerate(
      zip(emoji_lib.catalogue(), emoji_lib.pictures(PICTURE_SIZE), strict=True)
    ):
      png = io.BytesIO()  # A numpy image would be encoded by TensorFlow.
      Image.fromarray(pixels).save(png, 'PNG')
      png.seek(0)
      yield (
        i,
        {
          'image': png,
          'name': emoji.name,
          'category': emoji.category,
          'emoji': emoji.character,
          'index': i,
        },
      )

  def _generate_examples(self, split):
    index = {emoji.name: i for i, emoji in enumerate(emoji_lib.catalogue())}
    pairs = [pair for pair in emoji_pairs() if pair.split == split]
    for i, pair in enumerate(pairs):
      yield (
        i,
        {
          'implicit': pair.implicit,
          'explicit': pair.explicit,
          'category': pair.category,
          'id': pair.id,
          'index': index[pair.explicit],
        },
      )


def load_pictures(data_dir: str | os.PathLike) -> PictureTable:
  """Reads all pictures, preparing the dataset in `data_dir` if it is not there.

  Raises:
    UserError: if the emoji packages are missing or `data_dir` cannot be written.
  """
  rows = _rows('pictures', 'train', data_dir)
  images = np.stack([row['image'] for row in rows])
  images.setflags(write=False)
  texts = [tuple(_text(row[key]) for row in rows) for key in ('name', 'category', 'emoji')]
  return PictureTable(images, *texts)


def load_pairs(
  data_dir: str | os.PathLike, wordings_per_fact: int = TRAIN_WORDINGS, leave_out: str = ''
) -> dict[str, PairTable]:
  """Reads the pairs of all splits, preparing the dataset in `data_dir` if it is not there.

  Args:
    data_dir: where prepared datasets live.
    wordings_per_fact: of split 'train', as in `emoji_pairs.emoji_pairs`.
    leave_out: what is held out, as there.

  Returns:
    {split: PairTable} for every split of `emoji_pairs.SPLITS`.

  Raises:
    UserError: as `emoji_pairs.emoji_pairs`, or if `data_dir` cannot be written.
  """
  split_of = {pair.id: pair.split for pair in emoji_pairs(wordings_per_fact, leave_out=leave_out)}
  rows_of = collections.defaultdict(list)
  for stored in SPLITS:
    for row in _rows('pairs', stored, data_dir):
      rows_of[split_of.get(_text(row['id']))].append(row)
  tables = {}
  for split in SPLITS:
    rows = rows_of[split]
    pairs = tuple(
      KnowledgePair(
        split=split,
        **{key: _text(row[key]) for key in ('implicit', 'explicit', 'category', 'id')},
      )
      for row in rows
    )
    tables[split] = PairTable(pairs, np.array([row['index'] for row in rows], np.int32))
  return tables


def _text(value: bytes | str) -> str:
  return value.decode('utf-8') if isinstance(value, bytes) else value


def _rows(config: str, split: str, data_dir: str | os.PathLike) -> list[dict[str, Any]]:
  directory = _prepare(config, pathlib.Path(data_dir))
  with _quiet():
    return list(tfds.builder_from_directory(directory).as_data_source(split))


@functools.cache
def _source_digest() -> str:
  """Hash of all that the dataset is made of: a prepared dataset with another one is stale."""
  digest = hashlib.sha256(repr((PICTURE_SIZE, emoji_pairs())).encode())
  for emoji in emoji_lib.catalogue():
    digest.update(f'{emoji.character} {emoji.name} {emoji.category}\n'.encode())
    digest.update(emoji.path.read_bytes())
  return digest.hexdigest()


def _prepare(config: str, root: pathlib.Path) -> pathlib.Path:
  """Returns the directory of a complete, current dataset, building it if there is none."""
  final = root / EmojiKnowledge.name / config / str(EmojiKnowledge.VERSION)
  if _is_usable(final):
    return final
  try:
    root.mkdir(parents=True, exist_ok=True)
    _remove_debris(root)
    # Built aside and moved in one step: a killed run leaves no half dataset under the real name,
    # and of several processes that build at once one wins and the others use its files.
    with tempfile.TemporaryDirectory(dir=root, prefix=_ASIDE) as aside:
      built = _build(config, pathlib.Path(aside))
      final.parent.mkdir(parents=True, exist_ok=True)
      if final.exists() and not _is_usable(final):
        final.rename(pathlib.Path(aside) / 'unusable')
      try:
        built.rename(final)
      except OSError:
        if not _is_usable(final):
          raise
  except OSError as error:
    raise UserError(
      f'The emoji dataset cannot be prepared in {root} ({error.strerror or error}): choose a data '
      'directory that can be written.'
    ) from error
  return final


def _build(config: str, aside: pathlib.Path) -> pathlib.Path:
  with _quiet():
    builder = EmojiKnowledge(data_dir=aside, config=config, file_format='array_record')
    builder.download_and_prepare(download_dir=aside / 'downloads')
  built = pathlib.Path(builder.data_dir)
  sizes = {path.name: path.stat().st_size for path in built.iterdir()}
  manifest = {'source': _source_digest(), 'files': sizes}
  (built / _MANIFEST).write_text(json.dumps(manifest), encoding='utf-8')
  return built


def _is_usable(directory: pathlib.Path) -> bool:
  """Whether a directory holds a dataset made of today's sources, with every file whole."""
  try:
    manifest = json.loads((directory / _MANIFEST).read_text(encoding='utf-8'))
    return manifest['source'] == _source_digest() and all(
      (directory / name).stat().st_size == size for name, size in manifest['files'].items()
    )
  except (OSError, ValueError, KeyError, TypeError):
    return False


def _remove_debris(root: pathlib.Path) -> None:
  """Removes what killed runs left; an hour is far longer than a build takes."""
  for path in root.glob(_ASIDE + '*'):
    with contextlib.suppress(OSError):
      if time.time() - path.stat().st_mtime > 3600:
        shutil.rmtree(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides TFDS's progress bars and notices; errors are raised as ever."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    with open(os.devnull, 'w') as nowhere:
      with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
  finally:
    logging.set_verbosity(verbosity)
