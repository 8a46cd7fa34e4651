"""Writes models as weight files, in PyTorch's format or safetensors, with a model card.

A TokenFormer has the released names, and a model that transformers knows has the names that it has there.
"""

import dataclasses
import json
import os
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from tokenformer_jax import data
from tokenformer_jax.config import TOKEN_COUNTS, ModelConfig
from tokenformer_jax.config.validation import require
from tokenformer_jax.interop.hub import NORMALISATION, local_path
from tokenformer_jax.interop.hugging_face_config import config_fields
from tokenformer_jax.interop.hugging_face_files import their_arrays, written_config
from tokenformer_jax.interop.model_card import model_card
from tokenformer_jax.interop.names import has_released_form, pattention_names, released_names
from tokenformer_jax.interop.own_form import own_arrays, own_metadata
from tokenformer_jax.interop.pretrained import TAU_KEY
from tokenformer_jax.interop.rewriting import count_names, rewritten_config, rewritten_keys, rewritten_values
from tokenformer_jax.interop.safetensors_file import write_safetensors
from tokenformer_jax.interop.stored_array import ComputedArray
from tokenformer_jax.interop.torch_file import write_torch
from tokenformer_jax.interop.weight_config import CONFIG_KEY, config_beside, config_json
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.models.model_class import AnyModel
from tokenformer_jax.nn.parameters import Tree, split
from tokenformer_jax.nn.pattention import require_float_tokens
from tokenformer_jax.nn.theta import initial_tau
from tokenformer_jax.paths import user_path

EXPORT_DTYPES = ("float32", "bfloat16", "float16")
# A folder may have any other ending in its name, as in tokenformer-1.5b.
_OTHER_FILES = (".pt", ".pth", ".ckpt", ".npz", ".h5", ".gguf", ".msgpack", ".zip")
_FILES_BESIDE = ("config.json", "README.md", "tokenizer.json", "tokenizer_config.json", NORMALISATION)


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
  model: AnyModel,
  path: str | os.PathLike,
  *,
  dtype: str = "float32",
  released: bool | None = None,
  source: str | os.PathLike = "",
  step: int | None = None,
  tokenizer: data.Tokenizer | None = None,
) -> Exported:
  """Writes `model`, with config.json, README.md and the tokenizer beside it.

  A TokenFormer is written under the released names. A model that transformers has as well (`FAMILIES` of
  `hugging_face_config`), whether it was read from there or trained here, is written as transformers writes it. Any other
  architecture is written under the paths of its parameters (`own_form`), for this package alone.

  Args:
    model: the model, with float parameters: a `LanguageModel` or an encoder.
    path: a file that ends in `.bin` (PyTorch's format) or `.safetensors`, or a folder, which gets a
      `model.safetensors`; local or a URI. Existing files are not overwritten.
    dtype: `float32` (exact), `bfloat16` or `float16`. A model that was read from arrays of one of these is written back
      bit for bit under it.
    released: whether the file of a TokenFormer must give the same function in the released code, whose τ is always √N:
      a grown model then gets more rows (see `rewriting`). By default this is so for `.bin`, which cannot store τ; a
      `.safetensors` stores τ in its metadata, where `from_pretrained` finds it.
    source: the work folder, file, folder or hub model that the model was loaded from. The model card names it
      and describes the data and metrics of a work folder, and its tokenizer is written beside the model.
    step: the checkpoint of the work folder, None for its newest.
    tokenizer: the model's tokenizer; None takes the one of the source, if it has one.

  Returns:
    What was written.

  Raises:
    ValueError: a file exists already, the ending or the dtype is unknown, a `.bin` is asked to keep its τ, the model
      has an architecture of its own and the file is a `.bin`, its parameter tokens are int8, it is a copy for decoding, a
      number is too large for float16, or the source does not exist.
  """
  file = user_path(path)
  if file.suffix in _OTHER_FILES:
    raise ValueError(
      f"{file}: a file that ends in {file.suffix} cannot be written; choose .bin, .safetensors, or a folder."
    )
  if file.suffix not in (".bin", ".safetensors"):
    file = file / "model.safetensors"
  if dtype not in EXPORT_DTYPES:
    raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(EXPORT_DTYPES)}.")
  beside = {name: file.with_name(name) for name in _FILES_BESIDE}
  for existing in [file, *beside.values()]:
    if existing.exists():
      raise ValueError(f"{existing}: this file exists and is not overwritten; choose an empty folder.")
  require_float_tokens(model, "exported")
  if not isinstance(model, AnyModel):
    raise ValueError(
      f"model: a {type(model).__name__} has no released names and no paths of its own; give a whole model."
    )
  fields = config_fields(model.config)
  if isinstance(model, LanguageModel) and has_released_form(model.config):
    form = _released_form(model, file, released)
  else:
    require(not released, "released", released, "is for a TokenFormer; leave it out.")
    form = _own_form(model, file) if fields is None else _hugging_face_form(model, fields)
  folder = local_path(source, "source") if os.fspath(source) else None
  card = model_card(
    form.config,
    file.name,
    dtype=dtype,
    released=form.released,
    rows_added=form.rows_added,
    architecture=None if fields is None else fields["architectures"][0],
    source=source,
    folder=folder,
    step=step,
  )
  if tokenizer is None and folder is not None and not form.config.reads_images:
    tokenizer = _tokenizer(folder, form.config)
  normalisation = None if folder is None else (folder if folder.is_dir() else folder.parent) / NORMALISATION
  if fields is None:
    description = config_json(form.config)
  else:
    before = None if folder is None else config_beside(folder)
    description = written_config(fields, before, dtype, None if tokenizer is None else tokenizer.end_of_document)
  file.parent.mkdir(parents=True, exist_ok=True)
  arrays = {name: _narrowed(name, array, dtype) for name, array in form.arrays.items()}
  if file.suffix == ".bin":
    write_torch(file, arrays, dtype)
  else:
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(dataclasses.asdict(form.config)), **form.metadata}
    write_safetensors(file, arrays, dtype, metadata)
  beside["config.json"].write_bytes(description.encode())
  beside["README.md"].write_bytes(card.encode())
  if form.config.reads_images and normalisation is not None and normalisation.is_file():
    beside[NORMALISATION].write_bytes(normalisation.read_bytes())
  if tokenizer is not None:
    data.save_tokenizer(tokenizer, beside["tokenizer.json"])
  return Exported(file, form.config, form.rows_added, form.keeps_grown_tau)


@dataclasses.dataclass(frozen=True)
class _Form:
  """A model in the form that a file has.

  Attributes:
    config: its configuration, which has more tokens than the exported model's if rows were added.
    arrays: the arrays by name.
    metadata: what a `.safetensors` says beside the configuration.
    released: whether the released code computes the same function.
    rows_added, keeps_grown_tau: as in `Exported`.
  """

  config: ModelConfig
  arrays: dict[str, ComputedArray]
  metadata: dict[str, str]
  released: bool
  rows_added: dict[str, int]
  keeps_grown_tau: bool


def _released_form(model: LanguageModel, file: epath.Path, released: bool | None) -> _Form:
  released = file.suffix == ".bin" if released is None else released
  if file.suffix == ".bin" and not released:
    raise ValueError(f"{file}: a .bin cannot store τ; write a .safetensors, or the released form.")
  _, parameters, tau = split(model)
  config, arrays = released_arrays(parameters, tau, model.config, rewrite=released)
  taus = _taus(tau, config)
  born = {name: initial_tau(config.theta, arrays[f"{name}.key_param_tokens"].shape[0]) for name in taus}
  grown = any(np.float32(taus[name]) != np.float32(born[name]) for name in taus)
  rows_added = {field: getattr(config, field) - getattr(model.config, field) for field in TOKEN_COUNTS}
  metadata = {} if released else {TAU_KEY: json.dumps(taus)}
  return _Form(config, arrays, metadata, released, rows_added, keeps_grown_tau=grown and not released)


def _own_form(model: AnyModel, file: epath.Path) -> _Form:
  if file.suffix == ".bin":
    raise ValueError(
      f"{file}: neither the released code nor transformers has this architecture, and a .bin has no place for its "
      "configuration; write a .safetensors."
    )
  _, parameters, tau = split(model)
  rows_added = dict.fromkeys(TOKEN_COUNTS, 0)
  return _Form(model.config, own_arrays(parameters), own_metadata(tau), False, rows_added, keeps_grown_tau=False)


def _hugging_face_form(model: AnyModel, fields: dict[str, Any]) -> _Form:
  _, parameters, _ = split(model)
  arrays = their_arrays(fields["model_type"], parameters, model.config)
  return _Form(model.config, arrays, {}, False, dict.fromkeys(TOKEN_COUNTS, 0), keeps_grown_tau=False)


def _narrowed(name: str, array: ComputedArray, dtype: str) -> ComputedArray:
  """The array, which raises ValueError when it is read if a number of it is too large for float16."""
  largest = float(np.finfo(np.float16).max)

  def read() -> np.ndarray:
    found = array.read()
    if np.abs(found).max(initial=0) > largest:
      raise ValueError(
        f"{name}: it has a number above {largest:.0f}, the largest of float16; write bfloat16 or float32."
      )
    return found

  return ComputedArray(array.shape, read) if dtype == "float16" else array


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
  beside = folder if folder.is_dir() else folder.parent
  names = [name for name in ("tokenizer.json", "merges.txt", "vocab.txt") if (beside / name).is_file()]
  if not names:
    return None
  path = beside / names[0]
  if (beside / "checkpoints").is_dir():
    # `training` may import this package, which therefore imports it only in this case.
    from tokenformer_jax.training.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(str(beside))
  else:
    tokenizer = data.load_tokenizer(path) if path.suffix == ".json" else data.open_tokenizer(str(path))
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
