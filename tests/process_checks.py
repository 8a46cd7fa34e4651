"""What `test_processes` has each of two processes do; it takes the flags of `cli.generate` and a file with a config.

They try to start a run with configurations that differ, resume the run in --workdir with two devices each and with all
devices along the `token` axis, and write a text with the trained model.
"""

import pathlib
import runpy

from absl import app, flags

from tests import small_run
from tokenformer_jax.config import Config

REFUSED_WORKDIR = "refused"
# Printed before the error that was raised, and before the text.
REFUSED, WRITTEN = "refused:", "written:"


def main(argv):
  import jax

  from tokenformer_jax.distributed import processes
  from tokenformer_jax.training.loop import train

  _, config_file = argv
  workdir = flags.FLAGS.workdir
  config = Config.from_dict(runpy.run_path(config_file)["get_config"]())
  process_flags.start(stops_by_itself=True)
  other = small_run.replace(config, training=dict(num_steps=10 + jax.process_index()))
  try:
    train(other, str(pathlib.Path(workdir).with_name(REFUSED_WORKDIR)))
  except ValueError as error:
    print(REFUSED, error)
  train(small_run.replace(config, mesh=dict(data=1, token=4)), workdir)

  processes.start = lambda *_, **__: None  # They are started already.
  print(end=WRITTEN, flush=True)
  generate.main([])


if __name__ == "__main__":
  # A command's module defines its flags, some of which other commands define too: tests import only the names above.
  from tokenformer_jax.cli import generate, process_flags

  app.run(main)
