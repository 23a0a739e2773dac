"""CLIP as a reward: how well a picture answers its prompt, for any text-to-image model.

Two published scores of one model, the cosine between the features of picture and prompt:

  clip_score   100 max(cos, 0)          Hessel et al., CLIPScore (arXiv:2104.08718), as
                                        torchmetrics reports it; the paper's own is 2.5 max(cos, 0)
  sci_score    exp(logit_scale) cos     Li et al., Science-T2I (arXiv:2504.13129); its CLIP is
                                        ViT-H/14 trained further, so that implicit prompts are
                                        understood

The text is the implicit prompt, whatever prompt the picture was drawn of. Prompts are encoded once,
ahead of training; pictures are prepared and encoded in the compiled step.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from eru_jax import sharding
from eru_jax.data.text_encoder import check_prompts
from eru_jax.errors import UserError
from eru_jax.models.clip import ClipTextConfig, ClipTextModel
from eru_jax.models.clip_vision import ClipConfig, ClipVisionModel
from eru_jax.rewards.image_processing import ImageProcessor
from eru_jax.weights import clip_model as weights
from eru_jax.weights.snapshot import read_json

PyTree = Any

_CONFIG, _WEIGHTS = 'config.json', 'model.safetensors'
# Of the image processor; the second is transformers 5's, where it is a part.
_PROCESSORS = ('preprocessor_config.json', 'processor_config.json')
# Of the tokeniser, in either layout.
_VOCABULARY = (('tokenizer.json',), ('vocab.json', 'merges.txt'))
# One compiled program serves every call; a last batch is padded to this size.
_BATCH = 64
# Characters of an over-long prompt that the warning about it quotes.
_QUOTED = 200


def clip_score(cosine: jax.Array, logit_scale: jax.Array) -> jax.Array:
  """100 max(cos, 0), from 0 to 100."""
  del logit_scale
  return 100 * jnp.maximum(cosine, 0)


def sci_score(cosine: jax.Array, logit_scale: jax.Array) -> jax.Array:
  """exp(logit_scale) cos; CLIP learns a scale of about ln 100."""
  return jnp.exp(logit_scale) * cosine


SCORES = {'clip_score': clip_score, 'sci_score': sci_score}


def _unit(features: jax.Array) -> jax.Array:
  """Scales (B, D) to length 1, in float32."""
  features = features.astype(jnp.float32)
  return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def _encode(config: ClipConfig, params: PyTree, ids: jax.Array) -> jax.Array:
  _, pooled = ClipTextModel(config.text).apply({'params': params['text_model']}, ids)
  return _unit(pooled @ params['text_projection']['kernel'])


@dataclasses.dataclass(frozen=True, eq=False)
class ClipReward:
  """A frozen CLIP that scores pictures. Build it with `load_clip_reward`.

  Attributes:
    kind: 'clip_score' or 'sci_score'.
    config: architecture of both towers.
    processor: what happens to pictures before the model sees them.
    tokenizer: transformers' CLIPTokenizer.
    params: what `score` reads, numpy arrays: `vision_model` and `logit_scale`.
    text_params: what `text_features` reads, float32: `text_model` and `text_projection`.
    dtype: dtype of the vision tower's parameters and computation.
  """

  kind: str
  config: ClipConfig
  processor: ImageProcessor
  tokenizer: Any
  params: PyTree
  text_params: PyTree
  dtype: Any

  def shardings(self, mesh: Mesh) -> PyTree:
    """How `params` lie over a mesh.

    Raises:
      UserError: if the mesh does not divide a parameter.
    """
    boxed = weights.boxed_vision(self.config)
    return {
      'vision_model': sharding.logical_shardings(boxed, mesh),
      'logit_scale': sharding.replicated(mesh),
    }

  def score(self, params: PyTree, images: jax.Array, text_features: jax.Array) -> jax.Array:
    """Scores pictures; pure, differentiable in the pictures.

    Args:
      params: as the attribute.
      images: (B, H, W, 3) in [0, 1].
      text_features: (B, D) of length 1, those of each picture's prompt.

    Returns:
      (B,) float32.
    """
    model = ClipVisionModel(self.config.vision, self.dtype)
    features = _unit(model.apply({'params': params['vision_model']}, self.processor(images)))
    cosine = jnp.sum(features * text_features, axis=-1)
    return SCORES[self.kind](cosine, params['logit_scale'].astype(jnp.float32))

  def text_features(self, prompts: Sequence[str]) -> np.ndarray:
    """Encodes prompts, in float32; those that are too long lose their end, with one warning.

    Args:
      prompts: N texts.

    Returns:
      (N, D) float32 of length 1.

    Raises:
      UserError: if a prompt is empty or blank, naming its index.
    """
    ids = self.tokenize(prompts)
    found = np.zeros((len(ids), self.config.vision.projection_dim), np.float32)
    params = jax.device_put(self.text_params)
    for start in range(0, len(ids), _BATCH):
      part = ids[start : start + _BATCH]
      padded = np.resize(part, (_BATCH, ids.shape[1]))
      # Accelerators would otherwise round float32 products.
      with jax.default_matmul_precision('highest'):
        found[start : start + len(part)] = _encode(self.config, params, padded)[: len(part)]
    return found

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """Token ids (N, L) int32, padded behind the end of text to the longest that the model reads."""
    check_prompts(prompts)
    length = self.config.text.max_position_embeddings
    ids, cut = np.zeros((len(prompts), length), np.int32), []
    for index, prompt in enumerate(prompts):
      row = self.tokenizer(prompt, padding='max_length', truncation=True, max_length=length)
      ids[index] = row['input_ids']
      full = all(row['attention_mask'])
      # Quiet, as its own warning is about a model that would be given all of them.
      if full and len(self.tokenizer(prompt, verbose=False)['input_ids']) > length:
        cut.append(prompt)
    if cut:
      logging.warning(
        'CLIP reads %d tokens: %d of %d prompts are longer and lose their end; the first is %r.',
        length,
        len(cut),
        len(prompts),
        cut[0][:_QUOTED],
      )
    return ids


def load_clip_reward(
  directory: str | os.PathLike, kind: str = 'sci_score', dtype: Any = jnp.float32
) -> ClipReward:
  """Loads a CLIPModel in the Hugging Face layout.

  Args:
    directory: holds config.json, model.safetensors (or the index of its shards), the tokeniser and
      preprocessor_config.json.
    kind: 'clip_score' or 'sci_score'.
    dtype: dtype of the vision tower's parameters and computation.

  Raises:
    UserError: if there is no such score, or a file is missing, damaged or of another model.
  """
  if kind not in SCORES:
    raise UserError(f'Unknown score {kind!r}: choose one of {list(SCORES)}.')
  config, processor, tokenizer = read_clip_directory(directory)
  stored = weights.load(pathlib.Path(directory) / _WEIGHTS, config)

  def cast(names: Sequence[str], to: Any) -> PyTree:
    return jax.tree.map(lambda x: np.asarray(x, to), {name: stored.pop(name) for name in names})

  return ClipReward(
    kind,
    config,
    processor,
    tokenizer,
    # The scale is the score's, not the tower's: it keeps its digits.
    cast(['vision_model'], dtype) | cast(['logit_scale'], jnp.float32),
    cast(['text_model', 'text_projection'], jnp.float32),
    dtype,
  )


def describe_clip_reward(
  directory: str | os.PathLike, kind: str = 'sci_score', dtype: Any = jnp.float32
) -> ClipReward:
  """`load_clip_reward` with ShapeDtypeStructs for parameters and without tokeniser.

  Without such a directory it is SciScore's, OpenCLIP's ViT-H/14.
  """
  root = pathlib.Path(directory)
  config, processor = ClipConfig(ClipTextConfig()), ImageProcessor()
  if root.is_dir():
    config, processor, _ = read_clip_directory(root)
  shapes = weights.shapes(config)
  cast = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, dtype))
  params = {'vision_model': cast(shapes['vision_model']), 'logit_scale': shapes['logit_scale']}
  text = {name: shapes[name] for name in ('text_model', 'text_projection')}
  return ClipReward(kind, config, processor, None, params, text, dtype)


def read_clip_directory(directory: str | os.PathLike) -> tuple[ClipConfig, ImageProcessor, Any]:
  """Architecture, image processor and tokeniser of a CLIPModel; its weights are only looked for.

  Raises:
    UserError: as `load_clip_reward`.
  """
  root = pathlib.Path(directory)
  if not root.is_dir():
    raise UserError(
      f'There is no CLIP directory {root}: download one in the Hugging Face layout (docs/'
      'rewards.md says what is in it).'
    )
  present = {path.name for path in root.iterdir()}
  missing = [] if _CONFIG in present else [_CONFIG]
  if not present & {_WEIGHTS, f'{_WEIGHTS}.index.json'}:
    missing.append(_WEIGHTS)
  if not present & set(_PROCESSORS):
    missing.append(_PROCESSORS[0])
  if not any(present.issuperset(names) for names in _VOCABULARY):
    missing.append(' or '.join(' and '.join(names) for names in _VOCABULARY))
  if missing:
    raise UserError(
      f'The CLIP directory {root} lacks {", ".join(missing)}: give one in the Hugging Face layout.'
    )
  config = _read(root / _CONFIG, ClipConfig.from_dict)
  name = next(name for name in _PROCESSORS if name in present)
  processor = _read(root / name, _image_processor)
  if processor.crop_size != config.vision.image_size:
    raise UserError(
      f'{root / name} cuts pictures to {processor.crop_size} pixels, but the model sees '
      f'{config.vision.image_size}: take both files from the same model.'
    )
  return config, processor, _load_tokenizer(root, config)


def _read(path: pathlib.Path, parse: Callable[[dict[str, Any]], Any]) -> Any:
  """Parses a JSON object; errors name its file."""
  values = read_json(path)
  try:
    return parse(values)
  except UserError as error:
    raise error.at(path) from error


def _image_processor(values: dict[str, Any]) -> ImageProcessor:
  part = values.get('image_processor', values)
  if not isinstance(part, dict):
    raise UserError(f'image_processor is {part!r}, but must be a JSON object: copy the file again.')
  return ImageProcessor.from_dict(part)


def _load_tokenizer(root: pathlib.Path, config: ClipConfig) -> Any:
  import transformers  # here, because commands must print their help quickly

  try:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(root, local_files_only=True)
    needed = max(tokenizer.get_vocab().values()) + 1
  except Exception as error:  # whatever a damaged file makes of the library
    reason = str(error).strip().partition('\n')[0]
    raise UserError(
      f'{root} holds no readable CLIP tokeniser ({reason}): copy its files again.'
    ) from error
  if needed > config.text.vocab_size:
    raise UserError(
      f'The tokeniser in {root} numbers its tokens up to {needed - 1}, but the model has '
      f'{config.text.vocab_size}: take both from the same model.'
    )
  return tokenizer
