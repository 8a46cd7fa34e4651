"""The training state, and where each of its leaves lives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import replicated, tree_shardings
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import Tree, logical_axes, split
from tokenformer_jax.training.tau import TauRule


@functools.partial(
  jax.tree_util.register_dataclass,
  meta_fields=[],
  data_fields=["step", "params", "tau", "opt_state", "tau_opt_state", "born"],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything an update reads and writes. There is no random state: keys are folded from seed and step.

  Attributes:
    step: int32 [], updates done.
    params: float32 parameters.
    tau: the scale inside each Θ, [layer].
    opt_state: the optimizer's state.
    tau_opt_state: that of `tau.TauRule`; no leaves unless τ is learned.
    born: like `params`; the step at which each parameter token was added, int32 [N], [] elsewhere.
  """

  step: jax.Array
  params: Tree
  tau: Tree
  opt_state: optax.OptState
  tau_opt_state: optax.OptState
  born: Tree


def abstract_model(config: ModelConfig) -> LanguageModel:
  """The model with shapes and dtypes in the place of arrays."""
  return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


def initial_state(
  config: ModelConfig, optimizer: optax.GradientTransformation, tau_rule: TauRule, seed: int
) -> TrainState:
  """A fresh state; to be called under `jax.jit` with `out_shardings`, so that leaves are born sharded."""
  _, params, tau = split(LanguageModel(config, rngs=nnx.Rngs(seed)))
  return fresh_state(params, tau, logical_axes(abstract_model(config))[0], optimizer, tau_rule)


def fresh_state(
  params: Tree, tau: Tree, axes: Tree, optimizer: optax.GradientTransformation, tau_rule: TauRule
) -> TrainState:
  """Step 0 of a run that starts from these parameters."""

  def unborn(leaf, axes):
    rows = leaf.shape[axes.index("param_token")] if "param_token" in axes else ()
    return jnp.zeros(rows, jnp.int32)

  return TrainState(
    step=jnp.int32(0),
    params=params,
    tau=tau,
    opt_state=optimizer.init(params),
    tau_opt_state=tau_rule.init(tau),
    born=jax.tree.map(unborn, params, axes),
  )


def state_shardings(
  mesh: jax.sharding.Mesh, config: ModelConfig, shapes: TrainState, optimizer: optax.GradientTransformation
) -> TrainState:
  """A NamedSharding for every leaf: moments lie where their parameters do.

  Args:
    shapes: the state's shapes, `jax.eval_shape(initial_state, …)`.
  """
  param_axes, tau_axes = logical_axes(abstract_model(config))
  params = tree_shardings(mesh, param_axes, shapes.params)
  return TrainState(
    step=replicated(mesh),
    params=params,
    tau=tree_shardings(mesh, tau_axes, shapes.tau),
    opt_state=optax.tree.map_params(
      optimizer, lambda _, sharding: sharding, shapes.opt_state, params, transform_non_params=lambda _: replicated(mesh)
    ),
    tau_opt_state=jax.tree.map(lambda _: replicated(mesh), shapes.tau_opt_state),
    born=tree_shardings(mesh, jax.tree.map(lambda leaf: ("param_token",) * leaf.ndim, shapes.born), shapes.born),
  )
