"""Updates of parameters whose rows were not all born at the same step.

Rows added by growth have moments that begin at zero, in the midst of a run. Under Adam's bias correction
for the whole run, which is spent by then, their first steps reach 6.1 × the learning rate at β₂ = 0.999.
"""

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.nn.parameters import Tree


def scale_by_adam_of_rows(
  axes: Tree,
  beta1: float,
  beta2: float,
  eps: float,
  warmup_steps: int,
  first_moment_dtype: str = "float32",
  second_moment_dtype: str = "float32",
) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam`, but rows added by growth have a bias correction of their own, and a warm-up.

  A new row gets the update of an Adam that began with it, times age / `warmup_steps` until that is 1.
  Rows of the start get optax's to the bit. The state is `optax.ScaleByAdamState`.

  `update` takes `born`: a tree like the parameters, with the count of updates before each row was
  added, int32 [N] where there is a `param_token` axis and [] elsewhere; 0 for rows of the start.

  Args:
    axes: the parameters' logical axes.
    first_moment_dtype, second_moment_dtype: of the moments between updates.
  """
  adam = optax.scale_by_adam(beta1, beta2, eps, mu_dtype=first_moment_dtype)

  def with_squares_in(dtype, state):
    return state._replace(nu=optax.tree.cast(state.nu, dtype))

  def init(params):
    return with_squares_in(second_moment_dtype, adam.init(params))

  def update(gradients, state, params=None, *, born):
    del params
    adams, state = adam.update(gradients, with_squares_in(jnp.float32, state))

    def update_rows(adams, mean, square, born, axes):
      if "param_token" not in axes:
        return adams
      born = born.reshape([-1 if axis == "param_token" else 1 for axis in axes])
      age = state.count - born
      own = mean / (1 - beta1**age) / (jnp.sqrt(square / (1 - beta2**age)) + eps)
      return jnp.where(born > 0, jnp.minimum(age / max(warmup_steps, 1), 1.0) * own, adams)

    updates = jax.tree.map(update_rows, adams, state.mu, state.nu, born, axes)
    return updates, with_squares_in(second_moment_dtype, state)

  return optax.GradientTransformationExtraArgs(init, update)


def scale_rows(axes: Tree, new_rate: float, old_rate: float) -> optax.GradientTransformationExtraArgs:
  """After a growth, updates of the parameter tokens it added times `new_rate`, of those before times `old_rate`.

  `update` takes `born`, see `scale_by_adam_of_rows`. The state is empty.
  """

  def update(updates, state, params=None, *, born):
    del params
    last = last_birth(born)

    def scale(update, born, axes):
      if "param_token" not in axes:
        return update
      rate = jnp.where(last == 0, 1.0, jnp.where(born == last, new_rate, old_rate)).astype(update.dtype)
      return update * rate.reshape([-1 if axis == "param_token" else 1 for axis in axes])

    return jax.tree.map(scale, updates, born, axes), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def last_birth(born: Tree) -> jax.Array:
  """The step of the last growth, int32 []; 0 before any."""
  return jnp.max(jnp.stack([jnp.max(rows) for rows in jax.tree.leaves(born)]))
