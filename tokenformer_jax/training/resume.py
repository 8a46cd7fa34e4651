"""Whether a work folder may be gone on with: model, tokenizer and data must be its own."""

import dataclasses
import json
from typing import Any

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.paths import user_path

CONFIG = "config.json"
# What changes how fast a model runs and not what it is.
_FREE_MODEL_FIELDS = ("remat", "kernel")


def check_same_model(stored: dict[str, Any], config: Config, step: int, workdir: str) -> ModelConfig:
  """The model to restore at `step`: the stored one, with the new run's free fields.

  A checkpoint of the very step of a growth was written before it.

  Args:
    stored: the model's fields in the checkpoint's record.

  Raises:
    ValueError: naming the first field that differs, both values and the way out.
  """
  model = config.model_at(step - 1)
  for name, value in dataclasses.asdict(model).items():
    if name not in _FREE_MODEL_FIELDS and stored.get(name) != value:
      raise ValueError(
        f"{workdir}: its model at step {step} has {name}={stored.get(name)!r}, this run's would have "
        f"{value!r}; use another --workdir, or what its {CONFIG} has."
      )
  return model


def stored_config(workdir: str, way_out: str = "give the work folder of a run") -> Config:
  """The configuration of the run in a work folder, as last given. Raises ValueError where there is none."""
  path = user_path(workdir) / CONFIG
  if not path.exists():
    raise ValueError(f"{workdir}: no {CONFIG} there; {way_out}.")
  try:
    fields = json.loads(path.read_text())
  except ValueError:
    raise ValueError(f"{path}: not the configuration of a run.") from None
  return Config.from_dict(fields)


def check_same_run(config: Config, workdir: str, allow_data_change: bool) -> None:
  """Raises ValueError if a run was begun in the work folder with another first model or other data."""
  folder = user_path(workdir)
  path = folder / CONFIG
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{workdir}: not a folder; use another --workdir.")
  if not path.exists():
    return
  try:
    stored = json.loads(path.read_text())
    stored_model, stored_data = stored["model"], stored["data"]
  except (ValueError, TypeError, KeyError):
    raise ValueError(f"{path}: not the configuration of a run; use another --workdir.") from None
  check_same_model(stored_model, config, 0, workdir)
  if allow_data_change:
    return
  for name, value in dataclasses.asdict(config.data).items():
    if stored_data.get(name) != value:
      raise ValueError(
        f"{workdir}: its run reads data.{name}={stored_data.get(name)!r}, this one {value!r}; use "
        "another --workdir, or pass --allow_data_change to go on knowingly."
      )


def check_same_tokenizer(stored: str, fingerprint: str, where: str) -> None:
  """Raises ValueError unless the weights in `where` were trained on the ids of this run's tokenizer."""
  if stored != fingerprint:
    raise ValueError(
      f"{where}: its model was trained with the tokenizer {stored}, this run's is {fingerprint}: ids "
      f"would mean other text; set data.tokenizer to the one that its {CONFIG} has."
    )


def check_same_weights(model: ModelConfig, config: ModelConfig, source: str) -> None:
  """Raises ValueError unless weights of `model`, read from `source`, fit a run of `config`."""
  free = (*_FREE_MODEL_FIELDS, "seq_length", "compute_dtype")
  for field in dataclasses.fields(ModelConfig):
    have, want = getattr(model, field.name), getattr(config, field.name)
    if field.name not in free and have != want:
      raise ValueError(
        f"init_from={source}: its model has {field.name}={have!r}, this run's {want!r}; "
        f"set model.{field.name}={have!r}."
      )
