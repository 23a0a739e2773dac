"""Weight table of diffusers' AutoencoderKL and eru_jax.models.autoencoder_kl."""

from collections.abc import Mapping

from eru_jax.models.autoencoder_kl import AutoencoderConfig
from eru_jax.weights.table import Row, conv, linear, norm


def _resnet(torch: str, flax: str, shortcut: bool) -> list[Row]:
  rows = norm(f'{torch}.norm1', f'{flax}/norm1') + conv(f'{torch}.conv1', f'{flax}/conv1')
  rows += norm(f'{torch}.norm2', f'{flax}/norm2') + conv(f'{torch}.conv2', f'{flax}/conv2')
  if shortcut:
    rows += conv(f'{torch}.conv_shortcut', f'{flax}/conv_shortcut')
  return rows


def _middle(side: str, config: AutoencoderConfig) -> list[Row]:
  torch, flax = f'{side}.mid_block', f'{side}/mid_block'
  rows = []
  if config.mid_block_add_attention:
    rows += norm(f'{torch}.attentions.0.group_norm', f'{flax}/attentions_0/group_norm')
    for name in ('to_q', 'to_k', 'to_v', 'to_out.0'):
      rows += linear(f'{torch}.attentions.0.{name}', f'{flax}/attentions_0/{_flat(name)}')
  for index in range(2):
    rows += _resnet(f'{torch}.resnets.{index}', f'{flax}/resnets_{index}', shortcut=False)
  return rows


def _flat(name: str) -> str:
  return name.replace('.', '_')


def _levels(side: str, kind: str, widths: tuple[int, ...], layers: int, step: str) -> list[Row]:
  """Resolution levels of one side, whose widths come in the order they are passed through."""
  rows, before = [], widths[0]
  for level, width in enumerate(widths):
    torch, flax = f'{side}.{kind}.{level}', f'{side}/{kind}_{level}'
    for index in range(layers):
      rows += _resnet(
        f'{torch}.resnets.{index}', f'{flax}/resnets_{index}', shortcut=before != width
      )
      before = width
    if level < len(widths) - 1:
      rows += conv(f'{torch}.{step}.0.conv', f'{flax}/{step}_0/conv')
  return rows


def rows(config: AutoencoderConfig) -> list[Row]:
  """All tensors of an architecture, in the order in which diffusers' module holds them."""
  widths, layers = config.block_out_channels, config.layers_per_block
  table = []
  for side in ('encoder', 'decoder'):
    table += conv(f'{side}.conv_in', f'{side}/conv_in')
    if side == 'encoder':
      table += _levels(side, 'down_blocks', widths, layers, 'downsamplers')
    else:
      table += _levels(side, 'up_blocks', widths[::-1], layers + 1, 'upsamplers')
    table += _middle(side, config)
    table += norm(f'{side}.conv_norm_out', f'{side}/conv_norm_out')
    table += conv(f'{side}.conv_out', f'{side}/conv_out')
  if config.use_quant_conv:
    table += conv('quant_conv', 'quant_conv')
  if config.use_post_quant_conv:
    table += conv('post_quant_conv', 'post_quant_conv')
  return table


def counts(config: AutoencoderConfig) -> Mapping[str, int]:
  """Nothing is counted: every tensor has a row of its own."""
  del config
  return {}
