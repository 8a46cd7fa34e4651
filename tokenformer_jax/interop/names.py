"""The names of the released PyTorch state dicts, and the same weights as our parameter tree.

A released model is a flat dict. Its numbers count the parts of a sequential model: 0 is the
embedding, layers begin at 2, the final norm stands one after the last layer's successor. Ours is a
nested dict (`nn.parameters.split`) whose `blocks` carry a leading layer axis. Both call axis 0 of
keys and values the token and axis 1 the channel, so arrays are stacked and never transposed. τ is
in no released file: it is `initial_tau` of the number of rows there.
"""

from collections.abc import Mapping

from flax import nnx, traverse_util
import jax
import numpy as np

from tokenformer_jax.config import ModelConfig, nearest
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.nn.parameters import Tree, split

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


def released_names(num_layers: int) -> dict[str, tuple[str, int | None]]:
  """Released name -> (path in our tree, layer), the layer None where there is no layer axis."""
  table: dict[str, tuple[str, int | None]] = {"sequential.0.word_embeddings.weight": ("embedding", None)}
  for layer in range(num_layers):
    for ours, theirs in _PATTENTIONS.items():
      for our_array, their_array in _TOKENS.items():
        table[f"sequential.{layer + 2}.{theirs}.{their_array}"] = (f"blocks/{ours}/{our_array}", layer)
  for ours, theirs in _NORM.items():
    table[f"sequential.{num_layers + 3}.norm.{theirs}"] = (f"final_norm/{ours}", None)
  return table


def released_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Released name -> shape, for every array of a model of `config`."""
  _, parameters, _ = split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
  shapes = {path: leaf.shape for path, leaf in _flat(parameters).items()}
  return {name: shapes[path] if layer is None else shapes[path][1:]
          for name, (path, layer) in released_names(config.num_layers).items()}


def from_released(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> Tree:
  """Our parameter tree from a released state dict; each array is read once, when its turn comes.

  Raises:
    ValueError: an array is missing, unknown, or not of the shape that `config` gives it.
  """
  shapes = released_shapes(config)
  for name in arrays:
    if name not in shapes:
      raise ValueError(f"{name}: no such array in a TokenFormer of {config.num_layers} layers.{nearest(name, shapes)}")
  for name in shapes:
    if name not in arrays:
      raise ValueError(f"{name}: not in the state dict, which has {len(arrays)} of the {len(shapes)} arrays of "
                       f"a TokenFormer of {config.num_layers} layers.")
  flat: dict[str, np.ndarray] = {}
  for name, (path, layer) in released_names(config.num_layers).items():
    array = np.asarray(arrays[name])
    if array.shape != shapes[name]:
      raise ValueError(f"{name}: its shape is {array.shape}, but the configuration gives it {shapes[name]}.")
    if layer is None:
      flat[path] = array
      continue
    if path not in flat:
      flat[path] = np.empty((config.num_layers, *array.shape), array.dtype)
    flat[path][layer] = array
  return traverse_util.unflatten_dict(flat, sep="/")


def to_released(parameters: Tree) -> dict[str, jax.Array | np.ndarray]:
  """The released state dict of our parameter tree; layers are slices of the stacked arrays."""
  flat = _flat(parameters)
  table = released_names(len(flat["blocks/ffn/keys"]))
  return {name: flat[path] if layer is None else flat[path][layer] for name, (path, layer) in table.items()}


def _flat(tree: Tree) -> dict:
  return traverse_util.flatten_dict(tree, sep="/")
