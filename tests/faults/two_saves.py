"""What each of two processes does in `test_processes`: both save a small state until the disk of --failing breaks.

A command's module defines flags, some of which other commands define too: tests import only the names above `_main`.
"""

import errno
import os
import time

# Printed with the time, in seconds since 1970, just before the fault.
AT = "fault at"


def broken(*_, **__):
  raise OSError(errno.EIO, os.strerror(errno.EIO))


def _main(argv):
  del argv
  import jax
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec

  from tokenformer_jax.config import MeshConfig
  from tokenformer_jax.distributed.mesh import make_mesh
  from tokenformer_jax.training import checkpoint_files
  from tokenformer_jax.training.checkpoints import Checkpoints
  from tokenformer_jax.training.state import TrainState

  process_flags.start(stops_by_itself=True)
  mesh = make_mesh(MeshConfig(fsdp=2))

  def placed(array, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  leaf = {"keys": placed(np.ones((4, 2), np.float32), "fsdp")}
  state = TrainState(placed(np.int32(1)), leaf, leaf, leaf, leaf, leaf)
  checkpoints = Checkpoints(flags.FLAGS.workdir)
  for step in (1, 2):
    if step == 2 and jax.process_index() == flags.FLAGS.failing:
      print(AT, time.time(), flush=True)
      # Process 0 fails at its commit, the other one as soon as it begins.
      checkpoint_files.write_manifest = broken
      if jax.process_index():
        checkpoints._checkpointer.save = broken
    checkpoints.save(step, state, {})
    checkpoints._saving[1].join(timeout=100)
    checkpoints.check()
  time.sleep(100)


if __name__ == "__main__":
  from absl import flags

  from tokenformer_jax.cli import command, process_flags

  flags.DEFINE_string("workdir", None, "Where they save.")
  flags.DEFINE_integer("failing", None, "The process whose disk breaks.")
  process_flags.define()
  command.run(_main)
