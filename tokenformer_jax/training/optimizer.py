"""AdamW as released, with learning-rate schedules; rows of growth begin as `new_rows` says."""

import jax
import optax

from tokenformer_jax.config import GrowthConfig, OptimizerConfig
from tokenformer_jax.nn.parameters import Tree
from tokenformer_jax.training.new_rows import scale_by_adam_of_rows, scale_rows


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
  fall = optax.linear_schedule(peak, floor, num_steps - fall_from)
  return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, fall_from])


def make_optimizer(
  config: OptimizerConfig, num_steps: int, growth: GrowthConfig, axes: Tree
) -> optax.GradientTransformationExtraArgs:
  """AdamW: clip by global norm, Adam, decoupled decay, learning rate, and new and old rows' factors on it.

  Decay falls on embeddings and parameter tokens and not on the norm's scale and bias.

  Args:
    axes: the parameters' logical axes.

  Its `update` takes `born`, see `scale_by_adam_of_rows`.
  """
  decays = jax.tree.map(lambda a: a != ("norm",), axes, is_leaf=lambda node: isinstance(node, tuple))
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    scale_by_adam_of_rows(
      axes,
      config.beta1,
      config.beta2,
      config.eps,
      growth.warmup_steps,
      config.first_moment_dtype,
      config.second_moment_dtype,
    ),
    optax.add_decayed_weights(config.weight_decay, mask=decays),
    optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
    scale_rows(axes, growth.new_rows_rate, growth.old_rows_rate),
  )
