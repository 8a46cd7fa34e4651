"""Checkpoints whose leaves are read and written in slices, for models that do not fit into memory."""

from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from tokenformer_jax.growth.plan import leaves_by_path, path_name
from tokenformer_jax.growth.stream import stream_handler
from tokenformer_jax.training.checkpoint_files import (
  checkpoints_folder,
  chosen_step,
  record_of,
  restore_parts,
  state_parts,
  step_handler,
)
from tokenformer_jax.training.manifest import FORMAT
from tokenformer_jax.training.state import TrainState


class CheckpointStreams:
  """The checkpoints of a work folder, with `LeafStream`s in the place of arrays."""

  def __init__(self, workdir: str, written: Callable[[str], None] = lambda name: None):
    """Args: `written` is called with the name of each leaf once it is on disk."""
    self._workdir, self._folder = workdir, checkpoints_folder(workdir)
    self._checkpointer = ocp.Checkpointer(step_handler(lambda: stream_handler(written)))

  def record(self, step: int | None) -> tuple[int, dict[str, Any]]:
    """Returns (step, its record), by default of the newest good step. Raises ValueError where there is none."""
    step = chosen_step(self._workdir, step)
    return step, record_of(self._folder / str(step))

  def open(self, step: int, shapes: TrainState) -> TrainState:
    """Returns the state of `step` with its leaves still on disk. Raises ValueError where `restore` would."""
    model, optimizer = state_parts(shapes)
    items = restore_parts(
      self._checkpointer,
      self._folder / str(step),
      lambda target: ocp.args.PyTreeRestore(),
      model=model,
      optimizer=optimizer,
    )
    leaves = leaves_by_path({**items["model"], **items["optimizer"]})
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], shapes)

  def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
    """Writes the leaves one after the other and commits them together."""
    model, optimizer = state_parts(state)
    self._checkpointer.save(
      self._folder / str(step),
      args=ocp.args.Composite(
        model=ocp.args.PyTreeSave(model),
        optimizer=ocp.args.PyTreeSave(optimizer),
        record=ocp.args.JsonSave({**record, "format": FORMAT}),
      ),
    )

  def close(self) -> None:
    self._checkpointer.close()
