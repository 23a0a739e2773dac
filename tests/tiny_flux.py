"""A tiny random FLUX.1 on disk, in diffusers' layout, for tests that read a published snapshot."""

import importlib.util
import json
import pathlib

import pytest
from oracle import randomise

REASON = 'the package diffsynth is not installed: see launch/requirements-test.txt'


def vocabularies() -> pathlib.Path | None:
  """Where FLUX.1's own tokenisers lie, in the folders tokenizer_1 (CLIP) and tokenizer_2 (T5)."""
  found = importlib.util.find_spec('diffsynth')  # which is not imported: it would ask for much
  if found is None:
    return None
  return pathlib.Path(found.origin).parent / 'tokenizer_configs' / 'flux'


def _write_small_vocabularies(directory: pathlib.Path) -> pathlib.Path:
  """Tokenisers of single characters that mark, pad and number as FLUX.1's do."""
  import tokenizers
  from tokenizers import models, pre_tokenizers, processors

  clip, t5 = directory / 'tokenizer_1', directory / 'tokenizer_2'
  for folder in (clip, t5):
    folder.mkdir(parents=True)
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = [*alphabet, *(f'{c}</w>' for c in alphabet), '<|startoftext|>', '<|endoftext|>']
  (clip / 'vocab.json').write_text(json.dumps({word: i for i, word in enumerate(words)}))
  (clip / 'merges.txt').write_text('#version: 0.2\n')
  settings = {'tokenizer_class': 'CLIPTokenizer', 'model_max_length': 77}
  (clip / 'tokenizer_config.json').write_text(json.dumps(settings))

  pieces = [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0), ('▁', -2.0)]
  pieces += [(chr(code), -3.0) for code in range(ord('!'), ord('~') + 1)]
  pieces += [(f'<extra_id_{i}>', 0.0) for i in reversed(range(100))]
  tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.post_processor = processors.TemplateProcessing(
    single=['$A', '</s>'], pair=['$A', '</s>', '$B', '</s>'], special_tokens=[('</s>', 1)]
  )
  tokenizer.save(str(t5 / 'tokenizer.json'))
  settings = {'tokenizer_class': 'T5Tokenizer', 'model_max_length': 512, 'extra_ids': 100}
  (t5 / 'tokenizer_config.json').write_text(json.dumps(settings))
  return directory


def write_snapshot(directory, *, guidance: bool = True, seed: int = 0):
  """Writes a tiny random FLUX.1 as diffusers stores one; skips the test without diffusers.

  It has FLUX.1's own tokenisers where launch/requirements-test.txt is installed, else such as
  know single characters. Every size differs from those it could be taken for.

  Args:
    directory: where; made if needed. Receives model_index.json, scheduler/, transformer/, vae/,
      text_encoder/, text_encoder_2/, tokenizer/ and tokenizer_2/.
    guidance: whether the backbone is guidance-distilled (FLUX.1-dev), else it is as -schnell.
    seed: of the parameters.

  Returns:
    The diffusers FluxPipeline that was saved, on the CPU in float32.
  """
  pytest.importorskip('torch')
  diffusers = pytest.importorskip('diffusers')
  transformers = pytest.importorskip('transformers')
  directory = pathlib.Path(directory)
  source = vocabularies() or _write_small_vocabularies(directory.parent / f'{directory.name}-text')
  tokenizer = transformers.CLIPTokenizer.from_pretrained(source / 'tokenizer_1')
  tokenizer_2 = transformers.T5TokenizerFast.from_pretrained(source / 'tokenizer_2')
  clip = transformers.CLIPTextConfig(
    vocab_size=len(tokenizer),
    hidden_size=24,
    intermediate_size=40,
    projection_dim=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=77,
    hidden_act='quick_gelu',
    # Those of FLUX.1, none of which is what the tokeniser says.
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
  )
  t5 = transformers.T5Config(
    vocab_size=len(tokenizer_2) + 28,  # FLUX.1's has 32,128 rows for 32,100 tokens
    d_model=32,
    d_kv=8,
    d_ff=56,
    num_layers=2,
    num_heads=3,
    feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
  )
  transformer = diffusers.FluxTransformer2DModel(
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=t5.d_model,
    pooled_projection_dim=clip.hidden_size,
    guidance_embeds=guidance,
    axes_dims_rope=(4, 6, 6),
  )
  levels = 4
  vae = diffusers.AutoencoderKL(
    block_out_channels=(4, 4, 8, 8),
    down_block_types=('DownEncoderBlock2D',) * levels,
    up_block_types=('UpDecoderBlock2D',) * levels,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
    sample_size=32,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
  )
  text_encoder_2 = randomise(transformers.T5EncoderModel(t5), seed + 2)
  for block in text_encoder_2.encoder.block:
    # T5 scales its queries instead of its logits; otherwise rounding is all that tests would see.
    block.layer[0].SelfAttention.q.weight.data *= t5.d_kv**-0.5
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
    shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance
  )
  pipeline = diffusers.FluxPipeline(
    scheduler=scheduler,
    vae=randomise(vae, seed),
    text_encoder=randomise(transformers.CLIPTextModel(clip), seed + 1),
    tokenizer=tokenizer,
    text_encoder_2=text_encoder_2,
    tokenizer_2=tokenizer_2,
    transformer=randomise(transformer, seed + 3),
  )
  pipeline.set_progress_bar_config(disable=True)
  pipeline.save_pretrained(directory)
  return pipeline
