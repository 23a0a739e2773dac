"""The text encoders of FLUX.1: prompts in, Conditioning out.

T5 v1.1 XXL makes the token states, CLIP-L the pooled vector. Tokenisers, configs and weights are
read from a local FLUX.1 snapshot in diffusers' layout; nothing is downloaded. Prompts are treated
as diffusers' FluxPipeline does it: both tokenisers pad to full length, and nothing is masked, so
that T5 and the backbone attend to padding as well. Parameters are split over the mesh by
`sharding.RULES`, prompts over its axes data and fsdp.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eru_jax import sharding
from eru_jax.data.digests import file_digest
from eru_jax.data.text_encoder import check_prompts
from eru_jax.errors import UserError
from eru_jax.models.clip import ClipTextConfig, ClipTextModel
from eru_jax.models.t5 import T5Config, T5Encoder
from eru_jax.types import Conditioning
from eru_jax.weights import clip as clip_weights
from eru_jax.weights import streaming
from eru_jax.weights import t5 as t5_weights

# Of the folders text_encoder and text_encoder_2; shards of the second may stand in for the first.
_CONFIG, _WEIGHTS, _INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'
# One compiled program serves every call: batches are padded to this size, or to the next multiple
# of the devices that share them.
CLIP_BATCH, T5_BATCH = 32, 4
# What FLUX.1 was trained with, and the pipeline's own limit.
_LONGEST = 512
# Part of the fingerprint: raise it when the same files would give other embeddings.
_RECIPE = 'flux clip pooled, t5 unmasked, 1'
# Characters of an over-long prompt that the warning about it quotes.
_QUOTED = 200
# Files that are enough to make a tokeniser of, by class.
_VOCABULARIES = {
  'CLIPTokenizer': (('tokenizer.json',), ('vocab.json', 'merges.txt')),
  'T5TokenizerFast': (('tokenizer.json',), ('spiece.model',)),
}


def encode(module: nn.Module, params: Any, ids: jax.Array) -> jax.Array:
  """Pooled states (B, P) of CLIP, token states (B, L, D) of T5."""
  out = module.apply({'params': params}, ids)
  return out[1] if isinstance(module, ClipTextModel) else out


@dataclasses.dataclass(frozen=True, eq=False)
class _Half:
  """One of the two encoders, its parameters still on disk.

  Attributes:
    module: the model.
    folder: holds its config and weights.
    weights: how its files are read: `eru_jax.weights.clip` or `.t5`.
    tokenizer: of transformers.
    length: tokens a prompt is padded or cut to.
    batch: prompts encoded at once, if the devices can share them evenly.
    mesh: the devices.
  """

  module: ClipTextModel | T5Encoder
  folder: pathlib.Path
  weights: types.ModuleType
  tokenizer: Any
  length: int
  batch: int
  mesh: Mesh

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """Token ids (B, length) int32."""
    # One at a time: a batch would start threads that do not survive a later fork.
    options = dict(padding='max_length', max_length=self.length, truncation=True)
    rows = [self.tokenizer(prompt, **options)['input_ids'] for prompt in prompts]
    return np.array(rows, np.int32).reshape(-1, self.length)

  def is_cut(self, prompt: str) -> bool:
    return len(self.tokenizer(prompt, verbose=False)['input_ids']) > self.length

  def parameters(self) -> Any:
    """Its parameters, split over the mesh and no wider than the computation; of what is still on
    its way the host holds one array at a time.

    Raises:
      UserError: if a file is damaged or of another architecture, or the mesh does not divide it.
    """
    config = self.module.config
    stored = self.weights.stored(self.folder / _WEIGHTS, config)
    layout = sharding.logical_shardings(self.weights.boxed(config), self.mesh)
    places = traverse_util.flatten_dict(layout, sep='/')
    return streaming.load(streaming.narrowed(stored, self.module.dtype), places)

  def run(self, params: Any, ids: np.ndarray) -> np.ndarray:
    """Encodes token ids (B, length), B at least 1."""
    share = self.mesh.shape['data'] * self.mesh.shape['fsdp']
    size = -(-self.batch // share) * share
    split = NamedSharding(self.mesh, P(('data', 'fsdp')))
    apply = sharding.compiled_whole(encode, self.mesh, (0,))
    outputs = []
    for start in range(0, len(ids), size):
      part = ids[start : start + size]
      filled = jax.device_put(np.resize(part, (size, self.length)), split)
      # Accelerators would otherwise round float32 products, and caches differ between machines.
      with sharding.use_mesh(self.mesh), jax.default_matmul_precision('highest'):
        outputs.append(np.asarray(apply(self.module, params, filled))[: len(part)])
    return np.concatenate(outputs)


@dataclasses.dataclass(frozen=True, eq=False)
class FluxTextEncoder:
  """FLUX.1's frozen CLIP and T5 with their tokenisers. Build it with `load_flux_text`.

  Parameters are read when prompts are encoded, T5's after CLIP's are gone, and dropped after.
  Prompts that come part by part are announced by `expect`, so that neither is read twice.

  Attributes:
    directory: the snapshot.
    clip: the encoder of the pooled vector.
    t5: the encoder of the token states.
    keep_resident: keep T5's parameters after their first use, until `release`.
  """

  directory: pathlib.Path
  clip: _Half
  t5: _Half
  keep_resident: bool = False
  _resident: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)
  _pooled: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)

  @property
  def widths(self) -> tuple[int, int]:
    """Channels of a token state and of the pooled vector."""
    return self.t5.module.config.d_model, self.clip.module.config.hidden_size

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hex sha256 of everything the embedding of a text depends on; keys caches."""
    digest = hashlib.sha256(f'{_RECIPE}/{self.t5.length}/{self.t5.module.dtype}'.encode())
    for name in ('tokenizer', 'tokenizer_2'):
      for path in sorted(p for p in (self.directory / name).iterdir() if p.is_file()):
        digest.update(f'/{name}/{path.name}:{file_digest(path)}'.encode())
    for half in (self.clip, self.t5):
      for path in (half.folder / _CONFIG, *_weight_files(half.folder)):
        digest.update(f'/{half.folder.name}/{path.name}:{file_digest(path)}'.encode())
    return digest.hexdigest()

  def encode(self, prompts: Sequence[str], warn: bool = True) -> Conditioning:
    """Embeds prompts; those that are too long lose their end.

    Args:
      prompts: B texts; B may be 0, which reads no parameters.
      warn: whether to say so, see `warn_if_cut`.

    Returns:
      Conditioning of numpy arrays: tokens (B, max_length, D) in the encoder's dtype, pooled (B, P)
      float32, and no mask.

    Raises:
      UserError: if a prompt is empty or blank, naming its index, or a weights file is damaged.
    """
    check_prompts(prompts)
    conditioning = self._encode(prompts)
    if warn:
      self.warn_if_cut(prompts)
    return conditioning

  def warn_if_cut(self, prompts: Sequence[str], mask: np.ndarray | None = None) -> None:
    """Warns, once for all of them, if prompts are too long for either encoder.

    Args:
      prompts: B texts.
      mask: of their embeddings, which have none.
    """
    del mask
    clip = [prompt for prompt in prompts if self.clip.is_cut(prompt)]
    t5 = [prompt for prompt in prompts if self.t5.is_cut(prompt)]
    if clip or t5:
      logging.warning(
        '%d of %d prompts are longer than the %d tokens of CLIP, %d than the %d of T5, and lose '
        'their end there; the first is %r.',
        len(clip),
        len(prompts),
        self.clip.length,
        len(t5),
        self.t5.length,
        (clip or t5)[0][:_QUOTED],
      )

  def null_conditioning(self) -> Conditioning:
    """The embedding of the empty prompt, shaped like `encode` of one prompt."""
    return self._encode([''])

  def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids of CLIP (B, 77) and of T5 (B, max_length), int32, padding included."""
    return self.clip.tokenize(prompts), self.t5.tokenize(prompts)

  def expect(self, prompts: Sequence[str]) -> None:
    """Runs CLIP, alone, on prompts that T5 will be asked for, and on the empty one.

    Pooled vectors are small, and so CLIP is gone before T5 comes to stay.
    """
    missing = [prompt for prompt in ('', *prompts) if prompt not in self._pooled]
    if missing:
      pooled = self.clip.run(self.clip.parameters(), self.clip.tokenize(missing))
      self._pooled.update(zip(missing, pooled, strict=True))

  def release(self) -> None:
    """Drops what `keep_resident` and `expect` have kept."""
    self._resident.clear()
    self._pooled.clear()

  def _encode(self, prompts: Sequence[str]) -> Conditioning:
    if not prompts:
      states, pooled = self.widths
      tokens = np.zeros((0, self.t5.length, states), self.t5.module.dtype)
      return Conditioning(tokens, pooled=np.zeros((0, pooled), np.float32))
    if all(prompt in self._pooled for prompt in prompts):
      pooled = np.stack([self._pooled[prompt] for prompt in prompts])
    else:
      pooled = self.clip.run(self.clip.parameters(), self.clip.tokenize(prompts))
    params = self._resident.get('t5')
    params = self.t5.parameters() if params is None else params
    if self.keep_resident:
      self._resident['t5'] = params
    return Conditioning(self.t5.run(params, self.t5.tokenize(prompts)), pooled=pooled)


def load_flux_text(
  directory: str | pathlib.Path,
  max_length: int = 512,
  dtype: Any = jnp.float32,
  keep_resident: bool = False,
  mesh: Mesh | None = None,
) -> FluxTextEncoder:
  """Opens the text encoders of a FLUX.1 snapshot in diffusers' layout.

  Args:
    directory: holds tokenizer/, tokenizer_2/, text_encoder/ and text_encoder_2/.
    max_length: tokens that T5 pads or cuts a prompt to, end of text included: 512 for FLUX.1-dev,
      256 for -schnell.
    dtype: of the computation and of the token states, float32 or bfloat16.
    keep_resident: keep T5's parameters on the devices between calls of `encode`.
    mesh: the devices; None takes one.

  Raises:
    UserError: if a file is missing, damaged or of another architecture (weights are only read when
      something is encoded), or an argument is impossible.
  """
  directory = pathlib.Path(directory)
  if type(max_length) is not int or not 1 <= max_length <= _LONGEST:
    raise UserError(f'max_length is {max_length!r}, but FLUX.1 takes 1 to {_LONGEST}.')
  if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
    raise UserError(f'FLUX.1 text encoders run in float32 or bfloat16, not {jnp.dtype(dtype)}.')
  dtype = jnp.dtype(dtype)
  if mesh is None:
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])
  clip_config = ClipTextConfig.from_dict(_read_config(directory / 'text_encoder'))
  t5_config = T5Config.from_dict(_read_config(directory / 'text_encoder_2'))
  clip_tokenizer = _load_tokenizer(directory / 'tokenizer', 'CLIPTokenizer', clip_config.vocab_size)
  t5_tokenizer = _load_tokenizer(directory / 'tokenizer_2', 'T5TokenizerFast', t5_config.vocab_size)
  # A tokeniser that does not know its limit says some huge number.
  clip_length = min(clip_tokenizer.model_max_length, clip_config.max_position_embeddings)
  clip = _Half(
    ClipTextModel(clip_config, dtype),
    directory / 'text_encoder',
    clip_weights,
    clip_tokenizer,
    clip_length,
    CLIP_BATCH,
    mesh,
  )
  t5 = _Half(
    T5Encoder(t5_config, dtype),
    directory / 'text_encoder_2',
    t5_weights,
    t5_tokenizer,
    max_length,
    T5_BATCH,
    mesh,
  )
  return FluxTextEncoder(directory, clip, t5, keep_resident)


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The config.json of an encoder whose weights are there too."""
  values = _read_json(folder / _CONFIG)
  if not (folder / _WEIGHTS).is_file() and not (folder / _INDEX).is_file():
    raise UserError(f'{folder} holds neither {_WEIGHTS} nor {_INDEX}: download the folder again.')
  return values


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(
      f"There is no {path}: give a FLUX.1 snapshot in diffusers' layout, with tokenizer/, "
      'tokenizer_2/, text_encoder/ and text_encoder_2/.'
    ) from None
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read ({error}): copy the file again.') from error
  if not isinstance(values, dict):
    raise UserError(f'{path} holds no JSON object: copy the file again.')
  return values


def _load_tokenizer(folder: pathlib.Path, name: str, vocab_size: int) -> Any:
  # transformers would make an empty tokeniser of a folder without a vocabulary.
  options = _VOCABULARIES[name]
  if not any(all((folder / file).is_file() for file in files) for files in options):
    wanted = ' or '.join(' and '.join(files) for files in options)
    raise UserError(f'{folder} is no {name}: it lacks {wanted}; download the folder again.')
  # Without PyTorch it would say that its models are not available, which nobody asks for.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  import transformers  # here, because commands must print their help quickly

  try:
    tokenizer = getattr(transformers, name).from_pretrained(str(folder), local_files_only=True)
    needed = max(tokenizer.get_vocab().values()) + 1
  except Exception as error:  # of whatever class
    reason = ' '.join(str(error).split())[:_QUOTED]
    raise UserError(f'{folder} holds no {name} ({reason}): copy the folder again.') from error
  # An embedding that does not exist reads as NaN.
  if needed > vocab_size:
    raise UserError(
      f'{folder} numbers tokens up to {needed - 1}, but its encoder has {vocab_size} of them: the '
      'folders belong to different models.'
    )
  if tokenizer.pad_token_id is None:
    raise UserError(f'{folder} names no padding token: copy the folder again.')
  return tokenizer


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The weights file, or the index and the shards it names."""
  if (folder / _WEIGHTS).is_file():
    return [folder / _WEIGHTS]
  shards = _read_json(folder / _INDEX).get('weight_map')
  names = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
  # What it names besides files is refused when the weights are read.
  return [folder / _INDEX, *(folder / n for n in sorted(names) if (folder / n).is_file())]
