"""Low-rank updates in FLUX.1's original layout of layers, which kohya and ComfyUI name.

There the projections of one input are one layer: q, k and v of each stream of a double-stream
block, and q, k, v and the MLP of a single-stream block. The output layer's modulation has its
shift first, diffusers' and ours its scale.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from eru_jax.models.flux import FluxConfig
from eru_jax.weights.lora_layers import Layer, Update


@dataclasses.dataclass(frozen=True)
class Original:
  """A linear layer of the original layout.

  Attributes:
    name: its name there.
    parts: the reference's (diffusers') modules that it computes, outputs in this order.
    swapped: whether the two halves of the outputs have changed places.
  """

  name: str
  parts: tuple[str, ...]
  swapped: bool = False


_EMBEDDERS = {
  'time_in': 'timestep_embedder',
  'vector_in': 'text_embedder',
  'guidance_in': 'guidance_embedder',
}
_STREAMS = (
  # original, norm, attention's output, feed-forward, and its q, k, v
  ('img', 'norm1', 'to_out.0', 'ff', ('to_q', 'to_k', 'to_v')),
  ('txt', 'norm1_context', 'to_add_out', 'ff_context', ('add_q_proj', 'add_k_proj', 'add_v_proj')),
)


def originals(config: FluxConfig) -> list[Original]:
  """All linear layers of an architecture in the original layout."""
  table = [
    Original('img_in', ('x_embedder',)),
    Original('txt_in', ('context_embedder',)),
    Original('final_layer.linear', ('proj_out',)),
    Original('final_layer.adaLN_modulation.1', ('norm_out.linear',), swapped=True),
  ]
  for name, module in _EMBEDDERS.items():
    if module != 'guidance_embedder' or config.guidance_embeds:
      for original, linear in (('in_layer', 'linear_1'), ('out_layer', 'linear_2')):
        table.append(Original(f'{name}.{original}', (f'time_text_embed.{module}.{linear}',)))
  for index in range(config.num_layers):
    block = f'transformer_blocks.{index}'
    for stream, norm, out, feed_forward, projections in _STREAMS:
      name = f'double_blocks.{index}.{stream}'
      table += [
        Original(f'{name}_mod.lin', (f'{block}.{norm}.linear',)),
        Original(f'{name}_attn.qkv', tuple(f'{block}.attn.{part}' for part in projections)),
        Original(f'{name}_attn.proj', (f'{block}.attn.{out}',)),
        Original(f'{name}_mlp.0', (f'{block}.{feed_forward}.net.0.proj',)),
        Original(f'{name}_mlp.2', (f'{block}.{feed_forward}.net.2',)),
      ]
  for index in range(config.num_single_layers):
    block, name = f'single_transformer_blocks.{index}', f'single_blocks.{index}'
    parts = ('attn.to_q', 'attn.to_k', 'attn.to_v', 'proj_mlp')
    table += [
      Original(f'{name}.modulation.lin', (f'{block}.norm.linear',)),
      Original(f'{name}.linear1', tuple(f'{block}.{part}' for part in parts)),
      Original(f'{name}.linear2', (f'{block}.proj_out',)),
    ]
  return table


def fuse(
  original: Original, updates: Mapping[str, Update], known: Mapping[str, Layer]
) -> Update | None:
  """The update of an original layer out of those of its parts.

  Its rank is the sum of the parts', each writing to its own outputs; parts with the same `down`
  share it. Alpha is the rank: scales of the parts are in `up`.

  Args:
    original: the layer.
    updates: by the reference's module name; parts without one stay as they are.
    known: shapes of the parts.

  Returns:
    The update, or None if no part has one.
  """
  downs: list[np.ndarray] = []
  starts: dict[str, int] = {}
  for part in original.parts:
    if part not in updates:
      continue
    down, start = updates[part].down, 0
    for other in downs:
      if np.array_equal(other, down):
        break
      start += len(other)
    else:
      downs.append(down)
    starts[part] = start
  if not downs:
    return None
  down = np.concatenate(downs)
  up = np.zeros((sum(known[part].n_out for part in original.parts), len(down)), np.float32)
  row = 0
  for part in original.parts:
    if part in starts:
      update, start = updates[part], starts[part]
      rows, columns = slice(row, row + known[part].n_out), slice(start, start + update.rank)
      up[rows, columns] = update.scale * update.up
    row += known[part].n_out
  return Update(down, _swap(up) if original.swapped else up, float(len(down)))


def split(original: Original, update: Update, known: Mapping[str, Layer]) -> dict[str, Update]:
  """The updates of the parts of an original layer: the inverse of `fuse`.

  Each part gets the components that write to its outputs, and those that write to none, as all
  do at the start of a training. A part whose outputs only others' components reach gets no update.
  """
  up = _swap(update.up) if original.swapped else update.up
  ends = np.cumsum([known[part].n_out for part in original.parts])
  blocks = np.split(up, ends[:-1])
  writes = np.stack([block.any(axis=0) for block in blocks])
  updates = {}
  for part, block, own in zip(original.parts, blocks, writes, strict=True):
    kept = own | ~writes.any(axis=0)
    if kept.any():
      alpha = update.alpha * (int(kept.sum()) / update.rank)
      updates[part] = Update(update.down[kept], block[:, kept], alpha)
  return updates


def _swap(up: np.ndarray) -> np.ndarray:
  return np.roll(up, len(up) // 2, axis=0)
