"""Adapter files that other tools read and write, for FLUX.1.

Two forms:
  - 'diffusers': `transformer.<module>.lora_A.weight` (rank, in) and `lora_B.weight` (out, rank),
    with PEFT's settings in the file's metadata, as diffusers' `save_lora_weights` writes it.
  - 'kohya': `lora_unet_<layer>.lora_down.weight`, `lora_up.weight` and `alpha`, in the layout of
    the original FLUX.1 (`eru_jax.weights.lora_kohya`), as kohya's sd-scripts writes it.

What we write has alpha = rank everywhere, with the scale in the second matrix. Readers look for
alpha in different places (metadata, tensors, nowhere: diffusers' reader of kohya files forgets
that of the last layer), and so it is the same update to all of them. Ranks and alphas of the
training are in the metadata, and come back when we read the file ourselves.
"""

import collections
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from absl import logging

from eru_jax import __version__
from eru_jax.errors import UserError, listed
from eru_jax.models import lora
from eru_jax.models.flux import FluxConfig
from eru_jax.models.lora import LoraRule
from eru_jax.weights import lora_kohya, lora_layers, lora_peft
from eru_jax.weights.lora_layers import Layer, Update, from_updates, layers, to_updates
from eru_jax.weights.safetensors_io import write_safetensors
from eru_jax.weights.tensor_files import TensorFiles

PyTree = Any
FORMS = ('diffusers', 'kohya')
_DTYPES = ('float32', 'bfloat16', 'float16')
# Weights from a file that are larger are as good as infinite, and may overflow when scaled.
_BEYOND = 1e15

_TEXT_ENCODERS = ('text_encoder', 'lora_te')
_PREFIX = re.compile(
  r'(base_model\.model\.)?(transformer\.|diffusion_model\.|lora_unet_|lora_transformer_)?'
)
_LEAVES = {
  '.lora_A.weight': 'down',
  '.lora_down.weight': 'down',
  '.lora_B.weight': 'up',
  '.lora_up.weight': 'up',
  '.alpha': 'alpha',
}
# What else adapter files hold, none of which is a low-rank update.
_FOREIGN = {
  r'\.(dora_scale$|lora_magnitude_vector)': 'DoRA',
  r'\.hada_': 'LoHa',
  r'\.lokr_': 'LoKr',
  r'\.processor\.\w+_lora\d?\.': "XLabs' names",
  r'\.lora\.(down|up)\.weight$': "diffusers' names before PEFT",
  r'\.lora_[AB]\.[^.]+\.weight$': "PEFT's inner names",
  r'\.(bias|diff_b)$': 'biases',
}


def export_lora(
  path: str | os.PathLike,
  adapter: PyTree,
  rules: Sequence[LoraRule],
  config: FluxConfig,
  form: str = 'diffusers',
  dtype: Any = 'float32',
  base_model: str = 'FLUX.1',
) -> None:
  """Writes an adapter as a safetensors file, whole or not at all.

  Args:
    path: the file.
    adapter: nested dict of a (..., in, r) and b (..., r, out), stacked over scanned layers.
    rules: its rules.
    config: the architecture that it adapts.
    form: one of FORMS.
    dtype: of the stored matrices: float32, bfloat16 or float16.
    base_model: public name of the model that it was trained on, for the file's metadata.

  Raises:
    UserError: if the adapter is of another architecture, changes nothing, has numbers that are
      not finite in this dtype, or if the file cannot be written.
  """
  if form not in FORMS:
    raise UserError(f'Unknown form {form!r} of adapter files: choose one of {", ".join(FORMS)}.')
  try:
    dtype = np.dtype(dtype)
  except TypeError:
    dtype = None
  if dtype is None or dtype.name not in _DTYPES:
    raise UserError(f'Adapters are stored in one of {", ".join(_DTYPES)}: choose one of these.')
  known = layers(config)
  updates = to_updates(adapter, rules, known)
  if not updates:
    raise UserError('This adapter is zero everywhere: train it before you export it.')
  metadata = {
    'format': 'pt',
    'software': f'eru_jax {__version__}',
    'base_model': base_model,
    'form': form,
    'rules': json.dumps([[rule.pattern, rule.rank, rule.alpha] for rule in rules]),
    **lora_layers.sizes_to_metadata(lora.sizes(adapter, rules)),
  }
  if form == 'diffusers':
    tensors = _tensors(updates, 'transformer.{}.lora_A.weight', 'transformer.{}.lora_B.weight')
    metadata |= lora_peft.to_metadata({module: update.rank for module, update in updates.items()})
  else:
    fused = {}
    for original in lora_kohya.originals(config):
      update = lora_kohya.fuse(original, updates, known)
      if update is not None:
        fused['lora_unet_' + original.name.replace('.', '_')] = update
    tensors = _tensors(fused, '{}.lora_down.weight', '{}.lora_up.weight')
    tensors |= {f'{name}.alpha': np.float32(update.alpha) for name, update in fused.items()}
    rank = str(max(update.rank for update in fused.values()))
    metadata |= {
      'ss_network_module': 'networks.lora_flux',
      'ss_base_model_version': 'flux1',
      'ss_network_dim': rank,
      'ss_network_alpha': rank,
    }
  with np.errstate(over='ignore'):
    stored = {
      name: value if name.endswith('.alpha') else value.astype(dtype)
      for name, value in tensors.items()
    }
  for name, value in stored.items():
    if not np.isfinite(value.astype(np.float32)).all():
      raise UserError(
        f'{name} is not finite in {dtype.name}: take another dtype, or an earlier checkpoint if '
        'the training diverged.'
      )
  write_safetensors(path, stored, metadata)


def _tensors(updates: Mapping[str, Update], down: str, up: str) -> dict[str, np.ndarray]:
  tensors = {}
  for name, update in updates.items():
    tensors[down.format(name)], tensors[up.format(name)] = update.down, update.up
  return tensors


def import_lora(path: str | os.PathLike, config: FluxConfig) -> tuple[PyTree, tuple[LoraRule, ...]]:
  """Reads an adapter of either form, whatever prefix its tool puts before names.

  Adapters of text encoders in the same file are left out with a warning.

  Args:
    path: a safetensors file.
    config: the architecture that it adapts.

  Returns:
    (adapter, rules): float32 numpy arrays, and for each distinct (rank, alpha) one rule that
    names its layers. Of a file that `export_lora` wrote, these are the alphas it was trained with;
    where a file gives none, alpha is the rank.

  Raises:
    UserError: if the file is missing or damaged, or listing everything in it that this
      architecture cannot take.
  """
  files, metadata = TensorFiles(path), _read_metadata(path)
  updates = _read(files, metadata, config, files.read)
  sizes = lora_layers.read_sizes(path, metadata)
  return from_updates(lora_layers.unfold(updates, layers(config), sizes), layers(config))


def check_lora(path: str | os.PathLike, config: FluxConfig) -> None:
  """Looks at all of an adapter file but its numbers, before anything large is read.

  Raises:
    UserError: as `import_lora`.
  """
  files, metadata = TensorFiles(path), _read_metadata(path)
  _read(files, metadata, config, None)
  lora_layers.read_sizes(path, metadata)


def _read(
  files: TensorFiles,
  metadata: Mapping[str, str],
  config: FluxConfig,
  read: Callable[[str], np.ndarray] | None,
) -> dict[str, Update]:
  """The updates in a file, by the reference's module name; none if there is nothing to `read` with.

  Raises:
    UserError: as `import_lora`.
  """
  path, known = files.path, layers(config)
  settings = lora_peft.read(path, metadata)
  targets = {module: lora_kohya.Original(module, (module,)) for module in known}
  targets |= {original.name: original for original in lora_kohya.originals(config)}
  targets = {name.replace('.', '_'): target for name, target in targets.items()}

  problems: dict[str, list[str]] = collections.defaultdict(list)
  encoders = [key for key in files.tensors if key.startswith(_TEXT_ENCODERS)]
  keys = [key for key in files.tensors if key not in set(encoders)]
  updates: dict[str, Update] = {}
  found = _by_layer(keys, targets, problems)
  for name, parts in found.items():
    target = targets[name.replace('.', '_')]
    alpha = _alpha(name, parts, files, target, known, settings, problems)
    if alpha is None or read is None:
      continue
    update = _update(name, parts, alpha, read, problems)
    for module, part in (lora_kohya.split(target, update, known) if update else {}).items():
      if module in updates:
        problems['given twice'].append(name)
      updates[module] = part
  if not any(mark in key for key in files.tensors for mark in ('lora', 'hada', 'lokr')):
    raise UserError(
      f'{path} holds no adapter, but {len(files.tensors)} other tensors such as '
      f'{next(iter(files.tensors), "none")}: give the file that the training of an adapter wrote.'
    )
  if problems:
    raise UserError(
      f'{path} holds what this model cannot take: check which model it was made for, or save it '
      'again in one of the forms of docs/adapters.md with the tool that made it.',
      listed(dict(sorted(problems.items()))),
    )
  if not (found if read is None else updates):
    raise UserError(
      f'{path} holds adapters of text encoders alone, which are left out: give one of a FLUX.1 '
      'transformer.'
    )
  if encoders and read is not None:
    logging.warning(
      '%s: %d tensors of adapters of text encoders are left out, such as %r.',
      path, len(encoders), encoders[0],
    )  # fmt: skip
  return updates


def _read_metadata(path: str | os.PathLike) -> Mapping[str, str]:
  try:
    with safetensors.safe_open(path, framework='np') as file:
      return file.metadata() or {}
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(
      f'The metadata of {path} cannot be read ({error}): copy or download it again.'
    ) from error


def _by_layer(
  keys: Sequence[str],
  targets: Mapping[str, lora_kohya.Original],
  problems: dict[str, list[str]],
) -> dict[str, dict[str, str]]:
  """Keys of 'down', 'up' and 'alpha' of each layer, by its name in the file without prefixes."""
  found: dict[str, dict[str, str]] = {}
  for key in sorted(keys):
    leaf = next((leaf for leaf in _LEAVES if key.endswith(leaf)), None)
    if leaf is None:
      kind = next((kind for mark, kind in _FOREIGN.items() if re.search(mark, key)), 'unknown')
      problems[kind].append(key)
      continue
    name = key.removesuffix(leaf)
    name = name[_PREFIX.match(name).end() :]
    if name.replace('.', '_') not in targets:
      problems['of no layer of this model'].append(key)
    elif _LEAVES[leaf] in found.setdefault(name, {}):
      problems['given twice'].append(key)
    else:
      found[name][_LEAVES[leaf]] = key
  return found


def _alpha(
  name: str,
  parts: Mapping[str, str],
  files: TensorFiles,
  target: lora_kohya.Original,
  known: Mapping[str, Layer],
  settings: lora_peft.PeftSettings,
  problems: dict[str, list[str]],
) -> float | None:
  """The alpha of a layer whose matrices fit it, or None and a problem."""
  if 'down' not in parts or 'up' not in parts:
    problems['without their other matrix'].append(name)
    return None
  down, up = (files.tensors[parts[leaf]].shape for leaf in ('down', 'up'))
  n_in, n_out = known[target.parts[0]].n_in, sum(known[part].n_out for part in target.parts)
  rank = down[0] if down else 0
  if not rank or down != (rank, n_in) or up != (n_out, rank):
    problems['wrong shape'].append(f'{name} {down} {up} for {n_in} -> {n_out}')
    return None
  alpha = settings.alpha_of(name, rank)
  if 'alpha' in parts:
    stored = files.tensors[parts['alpha']]
    # Not read at any size: it is a number.
    sensible = math.prod(stored.shape) == 1 and stored.dtype.kind in 'fViu'
    alpha = float(files.read(parts['alpha']).item()) if sensible else None
  if not lora_peft.valid_alpha(alpha):
    problems['alpha is no sensible number'].append(name)
    return None
  return alpha


def _update(
  name: str,
  parts: Mapping[str, str],
  alpha: float,
  read: Callable[[str], np.ndarray],
  problems: dict[str, list[str]],
) -> Update | None:
  """The update that a layer's tensors make, or None and a problem."""
  down, up = (_float32(read(parts[leaf])) for leaf in ('down', 'up'))
  if down is None or up is None:
    problems['not finite numbers'].append(name)
    return None
  return Update(down, up, alpha)


def _float32(value: np.ndarray) -> np.ndarray | None:
  """A matrix of any floating type; None if it is of no such type, or has numbers beyond reason."""
  if value.dtype != ml_dtypes.bfloat16 and value.dtype.kind != 'f':
    return None
  with np.errstate(over='ignore'):
    value = value.astype(np.float32)
  return value if np.all(np.abs(value) < _BEYOND) else None
