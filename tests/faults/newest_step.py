"""What test_storage has each of two processes do: prints the newest good step of a run's work folder, and restores it."""

import sys

import jax

from tests import small_run
from tests.small_run import MODEL
from tokenformer_jax.config import MeshConfig
from tokenformer_jax.distributed import processes
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.program import make_program


def main(workdir: str, address: str, number: str) -> None:
  processes.start(address, 2, int(number))
  checkpoints = Checkpoints(workdir)
  checkpoints.claim()
  step = checkpoints.latest_step()
  shapes = make_program(small_run.config(), MODEL, make_mesh(MeshConfig(fsdp=2))).shapes
  state = checkpoints.restore(step, shapes)
  checkpoints.save(step + 2, state, checkpoints.record(step))
  checkpoints.close()
  print("newest", step, "then", checkpoints.latest_step(), "of", jax.process_count())


if __name__ == "__main__":
  main(*sys.argv[1:])
