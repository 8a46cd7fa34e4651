"""The models of Hugging Face in our layout: the conversion of whole state dicts, and which array is which of our leaves."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.config.task import ClassifierConfig
from tokenformer_jax.interop.hugging_face_config import model_config
from tokenformer_jax.interop.hugging_face_names import TABLES, full_name, lacks_prefix, with_full_names
from tokenformer_jax.interop.hugging_face_places import Place
from tokenformer_jax.interop.names import differences
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import Tree, split


def table(model_type: str, config: ModelConfig) -> dict[str, tuple[Place, tuple[int, ...]]]:
  """Maps each of their names to its (place, index) in our tree: (), (layer,) or (layer, expert) of the leaf."""
  paths = _shapes(config)
  found: dict[str, tuple[Place, tuple[int, ...]]] = {}
  counts = (config.num_layers, config.ffn.experts)
  for name, place in TABLES[model_type].items():
    if place.paths[0] not in paths:
      continue
    for index in itertools.product(*map(range, counts[: name.count("{}")])):
      found[name.format(*index)] = place, index
  return found


def their_shapes(model_type: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Maps the name of every array of a model to its shape."""
  shapes = _shapes(config)
  return {
    name: place.shape([shapes[path][len(index) :] for path in place.paths], config)
    for name, (place, index) in table(model_type, config).items()
  }


def without_absent_pooler(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
  """The configuration of the arrays with these full names: config.json does not say whether an encoder has its pooler."""
  if config.task != "encode" or any(".pooler." in name for name in names):
    return config
  return dataclasses.replace(config, classifier=ClassifierConfig())


def model_from(fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
  """The model of a config.json and a state dict in memory, with float32 parameters.

  Args:
    fields: the parsed config.json.
    arrays: the state dict, with the names of transformers 4 or 5.

  Raises:
    ValueError: the model is not supported, or arrays are missing, unknown or of another shape.
  """
  config, model_type = model_config(dict(fields)), fields["model_type"]
  known = with_full_names(model_type, arrays, config.task)
  config = without_absent_pooler(config, known)
  if faults := differences({name: np.shape(array) for name, array in known.items()}, their_shapes(model_type, config)):
    raise ValueError(f"the arrays do not fit config.json: {'; '.join(faults)}.")
  layers: dict[str, list[np.ndarray]] = {}
  for name, (place, _) in table(model_type, config).items():
    for path, leaf in zip(place.paths, place.ours(np.asarray(known[name]), config)):
      layers.setdefault(path, []).append(leaf)
  shapes = _shapes(config)
  flat = {path: jnp.asarray(np.stack(parts).reshape(shapes[path]), jnp.float32) for path, parts in layers.items()}
  graphdef, _, tau = split(abstract_model(config))
  return nnx.merge(graphdef, traverse_util.unflatten_dict(flat, sep="/"), tau)


def to_hugging_face(
  parameters: Tree, fields: Mapping[str, Any], names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
  """Their state dict for a tree of our parameters, or of gradients of them.

  Args:
    parameters: a tree like that of `nn.parameters.split`.
    fields: the parsed config.json.
    names: the names of a state dict, whose form of each name is kept.
  """
  config, model_type = model_config(dict(fields)), fields["model_type"]
  flat = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(parameters, sep="/").items()}
  written = {}
  if names is not None:
    bare = lacks_prefix(model_type, names)
    written = {full_name(model_type, name, bare): name for name in names}
    config = without_absent_pooler(config, written)
  return {
    written.get(name, name): place.theirs([flat[path][index] for path in place.paths], config)
    for name, (place, index) in table(model_type, config).items()
  }


@functools.lru_cache(maxsize=8)
def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  _, parameters, _ = split(abstract_model(config))
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(parameters, sep="/").items()}
