"""EruDiff on the embedded emoji world: DK-DM, then NO-RL, then a report.

    python -m eru_jax.train --config=configs/emoji.py --workdir=runs/emoji
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  del arg
  config = ml_collections.ConfigDict()
  config.title = 'EruDiff on the emoji world'
  config.stages = ('dk_dm', 'no_rl')
  config.model = dict(source='emoji_base', scan=False)
  config.sampling = dict(num_steps=12)
  config.evaluation = dict(max_prompts=160)
  config.dk_dm = dict(
    num_steps=200,
    teacher_batch=40,
    teacher_seeds=1,
    save_every=50,
    optimizer=dict(learning_rate=4e-4, warmup_steps=20, decay='cosine', ema_decay=0.98),
  )
  config.no_rl = dict(
    num_steps=25,
    save_every=25,
    log_every=1,
    optimizer=dict(learning_rate=1e-4, ema_decay=0.9),
  )
  return config
