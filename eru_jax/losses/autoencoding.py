"""The objective of a variational autoencoder for images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def autoencoding(
  encode: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  decode: Callable[[jax.Array], jax.Array],
  images: jax.Array,
  key: jax.Array,
  kl_weight: float = 5e-4,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """L1 + L2 reconstruction of a posterior sample, plus a weighted KL to the unit normal.

  Kingma & Welling, Auto-Encoding Variational Bayes (2014). The KL keeps the latents near unit
  scale and makes the decoder tolerate the small errors a diffusion model leaves in them.

  Args:
    encode: images -> (mean, logvar), each (B, h, w, C).
    decode: latents (B, h, w, C) -> images.
    images: (B, H, W, 3) float32 in [-1, 1].
    key: randomness of the posterior sample.
    kl_weight: weight of the KL, in nats per latent value.

  Returns:
    The loss and its parts: `l1`, `l2` (in the units of the images) and `kl` (nats per value).
  """
  mean, logvar = encode(images)
  z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)
  error = decode(z).astype(jnp.float32) - images
  l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
  kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
  return l1 + l2 + kl_weight * kl, {'l1': l1, 'l2': l2, 'kl': kl}
