"""Equal blocks one after the other: one loop over parameters stacked on a leading axis."""

from typing import Any

import flax.linen as nn
import jax

from eru_jax.errors import UserError

# Collections that have an entry for every block.
_AXES = ('params', 'lora', 'intermediates', 'features', 'overrides')
# The forward pass of cuDNN's attention; it results in the output and the softmax's statistics.
_CUDNN_FORWARD = 'dot_product_attention_fwd_wrapper'


def _is_cudnn(primitive: Any, *unused: Any, **options: Any) -> bool:
  # Its backward pass wants both: without the statistics, the kernel would run once more.
  del unused, options
  return primitive.name == _CUDNN_FORWARD


def _attention_and(*names: str) -> Any:
  policies = jax.checkpoint_policies
  return policies.save_from_both_policies(policies.save_only_these_names(*names), _is_cudnn)


# Which activations the backward pass keeps; the rest is recomputed from each block's input.
REMAT_POLICIES = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'attn': _attention_and('attn_output'),
  'names': _attention_and('qkv', 'attn_output'),
}


def stack_blocks(
  block: type[nn.Module], length: int, inputs: int, scan: bool, remat: str
) -> type[nn.Module]:
  """The module class that runs `length` blocks on a carry.

  Args:
    block: its __call__ takes the carry and `inputs` more arguments, and returns (carry, None).
    length: blocks.
    inputs: arguments beside the carry; every block sees the same.
    scan: run them as one loop; False unrolls it. The parameters are the same.
    remat: one of REMAT_POLICIES, what the backward pass keeps.

  Raises:
    UserError: if there is no such policy.
  """
  if remat not in REMAT_POLICIES:
    raise UserError(f'Unknown remat policy {remat!r}: choose one of {list(REMAT_POLICIES)}.')
  if remat != 'none':
    block = nn.remat(block, prevent_cse=not scan, policy=REMAT_POLICIES[remat])
  axes: dict[str, Any] = dict.fromkeys(_AXES, 0)
  return nn.scan(
    block,
    variable_axes=axes,
    split_rngs={'params': True},
    in_axes=(nn.broadcast,) * inputs,
    length=length,
    unroll=1 if scan else length,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
