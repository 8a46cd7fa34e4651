"""The arrays of Hugging Face's GPT-NeoX (Pythia), GPT-2, Llama and Mixtral models, and the conversion to and from our parameters.

Our matrices are [d_in, d_out] in attention, and rows [hidden unit, channel] in the feed-forward. PyTorch's `Linear` is
[d_out, d_in], and GPT-2's `Conv1D` is [d_in, d_out].
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.interop.hugging_face_config import model_config
from tokenformer_jax.interop.names import differences
from tokenformer_jax.models.language_model import LanguageModel
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import Tree, split

Stored = TypeVar("Stored")


@dataclasses.dataclass(frozen=True)
class Place:
  """Where one of their arrays stands in our tree.

  Attributes:
    paths: the path of the leaf, or of several leaves whose last axes are joined in their array.
    transposed: whether their matrix is the transpose of ours.
    by_head: whether joined leaves alternate head by head, [q_0 | k_0 | v_0 | q_1 | …], and not as wholes.
  """

  paths: tuple[str, ...]
  transposed: bool = False
  by_head: bool = False

  def ours(self, array: np.ndarray, head_dim: int) -> list[np.ndarray]:
    """Their array as our leaves, in the order of `paths`; a leaf of a block is that of one layer."""
    array = array.T if self.transposed else array
    if len(self.paths) == 1:
      return [array]
    parts, width = len(self.paths), head_dim if self.by_head else array.shape[-1] // len(self.paths)
    grouped = array.reshape(*array.shape[:-1], -1, parts, width)
    return [grouped[..., part, :].reshape(*array.shape[:-1], -1) for part in range(parts)]

  def theirs(self, leaves: Sequence[np.ndarray], head_dim: int) -> np.ndarray:
    """The inverse of `ours`."""
    array = leaves[0]
    if len(leaves) > 1:
      width = head_dim if self.by_head else array.shape[-1]
      grouped = [leaf.reshape(*leaf.shape[:-1], -1, width) for leaf in leaves]
      array = np.stack(grouped, axis=-2).reshape(*array.shape[:-1], -1)
    return array.T if self.transposed else array

  def our_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of each of our leaves for the shape of their array."""
    *others, last = shape[::-1] if self.transposed else shape
    return (*others, last // len(self.paths))

  def shape(self, leaves: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of their array for the shapes of our leaves."""
    shape = (*leaves[0][:-1], sum(leaf[-1] for leaf in leaves))
    return shape[::-1] if self.transposed else shape


def _same(path: str) -> Place:
  return Place((path,))


def _transposed(path: str) -> Place:
  return Place((path,), transposed=True)


def _query_key_value(field: str, **arrangement: bool) -> Place:
  return Place(tuple(f"blocks/attention/{name}/{field}" for name in ("query", "key", "value")), **arrangement)


# Their name -> its place in our tree, by `model_type`. The first {} is the layer, the second
# one the expert. A name whose leaf a model lacks (a bias, the
# head of a tied model) is not in its files.
_TABLES: dict[str, dict[str, Place]] = {
  "gpt_neox": {
    "gpt_neox.embed_in.weight": _same("embedding"),
    "gpt_neox.layers.{}.input_layernorm.weight": _same("blocks/norm/scale"),
    "gpt_neox.layers.{}.input_layernorm.bias": _same("blocks/norm/bias"),
    "gpt_neox.layers.{}.post_attention_layernorm.weight": _same("blocks/ffn_norm/scale"),
    "gpt_neox.layers.{}.post_attention_layernorm.bias": _same("blocks/ffn_norm/bias"),
    "gpt_neox.layers.{}.attention.query_key_value.weight": _query_key_value("weight", transposed=True, by_head=True),
    "gpt_neox.layers.{}.attention.query_key_value.bias": _query_key_value("bias", by_head=True),
    "gpt_neox.layers.{}.attention.dense.weight": _transposed("blocks/attention/proj/weight"),
    "gpt_neox.layers.{}.attention.dense.bias": _same("blocks/attention/proj/bias"),
    "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight": _same("blocks/ffn/keys"),
    "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias": _same("blocks/ffn/key_biases"),
    "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight": _transposed("blocks/ffn/values"),
    "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias": _same("blocks/ffn/bias"),
    "gpt_neox.final_layer_norm.weight": _same("final_norm/scale"),
    "gpt_neox.final_layer_norm.bias": _same("final_norm/bias"),
    "embed_out.weight": _same("head"),
  },
  "gpt2": {
    "transformer.wte.weight": _same("embedding"),
    "transformer.wpe.weight": _same("position_embedding"),
    "transformer.h.{}.ln_1.weight": _same("blocks/norm/scale"),
    "transformer.h.{}.ln_1.bias": _same("blocks/norm/bias"),
    "transformer.h.{}.attn.c_attn.weight": _query_key_value("weight"),
    "transformer.h.{}.attn.c_attn.bias": _query_key_value("bias"),
    "transformer.h.{}.attn.c_proj.weight": _same("blocks/attention/proj/weight"),
    "transformer.h.{}.attn.c_proj.bias": _same("blocks/attention/proj/bias"),
    "transformer.h.{}.ln_2.weight": _same("blocks/ffn_norm/scale"),
    "transformer.h.{}.ln_2.bias": _same("blocks/ffn_norm/bias"),
    "transformer.h.{}.mlp.c_fc.weight": _transposed("blocks/ffn/keys"),
    "transformer.h.{}.mlp.c_fc.bias": _same("blocks/ffn/key_biases"),
    "transformer.h.{}.mlp.c_proj.weight": _same("blocks/ffn/values"),
    "transformer.h.{}.mlp.c_proj.bias": _same("blocks/ffn/bias"),
    "transformer.ln_f.weight": _same("final_norm/scale"),
    "transformer.ln_f.bias": _same("final_norm/bias"),
    "lm_head.weight": _same("head"),
  },
  "llama": {
    "model.embed_tokens.weight": _same("embedding"),
    "model.layers.{}.input_layernorm.weight": _same("blocks/norm/scale"),
    "model.layers.{}.self_attn.q_proj.weight": _transposed("blocks/attention/query/weight"),
    "model.layers.{}.self_attn.q_proj.bias": _same("blocks/attention/query/bias"),
    "model.layers.{}.self_attn.k_proj.weight": _transposed("blocks/attention/key/weight"),
    "model.layers.{}.self_attn.k_proj.bias": _same("blocks/attention/key/bias"),
    "model.layers.{}.self_attn.v_proj.weight": _transposed("blocks/attention/value/weight"),
    "model.layers.{}.self_attn.v_proj.bias": _same("blocks/attention/value/bias"),
    "model.layers.{}.self_attn.o_proj.weight": _transposed("blocks/attention/proj/weight"),
    "model.layers.{}.self_attn.o_proj.bias": _same("blocks/attention/proj/bias"),
    "model.layers.{}.post_attention_layernorm.weight": _same("blocks/ffn_norm/scale"),
    "model.layers.{}.mlp.gate_proj.weight": _same("blocks/ffn/gates"),
    "model.layers.{}.mlp.gate_proj.bias": _same("blocks/ffn/gate_biases"),
    "model.layers.{}.mlp.up_proj.weight": _same("blocks/ffn/keys"),
    "model.layers.{}.mlp.up_proj.bias": _same("blocks/ffn/key_biases"),
    "model.layers.{}.mlp.down_proj.weight": _transposed("blocks/ffn/values"),
    "model.layers.{}.mlp.down_proj.bias": _same("blocks/ffn/bias"),
    "model.norm.weight": _same("final_norm/scale"),
    "lm_head.weight": _same("head"),
  },
}
_TABLES["mixtral"] = {name: place for name, place in _TABLES["llama"].items() if ".mlp." not in name} | {
  "model.layers.{}.block_sparse_moe.gate.weight": _same("blocks/ffn/router"),
  "model.layers.{}.block_sparse_moe.experts.{}.w1.weight": _same("blocks/ffn/gates"),
  "model.layers.{}.block_sparse_moe.experts.{}.w3.weight": _same("blocks/ffn/keys"),
  "model.layers.{}.block_sparse_moe.experts.{}.w2.weight": _transposed("blocks/ffn/values"),
}
# transformers 5 calls GPT-NeoX's head as it does that of other models.
_OTHER_NAMES = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}, "gpt2": {}, "llama": {}, "mixtral": {}}
_PREFIXES = {"gpt_neox": "gpt_neox.", "gpt2": "transformer.", "llama": "model.", "mixtral": "model."}
_HEADS = ("lm_head.weight", "embed_out.weight")
# Masks and frequencies that earlier versions of transformers stored; they follow from the configuration.
_BUFFER = re.compile(r"(.*\.)?((attention|attn)\.(bias|masked_bias)|rotary_emb\.inv_freq)")


def family_of(names: Iterable[str]) -> str | None:
  """The `model_type` whose embedding is among the names of a state dict, None if there is none."""
  names = set(names)
  for model_type in _TABLES:
    embedding = name_at(model_type, "embedding")
    if names & {embedding, embedding.removeprefix(_PREFIXES[model_type])}:
      return model_type
  return None


def name_at(model_type: str, path: str) -> str:
  """The name of the array that holds the leaf at `path`, which is of no block."""
  return next(name for name, place in _TABLES[model_type].items() if place.paths == (path,))


def with_full_names(model_type: str, arrays: Mapping[str, Stored]) -> dict[str, Stored]:
  """The arrays of a state dict under the names of `table`, without buffers.

  The names may lack the prefix that all but the head's have, as those of GPT-2 on the hub do.
  """
  found = {name: array for name, array in arrays.items() if not _BUFFER.fullmatch(name)}
  prefix = _PREFIXES[model_type]
  if not any(name.startswith(prefix) for name in found):
    found = {name if name in _HEADS else prefix + name: array for name, array in found.items()}
  return {_OTHER_NAMES[model_type].get(name, name): array for name, array in found.items()}


def table(model_type: str, config: ModelConfig) -> dict[str, tuple[Place, tuple[int, ...]]]:
  """Maps each of their names to its (place, index) in our tree: (), (layer,) or (layer, expert) of the leaf."""
  paths = _shapes(config)
  found: dict[str, tuple[Place, tuple[int, ...]]] = {}
  counts = (config.num_layers, config.ffn.experts)
  for name, place in _TABLES[model_type].items():
    if place.paths[0] not in paths:
      continue
    for index in itertools.product(*map(range, counts[: name.count("{}")])):
      found[name.format(*index)] = place, index
  return found


def their_shapes(model_type: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Maps the name of every array of a model to its shape."""
  shapes = _shapes(config)
  return {
    name: place.shape([shapes[path][len(index) :] for path in place.paths])
    for name, (place, index) in table(model_type, config).items()
  }


def model_from(fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> LanguageModel:
  """The model of a config.json and a state dict in memory, with float32 parameters.

  Args:
    fields: the parsed config.json.
    arrays: the state dict, with the names of transformers 4 or 5.

  Raises:
    ValueError: the model is not supported, or arrays are missing, unknown or of another shape.
  """
  config, model_type = model_config(dict(fields)), fields["model_type"]
  known = with_full_names(model_type, arrays)
  if faults := differences({name: np.shape(array) for name, array in known.items()}, their_shapes(model_type, config)):
    raise ValueError(f"the arrays do not fit config.json: {'; '.join(faults)}.")
  layers: dict[str, list[np.ndarray]] = {}
  for name, (place, _) in table(model_type, config).items():
    for path, leaf in zip(place.paths, place.ours(np.asarray(known[name]), config.head_dim)):
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
  written = {ours: theirs for theirs, ours in _OTHER_NAMES[model_type].items() if theirs in (names or ())}
  return {
    written.get(name, name): place.theirs([flat[path][index] for path in place.paths], config.head_dim)
    for name, (place, index) in table(model_type, config).items()
  }


@functools.lru_cache(maxsize=8)
def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  _, parameters, _ = split(abstract_model(config))
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(parameters, sep="/").items()}
