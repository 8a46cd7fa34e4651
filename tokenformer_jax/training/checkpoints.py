"""Orbax checkpoints of a work folder: weights, optimizer, and the record that explains them.

    WORKDIR/checkpoints/STEP/model       parameters and τ
                            /optimizer   step, moments, rows' ages
                            /record      JSON: model and run configuration, data position and fingerprint
    WORKDIR/config.json, tokenizer.json  the run's configuration as last given, and its tokenizer
"""

import dataclasses
from typing import Any

from etils import epath
from flax import nnx
import jax
import orbax.checkpoint as ocp

from tokenformer_jax import data
from tokenformer_jax.config import MeshConfig, ModelConfig
from tokenformer_jax.distributed.axes import tree_shardings
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import logical_axes, split
from tokenformer_jax.training.state import TrainState, abstract_model

TOKENIZER = "tokenizer.json"


class Checkpoints:
  """The checkpoints under one work folder; a save is committed as a whole or not at all."""

  def __init__(self, workdir: str, kept: int | None = None):
    self._manager = ocp.CheckpointManager(
        absolute(workdir) / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=kept))

  def latest_step(self) -> int | None:
    """The newest committed step, None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
    """Starts an asynchronous save; the state may be donated as soon as this returns.

    Raises:
      RuntimeError: Orbax declined to save.
    """
    model, optimizer = _items(state)
    saved = self._manager.save(step, args=ocp.args.Composite(
        model=ocp.args.StandardSave(model), optimizer=ocp.args.StandardSave(optimizer),
        record=ocp.args.JsonSave(record)))
    if not saved:
      raise RuntimeError(f"checkpoint of step {step} was not saved; the folder holds {self._manager.all_steps()}.")

  def record(self, step: int) -> dict[str, Any]:
    """The record saved at `step`."""
    return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

  def restore(self, step: int, shapes: TrainState) -> TrainState:
    """The state of `step`, every leaf with the shape and sharding that `shapes` asks for."""
    model, optimizer = _items(shapes)
    items = self._manager.restore(step, args=ocp.args.Composite(
        model=ocp.args.StandardRestore(model), optimizer=ocp.args.StandardRestore(optimizer)))
    return TrainState(**items["model"], **items["optimizer"])

  def close(self) -> None:
    """Waits for the saves under way; raises what went wrong in them."""
    self._manager.wait_until_finished()
    self._manager.close()


def load(workdir: str, step: int | None = None, mesh: jax.sharding.Mesh | None = None) -> LanguageModel:
  """The model of a training run, ready to call.

  Args:
    workdir: a run's work folder.
    step: which checkpoint; by default the newest.
    mesh: where the parameters go; by default the first device.

  Raises:
    ValueError: no checkpoint there, or none of that step.
  """
  folder = absolute(workdir) / "checkpoints"
  steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []
  if not steps:
    raise ValueError(f"{workdir}: no checkpoint there; train first, or give the work folder of a run.")
  if step is not None and step not in steps:
    raise ValueError(f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
  step = steps[-1] if step is None else step
  mesh = mesh or make_mesh(MeshConfig(), devices=jax.devices()[:1])
  with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
    record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
    abstract = abstract_model(ModelConfig(**record["model"]))
    graphdef, *shapes = split(abstract)
    target = dict(zip(("params", "tau"), (
        jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
                     tree, tree_shardings(mesh, axes, tree))
        for tree, axes in zip(shapes, logical_axes(abstract)))))
    item = manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(target)))["model"]
  return nnx.merge(graphdef, item["params"], item["tau"])


def load_tokenizer(workdir: str) -> data.Tokenizer:
  """The tokenizer of a training run. Raises ValueError where the work folder has none."""
  return data.load_tokenizer(absolute(workdir) / TOKENIZER)


def absolute(workdir: str) -> epath.Path:
  """A local folder or a bucket, as Orbax wants it."""
  return epath.Path(workdir).expanduser().absolute()


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  model = {name: fields.pop(name) for name in ("params", "tau")}
  return model, fields
