"""What the tests of adapter files share: a tiny FLUX.1, rules, adapters as if trained."""

import re

import numpy as np
from flax import traverse_util

from eru_jax.models import flux
from eru_jax.models.lora import LoraRule
from eru_jax.weights.lora_layers import layers

SMALL = dict(
  in_channels=8,
  num_layers=2,
  num_single_layers=2,
  attention_head_dim=16,
  num_attention_heads=2,
  joint_attention_dim=12,
  pooled_projection_dim=10,
  axes_dims_rope=(4, 6, 6),
)
EVERYTHING = (LoraRule('.*', 4, 8.0),)
SOME = (LoraRule('attn/to_(q|v)|proj_mlp', 3, 1.5), LoraRule('ff/', 2, 7.0))
MIXED = (
  LoraRule('attn/(to_q|add_k)', 2, 6.0),
  LoraRule('proj_out|norm_out', 3, 1.0),
  LoraRule('embed', 1, 2.5),
  LoraRule('.*', 4, 5.0),
)


def tiny_config(guidance=True):
  return flux.FluxConfig(**SMALL, guidance_embeds=guidance)


def trained(config, rules, seed=0):
  """A trained adapter: no number of it is zero."""
  rng, flat = np.random.default_rng(seed), {}
  for layer in layers(config).values():
    rule = next((rule for rule in rules if re.search(rule.pattern, layer.path)), None)
    if rule is not None and f'{layer.path}/a' not in flat:
      for leaf, shape in (('a', (layer.n_in, rule.rank)), ('b', (rule.rank, layer.n_out))):
        noise = 0.1 * rng.standard_normal((*layer.stack, *shape))
        flat[f'{layer.path}/{leaf}'] = noise.astype(np.float32)
  return traverse_util.unflatten_dict(flat, sep='/')
