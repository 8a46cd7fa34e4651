"""The flags of the doors that make a work folder with other counts of parameter tokens from a run's."""

from typing import Any

from absl import flags

flags.disclaim_key_flags()  # They are the door's that defines them.

_TOKENS = {
  "qkv_tokens": "each of query, key and value",
  "proj_tokens": "the attention's output projection",
  "ffn_tokens": "the feed-forward",
}


def define() -> None:
  """--workdir, --output, --step, the three counts, and --mesh.token."""
  flags.DEFINE_string("workdir", None, "Work folder of the run.")
  flags.DEFINE_string("output", None, "The new work folder, on a local disk.")
  flags.DEFINE_integer("step", None, "Checkpoint to take; by default the newest.")
  for name, place in _TOKENS.items():
    flags.DEFINE_integer(name, None, f"Parameter tokens to be in {place}; by default as many as are.")
  flags.DEFINE_integer("mesh.token", None, "Devices that share the parameter tokens from now on.")
  flags.mark_flags_as_required(["workdir", "output"])


def values() -> dict[str, Any]:
  """What the flags say, as arguments of `training.resize.grow_run` and `shrink_run`."""
  given = flags.FLAGS
  return dict(
    workdir=given.workdir,
    output=given.output,
    step=given.step,
    token_axis=given["mesh.token"].value,
    **{name: given[name].value for name in _TOKENS},
  )
