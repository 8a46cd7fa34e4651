"""The optimizer of a run: AdamW, Lion or Muon from optax, with factors for rows that growth added."""

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from tokenformer_jax.config import GrowthConfig, OptimizerConfig
from tokenformer_jax.nn.parameters import Axes, Tree, is_matrix
from tokenformer_jax.training.layer_rates import scale_layers
from tokenformer_jax.training.new_rows import scale_by_adam_of_rows, scale_rows
from tokenformer_jax.training.schedules import learning_rate_schedule
from tokenformer_jax.training.weight_average import average_weights

# Root mean square of an entry of Muon's update, which is about that of AdamW's (arXiv 2502.16982, section 2.2).
_MUON_RMS = 0.2


def make_optimizer(
  config: OptimizerConfig, num_steps: int, growth: GrowthConfig, axes: Tree, decayed: Tree
) -> optax.GradientTransformationExtraArgs:
  """Clipping by global norm, the optimizer's direction, decoupled decay, learning rate, and factors for new rows.

  Args:
    config: which optimizer, and its settings.
    num_steps: length of the run in updates.
    growth: warm-up and rates of the rows that growth adds.
    axes: the parameters' logical axes, a tree of tuples of names.
    decayed: which parameters are decayed, a tree of booleans: what they declare themselves.

  Returns:
    A transformation whose `update` takes `born` and `step` too, see `new_rows`.

  Raises:
    ValueError: see `learning_rate_schedule`.
  """
  # The order is that of the state in checkpoints: parts with a state must keep their places.
  parts = [
    optax.clip_by_global_norm(config.clip_norm),
    _direction(config, axes),
    optax.add_decayed_weights(config.weight_decay, mask=decayed),
    optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)),
    scale_rows(axes, growth.warmup_steps, growth.new_rows_rate, growth.old_rows_rate),
  ]
  if config.layer_decay != 1:
    parts[-1] = scale_layers(parts[-1], config.layer_decay)
  if config.ema_decay:
    parts.append(average_weights(config.ema_decay))
  return optax.chain(*parts)


def _direction(config: OptimizerConfig, axes: Tree) -> optax.GradientTransformation:
  """From gradients to updates before decay and learning rate, for the optimizer that `config` names."""
  if config.name == "lion":
    # Each entry of an update is a sign: a new row needs no bias correction, only its warm-up.
    return optax.scale_by_lion(config.beta1, config.beta2, mu_dtype=config.first_moment_dtype)
  if config.name == "muon":
    return _muon(config, axes)
  return scale_by_adam_of_rows(
    axes, config.beta1, config.beta2, config.eps, config.first_moment_dtype, config.second_moment_dtype
  )


def _muon(config: OptimizerConfig, axes: Tree) -> optax.GradientTransformation:
  """Muon for the matrices of the blocks, those of each layer by themselves, and Adam for all other parameters.

  Newton-Schulz orthogonalises all rows together, so new rows have no bias correction of their own, only their warm-up.
  """

  def dimensions(names: Axes):
    if not is_matrix(names):
      return optax.MaskedNode()
    return contrib.MuonDimensionNumbers(len(names) - 2, len(names) - 1)

  def to_size_of_adamw(update):
    if isinstance(update, optax.MaskedNode):
      return update
    return _MUON_RMS * jnp.sqrt(max(update.shape[-2:])) * update

  def scale_by_size(updates, params=None):
    del params
    return jax.tree.map(to_size_of_adamw, updates, is_leaf=lambda node: isinstance(node, optax.MaskedNode))

  muon = contrib.scale_by_muon(
    beta=config.beta1,
    eps=config.eps,
    mu_dtype=config.first_moment_dtype,
    weight_dimension_numbers=_map_axes(dimensions, axes),
  )
  return optax.partition(
    {
      "muon": optax.chain(muon, optax.stateless(scale_by_size)),
      "adam": optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=config.first_moment_dtype),
    },
    _map_axes(lambda names: "muon" if is_matrix(names) else "adam", axes),
  )


def _map_axes(function, axes: Tree) -> Tree:
  """`function` of the names of every parameter's axes."""
  return jax.tree.map(function, axes, is_leaf=lambda node: isinstance(node, tuple))
