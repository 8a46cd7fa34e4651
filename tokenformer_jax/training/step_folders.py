"""The numbered folders of checkpoints: which can be used, and how the others are put out of the way.

Nothing that a run finds is deleted or fatal: a folder that is not a whole checkpoint is renamed to STEP.set_aside.
"""

import contextlib
import os
import re
import shutil

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from tokenformer_jax.distributed.processes import on_first_process
from tokenformer_jax.paths import is_uri
from tokenformer_jax.training.manifest import MANIFEST, damaged, has_manifest, incomplete

_STEP = re.compile(r"0|[1-9][0-9]{0,8}")
_UNFINISHED = ".orbax-checkpoint-tmp"
_TRASH = ".trash"


def numbered(folder: epath.Path) -> list[int]:
  """Returns the numbers of all numbered entries, rising; they may be anything."""
  if not folder.is_dir():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if _STEP.fullmatch(path.name))


def whole_steps(folder: epath.Path) -> list[int]:
  """Returns the steps whose folders are whole, rising. Raises ValueError where a newer version wrote one of them."""
  return [step for step in numbered(folder) if not incomplete(folder / str(step))]


def newest_good_step(folder: epath.Path, put_aside: bool = False) -> int | None:
  """Returns the newest step whose files are those that were saved, None if there is none.

  Every process reads its share of the files, and all get the same step. One line names each damaged file.

  Args:
    folder: of the checkpoints.
    put_aside: whether damaged steps are renamed, which only a run in this work folder may do.

  Raises:
    ValueError: a newer version wrote the newest step.
  """
  below = None
  while (step := _newest_whole(folder, below)) is not None:
    problem = damage(folder / str(step))
    if not problem:
      if not has_manifest(folder / str(step)):
        logging.warning(
          "%s: an earlier version wrote this checkpoint without a manifest; damage of its files cannot be seen.",
          folder / str(step),
        )
      return step
    if jax.process_index() == 0:
      logging.warning("%s: %s; an earlier checkpoint is used.", folder / str(step), problem)
      if put_aside:
        set_aside(folder / str(step))
    below = step
  return None


def damage(folder: epath.Path) -> str:
  """Why a step cannot be used, or ""; every process reads its share of the files, and all get the same answer."""
  count = jax.process_count()
  problem = damaged(folder, jax.process_index(), count)
  if count == 1:
    return problem
  bad = np.flatnonzero(multihost_utils.process_allgather(np.int32(bool(problem))).reshape(-1))
  return problem or (f"process {bad[0]} cannot use it" if bad.size else "")


def tidy(folder: epath.Path) -> None:
  """Removes what killed saves and deletions left, and sets aside numbered entries that are not whole checkpoints."""
  if not folder.is_dir():
    return
  for path in list(folder.iterdir()):
    if _UNFINISHED in path.name or path.name.endswith(_TRASH):
      _delete(path)
  for step in numbered(folder):
    if problem := incomplete(folder / str(step)):
      logging.warning("%s: %s; it is not used.", folder / str(step), problem)
      set_aside(folder / str(step))


def set_aside(path: epath.Path) -> None:
  """Renames a numbered entry to NUMBER.set_aside. An object store cannot rename: there it stays and is passed over."""
  if is_uri(path) or not os.path.lexists(path):
    return
  target = path.with_name(f"{path.name}.set_aside")
  number = 1
  while os.path.lexists(target):
    number += 1
    target = path.with_name(f"{path.name}.set_aside_{number}")
  os.rename(path, target)
  logging.warning("%s: renamed to %s.", path, target.name)


def remove(path: epath.Path) -> None:
  """Removes the folder of a step, which from the first moment on is no step any more. An error is only reported."""
  try:
    if is_uri(path):
      (path / MANIFEST).unlink()
      path.rmtree()
      return
    trash = path.with_name(path.name + _TRASH)
    os.rename(path, trash)
    _delete(trash)
  except OSError as error:
    logging.warning("%s: this old checkpoint could not be removed: %s", path, error)


def remove_unfinished(folder: epath.Path, step: int) -> None:
  """Removes what a failed save of `step` left, and failed ones before it; no save may be under way."""
  if not folder.is_dir():
    return
  if is_uri(folder):
    if (folder / str(step)).exists() and incomplete(folder / str(step)):
      (folder / str(step)).rmtree()
    return
  for path in list(folder.iterdir()):
    if _UNFINISHED in path.name:
      _delete(path)


def _delete(path: epath.Path) -> None:
  """Deletes a file, a link or a folder; what cannot be deleted stays, because nothing reads it."""
  if is_uri(path):
    path.rmtree()
  elif os.path.islink(path) or not os.path.isdir(path):
    with contextlib.suppress(OSError):
      os.unlink(path)
  else:
    shutil.rmtree(path, ignore_errors=True)


def _newest_whole(folder: epath.Path, below: int | None) -> int | None:
  """Returns the newest whole step before `below` that the first process sees."""
  found = -1

  def look() -> None:
    nonlocal found
    candidates = (step for step in reversed(numbered(folder)) if below is None or step < below)
    found = next((step for step in candidates if not incomplete(folder / str(step))), -1)

  on_first_process(look)
  if jax.process_count() > 1:
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
  return None if found < 0 else found
