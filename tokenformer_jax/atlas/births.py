"""When the parameter tokens of a run were added."""

import jax
import numpy as np
import orbax.checkpoint as ocp

from tokenformer_jax.growth.layers import path_name
from tokenformer_jax.training.checkpoint_files import step_handler
from tokenformer_jax.training.checkpoints import checkpoints_folder, chosen_step


def births(workdir: str, step: int | None = None) -> dict[str, np.ndarray]:
  """How many updates had been done before each parameter token was added, int32 [N] by path of the layer.

  Nothing else of the checkpoint is read.

  Args:
    workdir: the work folder of a run.
    step: the checkpoint; by default the newest.

  Raises:
    ValueError: there is no such checkpoint.
  """
  where = checkpoints_folder(workdir) / str(chosen_step(workdir, step))
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with ocp.Checkpointer(step_handler(ocp.StandardCheckpointHandler)) as checkpointer:
    stored = checkpointer.metadata(where).item_metadata["optimizer"].tree
  target = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if _is_wanted(path) else ocp.PLACEHOLDER, stored)
  restore_args = jax.tree.map(
    lambda leaf: leaf if leaf is ocp.PLACEHOLDER else ocp.ArrayRestoreArgs(sharding=here), target
  )
  with ocp.PyTreeCheckpointer() as partial:  # Only this handler leaves placeholders unread.
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
    restored = partial.restore(where / "optimizer", args=args)
  leaves = jax.tree_util.tree_leaves_with_path(restored)
  named = {path_name(path): leaf for path, leaf in leaves if _is_wanted(path)}
  return {name.removeprefix("born/").removesuffix("/keys"): np.asarray(leaf) for name, leaf in named.items()}


def _is_wanted(path: tuple) -> bool:
  name = path_name(path)
  return name.startswith("born/") and name.endswith("/keys")
