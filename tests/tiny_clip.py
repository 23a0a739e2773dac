"""A tiny random CLIPModel on disk, in the Hugging Face layout, for tests that score pictures."""

import json
import pathlib

import pytest
from oracle import randomise
from tiny_flux import vocabularies

SIZES = dict(
  text=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3),
  vision=dict(
    hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, patch_size=7,
    image_size=28,
  ),
)  # fmt: skip
PROJECTION = 20


def image_processor(**changed):
  """transformers' CLIP image processor that works with Pillow, under its name of any version."""
  transformers = pytest.importorskip('transformers')
  name = 'CLIPImageProcessorPil'
  processor = getattr(transformers, name, None) or transformers.CLIPImageProcessor
  return processor(**changed)


def _write_tokenizer(directory: pathlib.Path) -> None:
  """A tokeniser of single characters that marks, pads and numbers as CLIP's does."""
  from tokenizers import pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = [*alphabet, *(f'{c}</w>' for c in alphabet), '<|startoftext|>', '<|endoftext|>']
  (directory / 'vocab.json').write_text(json.dumps({word: i for i, word in enumerate(words)}))
  (directory / 'merges.txt').write_text('#version: 0.2\n')
  settings = {'tokenizer_class': 'CLIPTokenizer', 'model_max_length': 77}
  (directory / 'tokenizer_config.json').write_text(json.dumps(settings))


def write_clip(directory, seed: int = 0, **changed):
  """Writes a tiny random CLIPModel with tokeniser and image processor; skips without torch.

  The vocabulary is CLIP's own where launch/requirements-test.txt is installed, else single
  characters.

  Args:
    directory: where; made if needed.
    seed: of the parameters.
    **changed: settings of both towers.

  Returns:
    (the transformers CLIPModel, its tokeniser, its image processor).
  """
  pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  source = vocabularies()
  if source is None:
    _write_tokenizer(directory)
  tokenizer = transformers.CLIPTokenizer.from_pretrained(
    directory if source is None else source / 'tokenizer_1'
  )
  tokenizer.save_pretrained(directory)
  ends = dict(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
  text = dict(vocab_size=len(tokenizer), max_position_embeddings=77, **ends)
  config = transformers.CLIPConfig(
    text_config={**SIZES['text'], **text, 'hidden_act': 'gelu', **changed},
    vision_config={**SIZES['vision'], 'hidden_act': 'gelu', **changed},
    projection_dim=PROJECTION,
    logit_scale_init_value=4.6,
  )
  model = transformers.CLIPModel(config)
  scale = float(model.logit_scale.detach())
  model = randomise(model, seed)
  model.logit_scale.data.fill_(scale)  # of random parameters it would be no scale
  model.save_pretrained(directory)
  edge = SIZES['vision']['image_size']
  processor = image_processor(
    size={'shortest_edge': edge}, crop_size={'height': edge, 'width': edge}
  )
  processor.save_pretrained(directory)
  return model, tokenizer, processor
