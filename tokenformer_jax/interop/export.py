"""Models into files: the released names, in PyTorch's format or safetensors, with a card beside them."""

import dataclasses
import json
import os
import pathlib

import numpy as np
from flax import traverse_util

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.interop.model_card import model_card
from tokenformer_jax.interop.names import pattention_names, released_names
from tokenformer_jax.interop.pretrained import TAU_KEY
from tokenformer_jax.interop.rewriting import rewritten_config, rewritten_keys, rewritten_values
from tokenformer_jax.interop.safetensors_file import write_safetensors
from tokenformer_jax.interop.stored_array import ComputedArray
from tokenformer_jax.interop.torch_file import write_torch
from tokenformer_jax.interop.weight_config import CONFIG_KEY, config_json
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import Tree, split
from tokenformer_jax.nn.theta import initial_tau

EXPORT_DTYPES = ("float32", "bfloat16")
# A folder may have any other dot in its name, as in tokenformer-1.5b.
_OTHER_FILES = (".pt", ".pth", ".ckpt", ".npz", ".h5", ".gguf", ".msgpack", ".zip")


@dataclasses.dataclass(frozen=True)
class Exported:
  """What `export` wrote.

  Attributes:
    path: the weight file.
    config: of the model in it, which has more tokens than the exported one where rows were added.
    rows_added: to each pattention of the fields qkv_tokens, proj_tokens, ffn_tokens.
    keeps_grown_tau: whether some τ is not the released code's, so that only we read the file rightly.
  """

  path: pathlib.Path
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
  """Writes `model` under the released names, and config.json and README.md beside it.

  Args:
    path: a file that ends in `.bin` (PyTorch's format) or `.safetensors`, or a folder, which gets a
      `model.safetensors`. Nothing that is there is overwritten.
    dtype: `float32` (exact) or `bfloat16`.
    released: whether the file must be right in the released code, whose τ is always √N: a grown model
      then gets rows that change nothing else (see `rewriting`). By default for `.bin`, which has no place
      for τ; a `.safetensors` carries τ in its metadata instead, where our `from_pretrained` finds it.
    source: where the model came from, for the card. The tokenizer.json of a folder is copied, and the
      card tells data and metrics of a work folder.
    step: of the work folder's checkpoint, None for its newest.

  Raises:
    ValueError: a file that is there, an unknown ending or dtype, a `.bin` that should keep its τ, or a
      model that the released code cannot be.
  """
  path = pathlib.Path(path).expanduser()
  if path.suffix in _OTHER_FILES:
    raise ValueError(f"{path}: ends in {path.suffix}; choose .bin, .safetensors, or a folder.")
  if path.suffix not in (".bin", ".safetensors"):
    path = path / "model.safetensors"
  released = path.suffix == ".bin" if released is None else released
  if path.suffix == ".bin" and not released:
    raise ValueError(f"{path}: a .bin has no place for τ; write a .safetensors, or the released form.")
  if dtype not in EXPORT_DTYPES:
    raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(EXPORT_DTYPES)}.")
  beside = {name: path.with_name(name) for name in ("config.json", "README.md", "tokenizer.json")}
  for file in [path, *beside.values()]:
    if file.exists():
      raise ValueError(f"{file}: is there already and is not overwritten; choose an empty folder.")

  _, parameters, tau = split(model)
  config, arrays = released_arrays(parameters, tau, model.config, rewrite=released)
  taus = _taus(tau, config)
  rows_added = {
    field: getattr(config, field) - getattr(model.config, field)
    for field in ("qkv_tokens", "proj_tokens", "ffn_tokens")
  }
  card = model_card(config, path.name, dtype=dtype, released=released, rows_added=rows_added, source=source, step=step)
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".bin":
    write_torch(path, arrays, dtype)
  else:
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(dataclasses.asdict(config))}
    if not released:
      metadata[TAU_KEY] = json.dumps(taus)
    write_safetensors(path, arrays, dtype, metadata)
  beside["config.json"].write_text(config_json(config), encoding="utf-8")
  beside["README.md"].write_text(card, encoding="utf-8")
  tokenizer = pathlib.Path(source) / "tokenizer.json"
  if source and tokenizer.is_file():
    beside["tokenizer.json"].write_bytes(tokenizer.read_bytes())
  counts = {name: arrays[f"{name}.key_param_tokens"].shape[0] for name in taus}
  born = {name: initial_tau(config.theta, count) for name, count in counts.items()}
  grown = any(np.float32(taus[name]) != np.float32(born[name]) for name in taus)
  return Exported(path, config, rows_added, keeps_grown_tau=grown and not released)


def released_arrays(
  parameters: Tree, tau: Tree, config: ModelConfig, *, rewrite: bool
) -> tuple[ModelConfig, dict[str, ComputedArray]]:
  """The released state dict of our trees, each array made when it is read; and its configuration.

  Args:
    rewrite: whether every τ becomes that of the released code, by `rewriting`.
  """
  flat = traverse_util.flatten_dict(parameters, sep="/")
  taus = {
    place.removesuffix("/tau"): np.asarray(leaf) for place, leaf in traverse_util.flatten_dict(tau, sep="/").items()
  }
  by_projection = {place.split("/")[-1]: leaf for place, leaf in taus.items()}
  target = rewritten_config(config, by_projection) if rewrite else config

  def computed(place: str, layer: int | None) -> ComputedArray:
    leaf = flat[place]
    if layer is None:
      return ComputedArray(leaf.shape, lambda: np.asarray(leaf))
    if not rewrite:
      return ComputedArray(leaf.shape[1:], lambda: np.asarray(leaf[layer]))
    projection, kind = place.rsplit("/", 1)
    num_tokens = getattr(target, _count_field(projection))
    form = {"keys": rewritten_keys, "values": rewritten_values}[kind]
    return ComputedArray(
      (num_tokens, leaf.shape[2]),
      lambda: form(np.asarray(leaf[layer]), taus[projection][layer], config.theta, num_tokens),
    )

  return target, {name: computed(*place) for name, place in released_names(config.num_layers).items()}


def _taus(tau: Tree, config: ModelConfig) -> dict[str, float]:
  flat = {place: np.asarray(leaf) for place, leaf in traverse_util.flatten_dict(tau, sep="/").items()}
  return {
    name: float(flat[f"{place}/tau"][layer]) for name, (place, layer) in pattention_names(config.num_layers).items()
  }


def _count_field(projection: str) -> str:
  return {"proj": "proj_tokens", "ffn": "ffn_tokens"}.get(projection.split("/")[-1], "qkv_tokens")
