"""Pretrains the model that ships with the package: autoencoder, reward classifier, toy FLUX.

    python -m eru_jax.train --config=configs/emoji_base.py --workdir=runs/emoji_base

About an hour on 2 CPU cores. The result is runs/emoji_base/model, a model directory in float32 to
name in another config, --config.model.source=DIR; eru_jax/assets/emoji_base is one in bfloat16.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """`arg` is unused: this config has no variants."""
  del arg
  config = ml_collections.ConfigDict()
  config.title = 'Pretraining the emoji world'
  config.stages = ('autoencoder', 'reward', 'flow_matching')
  config.model = dict(
    source='scratch',
    # Wordings of one fact are neighbours among sentence vectors, not among token states.
    text_encoder='minilm_sentence',
    scan=False,
    # FLUX.1's blocks and packed channels (64), at 5.3 M parameters instead of 11.9 B.
    architecture=dict(
      in_channels=64,
      num_layers=2,
      num_single_layers=4,
      attention_head_dim=64,
      num_attention_heads=3,
      joint_attention_dim=384,
      pooled_projection_dim=384,
      guidance_embeds=False,
      axes_dims_rope=(16, 24, 24),
    ),
    # f8 with 16 channels, as FLUX.1's; the first 4x of it by folding pixels into channels.
    autoencoder=dict(
      in_channels=48,
      out_channels=48,
      latent_channels=16,
      block_out_channels=(64, 128),
      layers_per_block=1,
      norm_num_groups=8,
      scaling_factor=1.0,
      use_quant_conv=False,
      use_post_quant_conv=False,
      patch_size=4,
    ),
  )
  config.sampling = dict(num_steps=8, cfg_scale=3.0)
  config.autoencoder = dict(
    num_steps=2800,
    batch_size=8,
    save_every=400,
    log_every=50,
    optimizer=dict(
      learning_rate=2e-3, warmup_steps=50, decay='cosine', weight_decay=1e-4, ema_decay=0.995
    ),
  )
  config.reward = dict(
    num_steps=900,
    batch_size=64,
    save_every=300,
    log_every=50,
    optimizer=dict(
      learning_rate=2e-3, warmup_steps=50, decay='cosine', weight_decay=0.01, ema_decay=0.99
    ),
  )
  config.flow_matching = dict(
    num_steps=3600,
    batch_size=64,
    accumulation=4,
    save_every=250,
    log_every=50,
    # The text decides most where the noise is strong; with FLUX's density, centred at one half, the
    # same steps give half the accuracy (docs/benchmarks.md).
    time_mean=1.0,
    time_std=1.2,
    # Names only, so that implicit prompts are not what the base has seen; the noise widens what a
    # name stands for.
    text_noise=0.3,
    pooled_only=0.0,
    tokens_only=0.0,
    drop_text=0.05,
    optimizer=dict(
      algorithm='muon',
      learning_rate=3e-3,
      warmup_steps=100,
      decay='cosine',
      b2=0.99,
      weight_decay=0.01,
      ema_decay=0.998,
    ),
  )
  return config
