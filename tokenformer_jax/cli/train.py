"""Trains a TokenFormer, or resumes a run that was stopped.

    python -m tokenformer_jax.cli.train --config=experiments/quickstart.py --workdir=runs/quickstart

Any field of the configuration can be set: --config.training.num_steps=2000. Running the same command again resumes
from the newest checkpoint and gives, bit by bit, the run that was never stopped. Without --config the run resumes with
the configuration in the work folder's config.json, in which fields can be set too. Number of steps, learning rate,
intervals, growth stages to come, mesh and number of processes may change then; model, data and the kind of optimizer may
not. SIGTERM, SIGINT and SIGHUP save a checkpoint and end the run with exit code 143; docs/reliability.md has the other
codes. For several processes see docs/running.md.
"""

import sys

from absl import flags
from ml_collections import config_flags

from tokenformer_jax import allocator
from tokenformer_jax.cli import command, process_flags, stored_config

_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="Python file with get_config(); by default the configuration in WORKDIR/config.json."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Local folder or gs:// bucket of the run: checkpoints, metrics, samples."
)
_PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of a few steps to WORKDIR/profile.")
_ALLOW_DATA_CHANGE = flags.DEFINE_bool(
  "allow_data_change", False, "Resume although the data is not what the run began with."
)
process_flags.define()
flags.mark_flags_as_required(["workdir"])


def main(argv):
  del argv
  allocator.keep_freed_memory_on_cpus()
  # These import jax, which --help and a wrong flag do not need.
  from tokenformer_jax.training import resume
  from tokenformer_jax.training.loop import train

  given = flags.FLAGS[_CONFIG.name].present
  config = command.read_config(_CONFIG) if given else resume.stored_config(_WORKDIR.value, "give --config")
  process_flags.start(stops_by_itself=True)
  train(config, _WORKDIR.value, profile=_PROFILE.value, allow_data_change=_ALLOW_DATA_CHANGE.value)


def with_stored_config(arguments: list[str]) -> list[str]:
  """The arguments with `--config` for the stored configuration, where they set fields of a configuration and name none."""
  names = [argument.lstrip("-").partition("=")[0] for argument in arguments]
  following = [*arguments[1:], ""]
  workdirs = [a.partition("=")[2] or after for name, a, after in zip(names, arguments, following) if name == "workdir"]
  if "config" in names or not workdirs or not any(name.startswith("config.") for name in names):
    return arguments
  return [f"--config={stored_config.__file__}:{workdirs[-1]}", *arguments]


if __name__ == "__main__":
  sys.argv[1:] = with_stored_config(sys.argv[1:])
  command.run(main)
