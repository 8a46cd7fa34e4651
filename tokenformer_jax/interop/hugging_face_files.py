"""Weight files of Hugging Face's models: which model they hold, and its arrays in our layout, read one by one."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.config.validation import flattened
from tokenformer_jax.interop.hugging_face import table, their_shapes, without_absent_pooler
from tokenformer_jax.interop.hugging_face_config import comparable, config_fields, model_config
from tokenformer_jax.interop.hugging_face_families import FAMILIES
from tokenformer_jax.interop.hugging_face_names import COPIES, family_of, with_full_names, without_prefix
from tokenformer_jax.interop.hugging_face_places import Place
from tokenformer_jax.interop.names import EMBEDDING, differences
from tokenformer_jax.interop.stored_array import FLOATS, ComputedArray, StoredArray, Weights
from tokenformer_jax.interop.weight_config import config_beside, config_in_metadata
from tokenformer_jax.nn.parameters import Tree


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One of our leaves, or one layer or expert of it, in an array of a file.

  Attributes:
    array: the array.
    place: the leaves that it holds.
    part: which of them this is.
    config: the model's.
  """

  array: StoredArray
  place: Place
  part: int
  config: ModelConfig

  @property
  def shape(self) -> tuple[int, ...]:
    return self.place.our_shape(self.array.shape)

  def blocks(self, rows: slice) -> Iterator[tuple[slice, np.ndarray]]:
    """Reads rows of the leaf, as `StoredArray.blocks` does; an array that is rearranged is read whole."""
    if not self.place.is_rearranged:
      yield from self.array.blocks(rows)
    else:
      yield slice(None), self.place.ours(self.array.read(), self.config)[self.part][rows]


def hugging_face_fields(weights: Weights, path: epath.Path) -> dict[str, Any] | None:
  """The config.json of a Hugging Face model, supported or not, {} if there is none; None for other weights.

  Args:
    weights: the weights; those of a TokenFormer are told by their names.
    path: their file or folder.
  """
  if any(f".{name}".endswith(f".{EMBEDDING}") for name in weights.arrays):
    return None
  fields = config_beside(path) or {}
  if "model_type" in fields:
    return fields
  return {} if family_of(weights.arrays) else None


def leaves_of(
  weights: Weights, fields: dict[str, Any], config: ModelConfig | None
) -> tuple[ModelConfig, dict[str, dict[str, Leaf]]]:
  """The model's configuration, and for each path in our tree the arrays that hold it, by name, one for each layer
  or each expert of each layer.

  Args:
    weights: the weights.
    fields: what `hugging_face_fields` returned.
    config: the user's configuration, which must describe the same function.

  Raises:
    ValueError: the model is not supported, or the arrays are not those of the configuration; the one message names all
      that is missing, unexpected, of another shape or of another type.
  """
  model_type, config = _described(weights, fields, config)
  if config.num_layers > len(weights.arrays):
    raise ValueError(
      f"{weights.where}: config.json is that of a model of {config.num_layers} layers; the {len(weights.arrays)} "
      "arrays are not such a model."
    )
  arrays = with_full_names(model_type, weights.arrays, config.task)
  config = without_absent_pooler(config, arrays)
  if config.tied:
    _leave_out_tied_head(weights.where, model_type, arrays)
  faults = differences({name: array.shape for name, array in arrays.items()}, their_shapes(model_type, config))
  if others := [f"{name} is {array.dtype}" for name, array in arrays.items() if array.dtype not in FLOATS]:
    faults.append(f"of a type other than {', '.join(FLOATS)} {len(others)}: {', '.join(others)}")
  if faults:
    raise ValueError(f"{weights.where} does not fit the {model_type} of its config.json: {'; '.join(faults)}.")
  found: dict[str, dict[str, Leaf]] = {}
  for name, (place, _) in table(model_type, config).items():
    for part, path in enumerate(place.paths):
      found.setdefault(path, {})[name] = Leaf(arrays[name], place, part, config)
  return config, found


def their_arrays(model_type: str, parameters: Tree, config: ModelConfig) -> dict[str, ComputedArray]:
  """Their state dict of our parameters; each array is computed when it is read. Without a head the names have no prefix."""
  flat = traverse_util.flatten_dict(parameters, sep="/")
  shapes = their_shapes(model_type, config)

  def computed(name: str, place: Place, index: tuple[int, ...]) -> ComputedArray:
    def read() -> np.ndarray:
      leaves = [np.asarray(flat[path][index]) for path in place.paths]
      return place.theirs(leaves, config)

    return ComputedArray(shapes[name], read)

  arrays = {name: computed(name, *where) for name, where in table(model_type, config).items()}
  if config.task == "encode":
    arrays = {without_prefix(model_type, name): array for name, array in arrays.items()}
  return arrays


def written_config(
  fields: dict[str, Any], before: dict[str, Any] | None, dtype: str, end_of_document: int | None
) -> str:
  """The text of a config.json.

  Args:
    fields: what `config_fields` gives for the model.
    before: the config.json that the model was read from, whose other fields (ids of special tokens, dropout) are kept
      where it is of the same `model_type`.
    dtype: the type of the arrays.
    end_of_document: the id that ends and begins documents, which is written where `before` says nothing.
  """
  kept: dict[str, Any] = dict(bos_token_id=end_of_document, eos_token_id=end_of_document)
  if before is not None and before.get("model_type") == fields["model_type"]:
    kept = before
  labels = {name: kept[name] for name in ("id2label", "label2id") if _as_many(kept, fields, name)}
  types = {"torch_dtype": dtype, **({"dtype": dtype} if "dtype" in kept else {})}
  return json.dumps({**kept, **fields, **labels, **types}, indent=2) + "\n"


def _as_many(before: dict[str, Any], fields: dict[str, Any], name: str) -> bool:
  """Whether both have this field with as many entries."""
  return isinstance(before.get(name), dict) and len(before[name]) == len(fields.get(name, ()))


def _described(weights: Weights, fields: dict[str, Any], config: ModelConfig | None) -> tuple[str, ModelConfig]:
  """(`model_type`, configuration): the user's, the one in the metadata, or the one that config.json describes."""
  config = config or config_in_metadata(weights)
  fields = fields or (config and config_fields(config)) or {}
  if not fields:
    raise ValueError(
      f"{weights.where}: its arrays have the names of a Hugging Face {family_of(weights.arrays)}; put the config.json "
      "of that model beside it."
    )
  described = model_config(fields, f"config.json of {weights.where}")
  if config is None:
    return fields["model_type"], described
  have, want = flattened(comparable(described)), flattened(comparable(config))
  free = () if config.attention.positions == "learned" else ("seq_length",)
  differing = [
    f"{name}={want[name]!r} where config.json has {have[name]!r}"
    for name in have
    if have[name] != want[name] and name not in free
  ]
  if differing:
    raise ValueError(f"{weights.where}: the configuration is that of another model: {', '.join(differing)}.")
  return fields["model_type"], config


def _leave_out_tied_head(where: str, model_type: str, arrays: dict[str, StoredArray]) -> None:
  """Removes stored copies of the embedding, which is the head of a tied model, and of BERT's bias of the logits."""
  for name, original in COPIES.get(model_type, {}).items():
    copy, first = arrays.get(name), arrays.get(original)
    if copy is None or first is None:
      continue
    if copy != first and not all(
      np.array_equal(block, first.read(rows), equal_nan=True) for rows, block in copy.blocks(slice(None))
    ):
      way_out = "set it to false to use both"
      if "tie_word_embeddings" in FAMILIES[model_type].fixed:
        way_out = f"an untied {model_type} is not supported"
      raise ValueError(
        f"{where}: {name} differs from {original}, but config.json has tie_word_embeddings=true; {way_out}."
      )
    del arrays[name]
