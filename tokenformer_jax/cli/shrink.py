"""Takes parameter tokens from a run, the least used first: a new work folder, the old one untouched.

    python -m tokenformer_jax.cli.shrink --workdir=runs/large --output=runs/small --ffn_tokens=2048

Use is a token's mean absolute contribution, measured on the run's training data; what it costs is measured on
its held-out data. Shrinking to the counts before a growth, before training went on, undoes the growth.
"""

from absl import flags

from tokenformer_jax.cli import door

_WORKDIR = flags.DEFINE_string("workdir", None, "Work folder of the run to shrink.")
_OUTPUT = flags.DEFINE_string("output", None, "The new work folder, on a local disk.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to shrink; by default the newest.")
_QKV = flags.DEFINE_integer("qkv_tokens", None, "Parameter tokens that stay in each of query, key and value.")
_PROJ = flags.DEFINE_integer("proj_tokens", None, "Parameter tokens that stay in the attention's output projection.")
_FFN = flags.DEFINE_integer("ffn_tokens", None,
                            "Parameter tokens that stay in the feed-forward. Counts not given stay.")
_TOKEN_AXIS = flags.DEFINE_integer("mesh.token", None, "Devices that share the parameter tokens from now on.")
flags.mark_flags_as_required(["workdir", "output"])


def main(argv):
  del argv
  # Imported here, so that --help and a bad flag are answered at once.
  from tokenformer_jax.training.resize import shrink_run

  print(shrink_run(_WORKDIR.value, _OUTPUT.value, step=_STEP.value, token_axis=_TOKEN_AXIS.value,
                   qkv_tokens=_QKV.value, proj_tokens=_PROJ.value, ffn_tokens=_FFN.value))
  print(f"Go on with: python -m tokenformer_jax.cli.train --workdir={_OUTPUT.value}")


if __name__ == "__main__":
  door.run(main)
