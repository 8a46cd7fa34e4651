"""The configuration of a model of which only the weights are known."""

import dataclasses
import json
import os

from etils import epath

from tokenformer_jax.config import NAMED_SIZES, Config, ModelConfig
from tokenformer_jax.interop.hugging_face_config import model_config
from tokenformer_jax.interop.names import EMBEDDING
from tokenformer_jax.interop.stored_array import Weights, quoted
from tokenformer_jax.paths import user_path

CONFIG_KEY = "tokenformer_jax.config"  # The key of the JSON configuration in the metadata of our safetensors files.
_PLACES = {
  "embedding": EMBEDDING,
  "qkv_tokens": "sequential.2.attention.query.key_param_tokens",
  "proj_tokens": "sequential.2.attention.proj.key_param_tokens",
  "ffn_tokens": "sequential.2.mlp.key_param_tokens",
}
# The largest number that a file's metadata may contain. It is compared with the arrays before any memory is allocated.
_LARGEST = 2**24


def config_for(weights: Weights, config: ModelConfig | None, path: epath.Path) -> ModelConfig:
  """Finds the configuration of the model with these weights.

  Args:
    weights: the weights, with the released names.
    config: the user's configuration, which takes precedence.
    path: the file or folder of the weights.

  Returns:
    The first of: `config`, the configuration in the file's metadata, the one in a config.json of this package
    beside the file, the named size with the arrays' shapes.

  Raises:
    ValueError: there is none of these, or its sizes differ from the arrays' (the message names them).
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
    raise ValueError(f"{weights.where}: the configuration is that of another model: {', '.join(differing)}.")
  return config


def read_config(path: str | os.PathLike, name: str = "config") -> ModelConfig:
  """Reads a model's configuration from a JSON file.

  Args:
    path: the config.json of a work folder, of an exported model or of a Hugging Face model, or a file with only the
      fields of ModelConfig.
    name: the flag or argument that gave it, for messages.

  Raises:
    ValueError: there is no such file, it is not JSON, or a field is invalid.
  """
  file = user_path(path, name)
  try:
    fields = json.loads(file.read_bytes())  # From bytes, so that a byte-order mark is accepted.
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{name}={os.fspath(path)!r}: the configuration cannot be read ({error}).") from None
  if isinstance(fields, dict) and "model_type" in fields:
    return model_config(fields, str(path))
  return _checked(fields.get("model", fields) if isinstance(fields, dict) else fields, str(path))


def config_json(config: ModelConfig) -> str:
  """The text of the config.json beside an exported model."""
  return json.dumps({"model": dataclasses.asdict(config)}, indent=2) + "\n"


def _sizes(weights: Weights) -> dict[str, int]:
  """The fields that the arrays' shapes determine; empty if one of the arrays needed for this is missing."""
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


def _stored(weights: Weights, path: epath.Path) -> ModelConfig | None:
  """The configuration that this package wrote into or beside the weights, None if it wrote none."""
  if CONFIG_KEY in weights.metadata:
    return config_in_metadata(weights)
  ours = (config_beside(path) or {}).get("model")
  return (
    _checked(ours, str((path if path.is_dir() else path.parent) / "config.json")) if isinstance(ours, dict) else None
  )


def config_in_metadata(weights: Weights, *, stacked: bool = False) -> ModelConfig | None:
  """The configuration that this package wrote into the file's metadata, None if there is none.

  Args:
    weights: the file.
    stacked: whether the layers are stacked in one array each, so that there may be more layers than arrays.
  """
  if CONFIG_KEY not in weights.metadata:
    return None
  where = f"{weights.where}: {CONFIG_KEY} in its metadata"
  try:
    fields = json.loads(weights.metadata[CONFIG_KEY])
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where} is not JSON ({error}).") from None
  config = _checked(fields, where)
  largest = max(value for value in dataclasses.astuple(config) if type(value) is int)
  if (config.num_layers > len(weights.arrays) and not stacked) or largest > _LARGEST:
    raise ValueError(f"{where} is {quoted(config)}; the file's {len(weights.arrays)} arrays are not such a model.")
  return config


def config_beside(path: epath.Path) -> dict | None:
  """The JSON object in the config.json beside a weight file or in its folder, None if there is none."""
  beside = (path if path.is_dir() else path.parent) / "config.json"
  if not beside.is_file():
    return None
  try:
    fields = json.loads(beside.read_bytes())
  except (ValueError, RecursionError) as error:
    # Without it the model of a named size with these shapes might be built, with another Θ or number of heads.
    raise ValueError(f"{beside}: not JSON ({error}); mend it, move it away, or give a configuration.") from None
  return fields if isinstance(fields, dict) else None


def _named(weights: Weights, sizes: dict[str, int]) -> ModelConfig:
  if not sizes:
    lost = [name for name in _PLACES.values() if len(getattr(weights.arrays.get(name), "shape", ())) != 2]
    raise ValueError(
      f"{weights.where}: not a released TokenFormer, because it has no matrix {', '.join(lost)}; its "
      f"arrays are {quoted(list(weights.arrays))}."
    )
  for name in NAMED_SIZES:
    config = ModelConfig.named(name, vocab_size=max(sizes["vocab_size"], 1))
    if all(getattr(config, field) == size for field, size in sizes.items()):
      return config
  known = ", ".join(f"{field}={size}" for field, size in sizes.items())
  raise ValueError(
    f"{weights.where}: no named size has its shapes. They determine {known}, but not num_heads, "
    "seq_length, theta, gelu, rotary_fraction and rotary_base: give "
    f"config=ModelConfig({known}, num_heads=…)."
  )


def _checked(fields, where: str) -> ModelConfig:
  try:
    return Config.from_dict({"model": fields}).model
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None
