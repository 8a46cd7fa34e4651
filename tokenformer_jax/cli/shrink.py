"""Removes the least used parameter tokens of a run: makes a new work folder, and leaves the old one as it is.

    python -m tokenformer_jax.cli.shrink --workdir=runs/large --output=runs/small --ffn_tokens=2048

Use is a token's mean absolute contribution, measured on the run's training data; the loss before and after is measured
on its held-out data. Shrinking a grown model to its earlier counts, before it is trained further, undoes the growth.
"""

from absl import flags

from tokenformer_jax.cli import command, resize_flags

resize_flags.define()


def main(argv):
  del argv
  # This imports jax, which --help and a wrong flag do not need.
  from tokenformer_jax.training.resize import shrink_run

  print(shrink_run(**resize_flags.values()))
  print(f"Resume with: python -m tokenformer_jax.cli.train --workdir={flags.FLAGS.output}")


if __name__ == "__main__":
  command.run(main)
