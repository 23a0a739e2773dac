"""Weight table of the autoencoder as latent diffusion's code names it, and ours.

Black Forest Labs' `ae.safetensors` is of this kind, and so are the `vae.` tensors of a checkpoint
of ComfyUI. The decoder's levels are numbered from the picture inwards there, and attention is made
of 1x1 convolutions.
"""

from eru_jax.models.autoencoder_kl import AutoencoderConfig
from eru_jax.weights import autoencoder_kl
from eru_jax.weights.table import Row, conv, norm, pointwise, prefixed

COMFYUI_PREFIX = 'vae.'

counts = autoencoder_kl.counts


def _resnet(torch: str, flax: str, shortcut: bool) -> list[Row]:
  rows = []
  for index in (1, 2):
    rows += norm(f'{torch}.norm{index}', f'{flax}/norm{index}')
    rows += conv(f'{torch}.conv{index}', f'{flax}/conv{index}')
  return rows + (conv(f'{torch}.nin_shortcut', f'{flax}/conv_shortcut') if shortcut else [])


def _middle(side: str, config: AutoencoderConfig) -> list[Row]:
  torch, flax = f'{side}.mid', f'{side}/mid_block'
  rows = []
  for index in range(2):
    rows += _resnet(f'{torch}.block_{index + 1}', f'{flax}/resnets_{index}', shortcut=False)
  if config.mid_block_add_attention:
    rows += norm(f'{torch}.attn_1.norm', f'{flax}/attentions_0/group_norm')
    names = {'q': 'to_q', 'k': 'to_k', 'v': 'to_v', 'proj_out': 'to_out_0'}
    for theirs, ours in names.items():
      rows += pointwise(f'{torch}.attn_1.{theirs}', f'{flax}/attentions_0/{ours}')
  return rows


def _levels(side: str, config: AutoencoderConfig) -> list[Row]:
  """Resolution levels of one side, in the order in which they are passed through."""
  widths, layers = config.block_out_channels, config.layers_per_block
  kind, ours, step, steps = 'down', 'down_blocks', 'downsample', 'downsamplers_0'
  if side == 'decoder':
    widths, layers = widths[::-1], layers + 1
    kind, ours, step, steps = 'up', 'up_blocks', 'upsample', 'upsamplers_0'
  rows, before, last = [], widths[0], len(widths) - 1
  for level, width in enumerate(widths):
    number = level if side == 'encoder' else last - level
    torch, flax = f'{side}.{kind}.{number}', f'{side}/{ours}_{level}'
    for index in range(layers):
      rows += _resnet(f'{torch}.block.{index}', f'{flax}/resnets_{index}', before != width)
      before = width
    if level < last:
      rows += conv(f'{torch}.{step}.conv', f'{flax}/{steps}/conv')
  return rows


def rows(config: AutoencoderConfig) -> list[Row]:
  """All tensors of an architecture."""
  table = []
  for side in ('encoder', 'decoder'):
    for name, kind in (('conv_in', conv), ('norm_out', norm), ('conv_out', conv)):
      table += kind(f'{side}.{name}', f'{side}/{"conv_norm_out" if kind is norm else name}')
    table += _levels(side, config) + _middle(side, config)
  if config.use_quant_conv:
    table += conv('quant_conv', 'quant_conv')
  if config.use_post_quant_conv:
    table += conv('post_quant_conv', 'post_quant_conv')
  return table


def comfyui_rows(config: AutoencoderConfig) -> list[Row]:
  """The same tensors in a checkpoint of ComfyUI."""
  return prefixed(rows(config), COMFYUI_PREFIX)
