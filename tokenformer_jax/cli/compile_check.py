"""Compiles a run for a TPU slice that is not there, and says what a chip holds, computes, sends and takes.

    python -m tokenformer_jax.cli.compile_check --config=experiments/pile.py --topology=v5e:4x4

Topologies are v4:AxBxC, v5e:AxB, v5p:AxBxC and v6e:AxB. Train step and decode step are compiled with
libtpu (pip install 'tokenformer_jax[tpu]'; no TPU needed); without it they are only lowered. The mesh, the
batch and the rest are the configuration's: --config.mesh.fsdp=4 --config.model.remat=full.
"""

from absl import flags
from ml_collections import config_flags

from tokenformer_jax.cli import door

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Python file with get_config().")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chip and sizes of the slice: v5e:4x4, v5p:2x2x4.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv):
  del argv
  import jax
  jax.config.update("jax_platforms", "cpu")  # Whatever is there is not what is compiled for.
  from tokenformer_jax.distributed.topologies import can_compile
  from tokenformer_jax.training.compile_check import check, report

  config = door.read_config(_CONFIG)
  if can_compile():
    print(f"{can_compile()}: only lowered, so that memory and what is sent are not known.", flush=True)
  print(report(config, _TOPOLOGY.value, check(config, _TOPOLOGY.value)))


if __name__ == "__main__":
  door.run(main)
