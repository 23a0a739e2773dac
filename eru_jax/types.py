"""The nouns every part of the library shares."""

from collections.abc import Callable

import flax.struct
import jax


@flax.struct.dataclass
class Conditioning:
  """What a text encoder makes and a backbone eats.

  Attributes:
    tokens: (B, L, D) token states.
    mask: (B, L) bool, True where a token is real. None attends to every token, padding
      included, which is what the FLUX.1 reference does.
    pooled: (B, P) one vector per prompt, or None for backbones without one.
  """

  tokens: jax.Array
  mask: jax.Array | None = None
  pooled: jax.Array | None = None


# (x_t, t, conditioning) -> velocity. x_t is (B, ...), t is (B,) float32 in [0, 1] with t = 1 pure
# noise, and the velocity has the shape of x_t. All that a loss or a sampler sees of a model.
VelocityFn = Callable[[jax.Array, jax.Array, Conditioning], jax.Array]
