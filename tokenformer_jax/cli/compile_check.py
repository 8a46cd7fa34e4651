"""Compiles a run for TPUs or GPUs that are not present, and prints what each chip holds, computes and sends.

    python -m tokenformer_jax.cli.compile_check --config=experiments/sizes.py:150m --topology=v5e:4x4

Topologies are v4:AxBxC, v5e:AxB, v5p:AxBxC and v6e:AxB, and a100:N, h100:N and h200:N, up to 8 GPUs of one machine.
The train step and the decode step are compiled with libtpu (pip install 'tokenformer_jax[tpu]') or JAX's CUDA plugin
('tokenformer_jax[gpu]'); no TPU or GPU is needed. Without them the programs are only lowered. For a run that grows, the
memory of every growth and the programs of the largest model are added. The mesh, the batch and everything else come
from the configuration: --config.mesh.fsdp=4 --config.model.remat=full.
"""

from absl import flags
from ml_collections import config_flags

from tokenformer_jax.cli import command

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Python file with a function get_config().")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chip and sizes of the slice: v5e:4x4, v5p:2x2x4, h100:8.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv):
  del argv
  import jax

  jax.config.update("jax_platforms", "cpu")  # The devices of this machine are not used.
  from tokenformer_jax.distributed.topologies import can_compile, parse_topology
  from tokenformer_jax.training.compile_check import check
  from tokenformer_jax.training.compile_report import report

  config = command.read_config(_CONFIG)
  if reason := can_compile(parse_topology(_TOPOLOGY.value)[0]):
    print(f"{reason}: the programs are only lowered, so their memory and what they send are unknown.", flush=True)
  print(report(config, _TOPOLOGY.value, check(config, _TOPOLOGY.value)))


if __name__ == "__main__":
  command.run(main)
