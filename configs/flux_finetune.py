"""Supervised fine-tuning of FLUX.1 on pictures and captions, the baseline of DK-DM.

    python -m eru_jax.train --config=configs/flux_finetune.py --workdir=runs/flux_finetune \\
      --config.model.source=FLUX.1-dev --config.data.pairs=pictures.jsonl

Each line of `data.pairs` has `implicit` (the caption, or the implicit prompt), `explicit` (the
same, or its anchor) and `image`, a path that begins where the file lies. Arguments, joined by
commas: `res=512`, `full`, `int8`, `runlocal`, as in flux_dev_dk_dm.py. Latents are computed once
and kept in the cache.
"""

import ml_collections

from eru_jax.config_file import options

# Attention and feed-forward layers of the blocks; what lies outside of blocks, diffusers' reader of
# ComfyUI's adapters drops.
_LAYERS = 'transformer_blocks/.*(attn|ff|proj)'


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Arguments: see above."""
  given = options(arg, ('full', 'int8', 'runlocal'), {'res': None}, contrary=[('full', 'int8')])
  rank = 16 if given['int8'] else 64
  config = ml_collections.ConfigDict()
  config.title = 'Fine-tuning of FLUX.1'
  config.stages = ('flow_matching',)
  config.model = dict(
    source='FLUX.1-dev',
    resolution=given['res'] or 512,
    dtype='bfloat16',
    params='float32' if given['full'] else 'int8' if given['int8'] else 'bfloat16',
    remat='full',
  )
  config.lora = () if given['full'] else (dict(pattern=_LAYERS, rank=rank, alpha=2.0 * rank),)
  config.mesh = dict(data=1, fsdp=-1)
  config.data = dict(world='prompts', pairs='pictures.jsonl')
  # 28 steps at guidance 3.5 for -dev, 4 steps for -schnell.
  steps = 4 if given['runlocal'] else 'own'
  config.sampling = dict(num_steps=steps, guidance='own', shift_mu='own')
  config.evaluation = dict(
    max_prompts=32, batch_size=1 if given['int8'] else 4, gallery=8, diagnosis=0
  )
  config.flow_matching = dict(
    num_steps=2000,
    batch_size=32,
    # A picture at a time on every device: docs/plan.md says what fits.
    per_device=1,
    text_noise=0.0,
    pooled_only=0.0,
    tokens_only=0.0,
    drop_text=0.0,
    save_every=100,
    optimizer=dict(
      learning_rate=1e-5 if given['full'] else 1e-4,
      b2=0.99,
      weight_decay=1e-4,
      warmup_steps=50,
      ema_decay=0.99,
    ),
  )
  if given['runlocal']:
    _shrink(config, given['res'])
  return config


def _shrink(config: ml_collections.ConfigDict, resolution: int | None) -> None:
  """The same experiment on a tiny random model."""
  config.model.update(source='tiny_flux', resolution=resolution or 64, dtype='float32')
  if config.model.params == 'bfloat16':
    config.model.params = 'float32'
  config.data.pairs = 'sample'
  config.evaluation.update(max_prompts=4, gallery=2)
  config.flow_matching.update(num_steps=4, batch_size=4, per_device=0, log_every=1)
  config.flow_matching.optimizer.warmup_steps = 1
