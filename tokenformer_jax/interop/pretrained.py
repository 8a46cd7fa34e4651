"""Loads models from weight files: released ones, exported ones, and those of the Hugging Face hub."""

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from tokenformer_jax.config import MeshConfig, ModelConfig
from tokenformer_jax.distributed.axes import tree_shardings
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.interop.foreign_names import with_released_names
from tokenformer_jax.interop.hub import local_path
from tokenformer_jax.interop.hugging_face_files import Leaf, hugging_face_fields, leaves_of
from tokenformer_jax.interop.names import check_fit, pattention_names, released_names
from tokenformer_jax.interop.own_form import is_own_form, read_own_form
from tokenformer_jax.interop.stored_array import FLOATS, StoredArray, Weights, quoted
from tokenformer_jax.interop.weight_config import config_for
from tokenformer_jax.interop.weights import open_weights
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import logical_axes, split
from tokenformer_jax.nn.theta import initial_tau
from tokenformer_jax.paths import user_path

TAU_KEY = "tokenformer_jax.tau"  # The key in the metadata of our safetensors files; its value is JSON, τ by pattention.

# The arrays that hold a leaf, by name: one for each layer or for each expert of each layer,
# or one for a leaf without layers.
Sources = Mapping[str, StoredArray | Leaf]


def from_pretrained(
  path_or_hub_id: str | os.PathLike, config: ModelConfig | None = None, *, mesh: jax.sharding.Mesh | None = None
) -> Any:
  """Loads the model in a weight file: a TokenFormer, or a model of Hugging Face.

  A TokenFormer's sizes come from the arrays' shapes. What shapes do not determine (heads, Θ, rotary settings, sequence
  length) comes from the first of: `config`, the file's metadata, a config.json of this package beside it, the
  named size with these shapes. τ comes from the metadata; without it, τ is that of the released code.

  Of Hugging Face's models, those of `hugging_face_families` are read: `gpt_neox` (Pythia), `gpt2`, `llama`, `mixtral`,
  `bert` and `vit`. Their config.json must lie beside the weights; all of its fields that change the function are obeyed or
  refused, and the class that it names decides between masked tokens, classes and no head. It is computed in float32,
  whatever type the arrays have, unless `config` has another `compute_dtype`.

  Args:
    path_or_hub_id: a local path, a URI, or the name OWNER/MODEL of a model on the Hugging Face hub. A path may
      name a released `pytorch_model.bin` or any `.bin`, `.pt`, `.pth` or `.safetensors` file of a state dict with
      its names (`foreign_names` lists the accepted differences), a folder with one of these or with shards and
      an index, a checkpoint folder of DeepSpeed's pipeline, or a run's work folder. Nothing in a file is
      executed.
    config: the model's configuration, which must agree with the shapes, and with a Hugging Face config.json in all that
      changes the function.
    mesh: the devices that hold the parameters; by default the first device. Arrays are read one after the
      other, and only the parts that the devices of this process hold.

  Returns:
    The model, with float32 parameters, ready to be called: a `LanguageModel` or another of `models.model_class`.

  Raises:
    ValueError: the path is not a weight file, the file is damaged, the shapes do not determine a model or
      differ from the configuration's, a Hugging Face model is not supported, or numbers are not finite.
  """
  path = local_path(path_or_hub_id)
  if is_work_folder(path):
    if config is not None:
      raise ValueError(f"{path}: a work folder has its model's configuration; leave config out.")
    # `training` may import this package, which therefore imports it only in this case.
    from tokenformer_jax.training.checkpoints import load

    return load(str(path), mesh=mesh)
  weights = open_weights(path)
  fields = hugging_face_fields(weights, path)
  places: Mapping[str, Sources]
  taus: dict[str, np.ndarray] = {}
  if is_own_form(weights):
    config, places, taus = read_own_form(weights, config)
  elif fields is not None:
    config, places = leaves_of(weights, fields, config)
  else:
    config, places, taus = _released(weights, config, path)

  abstract = abstract_model(config)
  graphdef, *shapes = split(abstract)
  mesh = mesh or make_mesh(MeshConfig(), devices=jax.devices()[:1])
  shardings = [tree_shardings(mesh, axes, tree) for axes, tree in zip(logical_axes(abstract), shapes)]

  def parameter(place, leaf, sharding):
    read = functools.partial(_read, weights.where, places[_name(place)], leaf.shape)
    return jax.make_array_from_callback(leaf.shape, sharding, read)

  def tau(place, leaf, sharding):
    return jax.make_array_from_callback(leaf.shape, sharding, taus[_name(place)].__getitem__)

  return nnx.merge(
    graphdef,
    *(jax.tree_util.tree_map_with_path(make, *trees) for make, *trees in zip((parameter, tau), shapes, shardings)),
  )


def is_work_folder(path: str | os.PathLike) -> bool:
  """Whether `path` is the work folder of a training run."""
  return (user_path(path) / "checkpoints").is_dir()


def _released(
  weights: Weights, config: ModelConfig | None, path: epath.Path
) -> tuple[ModelConfig, Mapping[str, Sources], dict[str, np.ndarray]]:
  """(configuration, the arrays that hold each leaf by its path, τ by its path) of a TokenFormer's weights."""
  weights = with_released_names(weights)
  config = config_for(weights, config, path)
  check_fit({name: array.shape for name, array in weights.arrays.items()}, config, weights.where)
  for name, array in weights.arrays.items():
    if array.dtype not in FLOATS:
      raise ValueError(f"{weights.where}: {name} is of type {array.dtype}; expected one of {', '.join(FLOATS)}.")
  places: dict[str, dict[str, StoredArray | Leaf]] = {}
  for name, (place, _) in released_names(config.num_layers).items():
    places.setdefault(place, {})[name] = weights.arrays[name]
  return config, places, _taus(weights, config)


def _taus(weights: Weights, config: ModelConfig) -> dict[str, np.ndarray]:
  """Maps the path of each τ in our tree to its values, float32 [layer]."""
  names = pattention_names(config.num_layers)
  if TAU_KEY in weights.metadata:
    stored = _tau_metadata(weights)
  else:
    counts = {name: weights.arrays[f"{name}.key_param_tokens"].shape[0] for name in names}
    stored = {name: initial_tau(config.theta, count) for name, count in counts.items()}
  if stored.keys() != names.keys():
    raise ValueError(
      f"{weights.where}: {TAU_KEY} in its metadata is for {quoted(list(stored))}; expected {quoted(list(names))}."
    )
  taus: dict[str, np.ndarray] = {}
  for name, (place, layer) in names.items():
    taus.setdefault(f"{place}/tau", np.empty(config.num_layers, np.float32))[layer] = stored[name]
  return taus


def _tau_metadata(weights: Weights) -> dict[str, float]:
  try:
    stored = json.loads(weights.metadata[TAU_KEY])
  except (ValueError, RecursionError):
    stored = None
  largest = float(np.finfo(np.float32).max)
  if not isinstance(stored, dict) or not all(
    type(value) in (int, float) and 0 < value <= largest for value in stored.values()
  ):
    raise ValueError(
      f"{weights.where}: {TAU_KEY} in its metadata is {quoted(weights.metadata[TAU_KEY])}; "
      "expected a positive number for each pattention."
    )
  return stored


def _read(where: str, sources: Sources, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
  """Reads the part `index` of a leaf from `sources`: its layers, the experts of its layers, or the leaf as one array."""
  if not shape:  # A single number is stored as an array of one.
    return _read(where, sources, (1,), (slice(None),)).reshape(())
  arrays = list(sources.items())
  depth = len(shape) - len(arrays[0][1].shape)
  chosen = np.arange(len(arrays)).reshape(shape[:depth])[index[:depth]]
  rows, *columns = index = index[depth:]
  part_shape = [len(range(*part.indices(size))) for part, size in zip(index, arrays[0][1].shape)]
  parts = np.empty((chosen.size, *part_shape), np.float32)
  for part, number in zip(parts, chosen.reshape(-1)):
    (name, array), bad = arrays[number], 0
    for place, block in array.blocks(rows):
      with np.errstate(over="ignore"):
        part[place] = block[:, *columns]
      bad += int(np.count_nonzero(~np.isfinite(part[place])))
    if bad:
      raise ValueError(
        f"{where}: {name} has {bad} numbers that are NaN or infinite in float32; the file "
        "is damaged, or its training run diverged."
      )
  return parts.reshape(*chosen.shape, *part_shape)


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
