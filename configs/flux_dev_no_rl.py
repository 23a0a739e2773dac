"""NO-RL on FLUX.1-dev: after DK-DM, unlearn what the reward says is wrong.

    python -m eru_jax.train --config=configs/flux_dev_no_rl.py --workdir=runs/flux_no_rl \\
      --config.model.source=FLUX.1-dev --config.data.pairs=pairs.jsonl \\
      --config.adapter=runs/flux_dk_dm/adapters/dk_dm.safetensors \\
      --config.no_rl.reward_model=sciscore

`model.source` and `data.pairs` as in flux_dev_dk_dm.py. `adapter` is what DK-DM left behind (any
LoRA file in the form of diffusers or kohya will do); '' begins at the base, which is not advised:
bad pictures alone do not tell where the good ones are (docs/benchmarks.md). `no_rl.reward_model` is
a directory with SciScore's weights, or with those of any CLIP for `no_rl.reward='clip_score'`.
Arguments: `res=512`, `full`, `int8`, `runlocal`, as there. `full` takes no adapter: what DK-DM left
behind is then a whole model, --config.model.source=runs/flux_dk_dm/model.

What to expect is not known, as there. Set reward_low and reward_high to what your pictures score
when they are wrong and when they are right.
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
  config.title = 'NO-RL on FLUX.1-dev'
  config.stages = ('no_rl',)
  config.adapter = '' if given['full'] else 'runs/flux_dk_dm/adapters/dk_dm.safetensors'
  config.model = dict(
    source='FLUX.1-dev',
    resolution=given['res'] or 512,
    dtype='bfloat16',
    params='float32' if given['full'] else 'int8' if given['int8'] else 'bfloat16',
    remat='full',
  )
  config.lora = () if given['full'] else (dict(pattern=_LAYERS, rank=rank, alpha=2.0 * rank),)
  config.mesh = dict(data=1, fsdp=-1)
  config.data = dict(world='prompts', pairs='pairs.jsonl')
  # 28 steps at guidance 3.5 for -dev, 4 steps for -schnell.
  steps = 4 if given['runlocal'] else 'own'
  config.sampling = dict(num_steps=steps, guidance='own', shift_mu='own')
  config.evaluation = dict(
    max_prompts=32, batch_size=1 if given['int8'] else 4, gallery=8, diagnosis=0
  )
  config.no_rl = dict(
    num_steps=120,
    reward='sci_score',
    reward_model='sciscore',
    # FLUX.1-dev's means under superficial and explicit prompts (Science-T2I, arXiv 2504.13129).
    reward_low=17.7,
    reward_high=32.9,
    # Laws of which SciScore tells right from wrong in 42 to 81 % of cases only (same paper).
    doubtful=('absorption', 'buoyancy', 'immiscibility'),
    prompts_per_step=32,
    images_per_prompt=16,
    rollout_steps=8,
    updates_per_step=2,
    timesteps_per_image=2,
    # A picture at a time on every device: docs/plan.md says what fits.
    per_device=1,
    explicit_share=0.25,
    time_min=0.3,
    # Iterations take minutes.
    save_every=10 if given['full'] else 2,
    log_every=1,
    optimizer=dict(
      learning_rate=1e-5 if given['full'] else 1e-4, b2=0.99, weight_decay=1e-4, ema_decay=0.9
    ),
  )
  if given['runlocal']:
    _shrink(config, given['res'])
  return config


def _shrink(config: ml_collections.ConfigDict, resolution: int | None) -> None:
  """The same experiment on a tiny random model."""
  config.adapter = ''
  config.model.update(source='tiny_flux', resolution=resolution or 64, dtype='float32')
  if config.model.params == 'bfloat16':
    config.model.params = 'float32'
  config.data.pairs = 'sample'
  config.evaluation.update(max_prompts=4, gallery=2)
  config.no_rl.update(
    num_steps=2,
    reward='clip_score',
    reward_model='tiny_clip',
    reward_low=0.0,
    reward_high=100.0,
    prompts_per_step=4,
    images_per_prompt=2,
    rollout_steps=2,
    per_device=0,
  )
