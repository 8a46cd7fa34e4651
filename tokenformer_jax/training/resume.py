"""Whether a work folder may be gone on with: model and data must be its own."""

import dataclasses
from typing import Any

from tokenformer_jax.config import Config, ModelConfig

# What changes how fast a model runs and not what it is.
_FREE_MODEL_FIELDS = ("remat",)


def check_same_model(stored: dict[str, Any], config: Config, step: int, workdir: str) -> ModelConfig:
  """The model to restore at `step`: the stored one, with the new run's free fields.

  Args:
    stored: the model's fields in the checkpoint's record.

  Raises:
    ValueError: naming the first field that differs, both values and the way out.
  """
  # A checkpoint of the very step of a growth was written before it.
  candidates = [config.model_at(step), config.model_at(step - 1)]
  for candidate in candidates:
    fields = dataclasses.asdict(candidate)
    differing = [name for name in fields
                 if name not in _FREE_MODEL_FIELDS and fields[name] != stored.get(name)]
    if not differing:
      return candidate
  name = differing[0]
  raise ValueError(f"{workdir}: its model at step {step} has {name}={stored.get(name)!r}, this run's would have "
                   f"{fields[name]!r}; use another --workdir, or the folder's own {workdir}/config.json.")


def check_same_run(stored: dict[str, Any], config: Config, workdir: str, allow_data_change: bool) -> None:
  """Raises ValueError unless a work folder's config.json has this run's first model and its data."""
  check_same_model(stored["model"], config, 0, workdir)
  if allow_data_change:
    return
  for name, value in dataclasses.asdict(config.data).items():
    if stored["data"].get(name) != value:
      raise ValueError(f"{workdir}: its run reads data.{name}={stored['data'].get(name)!r}, this one {value!r}; use "
                       "another --workdir, or pass --allow_data_change to go on knowingly.")


def check_same_weights(model: ModelConfig, config: ModelConfig, source: str) -> None:
  """Raises ValueError unless weights of `model`, read from `source`, fit a run of `config`."""
  free = (*_FREE_MODEL_FIELDS, "seq_length", "compute_dtype")
  for field in dataclasses.fields(ModelConfig):
    have, want = getattr(model, field.name), getattr(config, field.name)
    if field.name not in free and have != want:
      raise ValueError(f"init_from={source}: its model has {field.name}={have!r}, this run's {want!r}; "
                       f"set model.{field.name}={have!r}.")
