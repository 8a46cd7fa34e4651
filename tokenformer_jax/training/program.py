"""The compiled functions of a run while its model has one size; growth makes the next program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.distributed.axes import parts_of, traced_on
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import declared, split
from tokenformer_jax.training.objective import Objective, objective_of
from tokenformer_jax.training.optimizer import make_optimizer
from tokenformer_jax.training.schedules import check_schedule, learning_rate_schedule
from tokenformer_jax.training.state import TrainState, initial_state, state_shardings
from tokenformer_jax.training.step import make_eval_step, make_train_step
from tokenformer_jax.training.tau import TauRule, make_tau_rule


@dataclasses.dataclass(frozen=True)
class Program:
  """What a run executes at one model size.

  Attributes:
    model: the model's configuration.
    graphdef: `nnx.merge(graphdef, params, tau)` is the model.
    optimizer: the optax transformation.
    tau_rule: what an update does to τ.
    shapes: the state's abstract leaves, each with its sharding.
    train_step: jitted `(state, batch, most_loss=inf) -> (state, metrics)`; the old state is donated.
    objective: the loss of the model's task.
    eval_step: jitted `(params, tau, batch) -> objective.sums`.
    eval_step_as_trained: the same with the routers' choices of training, which look into the future; None for a model
      that has no routed blocks.
    initial_state: jitted `() -> TrainState`.
  """

  model: ModelConfig
  graphdef: Any
  optimizer: optax.GradientTransformationExtraArgs
  tau_rule: TauRule
  shapes: TrainState
  objective: Objective
  train_step: Callable
  eval_step: Callable
  eval_step_as_trained: Callable | None
  initial_state: Callable

  @property
  def shardings(self) -> TrainState:
    """The sharding of every leaf of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, self.shapes)


def make_program(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> Program:
  """The program of run `config` while its model is `model`, on `mesh`. Nothing is compiled yet.

  Raises:
    ValueError: see `check_run`; or the mesh does not divide a parameter.
  """
  check_run(config, mesh)
  abstract = abstract_model(model)
  graphdef, _, _ = split(abstract)
  axes, decayed = (declared(abstract, nnx.Param, name) for name in ("axes", "decayed"))
  optimizer = make_optimizer(config.optimizer, config.training.num_steps, config.growth, axes, decayed)
  tau_rule = make_tau_rule(config)
  schedule = learning_rate_schedule(config.optimizer, config.training.num_steps)

  def initial():
    return initial_state(model, optimizer, tau_rule, config.training.seed)

  shapes = jax.eval_shape(initial)
  shardings = state_shardings(mesh, model, shapes, optimizer)
  shapes = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings)
  objective = objective_of(model)
  train_step = make_train_step(
    graphdef,
    optimizer,
    tau_rule,
    schedule,
    config.optimizer.z_loss,
    config.training.gradient_accumulation,
    # Newton-Schulz steps take long, and their results are at most about 1 wherever the gradient is finite.
    checks_updates=config.optimizer.name != "muon",
    objective=objective,
  )
  return Program(
    model=model,
    graphdef=graphdef,
    optimizer=optimizer,
    tau_rule=tau_rule,
    shapes=shapes,
    objective=objective,
    train_step=jax.jit(traced_on(mesh, train_step), out_shardings=(shardings, None), donate_argnums=0),
    eval_step=jax.jit(traced_on(mesh, make_eval_step(graphdef, objective))),
    eval_step_as_trained=jax.jit(traced_on(mesh, make_eval_step(graphdef, objective, training=True)))
    if model.depth.is_routed
    else None,
    initial_state=jax.jit(initial, out_shardings=shardings),
  )


def check_run(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Checks what a run needs of its schedule and its mesh, before data is read.

  Raises:
    ValueError: the warm-up and the decay do not fit into the run; the rows of a micro-batch do not divide among the
      devices along data × fsdp, which would then all compute the same rows; or attention is centred, where each token
      needs the mean of all values before it, and the mesh splits the positions of a sequence.
  """
  check_schedule(config.optimizer, config.training.num_steps)
  if config.model.attention.shaped == "centred" and parts_of(mesh, "time") > 1:
    raise ValueError(
      f"mesh.sequence={parts_of(mesh, 'time')} with attention.shaped='centred': each token needs the mean of all values "
      "before it, which no device has; choose mesh.sequence=1."
    )
  rows, accumulation = config.data.batch_size, config.training.gradient_accumulation
  devices = parts_of(mesh, "batch")
  if accumulation > 1 and rows // accumulation % devices:
    raise ValueError(
      f"training.gradient_accumulation={accumulation}: the {rows // accumulation} rows of a micro-batch of "
      f"data.batch_size={rows} cannot be split over the {devices} devices along mesh axes data × fsdp, and every device "
      f"would compute more rows than its share; choose a data.batch_size that {accumulation * devices} divides, a "
      "smaller gradient_accumulation, or fewer devices along data and fsdp."
    )
