"""The flags that tell one process of several where the others are; clusters that JAX knows need none of them."""

from absl import flags

flags.disclaim_key_flags()  # They belong to the command that defines them.


def define() -> None:
  """Defines --coordinator_address, --num_processes and --process_id."""
  flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0. Not needed on a TPU slice, under SLURM, Open MPI or Kubernetes, or for one process.",
  )
  flags.DEFINE_integer(
    "num_processes", None, "With --coordinator_address: how many processes there are.", lower_bound=1
  )
  flags.DEFINE_integer("process_id", None, "With --coordinator_address: which of them this is, from 0.", lower_bound=0)


def start(**options) -> bool:
  """Calls `distributed.processes.start` with the flags' values; returns whether this is the first process."""
  import jax

  from tokenformer_jax.distributed import processes

  values = flags.FLAGS
  processes.start(values.coordinator_address, values.num_processes, values.process_id, **options)
  return jax.process_index() == 0
