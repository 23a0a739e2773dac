"""EruDiff on the embedded emoji world: DK-DM, NO-RL, report.

    python -m eru_jax.train --config=configs/emoji.py --workdir=runs/emoji

About six minutes on 2 CPU cores; what to expect of it is in docs/benchmarks.md.
`configs/emoji.py:lora` trains adapters instead of the whole backbone, the way FLUX.1 is fine-tuned;
nothing in it was tuned, and it needs more steps than these.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """`arg`: '' trains the whole backbone, 'lora' adapters of rank 32 on every linear layer."""
  if arg not in ('', 'lora'):
    raise ValueError(f"configs/emoji.py knows the argument 'lora', not {arg!r}")
  config = ml_collections.ConfigDict()
  config.title = 'EruDiff on the emoji world'
  config.seed = 0
  config.stages = ('dk_dm', 'no_rl')
  config.lora = ()
  config.wandb_project = ''
  # Unrolled blocks compile longer and step faster on a CPU.
  config.model = dict(source='emoji_base', scan=False)
  # As many facts as a few minutes on two cores suffice to learn; 0 takes all 416.
  config.data = dict(pairs='emoji_knowledge', wordings_per_fact=12, max_facts=128)
  # Guidance makes up its mind between two facts whose blend the model would otherwise draw.
  config.sampling = dict(num_steps=8, cfg_scale=3.0)
  config.evaluation = dict(max_prompts=128, gallery=12)
  config.dk_dm = dict(
    num_steps=200,
    teacher_batch=64,
    # Microbatches that stay in the cache are a fifth faster.
    accumulation=4,
    # Few rollouts: while a picture is wrong, the teacher cannot mend its late states.
    rollouts=4,
    rollout_steps=4,
    states_per_rollout=1,
    mixture=0.1,
    preservation_batch=16,
    preservation_weight=1.8,
    preserved_names=320,
    # Twelve wordings mark out a fact's neighbourhood themselves; more noise only slows learning.
    text_noise=0.15,
    pooled_only=0.0,
    teacher_seeds=1,
    # The text decides where the noise is strong.
    time_mean=1.6,
    save_every=70,
    optimizer=dict(
      algorithm='muon',
      learning_rate=3e-3,
      newton_schulz_steps=4,
      warmup_steps=20,
      decay='cosine',
      ema_decay=0.98,
    ),
  )
  config.no_rl = dict(
    num_steps=16,
    prompts_per_step=8,
    images_per_prompt=4,
    explicit_share=0.25,
    # Most right pictures score above half of this and most wrong ones below (docs/benchmarks.md).
    reward_high=0.1,
    save_every=8,
    log_every=1,
    optimizer=dict(learning_rate=5e-5, ema_decay=0.9),
  )
  if arg == 'lora':
    config.lora = (dict(pattern='.*', rank=32, alpha=64.0),)
  return config
