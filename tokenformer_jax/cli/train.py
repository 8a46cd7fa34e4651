"""Trains a TokenFormer, or goes on with a run that was stopped.

    python -m tokenformer_jax.cli.train --config=experiments/quickstart.py --workdir=runs/quickstart

Any field of the configuration can be set: --config.training.num_steps=2000. Running the same command
again continues from the newest checkpoint, and gives to the bit the run that was never stopped; without
--config it goes on with the configuration in the work folder's config.json. Steps,
learning rate, intervals, growth to come, mesh and number of processes may change then; model and data
may not. SIGTERM saves and ends the run with exit code 143. Several processes: docs/running.md.
"""

from absl import flags
from ml_collections import config_flags

from tokenformer_jax.cli import command, process_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="Python file with get_config(); by default WORKDIR/config.json."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder or bucket of the run: checkpoints, metrics, samples.")
_PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of a few steps to WORKDIR/profile.")
_ALLOW_DATA_CHANGE = flags.DEFINE_bool(
  "allow_data_change", False, "Go on although the data is not what the run began with."
)
process_flags.define()
flags.mark_flags_as_required(["workdir"])


def main(argv):
  del argv
  from tokenformer_jax.training.loop import train
  from tokenformer_jax.training.resume import stored_config

  given = flags.FLAGS[_CONFIG.name].present
  config = command.read_config(_CONFIG) if given else stored_config(_WORKDIR.value, "give --config")
  process_flags.start(stops_by_itself=True)
  train(config, _WORKDIR.value, profile=_PROFILE.value, allow_data_change=_ALLOW_DATA_CHANGE.value)


if __name__ == "__main__":
  command.run(main)
