"""An exponential moving average of the weights, kept as the distance of the weights from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.nn.parameters import Tree
from tokenformer_jax.training.state import TrainState

# The name of the field below in the paths of a checkpoint's leaves.
LAG = "lag"


class WeightAverageState(NamedTuple):
  """State of `average_weights`.

  Attributes:
    count: int32 [], updates done.
    lag: like the parameters: the weights minus their average. Growth gives new rows a lag of 0, so the average of a
      row that was just added is the row itself.
  """

  count: jax.Array
  lag: Tree


def average_weights(decay: float) -> optax.GradientTransformationExtraArgs:
  """The last transformation of a chain: changes no update and follows the weights with an average.

  The average after update n is d · (the average before) + (1 − d) · (the weights), with d = min(decay, n / (n + 9)), so
  that the initial weights are soon forgotten. For the distance of the weights from it, that is
  lag = d · (lag + update); this needs neither the weights nor a copy of them.
  """

  def init(params):
    return WeightAverageState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

  def update(updates, state, params=None, **_):
    del params
    count = state.count + 1
    d = jnp.minimum(decay, count / (count + 9))
    lag = jax.tree.map(lambda lag, update: d * (lag + update), state.lag, updates)
    return updates, WeightAverageState(count, lag)

  return optax.GradientTransformationExtraArgs(init, update)


def evaluation_params(state: TrainState) -> Tree:
  """The parameters that evaluations and samples use: the weights' average if the run keeps one, else the weights.

  Args:
    state: a training state. Its τ is not averaged; evaluations use it as it is.
  """
  average = state.opt_state[-1]
  if not isinstance(average, WeightAverageState):
    return state.params
  return jax.tree.map(jnp.subtract, state.params, average.lag)
