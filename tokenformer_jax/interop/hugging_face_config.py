"""The config.json of Hugging Face's models (`FAMILIES`), to and from our configuration."""

import dataclasses
from collections.abc import Callable
from typing import Any

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.config.parts import FeedForwardConfig
from tokenformer_jax.config.presets import PARTS, PRESETS
from tokenformer_jax.config.task import VisionConfig
from tokenformer_jax.config.validation import build
from tokenformer_jax.interop.hugging_face_families import FAMILIES, Family
from tokenformer_jax.interop.stored_array import quoted

# The names of the activations that transformers knows, and ours. The first name of each of ours is the one that is written.
_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_python": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
}
# Fields of experts that evaluation and decoding do not read.
_TRAINING = ("capacity", "balance", "router_z")
# Fields that change how a model is computed and not which function it is, or that a dense model does not read.
_FREE = ("compute_dtype", "remat", "kernel", "theta", "gelu")


def model_config(fields: dict[str, Any], where: str = "config.json") -> ModelConfig:
  """The configuration of the model that a config.json of transformers 4 or 5 describes.

  Dropout is left out: this package has none.

  Args:
    fields: the parsed file; its `model_type` is one of `FAMILIES`.
    where: the file, for messages.

  Raises:
    ValueError: the model cannot be expressed; the one message names every field that prevents it.
  """
  family = FAMILIES.get(fields.get("model_type", ""))
  if family is None:
    raise ValueError(
      f"{where}: model_type={quoted(fields.get('model_type'))} is not supported; it must be one of "
      f"{', '.join(FAMILIES)}."
    )
  faults: list[str] = []
  read = _with_rope(fields, family, faults)
  task = _task(read, family, faults)
  for theirs, only in family.fixed.items():
    if read.get(theirs, only) != only:
      faults.append(f"{theirs}={quoted(read[theirs])} is not supported, only {only}")
  found: dict[str, Any] = {}
  for ours, theirs in family.sizes.items():
    if theirs in read:
      found[ours] = read[theirs]
    else:
      faults.append(f"{theirs} is missing")
  for ours, (theirs, default) in family.options.items():
    value = read.get(theirs)
    found[ours] = default if value is None else value
  _check_types(found, family, faults)
  heads = _heads(task, read, family, faults)
  if faults:
    raise ValueError(f"{where}: {'; '.join(faults)}.")
  if found.get("ffn_tokens") is None:
    found["ffn_tokens"] = 4 * found["hidden_size"]
  if read.get("head_dim") not in (None, found["hidden_size"] // max(1, found["num_heads"])):
    raise ValueError(
      f"{where}: head_dim={quoted(read['head_dim'])} is not supported; the heads must divide "
      f"hidden_size={found['hidden_size']} among them."
    )
  found["ffn.activation"] = _ACTIVATIONS[found["ffn.activation"]]
  if "attention.bias" in found:
    found["attention.bias"] = "all" if found["attention.bias"] else "none"
  found |= {"task": task, **{name: found["hidden_size"] if value is None else value for name, value in heads.items()}}
  if found.get("attention.num_kv_heads") in (None, found["num_heads"]):
    found["attention.num_kv_heads"] = 0
  try:
    return _built(family, found)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None


def config_fields(config: ModelConfig) -> dict[str, Any] | None:
  """The fields of the config.json that describes this model, None if no family has such a model.

  They are those of transformers 4 and 5: rotary settings are given in both forms.
  """
  for model_type, family in FAMILIES.items():
    if config.task not in family.architectures.values():
      continue
    fields = _fields(model_type, family, config)
    try:
      if comparable(model_config(fields)) == comparable(config):
        return fields
    except ValueError:
      continue
  return None


def comparable(config: ModelConfig) -> ModelConfig:
  """The configuration with defaults in the fields that do not change the function of a dense model."""
  attention = config.attention
  if attention.num_kv_heads == config.num_heads:
    attention = dataclasses.replace(attention, num_kv_heads=0)
  free = (*_FREE, *(() if attention.positions == "rotary" else ("rotary_fraction", "rotary_base")))
  defaults = {field.name: field.default for field in dataclasses.fields(config) if field.name in free}
  ffn = config.ffn
  if ffn.experts > 1:
    ffn = dataclasses.replace(ffn, **{name: getattr(FeedForwardConfig, name) for name in _TRAINING})
  changes: dict[str, Any] = {**defaults, "attention": attention, "ffn": ffn}
  if config.task == "encode" and not config.classifier.pooler_size:
    # No config.json says whether there is a pooler.
    changes["classifier"] = dataclasses.replace(config.classifier, pooler_size=config.hidden_size)
  return dataclasses.replace(config, **changes)


def _with_rope(fields: dict[str, Any], family: Family, faults: list[str]) -> dict[str, Any]:
  """The fields with the rotary settings of transformers 5, `rope_parameters`, under the names of transformers 4."""
  read = dict(fields)
  if "rotary_base" not in family.options:
    return read
  for name in ("rope_parameters", "rope_scaling"):
    rope = read.get(name) or {}
    if not isinstance(rope, dict):
      faults.append(f"{name}={quoted(rope)} is not an object")
      continue
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
      faults.append(f"{name}={quoted(rope)} is not supported, only rope_type='default'")
    for theirs, ours in (("rope_theta", "rotary_base"), ("partial_rotary_factor", "rotary_fraction")):
      if theirs not in rope:
        continue
      if ours in family.options:
        read[family.options[ours][0]] = rope[theirs]
      elif rope[theirs] != 1.0:
        faults.append(f"{name}.{theirs}={quoted(rope[theirs])} is not supported, only 1.0")
  return read


def _task(read: dict[str, Any], family: Family, faults: list[str]) -> str:
  """Our task of the class that a config.json names; of several tasks, a class that is none of the family's is a fault."""
  first = next(iter(family.architectures.values()))
  named = read.get("architectures") or []
  if len(family.architectures) == 1 or not named:
    return first
  known = [family.architectures[name] for name in named if isinstance(name, str) and name in family.architectures]
  if not known:
    faults.append(f"architectures={quoted(named)} is not supported, only {', '.join(family.architectures)}")
  return known[0] if known else first


def _heads(task: str, read: dict[str, Any], family: Family, faults: list[str]) -> dict[str, Any]:
  """Our fields of the head on the last block; None is as many channels as the model has."""
  if task == "masked_token":
    return {}
  part = "vision" if family.preset == "vit" else "classifier"
  heads: dict[str, Any] = {"transform": False} if part == "classifier" and task != "next_token" else {}
  if task == "encode":
    heads |= {
      "classifier.pooler_size": read.get("pooler_output_size"),
      **({"vision.num_classes": 0} if part == "vision" else {}),
    }
  if task == "classify":
    labels = read.get("id2label")
    classes = len(labels) if isinstance(labels, dict) else read.get("num_labels", 2)
    if type(classes) is not int or classes < 1:
      faults.append(f"num_labels={quoted(classes)} is not a number of classes")
    heads[f"{part}.num_classes"] = classes
  return heads


def _check_types(found: dict[str, Any], family: Family, faults: list[str]) -> None:
  """Adds a fault for each value that is not of the type that our field has."""
  known = {**family.sizes, **{ours: theirs for ours, (theirs, _) in family.options.items()}}
  for ours, value in found.items():
    expected, accepts = _type_of(ours)
    if value is None and ours in ("ffn_tokens", "attention.num_kv_heads"):
      continue
    if ours == "ffn.activation" and not (isinstance(value, str) and value in _ACTIVATIONS):
      faults.append(f"{known[ours]}={quoted(value)} is not supported, only {', '.join(_ACTIVATIONS)}")
    elif not accepts(value):
      faults.append(f"{known[ours]}={quoted(value)} is not {expected}")


def _type_of(ours: str) -> tuple[str, Callable[[Any], bool]]:
  if ours in ("tied", "attention.bias", "ffn.bias", "residual.parallel"):
    return "true or false", lambda value: type(value) is bool
  if ours in ("norm_epsilon", "rotary_fraction", "rotary_base"):
    return "a number", lambda value: type(value) in (int, float)
  if ours == "ffn.activation":
    return "a name", lambda value: isinstance(value, str)
  return "a whole number", lambda value: type(value) is int


def _built(family: Family, found: dict[str, Any]) -> ModelConfig:
  """The preset with these fields; `attention.bias` is the field of a part."""
  fields: dict[str, Any] = {
    **PRESETS[family.preset],
    **{part: dict(PRESETS[family.preset].get(part, {})) for part in PARTS},
    "qkv_tokens": 0,
    "proj_tokens": 0,
  }
  for name, value in found.items():
    part, _, field = name.rpartition(".")
    (fields[part] if part else fields)[field] = value
  if fields["vision"]:
    fields |= {"vocab_size": 0, "seq_length": build(VisionConfig, fields["vision"], "vision").num_tokens}
  return ModelConfig.from_dict(fields)


def _fields(model_type: str, family: Family, config: ModelConfig) -> dict[str, Any]:
  """A config.json of this family with the sizes and options of `config`."""
  fields: dict[str, Any] = {"architectures": [_class(family, config.task)], "model_type": model_type}
  names = {**family.sizes, **{ours: theirs for ours, (theirs, _) in family.options.items()}}
  for ours, theirs in names.items():
    part, _, field = ours.rpartition(".")
    value = getattr(getattr(config, part) if part else config, field)
    if ours == "attention.bias":
      value = value == "all"
    elif ours == "attention.num_kv_heads":
      value = config.num_kv_heads
    elif ours == "ffn.activation":
      value = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == value)
    fields[theirs] = value
  classes = config.vision.num_classes or config.classifier.num_classes
  if classes:
    labels = [f"LABEL_{index}" for index in range(classes)]
    fields |= {"id2label": {str(i): label for i, label in enumerate(labels)}}
    fields |= {"label2id": {label: i for i, label in enumerate(labels)}}
  if config.task == "encode" and config.classifier.pooler_size and model_type == "vit":
    fields["pooler_output_size"] = config.classifier.pooler_size
  if "rotary_base" in family.options:
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if "rotary_fraction" in family.options:
      fields["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
  return fields


def _class(family: Family, task: str) -> str:
  return next(name for name, its_task in family.architectures.items() if its_task == task)
