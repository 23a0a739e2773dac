"""Model families: what a backbone needs around it to make pictures.

Adding a model adds one file beside this one and one entry to FAMILIES.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from eru_jax import flow
from eru_jax.errors import UserError
from eru_jax.models import autoencoder_kl, flux
from eru_jax.models import lora as lora_lib
from eru_jax.types import Conditioning, VelocityFn

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class ModelFamily:
  """A kind of text-to-image flow model.

  Attributes:
    name: key in FAMILIES.
    config: dataclass of the backbone's architecture, with `from_dict` and `to_dict`.
    backbone: module class, built as backbone(config, dtype, scan, remat, attention).
    latent_ids: (rows, columns) of the packed grid -> positions of its tokens.
    packing: edge of the square of latent pixels that makes one token.
    stacks: module name -> what its blocks are called, in the order in which they run; each block
      offers `layers.feature`s 'image' and 'text'.
    tiny: keys that shrink `config` for tests and laptops.
  """

  name: str
  config: type
  backbone: type[nn.Module]
  latent_ids: Callable[[int, int], np.ndarray]
  packing: int
  stacks: dict[str, str]
  tiny: dict[str, Any]

  @property
  def blocks(self) -> str:
    """Regular expression of the paths of all layers in blocks: what is kept in int8, if anything
    is, being nearly all of a backbone."""
    return f'^({"|".join(self.stacks)})/'

  def init(
    self,
    backbone: nn.Module,
    key: jax.Array,
    grid: tuple[int, int] = (1, 1),
    text_length: int = 1,
  ) -> PyTree:
    """Random backbone parameters, boxed with their logical axis names; no size changes them.

    Args:
      backbone: the module.
      key: a random key.
      grid: rows and columns of tokens in the packed latent grid.
      text_length: tokens of a prompt.
    """
    config = backbone.config
    conditioning = Conditioning(
      tokens=jnp.zeros((1, text_length, config.joint_attention_dim)),
      pooled=jnp.zeros((1, config.pooled_projection_dim)),
    )
    rows, columns = grid
    x, t = jnp.zeros((1, rows * columns, config.in_channels)), jnp.zeros(1)
    return backbone.init(key, x, t, conditioning, self.latent_ids(*grid), t)['params']


FAMILIES = {
  'flux': ModelFamily(
    name='flux',
    config=flux.FluxConfig,
    backbone=flux.FluxTransformer,
    latent_ids=flux.image_ids,
    packing=2,
    stacks={'transformer_blocks': 'double', 'single_transformer_blocks': 'single'},
    tiny=dict(
      in_channels=16,
      num_layers=1,
      num_single_layers=1,
      attention_head_dim=16,
      num_attention_heads=2,
      joint_attention_dim=32,
      pooled_projection_dim=32,
      guidance_embeds=False,
      axes_dims_rope=(4, 6, 6),
    ),
  ),
}


def family(name: str) -> ModelFamily:
  """Looks a family up.

  Raises:
    UserError: if there is no such family.
  """
  if name not in FAMILIES:
    raise UserError(f'Unknown model family {name!r}: choose one of {sorted(FAMILIES)}.')
  return FAMILIES[name]


def family_of(architecture: Any) -> ModelFamily:
  """The family that an architecture belongs to, one of its `config` class."""
  return next(family for family in FAMILIES.values() if type(architecture) is family.config)


@dataclasses.dataclass(frozen=True)
class DiffusionModel:
  """A backbone and an autoencoder at one picture size: pure functions, no parameters inside.

  Attributes:
    family: what the backbone is.
    backbone: its module.
    autoencoder: module of the autoencoder.
    height: of the pictures, in pixels.
    width: likewise.
    guidance: guidance scale fed to a guidance-distilled backbone.
    lora: adapter rules; empty if whole networks are trained.
  """

  family: ModelFamily
  backbone: nn.Module
  autoencoder: autoencoder_kl.AutoencoderKL
  height: int
  width: int
  guidance: float = 3.5
  lora: tuple[lora_lib.LoraRule, ...] = ()

  def __post_init__(self):
    step = self.family.packing * self.autoencoder.config.downscale
    if min(self.height, self.width) < step or self.height % step or self.width % step:
      raise UserError(
        f'Pictures of {self.height} x {self.width} pixels: this model needs multiples of {step}.'
      )
    autoencoder = self.autoencoder.config
    for name in ('in_channels', 'out_channels'):
      if getattr(autoencoder, name) != 3 * autoencoder.patch_size**2:
        raise UserError(
          f'Autoencoder config: `{name}` is {getattr(autoencoder, name)}; for pictures of three '
          f'colours it must be 3 x patch_size^2 = {3 * autoencoder.patch_size**2}.'
        )
    channels = self.family.packing**2 * autoencoder.latent_channels
    if channels != self.backbone.config.in_channels:
      raise UserError(
        f'The autoencoder makes {channels} channels a token, the backbone takes '
        f'{self.backbone.config.in_channels}: they do not belong together.'
      )

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of tokens in the packed latent grid."""
    step = self.family.packing * self.autoencoder.config.downscale
    return self.height // step, self.width // step

  @property
  def latent_shape(self) -> tuple[int, int]:
    """(tokens, channels) of one picture's packed latents."""
    rows, columns = self.grid
    return rows * columns, self.backbone.config.in_channels

  def init(self, key: jax.Array, text_length: int) -> PyTree:
    """Random backbone parameters, boxed with their logical axis names."""
    return self.family.init(self.backbone, key, self.grid, text_length)

  def velocity(self, base: PyTree, trainable: PyTree | None = None) -> VelocityFn:
    """The velocity network as the losses and samplers want it.

    Args:
      base: frozen backbone parameters.
      trainable: an adapter on them (if this model has LoRA rules), else whole parameters that
        stand in for them; None is the base itself.

    Returns:
      (x_t (B, S, C), t (B,), conditioning) -> (B, S, C) velocity in the model's dtype.
    """
    variables = self._variables(base, trainable)
    ids = self.family.latent_ids(*self.grid)

    def velocity_fn(x_t: jax.Array, t: jax.Array, conditioning: Conditioning) -> jax.Array:
      guidance = jnp.full(t.shape, self.guidance, jnp.float32)
      return self.backbone.apply(variables, x_t, t, conditioning, ids, guidance)

    return velocity_fn

  def _variables(self, base: PyTree, trainable: PyTree | None) -> dict[str, PyTree]:
    if trainable is None:
      return {'params': base}
    if self.lora:
      return {'params': base, 'lora': lora_lib.variables(trainable, self.lora)}
    return {'params': trainable}

  def features(
    self,
    base: PyTree,
    trainable: PyTree | None,
    x_t: jax.Array,
    t: jax.Array,
    conditioning: Conditioning,
  ) -> dict[str, dict[str, jax.Array]]:
    """The residual stream after every block, averaged over tokens.

    Args:
      base, trainable: as in `velocity`.
      x_t, t, conditioning: as the velocity network takes them.

    Returns:
      {stack: {'image' and 'text': (blocks, B, width) float32}} for the stacks of the family.
    """
    # The same parameters serve both, and what runs but a few times had better compile fast.
    backbone = self.backbone.clone(scan=True)
    ids = self.family.latent_ids(*self.grid)
    guidance = jnp.full(t.shape, self.guidance, jnp.float32)
    variables = self._variables(base, trainable)
    _, found = backbone.apply(variables, x_t, t, conditioning, ids, guidance, mutable=['features'])
    return found['features']

  def encode(self, autoencoder_params: PyTree, images: jax.Array) -> jax.Array:
    """Pictures (B, H, W, 3) in [-1, 1] to scaled, packed latents (posterior means)."""
    mean, _ = self.autoencoder.apply({'params': autoencoder_params}, images, method='encode')
    latents = autoencoder_kl.scale_latents(mean, self.autoencoder.config)
    return autoencoder_kl.pack_latents(latents)

  def decode(self, autoencoder_params: PyTree, latents: jax.Array) -> jax.Array:
    """Packed latents to pictures (B, H, W, 3) in [0, 1], float32."""
    rows, columns = (self.family.packing * tokens for tokens in self.grid)
    # Tokens may be split along `sequence`; pictures must not be.
    latents = nn.with_logical_constraint(latents.astype(jnp.float32), ('batch', None, None))
    z = autoencoder_kl.unpack_latents(latents, rows, columns)
    z = autoencoder_kl.unscale_latents(z, self.autoencoder.config)
    images = self.autoencoder.apply({'params': autoencoder_params}, z, method='decode')
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)

  def sample(
    self,
    velocity_fn: VelocityFn,
    noise: jax.Array,
    conditioning: Conditioning,
    schedule: jax.Array,
    null: Conditioning | None = None,
    cfg_scale: float = 1.0,
  ) -> jax.Array:
    """Packed latents (B, S, C) by Euler's method from noise of that shape.

    Args:
      velocity_fn: what `velocity` returned.
      noise: (B, S, C) start noise.
      conditioning: prompts of the batch.
      schedule: (steps + 1,) falling from 1 to 0.
      null: conditioning of the empty prompt, batch size 1; needed for cfg_scale other than 1.
      cfg_scale: true classifier-free guidance.
    """
    if cfg_scale != 1.0:
      if null is None:
        raise UserError('Classifier-free guidance needs the empty prompt: pass `null`.')
      velocity_fn = flow.classifier_free_guidance(velocity_fn, null, cfg_scale)
    return flow.euler_ode(velocity_fn, noise, schedule, conditioning)
