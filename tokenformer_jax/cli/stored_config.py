"""The configuration in a work folder as a file for `--config`: `--config=…/stored_config.py:WORKDIR`.

`cli.train` names it where fields are set without `--config`, so that they are set on what the run was started with.
"""

import ml_collections


def get_config(workdir: str) -> ml_collections.ConfigDict:
  """Returns the configuration as it was last given to `train` in `workdir`."""
  from tokenformer_jax.training.resume import stored_config  # It imports jax, which --help does not need.

  return stored_config(workdir, "give --config").to_config_dict()
