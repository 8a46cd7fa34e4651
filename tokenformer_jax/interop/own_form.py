"""Weight files of architectures that neither the released code nor transformers has: each leaf under its own path.

The leaf `blocks/attention/query/weight` is the array `blocks.attention.query.weight`, with its leading layer axis; a single
number is an array of one. The file's metadata has the configuration and every τ, which no dtype rounds.
"""

import json

import numpy as np
from flax import traverse_util

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.config.validation import flattened
from tokenformer_jax.interop.names import differences
from tokenformer_jax.interop.stored_array import FLOATS, ComputedArray, StoredArray, Weights, quoted
from tokenformer_jax.interop.weight_config import config_in_metadata
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import Tree, split

# The key in the metadata of our safetensors files; its value is JSON, the numbers of each τ by its path.
OWN_TAU_KEY = "tokenformer_jax.tau_by_path"


def own_arrays(parameters: Tree) -> dict[str, ComputedArray]:
  """The arrays of a file; each is fetched when it is read."""
  return {
    path.replace("/", "."): ComputedArray(
      leaf.shape or (1,), lambda leaf=leaf: np.asarray(leaf).reshape(leaf.shape or 1)
    )
    for path, leaf in traverse_util.flatten_dict(parameters, sep="/").items()
  }


def own_metadata(tau: Tree) -> dict[str, str]:
  """What a file's metadata says about τ."""
  flat = traverse_util.flatten_dict(tau, sep="/")
  return {OWN_TAU_KEY: json.dumps({path: np.asarray(leaf).tolist() for path, leaf in flat.items()})}


def is_own_form(weights: Weights) -> bool:
  """Whether weights are in this form."""
  return OWN_TAU_KEY in weights.metadata


def read_own_form(
  weights: Weights, config: ModelConfig | None
) -> tuple[ModelConfig, dict[str, dict[str, StoredArray]], dict[str, np.ndarray]]:
  """(configuration, the array that holds each leaf by the leaf's path, τ by its path).

  Args:
    weights: weights in this form.
    config: the user's configuration, which must describe the same model.

  Raises:
    ValueError: the metadata has no configuration or another model's, or the arrays are not those of the configuration;
      the one message names all that differ.
  """
  stored = config_in_metadata(weights, stacked=True)
  if stored is None:
    raise ValueError(f"{weights.where}: its metadata has no configuration; export the model again.")
  if config is not None:
    have, want = flattened(stored), flattened(config)
    free = ("compute_dtype", "remat", "kernel", *(() if stored.attention.positions == "learned" else ("seq_length",)))
    differing = [
      f"{name}={want[name]!r} where the file has {have[name]!r}" for name in have if have[name] != want[name]
    ]
    differing = [text for text in differing if text.split("=")[0] not in free]
    if differing:
      raise ValueError(f"{weights.where}: the configuration is that of another model: {', '.join(differing)}.")
  config = config or stored
  _, *shapes = split(abstract_model(config))
  parameters, taus = (traverse_util.flatten_dict(tree, sep="/") for tree in shapes)
  expected = {path.replace("/", "."): leaf.shape or (1,) for path, leaf in parameters.items()}
  faults = differences({name: array.shape for name, array in weights.arrays.items()}, expected)
  if others := [f"{name} is {array.dtype}" for name, array in weights.arrays.items() if array.dtype not in FLOATS]:
    faults.append(f"of a type other than {', '.join(FLOATS)} {len(others)}: {', '.join(others)}")
  if faults:
    raise ValueError(f"{weights.where} does not fit the configuration in its metadata: {'; '.join(faults)}.")
  found = {path: {path.replace("/", "."): weights.arrays[path.replace("/", ".")]} for path in parameters}
  return config, found, _taus(weights, {path: leaf.shape for path, leaf in taus.items()})


def _taus(weights: Weights, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  try:
    read = {
      path: np.asarray(numbers, np.float32) for path, numbers in json.loads(weights.metadata[OWN_TAU_KEY]).items()
    }
  except (ValueError, TypeError, AttributeError, RecursionError):
    read = {}
  if {path: tau.shape for path, tau in read.items()} != shapes or not all(
    np.all(np.isfinite(tau) & (tau > 0)) for tau in read.values()
  ):
    raise ValueError(
      f"{weights.where}: {OWN_TAU_KEY} in its metadata is {quoted(weights.metadata[OWN_TAU_KEY])}; expected positive "
      f"numbers of the shapes {quoted(shapes)}."
    )
  return read
