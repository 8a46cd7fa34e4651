"""The training state, and the sharding of each of its leaves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import replicated, tree_shardings
from tokenformer_jax.models.model_class import abstract_model, model_class
from tokenformer_jax.nn.parameters import Tree, logical_axes, row_axis, split
from tokenformer_jax.training.tau import TauRule


@functools.partial(
  jax.tree_util.register_dataclass,
  meta_fields=[],
  data_fields=["step", "params", "tau", "opt_state", "tau_opt_state", "born"],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that an update reads and writes. It has no random state: keys are folded from the seed and the step.

  Attributes:
    step: int32 [], the number of updates done.
    params: the float32 parameters.
    tau: the scale inside each Θ, float32 [layer].
    opt_state: the optimizer's state; with `ema_decay` its last part is the state of `weight_average`.
    tau_opt_state: the state of `tau.TauRule`; it has no leaves unless τ is learned.
    born: a tree like `params` with the number of updates done before each parameter token, or group of them, was added:
      int32 [N] where a parameter has rows, int32 [] elsewhere; 0 for those that were there from the start.
  """

  step: jax.Array
  params: Tree
  tau: Tree
  opt_state: optax.OptState
  tau_opt_state: optax.OptState
  born: Tree


def initial_state(
  config: ModelConfig, optimizer: optax.GradientTransformation, tau_rule: TauRule, seed: int
) -> TrainState:
  """The state of a run that starts from random parameters.

  Call it under `jax.jit` with `out_shardings`, so that no device ever holds a whole leaf that is to be split.
  """
  _, params, tau = split(model_class(config)(config, rngs=nnx.Rngs(seed)))
  return fresh_state(params, tau, logical_axes(abstract_model(config))[0], optimizer, tau_rule)


def fresh_state(
  params: Tree, tau: Tree, axes: Tree, optimizer: optax.GradientTransformation, tau_rule: TauRule
) -> TrainState:
  """The state of a run that starts from these parameters, before its first update.

  Args:
    params, tau: the model's, as `nn.parameters.split` returns them.
    axes: the parameters' logical axes.
    optimizer, tau_rule: those of the run.
  """

  def births(leaf, axes):
    axis = row_axis(axes)
    return jnp.zeros(() if axis is None else leaf.shape[axis], jnp.int32)

  return TrainState(
    step=jnp.int32(0),
    params=params,
    tau=tau,
    opt_state=optimizer.init(params),
    tau_opt_state=tau_rule.init(tau),
    born=jax.tree.map(births, params, axes),
  )


def state_shardings(
  mesh: jax.sharding.Mesh, config: ModelConfig, shapes: TrainState, optimizer: optax.GradientTransformation
) -> TrainState:
  """The sharding of every leaf of the state: moments have those of their parameters.

  Args:
    mesh: the devices.
    config: the model.
    shapes: the state's shapes, `jax.eval_shape(initial_state, …)`.
    optimizer: the optimizer that made the state.

  Raises:
    ValueError: the mesh does not divide a parameter.
  """
  param_axes, tau_axes = logical_axes(abstract_model(config))
  params = tree_shardings(mesh, param_axes, shapes.params)

  def rows_of(axes):
    axis = row_axis(axes)
    if axis is None:
      return ()
    return (None if "expert" in axes else axes[axis],)  # An expert's rows are whole on its device.

  def is_masked(node):
    return isinstance(node, optax.MaskedNode)  # A parameter that one of several optimizers leaves to another.

  return TrainState(
    step=replicated(mesh),
    params=params,
    tau=tree_shardings(mesh, tau_axes, shapes.tau),
    opt_state=optax.tree.map_params(
      optimizer,
      lambda leaf, sharding: leaf if is_masked(leaf) else sharding,
      shapes.opt_state,
      params,
      transform_non_params=lambda _: replicated(mesh),
      is_leaf=is_masked,
    ),
    tau_opt_state=jax.tree.map(lambda _: replicated(mesh), shapes.tau_opt_state),
    born=tree_shardings(mesh, jax.tree.map(lambda leaf, axes: rows_of(axes), shapes.born, param_axes), shapes.born),
  )
