"""Gives a run more parameter tokens: a new work folder for `train` to go on with, the old one untouched.

    python -m tokenformer_jax.cli.grow --workdir=runs/small --output=runs/large \\
        --qkv_tokens=2140 --proj_tokens=2140 --ffn_tokens=8560 --mesh.token=4
    python -m tokenformer_jax.cli.train --workdir=runs/large

The model's function, optimizer state, step and place in the data are the old run's. Leaves are read and
written in slices, so the model need not fit into memory.
"""

from absl import flags

from tokenformer_jax.cli import command, resize_flags
from tokenformer_jax.config import GROWTH_METHODS

resize_flags.define()
_METHOD = flags.DEFINE_enum(
  "method", None, GROWTH_METHODS, "How new rows begin; by default as the run's configuration says."
)


def main(argv):
  del argv
  # Imported here, so that --help and a bad flag are answered at once.
  from tokenformer_jax.training.resize import grow_run

  print(grow_run(**resize_flags.values(), method=_METHOD.value))
  print(f"Go on with: python -m tokenformer_jax.cli.train --workdir={flags.FLAGS.output}")


if __name__ == "__main__":
  command.run(main)
