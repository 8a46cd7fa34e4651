"""How the state of a run lies in the folder of a step, and how it is read and written with Orbax."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.growth.plan import leaves_by_path
from tokenformer_jax.paths import is_uri, user_path
from tokenformer_jax.training.manifest import damaged, incomplete, read_record, write_manifest
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step_folders import damage, newest_good_step, numbered, whole_steps

# Orbax compares times of day: with its own 20 minutes, a clock that is set forward during a save would fail it. Where
# folders are made in the background and one cannot be made, Orbax's threads wait for it for minutes.
ASYNC_OPTIONS = ocp.AsyncOptions(timeout_secs=7 * 24 * 3600, create_directories_asynchronously=False)


def checkpoints_folder(workdir: str) -> epath.Path:
  """Returns the folder of a work folder's checkpoints. Raises ValueError for a store that cannot hold any."""
  folder = user_path(workdir, "workdir") / "checkpoints"
  if is_uri(folder) and not str(folder).startswith("gs://"):
    raise ValueError(
      f"workdir={workdir!r}: checkpoints are kept in local folders and gs:// buckets; choose one of these."
    )
  return folder


def step_handler(arrays: Callable[[], ocp.CheckpointHandler]) -> ocp.CompositeCheckpointHandler:
  """Returns the handler of a step's parts, which writes the manifest before Orbax commits the step."""
  handler = ocp.CompositeCheckpointHandler(
    composite_options=ocp.CompositeOptions(async_options=ASYNC_OPTIONS),
    model=arrays(),
    optimizer=arrays(),
    record=ocp.JsonCheckpointHandler(),
  )
  finalize = handler.finalize

  def finalize_and_list(directory: epath.Path) -> None:
    finalize(directory)
    write_manifest(directory)

  handler.finalize = finalize_and_list  # Orbax registers handlers by their exact class.
  return handler


def chosen_step(workdir: str, step: int | None) -> int:
  """Returns `step`, or the newest good one, once its files are known to be those that were saved.

  Raises:
    ValueError: there is none, or `step` is damaged.
  """
  folder = checkpoints_folder(workdir)
  if step is None:
    step = newest_good_step(folder)
    if step is None:
      found = "".join(f" {folder / str(number)}: {damaged(folder / str(number))}." for number in numbered(folder))
      raise ValueError(f"{workdir}: no checkpoint there; train first, or give the work folder of a run.{found}")
    return step
  steps = whole_steps(folder)
  if step not in steps:
    why = f" {folder / str(step)}: {incomplete(folder / str(step))}." if step in numbered(folder) else ""
    raise ValueError(
      f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, steps)) or 'no others'}.{why}"
    )
  if problem := damage(folder / str(step)):
    raise ValueError(f"{folder / str(step)}: {problem}; choose another step of {', '.join(map(str, steps))}.")
  return step


def record_of(folder: epath.Path) -> dict[str, Any]:
  """Returns the record of the step in `folder`, as it was given to `save`."""
  record = read_record(folder)
  record.pop("format", None)
  return record


def stored_model(record: dict[str, Any], where: epath.Path) -> ModelConfig:
  """Returns the model's configuration in a record. Raises ValueError where this version does not know a field."""
  try:
    return ModelConfig.from_dict(record.get("model"))
  except ValueError as error:
    raise ValueError(f"{where}: its model cannot be built by this version of tokenformer_jax: {error}") from None


def state_parts(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits a state into the parts `model` and `optimizer` of a checkpoint."""
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  model = {name: fields.pop(name) for name in ("params", "tau")}
  return model, fields


def restore_parts(
  checkpointer: ocp.Checkpointer, folder: epath.Path, args: Callable[[Any], ocp.args.CheckpointArgs], **targets
) -> dict[str, Any]:
  """Returns parts of a checkpoint in the shapes and dtypes of `targets`; Orbax alone would cast silently.

  Raises:
    ValueError: names the first leaf that differs; or the files cannot be read.
  """
  try:
    stored = checkpointer.metadata(folder).item_metadata
    trees = {part: leaves_by_path(stored[part].tree) for part in targets}
  except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
    raise ValueError(f"{folder}: cannot be read; move it away, or choose another checkpoint. {error}") from None
  for part, target in targets.items():
    there, here = (
      {path: f"{leaf.dtype} {tuple(leaf.shape)}" for path, leaf in leaves.items()}
      for leaves in (trees[part], leaves_by_path(target))
    )
    for path in [*here, *there]:
      if here.get(path) != there.get(path):
        raise ValueError(
          f"{folder}: {path} is {there.get(path, 'not there')}, and {here.get(path, 'nothing')} in this run; "
          "use the configuration that it was saved with."
        )
  wanted = ocp.args.Composite(**{part: args(target) for part, target in targets.items()})
  try:
    return checkpointer.restore(folder, args=wanted)
  except (ValueError, TypeError, KeyError, OSError) as error:
    raise ValueError(f"{folder}: cannot be read; move it away, or choose another checkpoint. {error}") from None


def check_leaves(state: TrainState, where: epath.Path) -> None:
  """Refuses a state that a checkpoint could not give back, or that training should not resume from.

  Raises:
    ValueError: two leaves would have the same name on disk, or one has no entries; Orbax mixes these up.
    FloatingPointError: a parameter, a moment or τ is not finite.
  """
  leaves = leaves_by_path(state)
  names: dict[str, str] = {}
  for path, leaf in leaves.items():
    if (other := names.setdefault(path.replace("/", "."), path)) != path:
      raise ValueError(f"{where}: the leaves {other} and {path} would have the same name on disk; rename one of them.")
    if leaf.size == 0:
      raise ValueError(f"{where}: the leaf {path} {tuple(leaf.shape)} has no entries, and would not be restored.")
  floats = {path: leaf for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
  finite = np.asarray(_finite_leaves(list(floats.values())))
  if not finite.all():
    bad = [path for path, good in zip(floats, finite) if not good]
    raise FloatingPointError(
      f"{where}: not saved, because {bad[0]} is not finite ({len(bad)} of {len(floats)} leaves)."
    )


@jax.jit
def _finite_leaves(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
