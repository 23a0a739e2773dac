"""DK-DM on FLUX.1-dev: implicit prompts learn to draw what their explicit anchors draw.

    python -m eru_jax.train --config=configs/flux_dev_dk_dm.py --workdir=runs/flux_dk_dm \\
      --config.model.source=FLUX.1-dev --config.data.pairs=pairs.jsonl

`model.source` is a snapshot in diffusers' layout, `data.pairs` a JSON Lines file of knowledge
pairs, `data.others` a text file of ordinary prompts, one a line, that must stay as they are.
Arguments, joined by commas (`configs/flux_dev_dk_dm.py:full,res=1024`):

    res=512     edge of the pictures in pixels; of runlocal, 64
    full        trains the whole backbone instead of adapters of rank 64
    int8        keeps the frozen backbone in int8, with adapters of rank 16 and a quarter of the
                batch, for one accelerator of 16 GB
    runlocal    a tiny random FLUX.1 and the package's sample of pairs: the same code, on a laptop

What to expect is not known: FLUX.1's weights could not be had where this was written. All that
leads up to them is tested (docs/flux.md). The settings are those of published adapters of FLUX.1,
and what the emoji world taught (docs/benchmarks.md).
"""

import ml_collections

from eru_jax.config_file import options

# Attention and feed-forward layers of the blocks; what lies outside of blocks, diffusers' reader of
# ComfyUI's adapters drops.
_LAYERS = 'transformer_blocks/.*(attn|ff|proj)'


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Arguments: see above."""
  given = options(arg, ('full', 'int8', 'runlocal'), {'res': None}, contrary=[('full', 'int8')])
  # All that training adds to a base in int8 has to fit beside it.
  rank, batch = (16, 8) if given['int8'] else (64, 32)
  config = ml_collections.ConfigDict()
  config.title = 'DK-DM on FLUX.1-dev'
  config.stages = ('dk_dm',)
  config.model = dict(
    source='FLUX.1-dev',
    resolution=given['res'] or 512,
    dtype='bfloat16',
    params='float32' if given['full'] else 'int8' if given['int8'] else 'bfloat16',
    remat='full',
  )
  config.lora = () if given['full'] else (dict(pattern=_LAYERS, rank=rank, alpha=2.0 * rank),)
  config.mesh = dict(data=1, fsdp=-1)
  config.data = dict(world='prompts', pairs='pairs.jsonl', others='')
  # 28 steps at guidance 3.5 for -dev, 4 steps for -schnell.
  steps = 4 if given['runlocal'] else 'own'
  config.sampling = dict(num_steps=steps, guidance='own', shift_mu='own')
  config.evaluation = dict(
    max_prompts=32, batch_size=1 if given['int8'] else 4, gallery=8, diagnosis=0
  )
  config.dk_dm = dict(
    num_steps=2000,
    teacher_batch=batch,
    rollouts=batch // 4,
    rollout_steps=8,
    states_per_rollout=4,
    mixture=0.1,
    preservation_batch=batch,
    preservation_weight=1.0,
    # A state of each kind at a time on every device: docs/plan.md says what fits.
    per_device=1,
    in_turn=given['int8'],
    teacher_seeds=2,
    # Noise and masks on the text are for encoders of sentences; T5's states are taken as they are.
    text_noise=0.0,
    pooled_only=0.0,
    # The text decides where the noise is strong.
    time_mean=0.8,
    # Iterations take from half a minute to minutes: what a lost machine costs is to stay small.
    save_every=100 if given['full'] else 20,
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
  config.data.update(pairs='sample')
  config.evaluation.update(max_prompts=4, gallery=2)
  config.dk_dm.update(
    num_steps=4,
    teacher_batch=4,
    rollouts=4,
    rollout_steps=2,
    states_per_rollout=2,
    preservation_batch=4,
    teacher_seeds=1,
    per_device=0,
    log_every=1,
  )
  config.dk_dm.optimizer.warmup_steps = 1
