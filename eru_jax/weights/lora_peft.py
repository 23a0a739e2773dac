"""PEFT's settings of an adapter, which diffusers keeps in the metadata of its file."""

import collections
import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from eru_jax.errors import UserError

_KEY, _PREFIX = 'lora_adapter_metadata', 'transformer.'
# Others change the base weights too when they are loaded.
_PLAIN_INITS = (True, False, None, 'gaussian', 'orthogonal', 'eva')
# Far beyond what anybody trains with, and far from the ends of float32.
_SMALLEST, _LARGEST = 1e-6, 1e6


def valid_alpha(value: Any) -> bool:
  """Whether an alpha from a file is a number that scales an update sensibly."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and _SMALLEST <= value <= _LARGEST
  )


@dataclasses.dataclass(frozen=True)
class PeftSettings:
  """What decides the scales of updates that come without an alpha of their own.

  Attributes:
    alpha: of all modules, or None: alpha = rank.
    patterns: alphas of modules, by their names' ends, or by whole names that begin with '^'.
    rank_stabilised: whether updates are scaled by alpha / sqrt(rank).
  """

  alpha: float | None = None
  patterns: Mapping[str, float] = dataclasses.field(default_factory=dict)
  rank_stabilised: bool = False

  def alpha_of(self, module: str, rank: int) -> float:
    """The alpha for which alpha / rank is the scale of a module's update."""
    alpha = rank if self.alpha is None else self.alpha
    for name, value in self.patterns.items():
      if module == name.removeprefix('^') or module.endswith(f'.{name}'):
        alpha = value
        break
    return float(alpha * math.sqrt(rank) if self.rank_stabilised else alpha)


def read(path: str | os.PathLike, metadata: Mapping[str, str]) -> PeftSettings:
  """The settings in a file's metadata; alpha = rank if there are none.

  Args:
    path: the file, for messages.
    metadata: of the file.

  Raises:
    UserError: if they are damaged, or ask for what low-rank updates do not do.
  """
  try:
    values = json.loads(metadata.get(_KEY, '{}'))
  except (ValueError, RecursionError) as error:
    raise UserError(
      f'The LoRA settings in {path} are no JSON ({error}): export it again.'
    ) from None
  if not isinstance(values, dict):
    raise UserError(f'The LoRA settings in {path} are no JSON object: export it again.')
  own = {key.removeprefix(_PREFIX): v for key, v in values.items() if key.startswith(_PREFIX)}
  values = own or values

  init = values.get('init_lora_weights')
  if values.get('use_dora') or init not in _PLAIN_INITS:
    what = 'DoRA' if values.get('use_dora') else f'init_lora_weights {str(init)[:40]!r}'
    raise UserError(
      f'{path} is an adapter with {what}, which is more than low-rank updates: merge it into its '
      'base model with the tool that made it.'
    )
  alpha, patterns = values.get('lora_alpha'), values.get('alpha_pattern') or {}
  if not isinstance(patterns, dict):
    raise UserError(
      f'alpha_pattern in the LoRA settings of {path} is no JSON object: export it again.'
    )
  for name, value in [('', alpha), *patterns.items()]:
    if value is not None and not valid_alpha(value):
      where = f'of {name[:80]!r} ' if name else ''
      raise UserError(
        f'alpha {where}in the LoRA settings of {path} is no number from {_SMALLEST:g} to '
        f'{_LARGEST:g}: export it again.'
      )
  plain = {}
  for name, value in patterns.items():
    # Dots may be escaped; other regular expressions of a stranger are not run.
    name_ = name.replace('\\.', '.').removesuffix('$')
    if not re.fullmatch(r'\^?[\w.]+', name_):
      raise UserError(
        f'alpha_pattern {name[:80]!r} in the LoRA settings of {path} is no plain name of modules: '
        'save the adapter again with names instead of regular expressions.'
      )
    plain[name_] = value
  return PeftSettings(alpha, plain, bool(values.get('use_rslora')))


def to_metadata(ranks: Mapping[str, int]) -> dict[str, str]:
  """The metadata of a file whose updates all have alpha = rank, as diffusers writes it.

  Args:
    ranks: by module name.
  """
  usual = collections.Counter(ranks.values()).most_common(1)[0][0]
  others = {f'^{module}': rank for module, rank in ranks.items() if rank != usual}
  settings = {
    'r': usual,
    'lora_alpha': usual,
    'rank_pattern': others,
    'alpha_pattern': others,
    'target_modules': sorted(ranks),
  }
  settings = {_PREFIX + key: value for key, value in settings.items()}
  return {_KEY: json.dumps(settings, indent=2, sort_keys=True)}
