"""Gives a run more parameter tokens: makes a new work folder in which `train` resumes, and leaves the old one as it is.

    python -m tokenformer_jax.cli.grow --workdir=runs/small --output=runs/large \\
        --qkv_tokens=2140 --proj_tokens=2140 --ffn_tokens=8560 --mesh.token=4
    python -m tokenformer_jax.cli.train --workdir=runs/large

The model's function, optimizer state, step and position in the data are the old run's. Leaves are read and written in
slices, so that the model need not fit into memory.
"""

from absl import flags

from tokenformer_jax.cli import command, resize_flags
from tokenformer_jax.config import GROWTH_METHODS

resize_flags.define()
_METHOD = flags.DEFINE_enum(
  "method", None, GROWTH_METHODS, "How new rows begin; by default the method in the run's configuration."
)


def main(argv):
  del argv
  # This imports jax, which --help and a wrong flag do not need.
  from tokenformer_jax.training.resize import grow_run

  print(grow_run(**resize_flags.values(), method=_METHOD.value))
  print(f"Resume with: python -m tokenformer_jax.cli.train --workdir={flags.FLAGS.output}")


if __name__ == "__main__":
  command.run(main, renamed={"how": "method"})
