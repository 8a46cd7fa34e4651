"""Writes models as weight files with the released names, in PyTorch's format or safetensors, with a model card."""

import dataclasses
import json
import os

import numpy as np
from etils import epath
from flax import traverse_util

from tokenformer_jax import data
from tokenformer_jax.config import TOKEN_COUNTS, ModelConfig
from tokenformer_jax.interop.hub import local_path
from tokenformer_jax.interop.model_card import model_card
from tokenformer_jax.interop.names import pattention_names, released_names
from tokenformer_jax.interop.pretrained import TAU_KEY
from tokenformer_jax.interop.rewriting import count_names, rewritten_config, rewritten_keys, rewritten_values
from tokenformer_jax.interop.safetensors_file import write_safetensors
from tokenformer_jax.interop.stored_array import ComputedArray
from tokenformer_jax.interop.torch_file import write_torch
from tokenformer_jax.interop.weight_config import CONFIG_KEY, config_json
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import Tree, split
from tokenformer_jax.nn.pattention import require_float_tokens
from tokenformer_jax.nn.theta import initial_tau
from tokenformer_jax.paths import user_path

EXPORT_DTYPES = ("float32", "bfloat16")
# A folder may have any other ending in its name, as in tokenformer-1.5b.
_OTHER_FILES = (".pt", ".pth", ".ckpt", ".npz", ".h5", ".gguf", ".msgpack", ".zip")
_FILES_BESIDE = ("config.json", "README.md", "tokenizer.json", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class Exported:
  """What `export` wrote.

  Attributes:
    path: the weight file.
    config: the configuration of the model in it, which has more tokens than the exported one if rows were added.
    rows_added: name of a count -> the number of rows added to each pattention layer that has it.
    keeps_grown_tau: whether some τ differs from the released code's, so that only this package reads the file
      correctly.
  """

  path: epath.Path
  config: ModelConfig
  rows_added: dict[str, int]
  keeps_grown_tau: bool


def export(
  model: LanguageModel,
  path: str | os.PathLike,
  *,
  dtype: str = "float32",
  released: bool | None = None,
  source: str | os.PathLike = "",
  step: int | None = None,
) -> Exported:
  """Writes `model` under the released names, with config.json, README.md and the tokenizer beside it.

  Args:
    model: the model, with float parameters.
    path: a file that ends in `.bin` (PyTorch's format) or `.safetensors`, or a folder, which gets a
      `model.safetensors`; local or a URI. Existing files are not overwritten.
    dtype: `float32` (exact) or `bfloat16`.
    released: whether the file must give the same function in the released code, whose τ is always √N: a grown
      model then gets more rows (see `rewriting`). By default this is so for `.bin`, which cannot store τ; a
      `.safetensors` stores τ in its metadata, where `from_pretrained` finds it.
    source: the work folder, file, folder or hub model that the model was loaded from. The model card names it
      and describes the data and metrics of a work folder, and its tokenizer is written beside the model.
    step: the checkpoint of the work folder, None for its newest.

  Returns:
    What was written.

  Raises:
    ValueError: a file exists already, the ending or the dtype is unknown, a `.bin` is asked to keep its τ, the
      released code cannot express the model, its parameter tokens are int8, it is a copy for decoding, or the
      source does not exist.
  """
  file = user_path(path)
  if file.suffix in _OTHER_FILES:
    raise ValueError(
      f"{file}: a file that ends in {file.suffix} cannot be written; choose .bin, .safetensors, or a folder."
    )
  if file.suffix not in (".bin", ".safetensors"):
    file = file / "model.safetensors"
  released = file.suffix == ".bin" if released is None else released
  if file.suffix == ".bin" and not released:
    raise ValueError(f"{file}: a .bin cannot store τ; write a .safetensors, or the released form.")
  if dtype not in EXPORT_DTYPES:
    raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(EXPORT_DTYPES)}.")
  beside = {name: file.with_name(name) for name in _FILES_BESIDE}
  for existing in [file, *beside.values()]:
    if existing.exists():
      raise ValueError(f"{existing}: this file exists and is not overwritten; choose an empty folder.")
  require_float_tokens(model, "exported")
  if not isinstance(model, LanguageModel):
    raise ValueError(
      f"model: a {type(model).__name__} has no released names and cannot be exported; give a LanguageModel."
    )

  _, parameters, tau = split(model)
  config, arrays = released_arrays(parameters, tau, model.config, rewrite=released)
  taus = _taus(tau, config)
  rows_added = {field: getattr(config, field) - getattr(model.config, field) for field in TOKEN_COUNTS}
  folder = local_path(source, "source") if os.fspath(source) else None
  card = model_card(
    config, file.name, dtype=dtype, released=released, rows_added=rows_added, source=source, folder=folder, step=step
  )
  tokenizer = None if folder is None else _tokenizer(folder, config)
  file.parent.mkdir(parents=True, exist_ok=True)
  if file.suffix == ".bin":
    write_torch(file, arrays, dtype)
  else:
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(dataclasses.asdict(config))}
    if not released:
      metadata[TAU_KEY] = json.dumps(taus)
    write_safetensors(file, arrays, dtype, metadata)
  beside["config.json"].write_bytes(config_json(config).encode())
  beside["README.md"].write_bytes(card.encode())
  if tokenizer is not None:
    data.save_tokenizer(tokenizer, beside["tokenizer.json"])
  counts = {name: arrays[f"{name}.key_param_tokens"].shape[0] for name in taus}
  born = {name: initial_tau(config.theta, count) for name, count in counts.items()}
  grown = any(np.float32(taus[name]) != np.float32(born[name]) for name in taus)
  return Exported(file, config, rows_added, keeps_grown_tau=grown and not released)


def released_arrays(
  parameters: Tree, tau: Tree, config: ModelConfig, *, rewrite: bool
) -> tuple[ModelConfig, dict[str, ComputedArray]]:
  """Converts our trees to the released state dict, in which each array is computed when it is read.

  Args:
    parameters: the parameters of `nn.parameters.split`.
    tau: its τ.
    config: the model's configuration.
    rewrite: whether to change keys and values such that every τ is the released code's (see `rewriting`).

  Returns:
    The configuration of the result and its arrays by released name.

  Raises:
    ValueError: `rewrite` is set and the released code does not have the model's GeLU.
  """
  flat = traverse_util.flatten_dict(parameters, sep="/")
  taus = {
    place.removesuffix("/tau"): np.asarray(leaf) for place, leaf in traverse_util.flatten_dict(tau, sep="/").items()
  }
  target = rewritten_config(config, taus) if rewrite else config
  counts = count_names(config)

  def computed(place: str, layer: int | None) -> ComputedArray:
    leaf = flat[place]
    if layer is None:
      return ComputedArray(leaf.shape, lambda: np.asarray(leaf))
    if not rewrite:
      return ComputedArray(leaf.shape[1:], lambda: np.asarray(leaf[layer]))
    projection, kind = place.rsplit("/", 1)
    num_tokens = getattr(target, counts[projection])
    rewritten = {"keys": rewritten_keys, "values": rewritten_values}[kind]
    return ComputedArray(
      (num_tokens, leaf.shape[2]),
      lambda: rewritten(np.asarray(leaf[layer]), taus[projection][layer], config.theta, num_tokens),
    )

  return target, {name: computed(*place) for name, place in released_names(config.num_layers).items()}


def _tokenizer(folder: epath.Path, config: ModelConfig) -> data.Tokenizer | None:
  """The tokenizer in a folder of weights or beside a weight file, None if there is none."""
  path = (folder if folder.is_dir() else folder.parent) / "tokenizer.json"
  if not path.is_file():
    return None
  if (path.parent / "checkpoints").is_dir():
    # `training` may import this package, which therefore imports it only in this case.
    from tokenformer_jax.training.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(str(path.parent))
  else:
    tokenizer = data.load_tokenizer(path)
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f"{path}: this tokenizer has {tokenizer.vocab_size} ids and the model a vocabulary of {config.vocab_size}; "
      "move the tokenizer away, or put the model's own in its place."
    )
  return tokenizer


def _taus(tau: Tree, config: ModelConfig) -> dict[str, float]:
  flat = {place: np.asarray(leaf) for place, leaf in traverse_util.flatten_dict(tau, sep="/").items()}
  return {
    name: float(flat[f"{place}/tau"][layer]) for name, (place, layer) in pattention_names(config.num_layers).items()
  }
