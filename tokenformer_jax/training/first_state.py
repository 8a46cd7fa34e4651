"""The state of a run before its first update: random parameters, or those of another model."""

import jax

from tokenformer_jax import data
from tokenformer_jax.config import Config
from tokenformer_jax.growth.layers import leaves_by_path, path_name
from tokenformer_jax.growth.router import with_new_leaves
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import Tree, logical_axes, split
from tokenformer_jax.progress import say
from tokenformer_jax.training.checkpoints import load, load_tokenizer
from tokenformer_jax.training.program import Program, make_program
from tokenformer_jax.training.resume import check_same_tokenizer, check_same_weights, check_tokenizer_file
from tokenformer_jax.training.state import TrainState, fresh_state


def first_state(
  config: Config, workdir: str, mesh: jax.sharding.Mesh, tokenizer: data.Tokenizer | None
) -> tuple[Program, TrainState]:
  """(the program of the run's first model, its state on `mesh`).

  Args:
    config: the run; `init_from` names the weights to start from, or nothing. Weights without a router get a new one
      where the run's model has its parameter tokens in groups.
    workdir: the run's folder, which may hold a tokenizer already.
    mesh: the devices.
    tokenizer: that of the run's data; None for images.

  Raises:
    ValueError: the folder or the weights belong to another tokenizer, the weights to another model, or see
      `make_program`.
  """
  if tokenizer:
    check_tokenizer_file(workdir, tokenizer)
  program = make_program(config, config.model, mesh)
  if not config.init_from:
    return program, program.initial_state()
  source = load(config.init_from, mesh=mesh, average=False)
  check_same_weights(source.config, config.model, config.init_from)
  if tokenizer:
    check_same_tokenizer(load_tokenizer(config.init_from).fingerprint, tokenizer, f"init_from={config.init_from}")
  _, params, tau = split(source)
  if config.model.task == "classify":
    params = _with_head(params, program, f"init_from={config.init_from}")
  axes, _ = logical_axes(abstract_model(config.model))
  fresh = jax.jit(
    lambda params, tau: fresh_state(
      with_new_leaves(params, config.model, config.training.seed), tau, axes, program.optimizer, program.tau_rule
    ),
    out_shardings=program.shardings,
  )
  return program, fresh(params, tau)


def _with_head(loaded: Tree, program: Program, name: str) -> Tree:
  """The parameters of the run's model: the loaded ones by their names, and random ones where none has name and shape."""
  had, fresh = leaves_by_path(loaded), []

  def choose(path, leaf):
    have = had.get(path_name(path))
    if have is not None and have.shape == leaf.shape:
      return have
    fresh.append(path_name(path))
    return leaf

  params = jax.tree_util.tree_map_with_path(choose, program.initial_state().params)
  if fresh and jax.process_index() == 0:
    say(f"{name}: {len(jax.tree.leaves(params)) - len(fresh)} parameters loaded; fresh ones: {', '.join(fresh)}.")
  return params
