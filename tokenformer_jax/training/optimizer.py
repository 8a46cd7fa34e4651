"""AdamW as released, with learning-rate schedules and a beginning of their own for grown rows."""

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.config import OptimizerConfig
from tokenformer_jax.nn.parameters import Tree


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Learning rate of the update after `count` earlier ones, for a run of `num_steps` updates."""
  peak, floor, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
  rise = optax.linear_schedule(0.0, peak, warmup)
  if config.schedule == "warmup_cosine":
    fall = optax.cosine_decay_schedule(peak, max(num_steps - warmup, 1), alpha=floor / peak)
    return optax.join_schedules([rise, fall], [warmup])
  if not config.decay_steps:
    return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
  fall_from = max(num_steps - config.decay_steps, warmup)
  fall = optax.linear_schedule(peak, floor, config.decay_steps)
  return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, fall_from])


def make_optimizer(config: OptimizerConfig, num_steps: int, growth_warmup_steps: int,
                   axes: Tree) -> optax.GradientTransformationExtraArgs:
  """AdamW: clip by global norm, Adam, new rows' factor, decoupled decay, learning rate.

  Decay falls on embeddings and parameter tokens and not on the norm's scale and bias.

  Args:
    axes: the parameters' logical axes.

  Its `update` takes `born`, see `scale_new_rows`.
  """
  decays = jax.tree.map(lambda a: a != ("norm",), axes, is_leaf=_is_axes)
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.scale_by_adam(config.beta1, config.beta2, config.eps),
      scale_new_rows(axes, growth_warmup_steps, config.beta1, config.beta2),
      optax.add_decayed_weights(config.weight_decay, mask=decays),
      optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
  )


def scale_new_rows(axes: Tree, warmup_steps: int, beta1: float, beta2: float
                   ) -> optax.GradientTransformationExtraArgs:
  """Gives rows born by growth Adam's bias correction by their own age, and a linear warm-up.

  Their moments begin at zero under a step count that is already large, so that Adam's own
  correction is spent: uncorrected, their first steps reach 6.1 × the learning rate at β₂ = 0.999.

  `update` takes `born`: a tree like the parameters, with the count of updates before each row was
  added, int32 [N] where there is a `param_token` axis and [] elsewhere; 0 for rows of the start.
  """
  def update(updates, count, params=None, *, born):
    del params
    count += 1
    t = count.astype(jnp.float32)

    def factor(born):
      age = t - born
      own = jnp.sqrt(1 - beta2**age) / (1 - beta1**age)
      spent = jnp.sqrt(1 - beta2**t) / (1 - beta1**t)
      rise = jnp.minimum(age / max(warmup_steps, 1), 1.0)
      return jnp.where(born > 0, rise * own / spent, 1.0)

    return jax.tree.map(lambda u, b, a: u * along_param_token(factor(b), a), updates, born, axes), count

  return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([], jnp.int32), update)


def along_param_token(rows: jax.Array, axes: tuple) -> jax.Array:
  """`rows` [N] shaped to broadcast along the `param_token` axis of a leaf with `axes`; [] as it is."""
  return rows if rows.ndim == 0 else rows.reshape([-1 if a == "param_token" else 1 for a in axes])


def _is_axes(node) -> bool:
  return isinstance(node, tuple)
