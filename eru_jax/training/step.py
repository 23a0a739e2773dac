"""Compiled steps: prepare examples (rollouts), update parameters, refresh the rollout policy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from eru_jax.training.state import (
  OptimizerConfig,
  TrainState,
  apply_gradients,
  interpolate_trees,
)

PyTree = Any
# (params, frozen, examples, key, step) -> (loss, measurements)
LossFn = Callable[[PyTree, PyTree, PyTree, jax.Array, jax.Array], tuple[jax.Array, dict]]
# (policy params, frozen, batch, key) -> (examples, measurements)
PrepareFn = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[PyTree, dict]]
# (what was prepared, what the host found of it) -> (examples, measurements)
RateFn = Callable[[PyTree, PyTree], tuple[PyTree, dict]]


@dataclasses.dataclass(frozen=True)
class StageProgram:
  """What a stage is, as pure functions; `compile_stage` makes it run.

  Attributes:
    loss: the objective of one microbatch.
    prepare: turns a batch into training examples under the rollout policy, or None where the
      batch already is the examples. Its examples' leading axes must divide by
      updates_per_batch * accumulation.
    host: what is done with the prepared batch on the host, and may take its time there; None for
      nothing. Every process calls it, and returns the same numpy arrays.
    rate: with `host`: makes the examples of what was prepared and what `host` returned.
    updates_per_batch: parameter updates made from one prepared batch.
    accumulation: microbatches whose gradients are averaged into one update.
    behaviour_rate: step -> weight with which the rollout policy moves to the parameters after
      an iteration, or None if rollouts are not made by a policy of their own. With one, the loss
      finds the policy's parameters as frozen['policy'].
    optimizer: (its config, number of updates) -> the optimiser of the trainable parameters.
  """

  loss: LossFn
  prepare: PrepareFn | None = None
  host: Callable[[PyTree], PyTree] | None = None
  rate: RateFn | None = None
  updates_per_batch: int = 1
  accumulation: int = 1
  behaviour_rate: Callable[[jax.Array], jax.Array] | None = None
  optimizer: Callable[[OptimizerConfig, int], optax.GradientTransformation] = OptimizerConfig.build


@dataclasses.dataclass(frozen=True)
class CompiledStage:
  """An iteration of several compiled functions; calling it runs them.

  Attributes:
    prepare: (policy, frozen, batch, key) -> (examples by update, measurements); with `host`,
      whatever it looks at instead of examples.
    update: (state, frozen, examples by update, index, key) -> (state, measurements).
    finish: state -> state.
    updates: how often `update` runs.
    host: what was prepared -> what is found of it outside compiled code, or None.
    rate: (what was prepared, what was found) -> (examples by update, measurements), or None.
  """

  prepare: Callable
  update: Callable
  finish: Callable
  updates: int
  host: Callable | None = None
  rate: Callable | None = None

  def __call__(
    self, state: TrainState, frozen: PyTree, batch: PyTree, key: jax.Array
  ) -> tuple[TrainState, dict]:
    roll_key, update_key = jax.random.split(jax.random.fold_in(key, state.step))
    parts, measurements = self.prepare(policy_of(state), frozen, batch, roll_key)
    if self.host is not None:
      parts, rated = self.rate(parts, self.host(parts))
      measurements = {**measurements, **rated}
    history = []
    for index in range(self.updates):
      state, current = self.update(state, frozen, parts, index, update_key)
      history.append(current)
    averaged = jax.tree.map(lambda *values: sum(values) / len(values), *history)
    return self.finish(state), {**measurements, **averaged}


def policy_of(state: TrainState) -> PyTree:
  """The parameters that make rollouts."""
  return state.behaviour if state.behaviour is not None else state.params


def split_leading(tree: PyTree, parts: int) -> PyTree:
  """Reshapes every (N, ...) leaf to (parts, N / parts, ...), all devices sharing each part."""

  def split(x):
    x = x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
    # Left to itself, a mesh that splits N splits the parts, and gathers each as its turn comes.
    return nn.with_logical_constraint(x, (None, 'batch', *[None] * (x.ndim - 2)))

  return jax.tree.map(split, tree)


def joined_leading(tree: PyTree) -> PyTree:
  """The inverse of `split_leading`."""

  def join(x):
    x = x.reshape(-1, *x.shape[2:])
    return nn.with_logical_constraint(x, ('batch', *[None] * (x.ndim - 1)))

  return jax.tree.map(join, tree)


def accumulated_gradients(
  loss: LossFn,
  params: PyTree,
  frozen: PyTree,
  examples: PyTree,
  key: jax.Array,
  step: jax.Array,
  accumulation: int,
) -> tuple[jax.Array, dict, PyTree]:
  """Loss, measurements and gradients averaged over `accumulation` microbatches in turn."""
  grad_fn = jax.value_and_grad(loss, has_aux=True)
  if accumulation == 1:
    (value, aux), grads = grad_fn(params, frozen, examples, key, step)
    return value, aux, grads

  def body(total, inputs):
    microbatch, key = inputs
    out = grad_fn(params, frozen, microbatch, key, step)
    return jax.tree.map(jnp.add, total, out), None

  inputs = (split_leading(examples, accumulation), jax.random.split(key, accumulation))
  first = jax.tree.map(lambda x: x[0], inputs)
  shapes = jax.eval_shape(lambda i: grad_fn(params, frozen, i[0], i[1], step), first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, _ = jax.lax.scan(body, zeros, inputs)
  (value, aux), grads = jax.tree.map(lambda x: x / accumulation, total)
  return value, aux, grads


def compile_stage(
  program: StageProgram,
  optimizer: optax.GradientTransformation,
  ema_decay: float,
  state_sharding: PyTree | None = None,
) -> Callable[[TrainState, PyTree, PyTree, jax.Array], tuple[TrainState, dict]]:
  """Returns `iterate(state, frozen, batch, key) -> (state, measurements)`, jitted inside.

  It is one jitted function where an iteration is one, else a CompiledStage.

  The state is donated. `key` is the stage's key; each iteration folds its step number in, so an
  iteration depends on the state and the batch alone, and a resumed run repeats it exactly.
  """
  keep_layout = state_sharding is not None
  out = {'out_shardings': (state_sharding, None)} if keep_layout else {}
  out_state = {'out_shardings': state_sharding} if keep_layout else {}

  def update(state, frozen, examples, key):
    if program.behaviour_rate is not None:
      frozen = {**frozen, 'policy': state.behaviour}
    loss, aux, grads = accumulated_gradients(
      program.loss, state.params, frozen, examples, key, state.step, program.accumulation
    )
    state, measurements = apply_gradients(state, grads, loss, optimizer, ema_decay)
    return state, {'loss': loss, **aux, **measurements}

  def finish(state):
    behaviour = state.behaviour
    if program.behaviour_rate is not None:
      rate = program.behaviour_rate(state.step)
      behaviour = interpolate_trees(behaviour, state.params, rate)
    return state.replace(step=state.step + 1, behaviour=behaviour)

  def single(state, frozen, batch, key):
    state, measurements = update(state, frozen, batch, jax.random.fold_in(key, state.step))
    return finish(state), measurements

  if program.prepare is None and program.updates_per_batch == 1:
    return jax.jit(single, donate_argnums=0, **out)

  def prepare(policy, frozen, batch, key):
    prepared, measurements = program.prepare(policy, frozen, batch, key)
    if program.host is not None:
      return prepared, measurements
    return split_leading(prepared, program.updates_per_batch), measurements

  def rate(prepared, found):
    examples, measurements = program.rate(prepared, found)
    return split_leading(examples, program.updates_per_batch), measurements

  def update_part(state, frozen, parts, index, key):
    key = jax.random.fold_in(key, index)
    return update(state, frozen, jax.tree.map(lambda x: x[index], parts), key)

  return CompiledStage(
    jax.jit(prepare),
    jax.jit(update_part, donate_argnums=0, **out),
    jax.jit(finish, donate_argnums=0, **out_state),
    program.updates_per_batch,
    program.host,
    jax.jit(rate),
  )
