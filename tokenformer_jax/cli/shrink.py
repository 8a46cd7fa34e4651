"""Takes parameter tokens from a run, the least used first: a new work folder, the old one untouched.

    python -m tokenformer_jax.cli.shrink --workdir=runs/large --output=runs/small --ffn_tokens=2048

Use is a token's mean absolute contribution, measured on the run's training data; what it costs is measured on
its held-out data. Shrinking to the counts before a growth, before training went on, undoes the growth.
"""

from absl import flags

from tokenformer_jax.cli import command, resize_flags

resize_flags.define()


def main(argv):
  del argv
  # Imported here, so that --help and a bad flag are answered at once.
  from tokenformer_jax.training.resize import shrink_run

  print(shrink_run(**resize_flags.values()))
  print(f"Go on with: python -m tokenformer_jax.cli.train --workdir={flags.FLAGS.output}")


if __name__ == "__main__":
  command.run(main)
