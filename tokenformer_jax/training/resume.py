"""Whether a run may resume in a work folder: its model, tokenizer and data must be those that the run began with."""

import dataclasses
import json
from typing import Any

from tokenformer_jax import data
from tokenformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from tokenformer_jax.config.validation import build, flattened
from tokenformer_jax.paths import user_path
from tokenformer_jax.training.checkpoints import TOKENIZER
from tokenformer_jax.training.schedules import learning_rate_schedule

CONFIG = "config.json"
# These fields change how fast a model runs and how much memory it takes, but not its function.
_FREE_MODEL_FIELDS = ("remat", "kernel")

# Fields that give a model a router, what it chooses, and the value without one.
_ROUTERS = (
  ("ffn.experts", "to experts", 1),
  ("ffn.group_tokens", "to groups of parameter tokens", 0),
  ("depth.capacity", "past blocks", 1.0),
)


def check_same_model(stored: dict[str, Any], config: Config, step: int, workdir: str) -> ModelConfig:
  """Returns the model to restore at `step`: the stored one, with the free fields of this run.

  A checkpoint at the step of a growth stage was written before the growth.

  Args:
    stored: the model's fields in the checkpoint's record.
    config: this run.
    step: the checkpoint's step.
    workdir: for messages.

  Raises:
    ValueError: names the first field that differs, both values and the way out.
  """
  model = config.model_at(step - 1)
  had = flattened(ModelConfig.from_dict(stored, f"{workdir}: model"))
  for field, want in flattened(model).items():
    have = had[field]
    if field not in _FREE_MODEL_FIELDS and have != want:
      raise ValueError(
        f"{workdir}: its model at step {step} has {field}={have!r}, this run's would have {want!r}; "
        f"use another --workdir, or the value in its {CONFIG}."
      )
  return model


def stored_config(workdir: str, way_out: str = "give the work folder of a run") -> Config:
  """Returns the configuration in a work folder, as it was last given to `train`.

  Args:
    workdir: the folder.
    way_out: ends the message where there is no configuration.

  Raises:
    ValueError: there is no configuration, or one that cannot be used.
  """
  path = user_path(workdir, "workdir") / CONFIG
  if not path.exists():
    raise ValueError(f"{workdir}: no {CONFIG} there; {way_out}.")
  try:
    fields = json.loads(path.read_text())
  except ValueError:
    raise ValueError(f"{path}: not the configuration of a run.") from None
  try:
    return Config.from_dict(fields)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def check_same_run(config: Config, workdir: str, allow_data_change: bool) -> None:
  """Raises ValueError if the work folder holds a run that began with another model or with other data."""
  folder = user_path(workdir, "workdir")
  path = folder / CONFIG
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{workdir}: not a folder; use another --workdir.")
  if not path.exists():
    return
  try:
    stored = json.loads(path.read_text())
    stored_model, stored_data = dict(stored["model"]), dict(stored["data"])
  except (ValueError, TypeError, KeyError):
    raise ValueError(f"{path}: not the configuration of a run; use another --workdir.") from None
  check_same_model(stored_model, config, 0, workdir)
  if allow_data_change:
    return
  # A field that is newer than the record had its default.
  stored_fields = {**flattened(DataConfig()), **_flattened(stored_data)}
  for name, want in flattened(config.data).items():
    have = stored_fields[name]
    if have != want:
      raise ValueError(
        f"{workdir}: its run reads data.{name}={have!r}, this one {want!r}; use another --workdir, or pass "
        "--allow_data_change to resume with other data."
      )


def check_same_tokenizer(stored: str, tokenizer: data.Tokenizer, where: str) -> None:
  """Raises ValueError unless the weights in `where` were trained on the ids of this run's tokenizer.

  Args:
    stored: the fingerprint of the tokenizer that they were trained with.
    tokenizer: this run's.
    where: for the message.
  """
  if not tokenizer.matches(stored):
    raise ValueError(
      f"{where}: its model was trained with the tokenizer {stored}, this run's is {tokenizer.fingerprint}: ids "
      f"would mean other text; set data.tokenizer to the one that its {CONFIG} has."
    )


def check_tokenizer_file(workdir: str, tokenizer: data.Tokenizer) -> None:
  """Raises ValueError if the folder of a new run holds another tokenizer.json; `save_tokenizer` would refuse it later."""
  path = user_path(workdir, "workdir") / TOKENIZER
  if not path.exists():
    return
  try:
    same = data.load_tokenizer(path).fingerprint == tokenizer.fingerprint
  except ValueError:
    same = False
  if not same:
    raise ValueError(
      f"{path}: is not the tokenizer of this run and is not overwritten; move it away, or use another --workdir."
    )


def check_position(record: dict[str, Any], updates: int, step: int, workdir: str) -> None:
  """Raises ValueError unless a checkpoint is that of its step: a run takes one batch for each update.

  Args:
    record: the checkpoint's record.
    updates: how many the restored state counts.
    step: that of the checkpoint's folder.
    workdir: for the message.
  """
  batches = record["data"].get("next_batch") if isinstance(record.get("data"), dict) else None
  if (updates, batches) != (step, step):
    raise ValueError(
      f"{workdir}/checkpoints/{step}: its state counts {updates} updates and its data position {batches} batches, not "
      f"{step}: it was changed by hand; move it away to resume from the checkpoint before."
    )


def check_same_weights(model: ModelConfig, config: ModelConfig, source: str) -> None:
  """Raises ValueError unless weights of `model`, read from `source`, fit a run of `config`.

  A classifier may have another head than the model that its other weights come from, and a feed-forward whose parameter
  tokens are in groups takes the weights of a plain one: the run makes the router (`growth.router`).
  """
  if config.ffn.group_tokens and model.ffn == type(model.ffn)() and model.ffn_tokens == config.ffn_tokens:
    model = dataclasses.replace(model, ffn=config.ffn)
  # The learned embeddings of positions are weights, one for each.
  free = {*_FREE_MODEL_FIELDS, "compute_dtype", "seq_length"}
  if model.attention.positions == "learned":
    free.remove("seq_length")
  if config.task == "classify":
    free |= {"task", "tied", "transform", "classifier.num_classes", "classifier.pooler_size", "vision.num_classes"}
  had = flattened(model)
  _check_same_routers(had, flattened(config), source)
  differing = {
    field: (had[field], want) for field, want in flattened(config).items() if field not in free and had[field] != want
  }
  if differing:
    has = ", ".join(f"{field}={have!r}, this run's {want!r}" for field, (have, want) in differing.items())
    changes = ", ".join(f"model.{field}={have!r}" for field, (have, _) in differing.items())
    raise ValueError(f"init_from={source}: its model has {has}; set {changes}.")


def _check_same_routers(had: dict[str, Any], wanted: dict[str, Any], source: str) -> None:
  """Raises ValueError if only one of two models, fields by their paths, has a router: its weights would be missing."""
  for field, what, none in _ROUTERS:
    have, want = had[field], wanted[field]
    if have != none and want == none:
      raise ValueError(
        f"init_from={source}: its model has a router {what} ({field}={have!r}) and this run's has none ({field}={want!r}): "
        f"take model.{field.split('.')[0]} from its configuration, or leave init_from out."
      )
    if have == none and want != none and field != "ffn.group_tokens":  # The run makes the router of groups.
      raise ValueError(
        f"init_from={source}: its model has no router {what} ({field}={have!r}) and this run's needs one ({field}={want!r}): "
        f"set model.{field}={have!r} and leave the other fields of model.{field.split('.')[0]} as it has them, or train "
        "the routed model from the beginning, without init_from."
      )


def check_same_optimizer(stored: dict[str, Any], config: Config, workdir: str) -> None:
  """Raises ValueError if the optimizer's state in a checkpoint is that of another optimizer.

  Args:
    stored: the configuration in the checkpoint's record, nested dicts.
    config: this run.
    workdir: names the run in the message.
  """
  fields = {field.name: field for field in dataclasses.fields(OptimizerConfig)}
  for name in ("name", "ema_decay", "first_moment_dtype", "second_moment_dtype"):
    before, now = _stored(stored.get("optimizer", {}), fields[name]), getattr(config.optimizer, name)
    if before != now and (name != "ema_decay" or not (before and now)):
      raise ValueError(
        f"{workdir}: its run has optimizer.{name}={before!r}, this one {now!r}, whose state is another; keep {before!r}, "
        "or start a new run with --config.init_from."
      )


def changed_rate(stored: dict[str, Any], config: Config, step: int) -> str:
  """Returns a note if the learning rate jumps at `step` because the run resumes with another schedule, or "".

  A schedule depends on `training.num_steps`: a longer run begins its decay later, so the rate may rise again.

  Args:
    stored: the configuration in the checkpoint's record, nested dicts.
    config: this run.
    step: updates done.
  """
  if step >= config.training.num_steps:
    return ""
  try:
    num_steps = stored["training"]["num_steps"]
    before = learning_rate_schedule(build(OptimizerConfig, stored["optimizer"], "optimizer"), num_steps)
  except (ValueError, TypeError, KeyError):
    return ""  # An earlier version's schedule, which this one would not accept.
  after = learning_rate_schedule(config.optimizer, config.training.num_steps)
  if abs(float(after(step)) - float(before(step))) <= 1e-6 * float(after(step)):
    return ""
  return (
    f"The learning rate changes from {float(before(step - 1)):.3g} (the update before, of a run with "
    f"training.num_steps={num_steps:,}) to {float(after(step)):.3g} (the next one, with "
    f"training.num_steps={config.training.num_steps:,})."
  )


def _flattened(fields: dict[str, Any]) -> dict[str, Any]:
  """`flattened` of a configuration that was stored as JSON, where a tuple is a list."""
  flat: dict[str, Any] = {}
  for name, value in fields.items():
    if isinstance(value, dict):
      flat |= {f"{name}.{inner}": of_part for inner, of_part in _flattened(value).items()}
    else:
      flat[name] = tuple(value) if isinstance(value, list) else value
  return flat


def _stored(fields: dict[str, Any], field: dataclasses.Field) -> Any:
  """Returns the stored value; a field that is newer than the record had its default."""
  return fields.get(field.name, None if field.default is dataclasses.MISSING else field.default)
