"""Orbax checkpoints of a work folder: weights, optimizer state, and the record that describes them.

WORKDIR/checkpoints/STEP/model       parameters and τ
                        /optimizer   step, moments, the step at which each row was added
                        /record      JSON: model and run configuration, data position and fingerprint
WORKDIR/config.json, tokenizer.json  the run's configuration as last given, and its tokenizer

WORKDIR is a local folder or gs://BUCKET/FOLDER. Orbax commits a checkpoint by renaming its folder on a disk, and by a
file of its own in a bucket.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from tokenformer_jax import data
from tokenformer_jax.config import MeshConfig, ModelConfig
from tokenformer_jax.distributed.axes import tree_shardings
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.growth.plan import leaves_by_path, path_name
from tokenformer_jax.growth.stream import save_args, stream_handler
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import Tree, logical_axes, split
from tokenformer_jax.paths import is_uri, user_path
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.weight_average import LAG

TOKENIZER = "tokenizer.json"


class Checkpoints:
  """The checkpoints under one work folder; a save is committed as a whole or not at all.

  Nothing is written before the first save.
  """

  def __init__(self, workdir: str, kept: int | None = None):
    """Opens the checkpoints.

    Args:
      workdir: the work folder; it need not exist.
      kept: how many of the newest checkpoints a save keeps; None keeps all.

    Raises:
      ValueError: something that is not a checkpoint would prevent Orbax from saving.
    """
    self._manager = _open(workdir, ocp.StandardCheckpointHandler, max_to_keep=kept, create=False)
    newest = self._manager.latest_step()
    if newest != self.latest_step():
      raise ValueError(
        f"{self._manager.directory / str(newest)}: no whole checkpoint, but newer than those that are: move it away."
      )

  def latest_step(self) -> int | None:
    """Returns the step of the newest whole checkpoint, None if there is none."""
    return max(_whole_steps(self._manager), default=None)

  def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
    """Starts an asynchronous save; the state may be donated as soon as this returns.

    Raises:
      RuntimeError: Orbax declined to save.
    """
    model, optimizer = _items(state)
    saved = self._manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(model, save_args=jax.tree.map(save_args, model)),
        optimizer=ocp.args.StandardSave(optimizer, save_args=jax.tree.map(save_args, optimizer)),
        record=ocp.args.JsonSave(record),
      ),
    )
    if not saved:
      raise RuntimeError(f"checkpoint of step {step} was not saved; the folder holds {self._manager.all_steps()}.")

  def record(self, step: int) -> dict[str, Any]:
    """Returns the record saved at `step`."""
    return _record(self._manager, step)

  def restore(self, step: int, shapes: TrainState) -> TrainState:
    """Returns the state of `step`.

    Args:
      step: of a checkpoint that is there.
      shapes: the state's shapes, dtypes and shardings.

    Raises:
      ValueError: names the first leaf whose shape or dtype differs, or that only one side has.
    """
    model, optimizer = _items(shapes)
    items = _restore(self._manager, step, ocp.args.StandardRestore, model=model, optimizer=optimizer)
    return TrainState(**items["model"], **items["optimizer"])

  def close(self) -> None:
    """Waits for pending saves and raises the errors that occurred in them."""
    self._manager.wait_until_finished()
    self._manager.close()


def load(
  workdir: str, step: int | None = None, mesh: jax.sharding.Mesh | None = None, *, average: bool = True
) -> LanguageModel:
  """Returns the model of a training run, or one that `save` or `export` wrote, ready to call.

  Args:
    workdir: a run's work folder, local or gs://BUCKET/FOLDER; or a weight file, or a folder with one.
    step: which checkpoint; by default the newest.
    mesh: where the parameters go; by default the first device, or with several processes all devices, each
      with a copy.
    average: take the average of the weights where the run keeps one (`optimizer.ema_decay`), as its evaluations and
      samples do. False takes the weights themselves, from which training would continue.

  Raises:
    ValueError: there is no checkpoint, or none of that step.
  """
  folder = user_path(workdir, "workdir")
  if _is_weights(folder):
    if step is not None:
      raise ValueError(f"{workdir}: exported weights have no steps; leave step={step} out.")
    from tokenformer_jax.interop.pretrained import from_pretrained  # It imports this module for work folders.

    return from_pretrained(folder, mesh=mesh)
  with _open(workdir, ocp.StandardCheckpointHandler, create=False) as manager:
    step = _chosen_step(manager, workdir, step)
    abstract = abstract_model(ModelConfig.from_dict(_record(manager, step)["model"], f"{workdir}: model"))
    mesh = mesh or make_mesh(MeshConfig(), devices=None if jax.process_count() > 1 else jax.devices()[:1])
    graphdef, *shapes = split(abstract)
    target = dict(
      zip(
        ("params", "tau"),
        (
          jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            tree,
            tree_shardings(mesh, axes, tree),
          )
          for tree, axes in zip(shapes, logical_axes(abstract))
        ),
      )
    )
    item = _restore(manager, step, ocp.args.StandardRestore, model=target)["model"]
    params = item["params"]
    if average and (lag := _restore_lag(manager, step, target["params"])) is not None:
      params = jax.tree.map(jnp.subtract, params, lag)
  return nnx.merge(graphdef, params, item["tau"])


def _is_weights(path: epath.Path) -> bool:
  """Whether a path is a weight file, or a folder that holds one and is no work folder."""
  if path.is_file():
    return True
  if not path.is_dir() or (path / "checkpoints").is_dir():
    return False
  return any(file.suffix in (".safetensors", ".bin") for file in path.iterdir())


def load_tokenizer(workdir: str) -> data.Tokenizer:
  """Returns the tokenizer in a work folder. Raises ValueError where there is none."""
  return data.load_tokenizer(user_path(workdir, "workdir") / TOKENIZER)


class CheckpointStreams:
  """The same checkpoints with `LeafStream`s in the place of arrays, to copy one that does not fit into memory."""

  def __init__(self, workdir: str, written: Callable[[str], None] = lambda name: None):
    """Args: `written` is called with the name of each leaf once it is on disk."""
    self._workdir = workdir
    self._manager = _open(workdir, lambda: stream_handler(written), enable_async_checkpointing=False, create=False)

  def record(self, step: int | None) -> tuple[int, dict[str, Any]]:
    """Returns (step, its record), by default of the newest step. Raises ValueError where there is none."""
    step = _chosen_step(self._manager, self._workdir, step)
    return step, _record(self._manager, step)

  def open(self, step: int, shapes: TrainState) -> TrainState:
    """Returns the state of `step` with its leaves still on disk. Raises ValueError where `restore` would."""
    model, optimizer = _items(shapes)
    items = _restore(self._manager, step, lambda target: ocp.args.PyTreeRestore(), model=model, optimizer=optimizer)
    leaves = leaves_by_path({**items["model"], **items["optimizer"]})
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], shapes)

  def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
    """Writes the leaves one after the other and commits them together."""
    model, optimizer = _items(state)
    if not self._manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.PyTreeSave(model), optimizer=ocp.args.PyTreeSave(optimizer), record=ocp.args.JsonSave(record)
      ),
    ):
      raise RuntimeError(f"checkpoint of step {step} was not saved.")

  def close(self) -> None:
    self._manager.close()


def _open(workdir: str, arrays: Callable[[], ocp.CheckpointHandler], **options) -> ocp.CheckpointManager:
  folder = user_path(workdir, "workdir") / "checkpoints"
  if is_uri(folder) and not str(folder).startswith("gs://"):
    raise ValueError(
      f"workdir={workdir!r}: checkpoints are kept in local folders and gs:// buckets; choose one of these."
    )
  # Orbax reads the metadata of an item before its arrays only if it knows the item's handler.
  handlers = {"model": arrays(), "optimizer": arrays(), "record": ocp.JsonCheckpointHandler()}
  return ocp.CheckpointManager(folder, item_handlers=handlers, options=ocp.CheckpointManagerOptions(**options))


def _record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  return manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]


def _chosen_step(manager: ocp.CheckpointManager, workdir: str, step: int | None) -> int:
  steps = _whole_steps(manager)
  if not steps:
    raise ValueError(f"{workdir}: no checkpoint there; train first, or give the work folder of a run.")
  if step is not None and step not in steps:
    raise ValueError(f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
  return steps[-1] if step is None else step


def _restore(manager: ocp.CheckpointManager, step: int, args: Callable[[Any], ocp.args.CheckpointArgs], **targets):
  """Returns parts of a checkpoint in the shapes and dtypes of `targets`; Orbax alone would cast silently."""
  stored = manager.item_metadata(step)
  for part, target in targets.items():
    there, here = (
      {path: f"{leaf.dtype} {tuple(leaf.shape)}" for path, leaf in leaves_by_path(tree).items()}
      for tree in (stored[part].tree, target)
    )
    for path in [*here, *there]:
      if here.get(path) != there.get(path):
        raise ValueError(
          f"{manager.directory / str(step)}: {path} is {there.get(path, 'not there')}, and "
          f"{here.get(path, 'nothing')} in this run; use the configuration that it was saved with."
        )
  return manager.restore(step, args=ocp.args.Composite(**{part: args(target) for part, target in targets.items()}))


def _restore_lag(manager: ocp.CheckpointManager, step: int, params: Tree) -> Tree | None:
  """Returns the distance of the weights from their average (`weight_average`), None if the run keeps no average.

  Args:
    params: the shapes and shardings of the parameters, which are also those of the distance.
  """
  stored = manager.item_metadata(step)["optimizer"].tree
  shapes = {f"/{LAG}/{path}": leaf for path, leaf in leaves_by_path(params).items()}

  def wanted(path, _):
    return next((leaf for name, leaf in shapes.items() if path_name(path).endswith(name)), ocp.PLACEHOLDER)

  target = jax.tree_util.tree_map_with_path(wanted, stored)
  if all(leaf is ocp.PLACEHOLDER for leaf in jax.tree.leaves(target)):
    return None
  restore_args = jax.tree.map(
    lambda leaf: leaf if leaf is ocp.PLACEHOLDER else ocp.ArrayRestoreArgs(sharding=leaf.sharding), target
  )
  # Only this handler leaves placeholders unread.
  with ocp.PyTreeCheckpointer() as checkpointer:
    restored = checkpointer.restore(
      manager.directory / str(step) / "optimizer",
      args=ocp.args.PyTreeRestore(item=target, restore_args=restore_args),
    )
  leaves = {
    path.rpartition(f"/{LAG}/")[2]: leaf for path, leaf in leaves_by_path(restored).items() if f"/{LAG}/" in path
  }
  return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], params)


def _whole_steps(manager: ocp.CheckpointManager) -> list[int]:
  """Returns the committed steps that have all their parts, rising; Orbax also lists stray and half-deleted folders."""
  return sorted(
    step
    for step in manager.all_steps()
    if all((manager.directory / str(step) / part).exists() for part in ("model", "optimizer", "record"))
  )


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  model = {name: fields.pop(name) for name in ("params", "tau")}
  return model, fields
