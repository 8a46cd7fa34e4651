"""The configuration of a model of which only the weights are there."""

import dataclasses
import json
import os
import pathlib

from tokenformer_jax.config import NAMED_SIZES, Config, ModelConfig
from tokenformer_jax.interop.stored_array import Weights, quoted

CONFIG_KEY = "tokenformer_jax.config"  # In the metadata of our safetensors files, JSON.
_PLACES = {
  "embedding": "sequential.0.word_embeddings.weight",
  "qkv_tokens": "sequential.2.attention.query.key_param_tokens",
  "proj_tokens": "sequential.2.attention.proj.key_param_tokens",
  "ffn_tokens": "sequential.2.mlp.key_param_tokens",
}
# A metadata's numbers are checked against the arrays; until then they must not cost memory.
_LARGEST = 2**24


def config_for(weights: Weights, config: ModelConfig | None, path: pathlib.Path) -> ModelConfig:
  """`config`, or what was stored in or beside the weights, or the named size with these shapes.

  Raises:
    ValueError: there is none, or its sizes are not those of the arrays: it says which.
  """
  sizes = _sizes(weights)
  config = config or _stored(weights, path)
  if config is None:
    return _named(weights, sizes)
  differing = [
    f"{field}={getattr(config, field)} where the arrays have {size}"
    for field, size in sizes.items()
    if getattr(config, field) != size
  ]
  if differing:
    raise ValueError(f"{weights.where}: the configuration is another model's: {', '.join(differing)}.")
  return config


def read_config(path: str | os.PathLike) -> ModelConfig:
  """The configuration in a config.json: of a work folder, beside an export, or ModelConfig's fields alone.

  Raises:
    ValueError: no such file, no JSON, or fields that do not do.
  """
  try:
    fields = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{path}: no configuration to read ({error}).") from None
  return _checked(fields.get("model", fields) if isinstance(fields, dict) else fields, str(path))


def config_json(config: ModelConfig) -> str:
  """What stands in the config.json beside an export."""
  return json.dumps({"model": dataclasses.asdict(config)}, indent=2) + "\n"


def _sizes(weights: Weights) -> dict[str, int]:
  """The fields that shapes tell; empty where an array that tells is missing."""
  shapes = {field: weights.arrays[name].shape for field, name in _PLACES.items() if name in weights.arrays}
  if shapes.keys() != _PLACES.keys() or any(len(shape) != 2 for shape in shapes.values()):
    return {}
  num_layers = 0
  while f"sequential.{num_layers + 2}.mlp.key_param_tokens" in weights.arrays:
    num_layers += 1
  vocab_size, hidden_size = shapes.pop("embedding")
  return dict(
    vocab_size=vocab_size,
    num_layers=num_layers,
    hidden_size=hidden_size,
    **{field: shape[0] for field, shape in shapes.items()},
  )


def _stored(weights: Weights, path: pathlib.Path) -> ModelConfig | None:
  """What we wrote into or beside the weights, None where they are not ours."""
  if CONFIG_KEY in weights.metadata:
    where = f"{weights.where}: {CONFIG_KEY} in its metadata"
    try:
      fields = json.loads(weights.metadata[CONFIG_KEY])
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{where} is no JSON ({error}).") from None
    config = _checked(fields, where)
    largest = max(value for value in dataclasses.astuple(config) if type(value) is int)
    if config.num_layers > len(weights.arrays) or largest > _LARGEST:
      raise ValueError(f"{where} is {quoted(config)}; {len(weights.arrays)} arrays are no such model.")
    return config
  beside = (path if path.is_dir() else path.parent) / "config.json"
  try:
    fields = json.loads(beside.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return None
  ours = isinstance(fields, dict) and isinstance(fields.get("model"), dict)
  return _checked(fields["model"], str(beside)) if ours else None


def _named(weights: Weights, sizes: dict[str, int]) -> ModelConfig:
  if not sizes:
    lost = [name for name in _PLACES.values() if len(getattr(weights.arrays.get(name), "shape", ())) != 2]
    raise ValueError(
      f"{weights.where}: no released TokenFormer, for it has no matrix {', '.join(lost)}; its "
      f"arrays are {quoted(list(weights.arrays))}."
    )
  for name in NAMED_SIZES:
    config = ModelConfig.named(name, vocab_size=max(sizes["vocab_size"], 1))
    if all(getattr(config, field) == size for field, size in sizes.items()):
      return config
  told = ", ".join(f"{field}={size}" for field, size in sizes.items())
  raise ValueError(
    f"{weights.where}: of no named size. Its arrays tell {told}; they do not tell num_heads, "
    "seq_length, theta, gelu, rotary_fraction and rotary_base: give "
    f"config=ModelConfig({told}, num_heads=…)."
  )


def _checked(fields, where: str) -> ModelConfig:
  try:
    return Config.from_dict({"model": fields}).model
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None
