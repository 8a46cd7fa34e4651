"""The flags of the commands that make a work folder with other counts of parameter tokens from a run's folder."""

from typing import Any

from absl import flags

from tokenformer_jax.config import TOKEN_COUNTS

flags.disclaim_key_flags()  # They belong to the command that defines them.


def define() -> None:
  """Defines --workdir, --output, --step, the three counts, and --mesh.token."""
  flags.DEFINE_string("workdir", None, "Work folder of the run, local or in a gs:// bucket.")
  flags.DEFINE_string("output", None, "The new work folder, on a local disk.")
  flags.DEFINE_integer("step", None, "Step of the checkpoint to read; by default the newest.")
  for name, place in TOKEN_COUNTS.items():
    flags.DEFINE_integer(name, None, f"New number of rows of {place}; by default it stays.")
  flags.DEFINE_integer(
    "mesh.token", None, "Number of devices that share the parameter tokens in the new run; by default it stays."
  )
  flags.mark_flags_as_required(["workdir", "output"])


def values() -> dict[str, Any]:
  """Returns the flags' values as arguments of `training.resize.grow_run` and `shrink_run`."""
  given = flags.FLAGS
  return dict(
    workdir=given.workdir,
    output=given.output,
    step=given.step,
    token_axis=given["mesh.token"].value,
    **{name: given[name].value for name in TOKEN_COUNTS},
  )
