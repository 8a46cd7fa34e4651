"""The names of the released PyTorch state dicts, and the conversion to and from our parameter tree.

A released model is a flat dict whose numbers are positions in a sequential model: 0 is the embedding, the
layers begin at 2, and the final norm has the number of layers plus 3. Our tree is a nested dict
(`nn.parameters.split`) whose `blocks` have a leading layer axis. In both, axis 0 of keys and values is the
token and axis 1 the channel, so arrays are stacked and never transposed. No released file has τ: it is
`initial_tau` of the number of rows.
"""

from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.config.presets import PARTS
from tokenformer_jax.config.validation import nearest
from tokenformer_jax.interop.stored_array import quoted
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import Tree, split

EMBEDDING = "sequential.0.word_embeddings.weight"
# Our name -> the released one.
_PATTENTIONS = {
  "attention/query": "attention.query",
  "attention/key": "attention.key",
  "attention/value": "attention.value",
  "attention/proj": "attention.proj",
  "ffn": "mlp",
}
_TOKENS = {"keys": "key_param_tokens", "values": "value_param_tokens"}
_NORM = {"scale": "weight", "bias": "bias"}
# A message lists at most this many names of one kind; no released model has as many.
_MOST_NAMES = 1000
# Finding the nearest name takes about a millisecond.
_MOST_HINTS = 20


def has_released_form(config: ModelConfig) -> bool:
  """Whether a model is a TokenFormer as the released code has it, apart from its sizes, Θ and positions."""
  parts = [getattr(config, part) for part in PARTS]
  ends = (config.task, config.norm, config.final_norm, config.embedding_norm, config.tied, config.token_types)
  released_ends = ("next_token", "plain", "layer_norm", "none", True, 0)
  return ends == released_ends and all(part == type(part)() for part in parts)


def released_names(num_layers: int) -> dict[str, tuple[str, int | None]]:
  """Maps each released name to its (path in our tree, layer); the layer is None where there is no layer axis."""
  table: dict[str, tuple[str, int | None]] = {EMBEDDING: ("embedding", None)}
  for layer in range(num_layers):
    for ours, theirs in _PATTENTIONS.items():
      for our_array, their_array in _TOKENS.items():
        table[f"sequential.{layer + 2}.{theirs}.{their_array}"] = (f"blocks/{ours}/{our_array}", layer)
  for ours, theirs in _NORM.items():
    table[f"sequential.{num_layers + 3}.norm.{theirs}"] = (f"final_norm/{ours}", None)
  return table


def pattention_names(num_layers: int) -> dict[str, tuple[str, int]]:
  """Maps each pattention's released name, e.g. `sequential.2.mlp`, to the (path in our tree, layer) of its τ."""
  return {
    f"sequential.{layer + 2}.{theirs}": (f"blocks/{ours}", layer)
    for layer in range(num_layers)
    for ours, theirs in _PATTENTIONS.items()
  }


def released_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Maps the released name of every array of a model with this configuration to its shape."""
  _, parameters, _ = split(abstract_model(config))
  shapes = {path: leaf.shape for path, leaf in _flat(parameters).items()}
  return {
    name: shapes[path] if layer is None else shapes[path][1:]
    for name, (path, layer) in released_names(config.num_layers).items()
  }


def check_fit(shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str = "state dict") -> None:
  """Checks that names and shapes are those of a model with this configuration.

  Args:
    shapes: name -> shape of each array that was found.
    config: the model's configuration.
    where: the file, for the message.

  Raises:
    ValueError: arrays are missing, unknown or of another shape; the one message names all of them.
  """
  if faults := differences(shapes, released_shapes(config)):
    raise ValueError(
      f"{where} does not fit a TokenFormer of {config.num_layers} layers with "
      f"{config.qkv_tokens}, {config.proj_tokens} and {config.ffn_tokens} parameter tokens in "
      f"q/k/v, proj and ffn: {'; '.join(faults)}."
    )


def differences(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
  """Says which arrays are missing, unexpected or of another shape: a text with all names for each kind that occurs.

  Args:
    shapes: name -> shape of each array that was found.
    expected: name -> shape of each array of the model.
  """
  missing = [name for name in expected if name not in shapes]
  unknown = [quoted(name) for name in shapes if name not in expected]
  if len(unknown) <= _MOST_HINTS:
    hints = [nearest(name.strip("'"), missing or expected).strip() for name in unknown]
    unknown = [f"{name} ({hint})" if hint else name for name, hint in zip(unknown, hints)]
  other = [
    f"{name} is {tuple(shapes[name])}, not {shape}"
    for name, shape in expected.items()
    if name in shapes and tuple(shapes[name]) != shape
  ]
  kinds = {"missing": missing, "unexpected": unknown, "of another shape": other}
  return [
    f"{kind} {len(names)}: {', '.join(names[:_MOST_NAMES])}{', …' if names[_MOST_NAMES:] else ''}"
    for kind, names in kinds.items()
    if names
  ]


def from_released(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> Tree:
  """Converts a released state dict in memory to our parameter tree.

  Args:
    arrays: the state dict.
    config: the model's configuration.

  Returns:
    The tree of `nn.parameters.split`, of NumPy arrays.

  Raises:
    ValueError: arrays are missing, unknown, or not of the shape that `config` gives them.
  """
  check_fit({name: np.shape(array) for name, array in arrays.items()}, config)
  layers: dict[str, list[np.ndarray]] = {}
  for name, (path, _) in released_names(config.num_layers).items():
    layers.setdefault(path, []).append(np.asarray(arrays[name]))
  flat = {path: np.stack(parts) if path.startswith("blocks/") else parts[0] for path, parts in layers.items()}
  return traverse_util.unflatten_dict(flat, sep="/")


def to_released(parameters: Tree) -> dict[str, jax.Array | np.ndarray]:
  """Converts our parameter tree to a released state dict, whose layers are slices of the stacked arrays."""
  flat = _flat(parameters)
  table = released_names(len(flat["blocks/ffn/keys"]))
  return {name: flat[path] if layer is None else flat[path][layer] for name, (path, layer) in table.items()}


def _flat(tree: Tree) -> dict:
  return traverse_util.flatten_dict(tree, sep="/")
