"""Multi-head attention: one function, the backend picks the kernel."""

import jax

from eru_jax.errors import UserError

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn')


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
  implementation: str = 'auto',
) -> jax.Array:
  """Full (bidirectional) scaled dot-product attention, softmax in float32.

  Args:
    query: (B, L, H, D).
    key: (B, S, H, D).
    value: (B, S, H, D).
    mask: (B, S) bool, True where a key may be attended to, or None for all of them.
    implementation: 'xla' anywhere; 'cudnn' on NVIDIA GPUs in bfloat16 or float16; 'auto' picks
      cuDNN there and XLA everywhere else.

  Returns:
    (B, L, H, D) in the query's dtype.

  Raises:
    UserError: if the implementation is unknown.
  """
  if implementation not in IMPLEMENTATIONS:
    raise UserError(
      f'Unknown attention implementation {implementation!r}: choose one of {IMPLEMENTATIONS}.'
    )
  if implementation == 'auto':
    half = query.dtype.itemsize == 2
    implementation = 'cudnn' if half and jax.default_backend() == 'gpu' else 'xla'
  if mask is not None:
    mask = mask[:, None, None, :]
  return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
