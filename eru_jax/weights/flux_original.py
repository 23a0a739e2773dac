"""Weight table of FLUX.1 as Black Forest Labs publish it, in one file, and eru_jax.models.flux.

Query, key and value of a block are one matrix there, in single-stream blocks with the first layer
of the MLP after them, and the last adaLN gives shift and scale where diffusers' gives scale and
shift. ComfyUI keeps the same names below a prefix.
"""

from collections.abc import Mapping
from typing import Any

from eru_jax.errors import UserError
from eru_jax.models.flux import FluxConfig
from eru_jax.weights import flux
from eru_jax.weights.table import Row, linear, prefixed

COMFYUI_PREFIX = 'model.diffusion_model.'
# Rotary channels by size of a head: of published models, and nothing in the tensors tells them.
_AXES_DIMS_ROPE = {128: (16, 56, 56)}

counts = flux.counts


def _double(width: int) -> list[Row]:
  rows, torch, flax = [], 'double_blocks.{i}', 'transformer_blocks'
  thirds = [((part * width, (part + 1) * width),) for part in range(3)]
  streams = (
    ('img', 'norm1', 'ff', ('to_q', 'to_k', 'to_v'), 'to_out_0', ('norm_q', 'norm_k')),
    (
      'txt', 'norm1_context', 'ff_context', ('add_q_proj', 'add_k_proj', 'add_v_proj'),
      'to_add_out', ('norm_added_q', 'norm_added_k'),
    ),
  )  # fmt: skip
  for stream, modulation, mlp, projections, out, norms in streams:
    rows += linear(f'{torch}.{stream}_mod.lin', f'{flax}/{modulation}/linear')
    for name, third in zip(projections, thirds, strict=True):
      rows += linear(f'{torch}.{stream}_attn.qkv', f'{flax}/attn/{name}', ranges=third)
    rows += _norms(f'{torch}.{stream}_attn.norm', f'{flax}/attn', norms)
    rows += linear(f'{torch}.{stream}_attn.proj', f'{flax}/attn/{out}')
    rows += linear(f'{torch}.{stream}_mlp.0', f'{flax}/{mlp}/net_0_proj')
    rows += linear(f'{torch}.{stream}_mlp.2', f'{flax}/{mlp}/net_2')
  return rows


def _norms(torch: str, flax: str, names: tuple[str, str]) -> list[Row]:
  return [
    Row(f'{torch}.{theirs}.scale', f'{flax}/{ours}/scale')
    for theirs, ours in zip(('query_norm', 'key_norm'), names, strict=True)
  ]


def _single(width: int) -> list[Row]:
  torch, flax = 'single_blocks.{j}', 'single_transformer_blocks'
  rows, start = linear(f'{torch}.modulation.lin', f'{flax}/norm/linear'), 0
  layers = {'attn/to_q': width, 'attn/to_k': width, 'attn/to_v': width, 'proj_mlp': 4 * width}
  for name, size in layers.items():
    rows += linear(f'{torch}.linear1', f'{flax}/{name}', ranges=((start, start + size),))
    start += size
  rows += linear(f'{torch}.linear2', f'{flax}/proj_out')
  return rows + _norms(f'{torch}.norm', f'{flax}/attn', ('norm_q', 'norm_k'))


def rows(config: FluxConfig) -> list[Row]:
  """All tensors of an architecture; the two kinds of blocks count with {i} and {j}."""
  embedders = {'time_in': 'timestep_embedder', 'vector_in': 'text_embedder'}
  if config.guidance_embeds:
    embedders['guidance_in'] = 'guidance_embedder'
  table = linear('img_in', 'x_embedder') + linear('txt_in', 'context_embedder')
  for theirs, ours in embedders.items():
    for layer, name in (('in_layer', 'linear_1'), ('out_layer', 'linear_2')):
      table += linear(f'{theirs}.{layer}', f'time_text_embed/{ours}/{name}')
  table += _double(config.width) + _single(config.width)
  halves = ((config.width, 2 * config.width), (0, config.width))
  table += linear('final_layer.adaLN_modulation.1', 'norm_out/linear', ranges=halves)
  return table + linear('final_layer.linear', 'proj_out')


def comfyui_rows(config: FluxConfig) -> list[Row]:
  """The same tensors in a checkpoint of ComfyUI."""
  return prefixed(rows(config), COMFYUI_PREFIX)


def infer_config(tensors: Mapping[str, Any], prefix: str = '') -> FluxConfig:
  """The architecture of a file that comes without config.json.

  Args:
    tensors: name -> anything with `shape`.
    prefix: of all names.

  Raises:
    UserError: if a tensor that tells it is missing, or the heads are not of FLUX.1's size.
  """

  def shape(name: str, rank: int) -> tuple[int, ...]:
    found = tensors.get(prefix + name)
    if found is None or len(found.shape) != rank:
      raise UserError(
        f'The architecture cannot be told without {prefix + name}, of {rank} axes: put the '
        "config.json of diffusers' `transformer` folder beside the weights."
      )
    return found.shape

  def blocks(kind: str) -> int:
    number = 0
    while any(name.startswith(f'{prefix}{kind}.{number}.') for name in tensors):
      number += 1
    return number

  width, in_channels = shape('img_in.weight', 2)
  (head,) = shape('double_blocks.0.img_attn.norm.query_norm.scale', 1)
  if head not in _AXES_DIMS_ROPE or width % head:
    raise UserError(
      f'Heads of {head} channels in a width of {width} are not those of FLUX.1: put the '
      "config.json of diffusers' `transformer` folder beside the weights."
    )
  return FluxConfig(
    in_channels=in_channels,
    num_layers=blocks('double_blocks'),
    num_single_layers=blocks('single_blocks'),
    attention_head_dim=head,
    num_attention_heads=width // head,
    joint_attention_dim=shape('txt_in.weight', 2)[1],
    pooled_projection_dim=shape('vector_in.in_layer.weight', 2)[1],
    guidance_embeds=f'{prefix}guidance_in.in_layer.weight' in tensors,
    axes_dims_rope=_AXES_DIMS_ROPE[head],
  )
