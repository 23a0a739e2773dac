"""Equal blocks one after the other: one loop over parameters stacked on a leading axis."""

from typing import Any

import flax.linen as nn

from eru_jax.errors import UserError
from eru_jax.models.flux import REMAT_POLICIES


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
  axes: dict[str, Any] = dict.fromkeys(('params', 'lora', 'intermediates', 'overrides'), 0)
  return nn.scan(
    block,
    variable_axes=axes,
    split_rngs={'params': True},
    in_axes=(nn.broadcast,) * inputs,
    length=length,
    unroll=1 if scan else length,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
