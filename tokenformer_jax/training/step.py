"""One update and one evaluation, as pure functions for `jax.jit`."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tokenformer_jax.nn.block import Said
from tokenformer_jax.training.loss import LossSums, loss_sums
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.tau import TauRule


def make_train_step(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformationExtraArgs,
  tau_rule: TauRule,
  schedule: optax.Schedule,
  z_loss: float,
  accumulation: int,
):
  """The function `(state, batch) -> (state, metrics)` of one update.

  The gradient is that of the mean loss over all tokens of the batch, however many micro-batches it is computed in.

  Args:
    graphdef: `nnx.merge(graphdef, params, tau)` is the model.
    optimizer: from `make_optimizer`.
    tau_rule: from `make_tau_rule`.
    schedule: the learning rate, for the metrics.
    z_loss: coefficient of the mean of log² Σ exp(logits).
    accumulation: number of micro-batches; it divides the rows of the batch.

  Returns:
    A function that takes a `TrainState` and a `data.Batch` of arrays [B, T]. Its metrics are `loss` (nats a token,
    without the z-loss), `grad_norm` (before clipping), `learning_rate` and what the blocks say (`nn.block.Said`), each
    float32 []. What a block says under a name that begins with `loss/` is added to the loss whose gradient is taken.
    Micro-batches count by the weight of their tokens.
  """

  def objective(params, tau, batch):
    loss, sums, said = _loss(graphdef, params, tau, batch, z_loss)
    for name, value in said.items():
      if name.startswith("loss/"):
        loss += value * sums.weight
    return loss, (sums, jax.tree.map(lambda value: value * sums.weight, said))

  trained = ("params", "tau") if tau_rule.learns else ("params",)
  gradients = jax.value_and_grad(objective, argnums=tuple(range(len(trained))), has_aux=True)

  def train_step(state: TrainState, batch):
    # A micro-batch takes every accumulation-th row, so that its rows lie on all devices like those of the batch.
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

    def add_micro_batch(total, micro_batch):
      (_, (sums, said)), grads = gradients(state.params, state.tau, micro_batch)
      return jax.tree.map(jnp.add, total, (grads, sums)), said

    zeros = (tuple(jax.tree.map(jnp.zeros_like, getattr(state, name)) for name in trained), LossSums(*jnp.zeros(3)))
    (grads, sums), said = jax.lax.scan(add_micro_batch, zeros, micro_batches)
    grads, *tau_grads = jax.tree.map(lambda g: g / sums.weight, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, born=state.born, step=state.step)
    tau, tau_opt_state = tau_rule.update(state.tau, *(tau_grads or [None]), state.tau_opt_state, state.born, state.step)
    metrics = {
      "loss": sums.nats / sums.weight,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": schedule(state.step),
      **{name: jnp.sum(values) / sums.weight for name, values in said.items()},
    }
    state = TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      tau=tau,
      opt_state=opt_state,
      tau_opt_state=tau_opt_state,
      born=state.born,
    )
    return state, metrics

  return train_step


def make_eval_step(graphdef: nnx.GraphDef):
  """The function `(params, tau, batch) -> LossSums` over the batch, without z-loss and gradients."""

  def eval_step(params, tau, batch):
    return _loss(graphdef, params, tau, batch, 0.0)[1]

  return eval_step


def _loss(graphdef, params, tau, batch, z_loss) -> tuple[jax.Array, LossSums, Said]:
  model = nnx.merge(graphdef, params, tau)
  hidden, said = model.hidden(batch.inputs, batch.positions, batch.segments)
  return *loss_sums(hidden, model.table(), batch.labels, batch.weights, z_loss), said
