"""τ after growth: kept, moved to that of a new layer, or learned (`GrowthConfig.tau`).

τ belongs to a layer and not to its rows. Exact growth leaves it where it was; a model born with as many
tokens would have a larger one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.config import Config
from tokenformer_jax.nn.parameters import Tree
from tokenformer_jax.nn.theta import initial_tau
from tokenformer_jax.training.new_rows import last_birth
from tokenformer_jax.training.optimizer import learning_rate_schedule


class TauRule(NamedTuple):
  """What an update does to τ.

  Attributes:
    learns: whether `update` wants gradients.
    init: `tau -> state`.
    update: `(tau, gradients, state, born, step) -> (tau, state)`; step int32 [], updates done before.
  """

  learns: bool
  init: Callable[[Tree], optax.OptState]
  update: Callable[..., tuple[Tree, optax.OptState]]


def make_tau_rule(config: Config) -> TauRule:
  """The rule of run `config`."""
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
  """τ after update number `step`: τ² goes in equal steps, from a layer's growth on, to N after `num_steps`.

  Where it comes from need not be remembered: each step takes its share of what is left.

  Args:
    tau: scales [layer], at the leaves `…/tau`.
    born: rows' births, at the leaves `…/keys` beside them; a layer grew last when its youngest rows were born.
  """
  if "tau" not in tau:
    return {name: moved(tau[name], born[name], step, num_steps, theta) for name in tau}
  target = jnp.float32(initial_tau(theta, born["keys"].shape[0]))
  grown = jnp.max(born["keys"])
  left = grown + num_steps - step
  square = jnp.square(tau["tau"])
  nearer = jnp.where(left == 1, target, jnp.sqrt(square + (target**2 - square) / jnp.maximum(left, 1)))
  return {"tau": jnp.where((grown > 0) & (left >= 1), nearer, tau["tau"])}


def _learned(optimizer, tau, gradients, state, born, step):
  """Adam on log τ, once the model has grown."""
  del step
  steps, state = optimizer.update(jax.tree.map(jnp.multiply, tau, gradients), state)
  grown = last_birth(born) > 0
  return jax.tree.map(lambda t, by: jnp.where(grown, t * jnp.exp(by), t), tau, steps), state
