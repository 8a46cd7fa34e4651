"""Adam for parameters whose rows were not all born at the same step.

Rows added by growth have moments that begin at zero, in the midst of a run. Under Adam's bias correction
for the whole run, which is spent by then, their first steps reach 6.1 × the learning rate at β₂ = 0.999.
"""

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.nn.parameters import Tree


def scale_by_adam_of_rows(axes: Tree, beta1: float, beta2: float, eps: float, warmup_steps: int
                          ) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam`, but rows added by growth have a bias correction of their own, and a warm-up.

  A new row gets the update of an Adam that began with it, times age / `warmup_steps` until that is 1.
  Rows of the start get optax's to the bit. The state is `optax.ScaleByAdamState`.

  `update` takes `born`: a tree like the parameters, with the count of updates before each row was
  added, int32 [N] where there is a `param_token` axis and [] elsewhere; 0 for rows of the start.

  Args:
    axes: the parameters' logical axes.
  """
  adam = optax.scale_by_adam(beta1, beta2, eps)

  def update(gradients, state, params=None, *, born):
    del params
    adams, state = adam.update(gradients, state)

    def update_rows(adams, mean, square, born, axes):
      if "param_token" not in axes:
        return adams
      born = born.reshape([-1 if axis == "param_token" else 1 for axis in axes])
      age = state.count - born
      own = mean / (1 - beta1**age) / (jnp.sqrt(square / (1 - beta2**age)) + eps)
      return jnp.where(born > 0, jnp.minimum(age / max(warmup_steps, 1), 1.0) * own, adams)

    return jax.tree.map(update_rows, adams, state.mu, state.nu, born, axes), state

  return optax.GradientTransformationExtraArgs(adam.init, update)
