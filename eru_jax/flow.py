"""Rectified flow: the path, timestep densities and samplers, all pure functions.

Convention throughout: x_t = (1 - t) x_0 + t noise, velocity v = noise - x_0, so t = 1 is pure
noise and sampling integrates from 1 to 0. (Liu et al., Flow Straight and Fast, 2022; the
conventions of FLUX.1 and Qwen-Image.)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from eru_jax.errors import UserError
from eru_jax.types import Conditioning, VelocityFn

# The largest shift, either way: at it a grid is all but ones or zeros. Far beyond, e^mu overflows,
# or float32 divides zero by zero and every picture is NaN.
MAX_SHIFT_MU = 20.0


def expand(t: jax.Array, like: jax.Array) -> jax.Array:
  """Reshapes t (B,), in float32, so that it broadcasts against like (B, ...)."""
  t = jnp.asarray(t, jnp.float32)
  return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(x_0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
  """The point x_t (B, ...) on the straight path between data and noise."""
  t = expand(t, x_0)
  return (1 - t) * x_0 + t * noise


def velocity(x_0: jax.Array, noise: jax.Array) -> jax.Array:
  """The path's velocity dx_t/dt, the regression target of flow matching, float32."""
  return noise.astype(jnp.float32) - x_0.astype(jnp.float32)


def predict_x0(x_t: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
  """The clean sample a velocity (B, ...) points at from x_t."""
  return x_t - expand(t, x_t) * v


def predict_noise(x_t: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
  """The noise a velocity (B, ...) points away from at x_t."""
  return x_t + (1 - expand(t, x_t)) * v


def score(x_t: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
  """grad log p_t(x_t) = -(x_t + (1 - t) v) / t, for t > 0."""
  return -predict_noise(x_t, v, t) / expand(t, x_t)


def shift_timesteps(t: jax.Array, mu: float) -> jax.Array:
  """FLUX's shift towards noise, e^mu / (e^mu + 1/t - 1); mu = 0 is the identity."""
  # Written so that t = 0 needs no division by it and t = 1 stays 1 exactly.
  scaled = math.exp(mu) * t
  return scaled / (scaled + (1 - t))


def resolution_mu(
  num_tokens: int,
  base: int = 256,
  maximum: int = 4096,
  base_shift: float = 0.5,
  max_shift: float = 1.15,
) -> float:
  """FLUX.1-dev's shift for a number of image tokens: linear through its two anchors.

  Raises:
    UserError: if there are no tokens, or maximum is not above base.
  """
  if num_tokens < 1 or maximum <= base:
    raise UserError(
      f'resolution_mu needs a token and maximum > base, got num_tokens = {num_tokens}, '
      f'base = {base} and maximum = {maximum}.'
    )
  slope = (max_shift - base_shift) / (maximum - base)
  return base_shift + slope * (num_tokens - base)


@dataclasses.dataclass(frozen=True)
class TimestepDensity:
  """How training draws t.

  Attributes:
    kind: 'uniform', or 'logit_normal': sigmoid of a Gaussian (Esser et al., 2024, section 3.1).
    mean: of that Gaussian; above 0 prefers noise.
    std: of that Gaussian.
    shift_mu: FLUX's shift, applied to the draw.
    t_min: smallest t; draws are mapped into [t_min, t_max] linearly.
    t_max: largest t.
  """

  kind: str = 'logit_normal'
  mean: float = 0.0
  std: float = 1.0
  shift_mu: float = 0.0
  t_min: float = 0.0
  t_max: float = 1.0

  def __post_init__(self):
    if self.kind not in ('uniform', 'logit_normal'):
      raise UserError(
        f"Unknown timestep density {self.kind!r}: choose 'uniform' or 'logit_normal'."
      )
    if not math.isfinite(self.mean):
      raise UserError(f'Timestep density: mean is {self.mean} but must be finite.')
    if not abs(self.shift_mu) <= MAX_SHIFT_MU:
      raise UserError(
        f'Timestep density: shift_mu is {self.shift_mu} but must be from {-MAX_SHIFT_MU:g} to '
        f'{MAX_SHIFT_MU:g}.'
      )
    if not 0 < self.std < math.inf:
      raise UserError(f'Timestep density: std is {self.std} but must be positive.')
    if not 0 <= self.t_min < self.t_max <= 1:
      raise UserError(
        f'Timestep density: need 0 <= t_min < t_max <= 1, got {self.t_min} and {self.t_max}.'
      )

  def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws timesteps of a shape, float32."""
    if self.kind == 'uniform':
      return self._placed(jax.random.uniform(key, shape))
    return self._placed(self._of_gaussian(jax.random.normal(key, shape)))

  def quantiles(self, count: int) -> jax.Array:
    """The midpoints of `count` equally likely parts, (count,) float32, for means under it."""
    share = (jnp.arange(count, dtype=jnp.float32) + 0.5) / count
    if self.kind == 'uniform':
      return self._placed(share)
    return self._placed(self._of_gaussian(jax.scipy.special.ndtri(share)))

  def _of_gaussian(self, normal: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(self.mean + self.std * normal)

  def _placed(self, t: jax.Array) -> jax.Array:
    return self.t_min + (self.t_max - self.t_min) * shift_timesteps(t, self.shift_mu)


def timestep_schedule(num_steps: int, mu: float = 0.0) -> jax.Array:
  """The solver's grid: (num_steps + 1,) float32 from 1 down to 0.

  Matches diffusers' FluxPipeline: sigmas linspace(1, 1/N, N), shifted, and a final 0.

  Raises:
    UserError: if num_steps is not positive, or mu beyond MAX_SHIFT_MU.
  """
  if num_steps < 1 or not abs(mu) <= MAX_SHIFT_MU:
    raise UserError(
      f'A schedule needs at least one step and a shift from {-MAX_SHIFT_MU:g} to '
      f'{MAX_SHIFT_MU:g}, got num_steps = {num_steps} and mu = {mu}.'
    )
  sigmas = np.linspace(1, 1 / num_steps, num_steps)
  return jnp.asarray(np.append(shift_timesteps(sigmas, mu), 0.0), jnp.float32)


def _steps(schedule: jax.Array) -> tuple[jax.Array, jax.Array]:
  if schedule.ndim != 1 or schedule.shape[0] < 2:
    raise UserError(
      f'The schedule has shape {schedule.shape} but must be (num_steps + 1,), falling from 1 to 0.'
    )
  return schedule[:-1], schedule[1:]


def euler_ode(
  velocity_fn: VelocityFn,
  x_T: jax.Array,
  schedule: jax.Array,
  conditioning: Conditioning,
  *,
  return_trajectory: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Integrates dx/dt = v from noise to data with Euler's method.

  Args:
    velocity_fn: the field.
    x_T: (B, ...) start noise.
    schedule: (N + 1,) falling from 1 to 0.
    conditioning: passed to the field.
    return_trajectory: also return the states at the start of each step.

  Returns:
    x_0 (B, ...) float32, or (x_0, states (N, B, ...)); state n belongs to schedule[n].

  Raises:
    UserError: if the schedule is no vector of at least two times.
  """

  def step(x, times):
    t, t_next = times
    v = velocity_fn(x, jnp.full(x.shape[:1], t, jnp.float32), conditioning)
    return x + (t_next - t) * v.astype(jnp.float32), x if return_trajectory else None

  x_0, states = jax.lax.scan(step, x_T.astype(jnp.float32), _steps(schedule))
  return (x_0, states) if return_trajectory else x_0


def sde_step(
  x_t: jax.Array,
  v: jax.Array,
  t: jax.Array,
  t_next: jax.Array,
  noise_level: float,
  t_clamp: float,
) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation of one step of the marginal-preserving SDE.

  Flow-GRPO (Liu et al., 2025): sigma_t = a sqrt(t / (1 - t)), with drift
  v + sigma^2 / (2 t) (x + (1 - t) v), which leaves the flow's marginals unchanged.

  Args:
    x_t: (B, ...) state.
    v: (B, ...) velocity there.
    t: time of the state, () or anything that broadcasts against it.
    t_next: time to go to, below t, shaped like t.
    noise_level: a.
    t_clamp: stands in for t in sigma where t = 1, whose noise would be infinite; Flow-GRPO uses
      the schedule's second entry.

  Returns:
    (mean (B, ...), std shaped like t) of x at t_next; std is 0 for the step that ends at 0.
  """
  dt = t_next - t
  sigma = noise_level * jnp.sqrt(t / (1 - jnp.where(t >= 1, t_clamp, t)))
  # The last step is deterministic: noise on the finished sample would only be seen as noise.
  sigma = jnp.where(t_next <= 0, 0.0, sigma)
  variance = jnp.square(sigma)
  mean = x_t * (1 + variance / (2 * t) * dt) + v * (1 + variance * (1 - t) / (2 * t)) * dt
  return mean, sigma * jnp.sqrt(-dt)


def cps_step(
  x_t: jax.Array,
  v: jax.Array,
  t: jax.Array,
  t_next: jax.Array,
  noise_level: float,
) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation of one coefficients-preserving step.

  Wang & Yu, Coefficients-Preserving Sampling (arXiv 2509.05952), with Flow-GRPO's angle: of the
  noise that belongs into x at t_next, the part t_next sin(a pi / 2) is drawn anew and
  t_next cos(a pi / 2) is the predicted one. So the sample never carries more noise than its time
  says, which `sde_step` does at finite steps. For data at one point all marginals are exact.

  Args:
    x_t, v, t, t_next: as in `sde_step`.
    noise_level: a in [0, 1]; 0 is the Euler step, 1 forgets the noise at every step.

  Returns:
    (mean (B, ...), std shaped like t) of x at t_next; std is 0 for the step that ends at 0.
  """
  angle = noise_level * math.pi / 2
  predicted_x0, predicted_noise = x_t - t * v, x_t + (1 - t) * v
  mean = (1 - t_next) * predicted_x0 + t_next * math.cos(angle) * predicted_noise
  return mean, t_next * math.sin(angle)


@dataclasses.dataclass(frozen=True)
class Dynamics:
  """How a sampler injects noise: the Gaussian policy that policy gradients differentiate.

  Attributes:
    kind: 'sde' (`sde_step`) or 'cps' (`cps_step`).
    noise_level: a of those; Flow-GRPO uses 0.7 to 0.9 of 'sde' and 0.8 of 'cps'.
  """

  kind: str = 'sde'
  noise_level: float = 0.7

  def __post_init__(self):
    if self.kind not in ('sde', 'cps'):
      raise UserError(f"Unknown sampler dynamics {self.kind!r}: choose 'sde' or 'cps'.")
    limit = math.inf if self.kind == 'sde' else 1.0
    if not (0 <= self.noise_level <= limit and math.isfinite(self.noise_level)):
      upper = '' if self.kind == 'sde' else ' and at most one'
      raise UserError(
        f'The noise level of {self.kind} dynamics is {self.noise_level} but must be zero or more'
        f'{upper}.'
      )

  def step(
    self, x_t: jax.Array, v: jax.Array, t: jax.Array, t_next: jax.Array, t_clamp: jax.Array | float
  ) -> tuple[jax.Array, jax.Array]:
    """(mean, std) of x at t_next; arguments as in `sde_step`."""
    if self.kind == 'sde':
      return sde_step(x_t, v, t, t_next, self.noise_level, t_clamp)
    return cps_step(x_t, v, t, t_next, self.noise_level)


def gaussian_log_prob(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
  """log N(x; mean, std^2) averaged (not summed) over all but the batch axis: (B,) float32."""
  z = (x.astype(jnp.float32) - mean) / std
  log_prob = -0.5 * jnp.square(z) - jnp.log(std) - 0.5 * math.log(2 * math.pi)
  return jnp.mean(log_prob, axis=tuple(range(1, x.ndim)))


def euler_sde(
  key: jax.Array,
  velocity_fn: VelocityFn,
  x_T: jax.Array,
  schedule: jax.Array,
  conditioning: Conditioning,
  *,
  noise_level: float,
  dynamics: str = 'sde',
  return_trajectory: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Euler-Maruyama on the SDE of `sde_step`, or steps of `cps_step`; noise_level 0 is `euler_ode`.

  sigma of the SDE is singular at t = 1, so the marginals are approached only like N^-min(a^2, 1)
  in the number of steps N (derived here, for normal data).

  Args:
    key: randomness.
    velocity_fn, x_T, schedule, conditioning, return_trajectory: as in `euler_ode`.
    noise_level: a of `sde_step` or `cps_step`.
    dynamics: 'sde' or 'cps', see `Dynamics`.

  Returns:
    As `euler_ode`.

  Raises:
    UserError: if the noise level is out of range, the dynamics unknown, or the schedule no vector
      of two or more times.
  """
  transition = Dynamics(dynamics, noise_level)
  intervals = _steps(schedule)
  t_clamp = schedule[1]

  def step(x, inputs):
    t, t_next, key = inputs
    v = velocity_fn(x, jnp.full(x.shape[:1], t, jnp.float32), conditioning)
    mean, std = transition.step(x, v.astype(jnp.float32), t, t_next, t_clamp)
    noise = jax.random.normal(key, x.shape, jnp.float32)
    return mean + std * noise, x if return_trajectory else None

  keys = jax.random.split(key, schedule.shape[0] - 1)
  x_0, states = jax.lax.scan(step, x_T.astype(jnp.float32), (*intervals, keys))
  return (x_0, states) if return_trajectory else x_0


def concatenate_conditionings(*parts: Conditioning) -> Conditioning:
  """Joins conditionings along the batch; where only some have a mask, the others attend to all.

  Raises:
    UserError: if lengths or widths differ, or only some have pooled vectors.
  """
  shapes = {(c.tokens.shape[1:], None if c.pooled is None else c.pooled.shape[1:]) for c in parts}
  if len(shapes) > 1:
    raise UserError(
      f'Conditionings of one batch differ in (tokens, pooled) shape, {sorted(map(str, shapes))}: '
      'encode all prompts with the same encoders and length.'
    )
  if any(c.mask is not None for c in parts):
    parts = [
      c.replace(mask=jnp.ones(c.tokens.shape[:2], bool)) if c.mask is None else c for c in parts
    ]
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def classifier_free_guidance(
  velocity_fn: VelocityFn, null: Conditioning, scale: float
) -> VelocityFn:
  """v_null + scale (v - v_null), in one call on a doubled batch.

  Ho & Salimans, Classifier-Free Diffusion Guidance (2022).

  Args:
    velocity_fn: the conditional field.
    null: conditioning of the empty prompt, batch size 1, shaped like the prompts' otherwise.
    scale: guidance scale; 1 returns the field itself.

  Returns:
    The guided field.

  Raises:
    UserError: if the scale is negative, or, in a call, null does not fit the prompts.
  """
  if not 0 <= scale < math.inf:
    raise UserError(f'The guidance scale is {scale} but must be zero or more.')
  if scale == 1:
    return velocity_fn

  def guided(x_t: jax.Array, t: jax.Array, conditioning: Conditioning) -> jax.Array:
    empty = jax.tree.map(lambda n: jnp.broadcast_to(n, (x_t.shape[0], *n.shape[1:])), null)
    both = concatenate_conditionings(conditioning, empty)
    v = velocity_fn(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
    conditional, unconditional = jnp.split(v.astype(jnp.float32), 2)
    return unconditional + scale * (conditional - unconditional)

  return guided
