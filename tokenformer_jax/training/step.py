"""One update and one evaluation, as pure functions for `jax.jit`."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tokenformer_jax.training.objective import NEXT_TOKEN, Objective
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.tau import TauRule


def _all_finite(tree) -> jax.Array:
  """Whether all numbers of all leaves are finite, bool []; whole numbers always are."""
  leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in leaves], jnp.bool_(True))


def make_train_step(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformationExtraArgs,
  tau_rule: TauRule,
  schedule: optax.Schedule,
  z_loss: float,
  accumulation: int,
  checks_updates: bool = True,
  objective: Objective = NEXT_TOKEN,
):
  """The function `(state, batch) -> (state, metrics)` of one update.

  The gradient is that of the mean loss over all tokens or examples of the batch, however many micro-batches it is computed in.

  Args:
    graphdef: `nnx.merge(graphdef, params, tau)` is the model.
    optimizer: from `make_optimizer`.
    tau_rule: from `make_tau_rule`.
    schedule: the learning rate, for the metrics.
    z_loss: coefficient of the mean of log² Σ exp(logits).
    accumulation: number of micro-batches; it divides the rows of the batch.
    checks_updates: whether the new parameters and τ are looked at, for which the update is computed twice.
    objective: the loss of the model's task.

  Returns:
    A function that takes a `TrainState`, a batch of the task and `most_loss`, by default inf. Its metrics
    are `loss` (its mean, without the z-loss), `grad_norm` (before clipping), `learning_rate`, `skipped` and what the
    blocks say (`nn.block.Said`), each float32 []. What a block says under a name that begins with `loss/` is added to
    the loss whose gradient is taken. Micro-batches count by the weight of their tokens.

    `skipped` is 1 where the loss or the gradient is not finite, or with `checks_updates` a new parameter or τ, or where
    the loss is above `most_loss`: the state then stays as it was, except for the step, the schedule's count of it, and a
    τ that a rule moves with the step.
  """

  def loss_and_sums(params, tau, batch):
    loss, sums, said = objective.loss(nnx.merge(graphdef, params, tau), batch, z_loss, True)
    for name, value in said.items():
      if name.startswith("loss/"):
        loss += value * sums.weight
    return loss, (sums, jax.tree.map(lambda value: value * sums.weight, said))

  trained = ("params", "tau") if tau_rule.learns else ("params",)
  gradients = jax.value_and_grad(loss_and_sums, argnums=tuple(range(len(trained))), has_aux=True)

  def train_step(state: TrainState, batch, most_loss=math.inf):
    # A micro-batch takes every accumulation-th row, so that its rows lie on all devices like those of the batch.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

    def add_micro_batch(total, micro_batch):
      (_, (sums, said)), grads = gradients(state.params, state.tau, micro_batch)
      return jax.tree.map(jnp.add, total, (grads, sums)), said

    zeros = (tuple(jax.tree.map(jnp.zeros_like, getattr(state, name)) for name in trained), objective.zeros())
    (totals, sums), said = jax.lax.scan(add_micro_batch, zeros, micro_batches)

    def updated(state: TrainState, grads, tau_grads) -> TrainState:
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params, born=state.born, step=state.step)
      tau, tau_opt_state = tau_rule.update(
        state.tau, *(tau_grads or [None]), state.tau_opt_state, state.born, state.step
      )
      return TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        tau=tau,
        opt_state=opt_state,
        tau_opt_state=tau_opt_state,
        born=state.born,
      )

    grads, *tau_grads = jax.tree.map(lambda g: g / sums.weight, totals)
    loss, grad_norm = sums.nats / sums.weight, optax.tree.norm(grads)
    is_good = jnp.isfinite(loss) & (loss <= most_loss) & jnp.isfinite(grad_norm) & _all_finite(tau_grads)
    if checks_updates:
      # Only this is kept of the update, which is computed again below: to keep it would take the memory of the state.
      new = updated(state, grads, tau_grads)
      is_good &= _all_finite((new.params, new.tau))
    metrics = {
      "loss": loss,
      "grad_norm": grad_norm,
      "learning_rate": schedule(state.step),
      "skipped": 1.0 - is_good.astype(jnp.float32),
      **{name: jnp.sum(values) / sums.weight for name, values in said.items()},
    }
    # The barrier keeps the two updates apart. There is no conditional around the second one, because XLA:CPU does not
    # keep the collectives of a branch in the same order on all processes.
    new = updated(*jax.lax.optimization_barrier((state, grads, tau_grads)))
    kept = _skipped(state)
    if not tau_rule.learns:  # Such a rule reads no gradient, and a step that it missed would be missing for ever.
      kept = dataclasses.replace(kept, tau=new.tau)
    return jax.tree.map(lambda new, kept: jnp.where(is_good, new, kept), new, kept), metrics

  return train_step


def make_eval_step(graphdef: nnx.GraphDef, objective: Objective = NEXT_TOKEN, training: bool = False):
  """The function `(params, tau, batch) -> objective.sums` over the batch, without z-loss and gradients.

  Args:
    graphdef, objective: as for `make_train_step`.
    training: whether routers choose as in an update (`nn.context.Context`).
  """

  def eval_step(params, tau, batch):
    return objective.loss(nnx.merge(graphdef, params, tau), batch, 0.0, training)[1]

  return eval_step


def _skipped(state: TrainState) -> TrainState:
  """The state after an update that was not done: only the step is counted, by the learning rates' schedules too."""

  def is_clock(node):
    return isinstance(node, optax.ScaleByScheduleState)

  def count(node):
    return node._replace(count=node.count + 1) if is_clock(node) else node

  opt_state, tau_opt_state = jax.tree.map(count, (state.opt_state, state.tau_opt_state), is_leaf=is_clock)
  return dataclasses.replace(state, step=state.step + 1, opt_state=opt_state, tau_opt_state=tau_opt_state)
