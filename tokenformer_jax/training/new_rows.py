"""Updates of parameters whose rows were not all added at the same step.

The moments of rows that growth adds begin at zero in the middle of a run. Adam's bias correction for the whole run has
vanished by then, so without a correction of their own the first updates of new rows would reach 6.1 × the learning
rate at β₂ = 0.999.

Every `update` here takes two extra arguments:

  born: a tree like the parameters with the number of updates that were done before each row was added: int32 [N] where
    a parameter has rows (`nn.parameters.row_axis`), int32 [] elsewhere; 0 for rows that were there from the start. Growth by
    `method="duplicate"` adds no new rows in this sense: its copies have the births, moments and rates of the rows that
    they were copied from, so they are neither warmed up nor do they slow the old rows down.
  step: int32 [], the number of updates done before this one.
"""

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.nn.parameters import Tree, row_axis


def scale_by_adam_of_rows(
  axes: Tree,
  beta1: float,
  beta2: float,
  eps: float,
  first_moment_dtype: str = "float32",
  second_moment_dtype: str = "float32",
) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam` with a separate bias correction for rows that growth added.

  A new row gets the update of an Adam that was started when the row was added. Updates that are skipped count in its age,
  which makes its first updates smaller, never larger. Rows that were there from the start get
  optax's update to the bit. The state is `optax.ScaleByAdamState`.

  Args:
    axes: the parameters' logical axes, a tree of tuples of names.
    beta1, beta2, eps: as in `optax.scale_by_adam`.
    first_moment_dtype, second_moment_dtype: types of the moments between updates.
  """
  adam = optax.scale_by_adam(beta1, beta2, eps, mu_dtype=first_moment_dtype)

  def with_second_moment_in(dtype, state):
    return state._replace(nu=optax.tree.cast(state.nu, dtype))

  def init(params):
    return with_second_moment_in(second_moment_dtype, adam.init(params))

  def update(gradients, state, params=None, *, born, step, **_):
    del params
    adams, state = adam.update(gradients, with_second_moment_in(jnp.float32, state))

    def update_rows(adams, mean, square, born, axes):
      if row_axis(axes) is None:
        return adams
      born = _along_tokens(born, axes)
      # Updates that were skipped are counted in the step, from which births are counted, and not in the state.
      age = step + 1 - born
      own = mean / (1 - beta1**age) / (jnp.sqrt(square / (1 - beta2**age)) + eps)
      return jnp.where(born > 0, own, adams)

    updates = jax.tree.map(update_rows, adams, state.mu, state.nu, born, axes)
    return updates, with_second_moment_in(second_moment_dtype, state)

  return optax.GradientTransformationExtraArgs(init, update)


def scale_rows(
  axes: Tree, warmup_steps: int, new_rate: float, old_rate: float
) -> optax.GradientTransformationExtraArgs:
  """Factors on the updates of parameter tokens, weight decay included. The state is empty.

  In a parameter that has grown, the rows of its latest growth have the factor `new_rate` and all others `old_rate`. The
  updates of those rows rise linearly to full size, the more slowly the more rows came at once: over
  `warmup_steps` · (new rows / rows before them) updates. A parameter that has not grown keeps its updates as they are.

  The priors of groups of tokens (`nn.token_groups`) are not trained: those of new groups rise from 0 to 1 in the same time.

  Args:
    axes: the parameters' logical axes, a tree of tuples of names.
    warmup_steps: length in updates of the warm-up of as many new rows as there were before; 0 for none.
    new_rate, old_rate: factors on the learning rate.
  """

  def update(updates, state, params=None, *, born, step, **_):
    params = updates if params is None else params  # Only priors need them.

    def scale(update, born, axes, param):
      if row_axis(axes) is None:
        return update
      latest = jnp.max(born)
      is_new = (born == latest) & (latest > 0)
      num_new = jnp.sum(is_new)
      rise = warmup_steps * num_new / jnp.maximum(born.size - num_new, 1)
      if axes[-1] == "token_group":
        risen = jnp.clip((step + 1 - born) / jnp.maximum(rise, 1.0), 0.0, 1.0)
        return jnp.maximum(_along_tokens(jnp.where(born > 0, risen, 1.0).astype(param.dtype), axes) - param, 0.0)
      warmup = jnp.minimum((step + 1 - latest) / jnp.maximum(rise, 1.0), 1.0)
      rate = jnp.where(is_new, new_rate * warmup, jnp.where(latest > 0, old_rate, 1.0))
      return update * _along_tokens(rate.astype(update.dtype), axes)

    return jax.tree.map(scale, updates, born, axes, params), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _along_tokens(rows: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """[N] as [1, …, N, …, 1], with N where a parameter with these axes has its rows."""
  return rows.reshape([-1 if index == row_axis(axes) else 1 for index in range(len(axes))])
