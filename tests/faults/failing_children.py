"""Does one thing in many forked children, each of which is killed, or has an error, at another of its file operations.

    LD_PRELOAD=fail_at.so python -m tests.faults.failing_children SCENARIO FOLDER ERROR NUMBER …

The child for NUMBER works in a copy of FOLDER/start called FOLDER/ERROR.NUMBER. Its exit code (−9 where it was killed, 3 after
an OSError) and the number of its file operations are printed. NUMBER 0 never fails.
"""

import ctypes
import os
import pathlib
import pickle
import shutil
import sys

import jax

from tokenformer_jax.training import resize
from tokenformer_jax.training.checkpoints import Checkpoints


def save(folder: pathlib.Path) -> None:
  """Saves step 4 beside step 2, which is deleted then."""
  state, record = pickle.loads((folder.parent / "state.pickle").read_bytes())
  checkpoints = Checkpoints(str(folder), kept=1)
  checkpoints.save(4, jax.tree.map(jax.numpy.asarray, state), record)
  checkpoints.close()


def grow(folder: pathlib.Path) -> None:
  resize.grow_run(str(folder.parent / "source"), str(folder / "grown"), ffn_tokens=32)


def main(scenario: str, folder: str, error: str, *numbers: str) -> None:
  library = ctypes.CDLL(None)
  for number in map(int, numbers):
    place = pathlib.Path(folder, f"{error}.{number}")
    shutil.copytree(pathlib.Path(folder, "start"), place)
    counted = place.with_suffix(f".{number}.operations")
    child = os.fork()
    if child == 0:
      code = 1
      try:
        library.fail_at(f"{place}/".encode(), number or -1, int(error))
        {"save": save, "grow": grow}[scenario](place)
        code = 0
      except OSError:
        code = 3
      finally:
        counted.write_text(str(library.operations()))
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(number, code, counted.read_text() if counted.exists() else -1, flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
