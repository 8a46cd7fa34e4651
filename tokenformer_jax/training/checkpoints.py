"""Orbax checkpoints of a work folder: weights, optimizer state, and the record that describes them.

WORKDIR/checkpoints/STEP/model       parameters and τ
                        /optimizer   step, moments, the step at which each row was added
                        /record      JSON: model and run configuration, data position and fingerprint
                        /manifest.json   sizes and SHA-256 of all files, see `manifest`
WORKDIR/config.json, tokenizer.json  the run's configuration as last given, and its tokenizer

WORKDIR is a local folder or gs://BUCKET/FOLDER. Orbax commits a checkpoint by renaming its folder on a disk, and by a
file of its own in a bucket.
"""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import nnx

from tokenformer_jax import data
from tokenformer_jax.config import MeshConfig
from tokenformer_jax.distributed.axes import tree_shardings
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.distributed.processes import on_first_process
from tokenformer_jax.growth.plan import leaves_by_path, path_name
from tokenformer_jax.growth.stream import save_args
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import Tree, logical_axes, split
from tokenformer_jax.paths import user_path
from tokenformer_jax.training.checkpoint_files import (
  ASYNC_OPTIONS,
  check_leaves,
  checkpoints_folder,
  chosen_step,
  record_of,
  restore_parts,
  state_parts,
  step_handler,
  stored_model,
)
from tokenformer_jax.training.failed_saves import cause, wait_for_writers
from tokenformer_jax.training.lock import WorkFolderLock
from tokenformer_jax.training.manifest import FORMAT
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step_folders import (
  newest_good_step,
  remove,
  remove_unfinished,
  set_aside,
  tidy,
  whole_steps,
)
from tokenformer_jax.training.weight_average import LAG

TOKENIZER = "tokenizer.json"
# Failed saves in a row that end a run.
_FAILURES = 3


class Checkpoints:
  """The checkpoints under one work folder; a save is committed as a whole or not at all.

  Nothing is written before `claim` or the first save.
  """

  def __init__(self, workdir: str, kept: int | None = None):
    """Opens the checkpoints.

    Args:
      workdir: the work folder; it need not exist.
      kept: how many of the newest checkpoints a save keeps; None keeps all.
    """
    self._folder, self._kept = checkpoints_folder(workdir), kept
    self._lock: WorkFolderLock | None = None
    self._claimed = False
    self._checkpointer = ocp.AsyncCheckpointer(step_handler(ocp.StandardCheckpointHandler), async_options=ASYNC_OPTIONS)
    self._saving: tuple[int, threading.Thread, list[Exception]] | None = None
    self._failures = 0
    self._failed_step: int | None = None

  def claim(self) -> None:
    """Takes the work folder for this run, and puts out of the way what is no checkpoint. `save` does it otherwise.

    Raises:
      ValueError: another run has it.
    """
    if not self._claimed:
      on_first_process(self._claim)
      self._claimed = True

  def _claim(self) -> None:
    self._lock = WorkFolderLock(self._folder.parent)
    tidy(self._folder)

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint whose files are those that were saved, None if there is none."""
    return newest_good_step(self._folder, put_aside=self._claimed)

  def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
    """Starts an asynchronous save; the state may be donated as soon as this returns. `check` tells how it ended.

    Raises:
      FloatingPointError: a parameter, a moment or τ is not finite.
      ValueError: two leaves would have the same name on disk, or one has no entries.
      OSError: saves failed, see `check`.
    """
    self.claim()
    self._end_save(_FAILURES)
    try:
      check_leaves(state, self._folder / str(step))
    except FloatingPointError as error:
      raise FloatingPointError(f"{error} {self._newest()}") from None
    model, optimizer = state_parts(state)
    args = ocp.args.Composite(
      model=ocp.args.StandardSave(model, save_args=jax.tree.map(save_args, model)),
      optimizer=ocp.args.StandardSave(optimizer, save_args=jax.tree.map(save_args, optimizer)),
      record=ocp.args.JsonSave({**record, "format": FORMAT}),
    )
    errors: list[Exception] = []

    def finish() -> None:
      try:
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0 and self._kept:
          for old in whole_steps(self._folder)[: -self._kept]:
            remove(self._folder / str(old))
      except Exception as error:  # tensorstore and Orbax raise many kinds; `check` reports it.
        errors.append(error)

    try:
      if jax.process_index() == 0:
        set_aside(self._folder / str(step))
      self._checkpointer.save(self._folder / str(step), args=args, force=True)
    except Exception as error:
      errors.append(error)
    self._saving = step, threading.Thread(target=finish if not errors else lambda: None), errors
    self._saving[1].start()

  def check(self) -> None:
    """Reports how the last save ended, if it has ended; called after every step.

    A failed save is reported in one line and what it left is removed; the run saves again at its next interval.

    Raises:
      OSError: it was the third failure in a row, or one in a run of several processes, or another process took the
        work folder.
    """
    if self._lock is not None and self._lock.lost:
      raise OSError(self._lock.lost)
    if self._saving is not None and not self._saving[1].is_alive():
      self._end_save(_FAILURES)

  def _end_save(self, failures: int) -> None:
    """Waits for the last save. Raises OSError if it failed and so did the ones before, `failures` in a row."""
    if self._saving is None:
      return
    step, thread, errors = self._saving
    thread.join()
    self._saving = None
    if not errors:
      self._failures = 0
      return
    self._failures, self._failed_step = self._failures + 1, step
    if jax.process_index() == 0:
      wait_for_writers()
      remove_unfinished(self._folder, step)
    reason = f"{cause(errors[0]).rstrip('.')}."
    text = f"{self._folder / str(step)}: the checkpoint could not be saved ({self._failures} in a row): {reason}"
    if self._failures >= failures or jax.process_count() > 1:
      raise OSError(f"{text} {self._newest()}") from errors[0]
    logging.warning("%s The run saves again at its next interval.", text)

  def _newest(self) -> str:
    steps = whole_steps(self._folder)
    return f"The newest checkpoint is that of step {steps[-1]}." if steps else "There is no checkpoint."

  def record(self, step: int) -> dict[str, Any]:
    """Returns the record saved at `step`."""
    return record_of(self._folder / str(step))

  def restore(self, step: int, shapes: TrainState) -> TrainState:
    """Returns the state of `step`.

    Args:
      step: of a checkpoint that is there.
      shapes: the state's shapes, dtypes and shardings.

    Raises:
      ValueError: names the first leaf whose shape or dtype differs, or that only one side has.
    """
    model, optimizer = state_parts(shapes)
    items = restore_parts(
      self._checkpointer, self._folder / str(step), ocp.args.StandardRestore, model=model, optimizer=optimizer
    )
    return TrainState(**items["model"], **items["optimizer"])

  def close(self) -> None:
    """Waits for the last save and gives the work folder back.

    Raises:
      OSError: the last save failed, so that the newest updates are in no checkpoint.
    """
    try:
      self._end_save(1)
    finally:
      if self._failed_step is not None and jax.process_index() == 0:
        # tensorstore may have written on for a moment after the save failed.
        remove_unfinished(self._folder, self._failed_step)
      if self._lock is not None:
        self._lock.release()
      self._checkpointer.close()


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
  where = checkpoints_folder(workdir) / str(chosen_step(workdir, step))
  abstract = abstract_model(stored_model(record_of(where), where))
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
  with ocp.Checkpointer(step_handler(ocp.StandardCheckpointHandler)) as checkpointer:
    item = restore_parts(checkpointer, where, ocp.args.StandardRestore, model=target)["model"]
    params = item["params"]
    if average and (lag := _restore_lag(checkpointer, where, target["params"])) is not None:
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
  """Returns the tokenizer in a work folder.

  Raises:
    ValueError: there is none, as for a run on images, or not the one that the newest checkpoint was trained with.
  """
  folder = user_path(workdir, "workdir")
  record: dict[str, Any] = {}
  if (folder / "checkpoints").is_dir() and (steps := whole_steps(folder / "checkpoints")):
    record = record_of(folder / "checkpoints" / str(steps[-1]))
  stored = record.get("tokenizer", "")
  if stored is None:
    raise ValueError(f"{workdir}: this run reads images; it has no tokenizer, and its model generates no text.")
  tokenizer = data.load_tokenizer(folder / TOKENIZER)
  if stored and isinstance(stored, str) and not tokenizer.matches(stored):
    raise ValueError(
      f"{folder / TOKENIZER}: this is not the tokenizer {stored} that the model was trained with, but "
      f"{tokenizer.fingerprint}: ids would mean other text; put the model's own in its place."
    )
  return tokenizer


def _restore_lag(checkpointer: ocp.Checkpointer, where: epath.Path, params: Tree) -> Tree | None:
  """Returns the distance of the weights from their average (`weight_average`), None if the run keeps no average.

  Args:
    params: the shapes and shardings of the parameters, which are also those of the distance.
  """
  stored = checkpointer.metadata(where).item_metadata["optimizer"].tree
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
  with ocp.PyTreeCheckpointer() as partial:
    restored = partial.restore(
      where / "optimizer",
      args=ocp.args.PyTreeRestore(item=target, restore_args=restore_args),
    )
  leaves = {
    path.rpartition(f"/{LAG}/")[2]: leaf for path, leaf in leaves_by_path(restored).items() if f"/{LAG}/" in path
  }
  return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], params)
