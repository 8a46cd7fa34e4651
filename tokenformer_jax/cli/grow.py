"""Gives a run more parameter tokens: a new work folder for `train` to go on with, the old one untouched.

    python -m tokenformer_jax.cli.grow --workdir=runs/small --output=runs/large \\
        --qkv_tokens=2140 --proj_tokens=2140 --ffn_tokens=8560 --mesh.token=4
    python -m tokenformer_jax.cli.train --workdir=runs/large

The model's function, optimizer state, step and place in the data are the old run's. Leaves are read and
written in slices, so the model need not fit into memory.
"""

from absl import flags

from tokenformer_jax.cli import door
from tokenformer_jax.config import WAYS_OF_GROWING

_WORKDIR = flags.DEFINE_string("workdir", None, "Work folder of the run to grow.")
_OUTPUT = flags.DEFINE_string("output", None, "The new work folder, on a local disk.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to grow; by default the newest.")
_QKV = flags.DEFINE_integer("qkv_tokens", None, "Parameter tokens in each of query, key and value.")
_PROJ = flags.DEFINE_integer("proj_tokens", None, "Parameter tokens in the attention's output projection.")
_FFN = flags.DEFINE_integer("ffn_tokens", None,
                            "Parameter tokens in the feed-forward. Counts not given stay.")
_HOW = flags.DEFINE_enum("how", None, WAYS_OF_GROWING,
                         "How new rows begin; by default as the run's configuration says.")
_TOKEN_AXIS = flags.DEFINE_integer("mesh.token", None, "Devices that share the parameter tokens from now on.")
flags.mark_flags_as_required(["workdir", "output"])


def main(argv):
  del argv
  # Imported here, so that --help and a bad flag are answered at once.
  from tokenformer_jax.training.resize import grow_run

  report = grow_run(_WORKDIR.value, _OUTPUT.value, step=_STEP.value, how=_HOW.value, token_axis=_TOKEN_AXIS.value,
                    qkv_tokens=_QKV.value, proj_tokens=_PROJ.value, ffn_tokens=_FFN.value)
  print(report)
  print(f"Go on with: python -m tokenformer_jax.cli.train --workdir={_OUTPUT.value}")


if __name__ == "__main__":
  door.run(main)
