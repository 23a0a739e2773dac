"""The training state, the optimiser, and one guarded parameter update."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from eru_jax.errors import UserError

PyTree = Any


@flax.struct.dataclass
class TrainState:
  """Everything a stage changes as it trains, and so all that a checkpoint holds.

  Attributes:
    step: () int32, iterations done.
    params: the trainable parameters: an adapter, or a whole network.
    ema: exponential moving average of params; what is evaluated and handed to the next stage.
    opt_state: the optimiser's state.
    behaviour: the policy that makes rollouts (NO-RL's slowly following old policy), else None.
    updates: () int32, parameter updates made; an iteration may hold several.
    skipped: () int32, updates skipped because of a non-finite loss or gradient, in a row.
  """

  step: jax.Array
  params: PyTree
  ema: PyTree
  opt_state: PyTree
  behaviour: PyTree | None
  updates: jax.Array
  skipped: jax.Array


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW or Muon, with linear warm-up and an optional cosine decay.

  Attributes:
    algorithm: 'adamw', or 'muon' (Jordan et al. 2024): matrices move along their orthogonalised
      momentum, scaled to the root mean square of an AdamW step (Liu et al., arXiv 2502.16982), so
      that learning rates carry over; biases, scales and convolutions take AdamW steps.
    learning_rate: peak learning rate.
    warmup_steps: updates of linear warm-up.
    decay: 'constant' or 'cosine' (to zero at the stage's last update).
    b1: AdamW's first-moment decay. Muon's momentum has its usual 0.95.
    b2: AdamW's second-moment decay.
    newton_schulz_steps: iterations of Muon's orthogonalisation; with fewer, small singular values
      stay small, and a step of a small network takes visibly less time.
    moments: 'float32', or 'bfloat16' for the first moment (Muon's momentum, too): of a large
      network, a tenth of what training holds.
    weight_decay: decoupled weight decay, on matrices only.
    clip_norm: gradients are scaled down to this global norm.
    ema_decay: asymptotic decay of the parameter average; warmed up as (1 + n) / (10 + n).
  """

  algorithm: str = 'adamw'
  learning_rate: float = 1e-4
  warmup_steps: int = 0
  decay: str = 'constant'
  b1: float = 0.9
  b2: float = 0.999
  newton_schulz_steps: int = 5
  moments: str = 'float32'
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  ema_decay: float = 0.99

  def __post_init__(self):
    rules = {
      'algorithm': (self.algorithm in ('adamw', 'muon'), "'adamw' or 'muon'"),
      'learning_rate': (self.learning_rate > 0, 'positive'),
      'warmup_steps': (self.warmup_steps >= 0, 'zero or more'),
      'decay': (self.decay in ('constant', 'cosine'), "'constant' or 'cosine'"),
      'b1': (0 <= self.b1 < 1, 'in [0, 1)'),
      'b2': (0 <= self.b2 < 1, 'in [0, 1)'),
      'moments': (self.moments in ('float32', 'bfloat16'), "'float32' or 'bfloat16'"),
      'newton_schulz_steps': (self.newton_schulz_steps >= 1, 'at least 1'),
      'weight_decay': (self.weight_decay >= 0, 'zero or more'),
      'clip_norm': (self.clip_norm > 0, 'positive'),
      'ema_decay': (0 <= self.ema_decay < 1, 'in [0, 1)'),
    }
    for name, (valid, wanted) in rules.items():
      if not valid:
        raise UserError(f'optimizer.{name} is {getattr(self, name)!r} but must be {wanted}.')

  def build(self, num_updates: int) -> optax.GradientTransformation:
    """The optimiser for a stage of `num_updates` parameter updates."""
    if self.decay == 'cosine':
      schedule = optax.warmup_cosine_decay_schedule(
        0.0 if self.warmup_steps else self.learning_rate,
        self.learning_rate,
        self.warmup_steps,
        max(num_updates, self.warmup_steps + 1),
      )
    elif self.warmup_steps:
      schedule = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
    else:
      schedule = self.learning_rate
    # None keeps that of the parameters.
    moments = None if self.moments == 'float32' else self.moments
    if self.algorithm == 'muon':
      descend = optax.contrib.muon(
        schedule,
        ns_steps=self.newton_schulz_steps,
        mu_dtype=moments,
        weight_decay=self.weight_decay,
        adam_b1=self.b1,
        adam_b2=self.b2,
        muon_weight_dimension_numbers=_muon_axes,
        consistent_rms=_ADAMW_RMS,
      )
    else:
      descend = optax.adamw(
        schedule,
        self.b1,
        self.b2,
        mu_dtype=moments,
        weight_decay=self.weight_decay,
        mask=_matrices,
      )
    return optax.chain(optax.clip_by_global_norm(self.clip_norm), descend)


def _resting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """Leaves parameters and moments alone where the whole gradient is zero: momentum would not."""

  def update(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
    moves = optax.global_norm(grads) > 0
    updates, new_state = optimizer.update(grads, state, params)
    updates = jax.tree.map(lambda u: jnp.where(moves, u, 0), updates)
    return updates, jax.tree.map(lambda n, o: jnp.where(moves, n, o), new_state, state)

  return optax.GradientTransformation(optimizer.init, update)


def two_time_scales(
  config: OptimizerConfig, num_updates: int, per_round: int
) -> optax.GradientTransformation:
  """The optimiser of (student, critic), of which one learns at a time and the other rests.

  Args:
    config: of both.
    num_updates: updates of either.
    per_round: updates in a round, the last of which is the student's.
  """
  rounds = num_updates // per_round
  parts = _resting(config.build(rounds)), _resting(config.build(num_updates - rounds))

  def init(params: tuple) -> tuple:
    return tuple(part.init(p) for part, p in zip(parts, params, strict=True))

  def update(grads: tuple, state: tuple, params: tuple) -> tuple[tuple, tuple]:
    found = [part.update(*args) for part, *args in zip(parts, grads, state, params, strict=True)]
    updates, state = zip(*found, strict=True)
    return updates, state

  return optax.GradientTransformation(init, update)


# Root mean square of a typical AdamW update, before the learning rate.
_ADAMW_RMS = 0.2


def _matrices(params: PyTree) -> PyTree:
  """True for weights. By name, since biases and scales of stacked layers have two axes as well."""

  def is_matrix(path: tuple, parameter: jax.Array) -> bool:
    return parameter.ndim > 1 and getattr(path[-1], 'key', None) not in ('bias', 'scale')

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def _muon_axes(params: PyTree) -> PyTree:
  """Input and output axes of matrices (..., in, out), stacked over layers or not; else None."""

  def axes(parameter: jax.Array, matrix: bool) -> optax.contrib.MuonDimensionNumbers | None:
    if not matrix or parameter.ndim > 3:
      return None
    return optax.contrib.MuonDimensionNumbers(parameter.ndim - 2, parameter.ndim - 1)

  return jax.tree.map(axes, params, _matrices(params))


def init_state(
  params: PyTree, optimizer: optax.GradientTransformation, *, behaviour: bool = False
) -> TrainState:
  """A fresh state at step 0; `behaviour` adds a rollout policy that starts at params."""

  def copy() -> PyTree:
    return jax.tree.map(jnp.array, params)

  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=copy(),
    ema=copy(),
    opt_state=optimizer.init(params),
    behaviour=copy() if behaviour else None,
    updates=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
  )


def interpolate_trees(old: PyTree, new: PyTree, weight: jax.Array | float) -> PyTree:
  """(1 - weight) old + weight new, leaf by leaf, in the leaves' dtype."""
  return jax.tree.map(lambda a, b: (a + weight * (b - a)).astype(a.dtype), old, new)


def apply_gradients(
  state: TrainState,
  grads: PyTree,
  loss: jax.Array,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update of params and their average, or none at all if anything is not finite.

  Returns:
    The new state (step untouched: an iteration may hold several updates) and the measurements
    `grad_norm`, `update_norm`, `param_norm` and `skipped`.
  """
  grad_norm = optax.global_norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  # The average follows young parameters closely and old ones slowly.
  done = state.updates.astype(jnp.float32)
  decay = jnp.minimum(ema_decay, (1 + done) / (10 + done))
  ema = interpolate_trees(state.ema, params, 1 - decay)

  def keep(new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

  state = state.replace(
    params=keep(params, state.params),
    ema=keep(ema, state.ema),
    opt_state=keep(opt_state, state.opt_state),
    updates=state.updates + finite.astype(jnp.int32),
    skipped=jnp.where(finite, 0, state.skipped + 1).astype(jnp.int32),
  )
  measurements = {
    'grad_norm': grad_norm,
    'update_norm': optax.global_norm(updates),
    'param_norm': optax.global_norm(params),
    'skipped': state.skipped.astype(jnp.float32),
  }
  return state, measurements
