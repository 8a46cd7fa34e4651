"""τ after growth: kept, moved to the τ of a new layer, or learned (`GrowthConfig.tau`).

τ belongs to a layer and not to its rows. Exact growth leaves it as it was, while a layer that is initialised with as
many tokens has a larger one; `live` growth scales it to that at once. A layer whose tokens have not grown keeps its τ
under every rule. Growth by `method="duplicate"` scales τ with the number of tokens at once and adds no new rows (see
`new_rows`), so no rule acts after it unless the layer grew by another method before.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.config import Config
from tokenformer_jax.nn.parameters import Tree
from tokenformer_jax.nn.theta import initial_tau
from tokenformer_jax.training.schedules import learning_rate_schedule


class TauRule(NamedTuple):
  """What an update does to τ.

  Attributes:
    learns: whether `update` needs the gradients of τ.
    init: `tau -> state`.
    update: `(tau, gradients, state, born, step) -> (tau, state)`; step int32 [], the number of updates done before.
  """

  learns: bool
  init: Callable[[Tree], optax.OptState]
  update: Callable[..., tuple[Tree, optax.OptState]]


def make_tau_rule(config: Config) -> TauRule:
  """The rule that `config.growth.tau` names; `recomputed` acts in the growth itself, so that training keeps τ."""
  growth = config.growth
  if growth.tau == "learned":
    optimizer = optax.chain(
      optax.scale_by_adam(config.optimizer.beta1, config.optimizer.beta2, config.optimizer.eps),
      optax.scale_by_learning_rate(learning_rate_schedule(config.optimizer, config.training.num_steps)),
    )
    return TauRule(True, optimizer.init, lambda *args: _learned(optimizer, *args))
  if growth.tau == "moved":
    return TauRule(
      False,
      lambda tau: (),
      lambda tau, gradients, state, born, step: (moved(tau, born, step, growth.tau_steps, config.model.theta), state),
    )
  return TauRule(False, lambda tau: (), lambda tau, gradients, state, born, step: (tau, state))


def moved(tau: Tree, born: Tree, step: jax.Array, num_steps: int, theta: str) -> Tree:
  """τ after update number `step`: from a layer's growth on, τ² moves in `num_steps` equal steps to the layer's N.

  The start of the move need not be stored, because each step takes its share of the remaining distance.

  Args:
    tau: scales [layer], at the leaves `…/tau`.
    born: births of rows, int32 [N], at the leaves `…/keys` beside them.
    step: int32 [], the number of updates done before.
    num_steps: length of the move in updates.
    theta: the model's Θ, which decides the τ of a new layer.
  """

  def move(tau, births):
    target = jnp.float32(initial_tau(theta, births.shape[0]))
    grown = jnp.max(births)
    left = grown + num_steps - step
    square = jnp.square(tau)
    nearer = jnp.where(left == 1, target, jnp.sqrt(square + (target**2 - square) / jnp.maximum(left, 1)))
    return jnp.where((grown > 0) & (left >= 1), nearer, tau)

  return jax.tree.map(move, tau, _births_of_keys(tau, born))


def _learned(optimizer, tau, gradients, state, born, step):
  """Adam on log τ, for layers that have grown."""
  del step
  updates, state = optimizer.update(jax.tree.map(jnp.multiply, tau, gradients), state)

  def learn(tau, update, births):
    return jnp.where(jnp.max(births) > 0, tau * jnp.exp(update), tau)

  return jax.tree.map(learn, tau, updates, _births_of_keys(tau, born)), state


def _births_of_keys(tau: Tree, born: Tree) -> Tree:
  """A tree like `tau` whose leaves are the births of the keys beside each τ."""
  if "tau" in tau:
    return {"tau": born["keys"]}
  return {name: _births_of_keys(tau[name], born[name]) for name in tau}
