"""A cache of prompt embeddings on disk, keyed by encoder and text.

One ArrayRecord file holds the prompts of one call that were not cached before; it appears under
its final name only when it is whole, so a killed run leaves nothing half-written behind.
"""

import contextlib
import hashlib
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from absl import logging

from eru_jax.data.text_encoder import check_prompts
from eru_jax.errors import UserError
from eru_jax.types import Conditioning

_GROUP = 'group_size:1'


class Encoder(Protocol):
  """What the cache asks of a text encoder."""

  @property
  def fingerprint(self) -> str: ...

  def encode(self, prompts: Sequence[str], warn: bool = True) -> Conditioning: ...

  def warn_if_cut(self, prompts: Sequence[str], mask: np.ndarray) -> None: ...


def _key(prompt: str) -> str:
  return hashlib.sha256(prompt.encode()).hexdigest()


def _pack(prompt: str, row: Conditioning) -> bytes:
  """One record: the text and, of its embedding, the real tokens only."""
  length = int(row.mask.sum())
  buffer = io.BytesIO()
  np.savez(
    buffer,
    prompt=np.frombuffer(prompt.encode(), np.uint8),
    tokens=row.tokens[:length],
    padded=np.int32(row.tokens.shape[0]),
    pooled=row.pooled,
  )
  return buffer.getvalue()


def _unpack(record: bytes) -> tuple[str, Conditioning]:
  with np.load(io.BytesIO(record), allow_pickle=False) as data:
    prompt = data['prompt'].tobytes().decode()
    short, padded = data['tokens'], int(data['padded'])
    tokens = np.zeros((padded, short.shape[1]), short.dtype)
    tokens[: len(short)] = short
    return prompt, Conditioning(tokens, np.arange(padded) < len(short), data['pooled'])


class EmbeddingCache:
  """Looks prompts up, encoding only those it has not seen."""

  def __init__(self, directory: str | os.PathLike, encoder: Encoder):
    """Opens the cache of one encoder; encoders with other fingerprints never mix with it."""
    self._encoder = encoder
    self._directory = pathlib.Path(directory) / encoder.fingerprint[:16]
    self._rows: dict[str, Conditioning] = {}
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(
        f'The embedding cache {self._directory} cannot be made ({error.strerror}): set '
        'ERU_JAX_CACHE to a writable directory.'
      ) from error
    for path in sorted(self._directory.glob('*.array_record')):
      self._read(path)

  def lookup(self, prompts: Sequence[str]) -> Conditioning:
    """Embeddings of prompts, in their order; warns once if any of them is too long.

    Args:
      prompts: N texts, repeats allowed; N may be 0.

    Returns:
      Conditioning of numpy arrays, N rows.

    Raises:
      UserError: for an empty prompt, naming its index, or if the cache cannot be written.
    """
    check_prompts(prompts)  # here, because the encoder would count among the missing ones only
    if not prompts:
      return self._encoder.encode([])
    missing = list(dict.fromkeys(p for p in prompts if _key(p) not in self._rows))
    if missing:
      fresh = self._encoder.encode(missing, warn=False)
      rows = [jax.tree.map(lambda x, i=i: x[i], fresh) for i in range(len(missing))]
      self._write(missing, rows)
      self._rows |= {_key(prompt): row for prompt, row in zip(missing, rows, strict=True)}
    found = [self._rows[_key(prompt)] for prompt in prompts]
    conditioning = jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    # Here, because whoever uses a prompt is to know, not only who was the first to encode it.
    self._encoder.warn_if_cut(prompts, conditioning.mask)
    return conditioning

  def _read(self, path: pathlib.Path) -> None:
    from array_record.python import array_record_module

    try:
      reader = array_record_module.ArrayRecordReader(str(path))
      records = reader.read_all()
      reader.close()
      self._rows |= {_key(prompt): row for prompt, row in map(_unpack, records)}
    except Exception as error:  # a damaged cache costs time, never a run
      logging.warning(
        'Embedding cache file %s is damaged (%r); its prompts are encoded again.', path, error
      )
      with contextlib.suppress(OSError):  # somebody else's directory, perhaps
        path.unlink()

  def _write(self, prompts: Sequence[str], rows: Sequence[Conditioning]) -> None:
    from array_record.python import array_record_module

    name = hashlib.sha256('\n'.join(prompts).encode()).hexdigest()[:16]
    temporary = self._directory / f'{name}.{os.getpid()}.tmp'
    try:
      writer = array_record_module.ArrayRecordWriter(str(temporary), _GROUP)
      for prompt, row in zip(prompts, rows, strict=True):
        writer.write(_pack(prompt, row))
      writer.close()
      os.replace(temporary, self._directory / f'{name}.array_record')
    except (OSError, RuntimeError, ValueError) as error:
      temporary.unlink(missing_ok=True)
      raise UserError(
        f'The embedding cache {self._directory} cannot be written ({error}): free some space, or '
        'set ERU_JAX_CACHE to another directory.'
      ) from error
