"""A tiny random FLUX.1 and CLIP on disk, file for file like published ones, made without PyTorch.

`:runlocal` configs and tests walk the code of the 12 B model on it: backbone, autoencoder, both
text encoders and their tokenisers, scheduler. Its pictures mean nothing.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from eru_jax.files import replace_file
from eru_jax.models import autoencoder_kl, clip, clip_vision, flux, registry, t5
from eru_jax.weights import autoencoder_kl as autoencoder_table
from eru_jax.weights import clip as clip_table
from eru_jax.weights import clip_model as clip_model_table
from eru_jax.weights import flux as flux_table
from eru_jax.weights import layouts, snapshot, table
from eru_jax.weights import t5 as t5_table
from eru_jax.weights.safetensors_io import write_safetensors

PyTree = Any
_MARKS = ('<|startoftext|>', '<|endoftext|>')

_CLIP = clip.ClipTextConfig(
  vocab_size=514,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=3,
)
_T5 = t5.T5Config(vocab_size=228, d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=3)
_AUTOENCODER = {
  'in_channels': 3,
  'out_channels': 3,
  'block_out_channels': [4, 4, 8, 8],
  'layers_per_block': 1,
  'latent_channels': 4,
  'norm_num_groups': 2,
  'scaling_factor': 0.3611,
  'shift_factor': 0.1159,
  'use_quant_conv': False,
  'use_post_quant_conv': False,
}
_INDEX = {
  '_class_name': 'FluxPipeline',
  'scheduler': ['diffusers', 'FlowMatchEulerDiscreteScheduler'],
  'text_encoder': ['transformers', 'CLIPTextModel'],
  'text_encoder_2': ['transformers', 'T5EncoderModel'],
  'tokenizer': ['transformers', 'CLIPTokenizer'],
  'tokenizer_2': ['transformers', 'T5TokenizerFast'],
  'transformer': ['diffusers', 'FluxTransformer2DModel'],
  'vae': ['diffusers', 'AutoencoderKL'],
}


_CLIP_MODEL = {
  'model_type': 'clip',
  'architectures': ['CLIPModel'],
  'projection_dim': 20,
  'text_config': dataclasses.asdict(_CLIP) | {'hidden_act': 'gelu', 'eos_token_id': 513},
  'vision_config': {
    'hidden_size': 32,
    'intermediate_size': 56,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'patch_size': 7,
    'image_size': 28,
    'hidden_act': 'gelu',
  },
}


def write_tiny_flux(directory: str | os.PathLike, guidance: bool = True, seed: int = 0) -> None:
  """Writes the snapshot; it appears whole or not at all, and an older one is kept.

  Args:
    directory: where; made if needed.
    guidance: whether the backbone is guidance-distilled, as FLUX.1-dev, or as -schnell.
    seed: of the parameters.

  Raises:
    UserError: if a file cannot be written.
  """
  directory = pathlib.Path(directory)
  if snapshot.is_snapshot(directory):
    return
  temporary = _beside(directory)
  rng = np.random.default_rng(seed)
  architecture = flux.FluxConfig.from_dict(
    registry.family('flux').tiny
    | {
      'num_single_layers': 2,
      'joint_attention_dim': _T5.d_model,
      'pooled_projection_dim': _CLIP.hidden_size,
      'guidance_embeds': guidance,
    }
  )
  autoencoder = autoencoder_kl.AutoencoderConfig.from_dict(_AUTOENCODER)
  shapes = layouts.backbone(registry.family('flux')).shapes(architecture)
  rows, counts = flux_table.rows(architecture), flux_table.counts(architecture)
  _write(temporary / 'transformer', shapes, rows, counts, architecture.to_dict(), rng)
  _write(
    temporary / 'vae',
    layouts.AUTOENCODER.shapes(autoencoder),
    autoencoder_table.rows(autoencoder),
    autoencoder_table.counts(autoencoder),
    autoencoder.to_dict(),
    rng,
  )
  _write_encoders(temporary, rng)
  _write_clip_tokenizer(temporary / 'tokenizer')
  _write_t5_tokenizer(temporary / 'tokenizer_2')
  scheduler = {
    '_class_name': 'FlowMatchEulerDiscreteScheduler',
    'use_dynamic_shifting': guidance,
    'shift': 3.0 if guidance else 1.0,
    'base_shift': 0.5,
    'max_shift': 1.15,
    'base_image_seq_len': 256,
    'max_image_seq_len': 4096,
    'num_train_timesteps': 1000,
  }
  _write_json(temporary / 'scheduler' / 'scheduler_config.json', scheduler)
  _write_json(temporary / snapshot.INDEX, _INDEX)
  _move(temporary, directory)


def write_tiny_clip(directory: str | os.PathLike, seed: int = 0) -> None:
  """Writes a CLIPModel with tokeniser and image processor, as `write_tiny_flux`."""
  directory = pathlib.Path(directory)
  if (directory / 'config.json').is_file():
    return
  temporary, rng = _beside(directory), np.random.default_rng(seed)
  config = clip_vision.ClipConfig.from_dict(_CLIP_MODEL)
  params = _random(rng, clip_model_table.shapes(config))
  # A temperature; of random parameters it would be none.
  params['logit_scale'] = np.full_like(params['logit_scale'], 4.6)
  tensors = table.to_torch(params, clip_model_table.rows(config), clip_model_table.counts(config))
  write_safetensors(temporary / 'model.safetensors', tensors, {'format': 'pt'})
  edge = config.vision.image_size
  processor = {
    'image_processor_type': 'CLIPImageProcessor',
    'size': {'shortest_edge': edge},
    'crop_size': {'height': edge, 'width': edge},
  }
  _write_json(temporary / 'preprocessor_config.json', processor)
  _write_clip_tokenizer(temporary)
  _write_json(temporary / 'config.json', _CLIP_MODEL)
  _move(temporary, directory)


def _beside(directory: pathlib.Path) -> pathlib.Path:
  return directory.with_name(f'{directory.name}.{os.getpid()}.tmp')


def _move(temporary: pathlib.Path, directory: pathlib.Path) -> None:
  try:
    os.rename(temporary, directory)
  except OSError:
    # Another process was faster, or there is a directory without a model.
    shutil.copytree(temporary, directory, dirs_exist_ok=True)
    shutil.rmtree(temporary)


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  replace_file(path, (json.dumps(values, indent=2) + '\n').encode())


def _random(rng: np.random.Generator, shapes: PyTree) -> PyTree:
  """Values that would betray a swapped tensor; layers that start at zero would leave out much."""

  def draw(path: Sequence[Any], shape: jax.ShapeDtypeStruct) -> np.ndarray:
    values = np.asarray(rng.standard_normal(shape.shape), np.float32)
    name = path[-1].key
    if name == 'scale':
      return 1 + 0.2 * values
    if name == 'bias':
      return 0.2 * values
    fan_in = shape.shape[-1] if name == 'embedding' else np.prod(shape.shape[-4:-1])
    if name == 'kernel' and len(shape.shape) == 3:  # a stack of matrices
      fan_in = shape.shape[-2]
    return values * np.float32(fan_in) ** -0.5

  return jax.tree_util.tree_map_with_path(draw, shapes)


def _write(
  directory: pathlib.Path,
  shapes: PyTree,
  rows: Sequence[table.Row],
  counts: Mapping[str, int],
  config: Mapping[str, Any],
  rng: np.random.Generator,
  name: str = 'diffusion_pytorch_model.safetensors',
) -> None:
  tensors = table.to_torch(_random(rng, shapes), rows, counts)
  write_safetensors(directory / name, tensors, {'format': 'pt'})
  _write_json(directory / 'config.json', config)


def _write_encoders(directory: pathlib.Path, rng: np.random.Generator) -> None:
  parts = (
    ('text_encoder', clip_table, _CLIP, 'clip_text_model', 'CLIPTextModel'),
    ('text_encoder_2', t5_table, _T5, 't5', 'T5EncoderModel'),
  )
  for name, module, config, model_type, architecture in parts:
    values = dataclasses.asdict(config)
    values |= {'model_type': model_type, 'architectures': [architecture]}
    _write(
      directory / name,
      module.shapes(config),
      module.rows(config),
      module.counts(config),
      values,
      rng,
      'model.safetensors',
    )


def _write_clip_tokenizer(directory: pathlib.Path) -> None:
  """Byte pairs without merges: every byte is a token, and the marks are where FLUX.1 has them."""
  from tokenizers import pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = [*alphabet, *(f'{letter}</w>' for letter in alphabet), *_MARKS]
  _write_json(directory / 'vocab.json', {word: index for index, word in enumerate(words)})
  replace_file(directory / 'merges.txt', b'#version: 0.2\n')
  settings = {'tokenizer_class': 'CLIPTokenizer', 'model_max_length': 77}
  _write_json(directory / 'tokenizer_config.json', settings)


def _write_t5_tokenizer(directory: pathlib.Path) -> None:
  """Single ASCII characters; the special tokens are numbered as FLUX.1's."""
  import tokenizers
  from tokenizers import models, pre_tokenizers, processors

  pieces = [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0), ('▁', -2.0)]
  pieces += [(chr(code), -3.0) for code in range(ord('!'), ord('~') + 1)]
  pieces += [(f'<extra_id_{i}>', 0.0) for i in reversed(range(100))]
  tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.post_processor = processors.TemplateProcessing(
    single=['$A', '</s>'], pair=['$A', '</s>', '$B', '</s>'], special_tokens=[('</s>', 1)]
  )
  replace_file(directory / 'tokenizer.json', tokenizer.to_str().encode())
  settings = {'tokenizer_class': 'T5Tokenizer', 'model_max_length': 512, 'extra_ids': 100}
  _write_json(directory / 'tokenizer_config.json', settings)
