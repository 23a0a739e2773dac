"""Weight table of FLUX.1: diffusers' FluxTransformer2DModel and eru_jax.models.flux."""

from collections.abc import Mapping

from eru_jax.models.flux import FluxConfig
from eru_jax.weights.table import Row, linear, norm


def _attention(torch: str, flax: str, names: tuple[str, ...], norms: tuple[str, ...]) -> list[Row]:
  rows = []
  for name in norms:
    rows += norm(f'{torch}.{name}', f'{flax}/{name}', bias=False)
  for name in names:
    rows += linear(f'{torch}.{name}', f'{flax}/{name.replace(".", "_")}')
  return rows


def rows(config: FluxConfig) -> list[Row]:
  """All tensors of an architecture, in the order in which diffusers' module holds them; the two
  kinds of blocks count with {i} and {j}."""
  embedders = ['timestep_embedder', 'guidance_embedder', 'text_embedder']
  if not config.guidance_embeds:
    embedders.remove('guidance_embedder')
  table = []
  for name in embedders:
    for layer in ('linear_1', 'linear_2'):
      table += linear(f'time_text_embed.{name}.{layer}', f'time_text_embed/{name}/{layer}')
  for name in ('context_embedder', 'x_embedder'):
    table += linear(name, name)

  torch, flax = 'transformer_blocks.{i}', 'transformer_blocks'
  for name in ('norm1', 'norm1_context'):
    table += linear(f'{torch}.{name}.linear', f'{flax}/{name}/linear')
  projections = ('to_q', 'to_k', 'to_v', 'to_out.0')
  added = ('add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out')
  table += _attention(f'{torch}.attn', f'{flax}/attn', projections, ('norm_q', 'norm_k'))
  table += _attention(f'{torch}.attn', f'{flax}/attn', added, ('norm_added_q', 'norm_added_k'))
  for name in ('ff', 'ff_context'):
    table += linear(f'{torch}.{name}.net.0.proj', f'{flax}/{name}/net_0_proj')
    table += linear(f'{torch}.{name}.net.2', f'{flax}/{name}/net_2')

  torch, flax = 'single_transformer_blocks.{j}', 'single_transformer_blocks'
  table += linear(f'{torch}.norm.linear', f'{flax}/norm/linear')
  for name in ('proj_mlp', 'proj_out'):
    table += linear(f'{torch}.{name}', f'{flax}/{name}')
  table += _attention(
    f'{torch}.attn', f'{flax}/attn', ('to_q', 'to_k', 'to_v'), ('norm_q', 'norm_k')
  )
  table += linear('norm_out.linear', 'norm_out/linear')
  return table + linear('proj_out', 'proj_out')


def counts(config: FluxConfig) -> Mapping[str, int]:
  return {'i': config.num_layers, 'j': config.num_single_layers}
