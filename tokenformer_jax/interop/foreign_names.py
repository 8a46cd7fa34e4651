"""State dicts with the released names in a slightly different form, as other programs save them."""

import numpy as np

from tokenformer_jax.interop.names import EMBEDDING
from tokenformer_jax.interop.stored_array import StoredArray, Weights, quoted

# A hostile file may name one array any number of times. More copies than these are not compared, but refused as unknown.
_MOST_COPIES = 4


def with_released_names(weights: Weights) -> Weights:
  """Brings a state dict into the form that the released models have.

  - A prefix that all names share is removed: `module.` (DataParallel, DeepSpeed), `_orig_mod.` (torch.compile),
    `model.`, or any other.
  - Buffers `inv_freq` of rotary embeddings are left out, because they follow from the configuration.
  - A second copy of the embedding (`lm_head.weight`, `embed_out.weight`, …) is left out if it is equal to the
    embedding, because the model computes its logits from the embedding.

  Raises:
    ValueError: only some names have the embedding's prefix, or another array has the embedding's shape and
      differs from it.
  """
  arrays = {name: array for name, array in weights.arrays.items() if name.split(".")[-1] != "inv_freq"}
  embeddings = [name for name in arrays if f".{name}".endswith(f".{EMBEDDING}")]
  if not embeddings:
    return Weights(weights.where, arrays, weights.metadata)
  embedding = min(embeddings, key=len)
  copies = _of_the_same_shape(arrays, embedding)
  for name in copies if len(copies) <= _MOST_COPIES else ():
    _check_equal(weights.where, arrays, name, embedding)
    del arrays[name]
  prefix = embedding.removesuffix(EMBEDDING)
  others = [name for name in arrays if not name.startswith(prefix)]
  if others:
    raise ValueError(
      f"{weights.where}: the embedding's name begins with {quoted(prefix)} and {len(others)} other names do not: "
      f"{quoted(others)}; save the model's state dict alone, so that all names have the same prefix."
    )
  return Weights(weights.where, {name.removeprefix(prefix): array for name, array in arrays.items()}, weights.metadata)


def _of_the_same_shape(arrays: dict[str, StoredArray], embedding: str) -> list[str]:
  """The names of other matrices with the embedding's shape, except keys and values, which may have it by chance."""
  shape = arrays[embedding].shape
  return [
    name
    for name, array in arrays.items()
    if name != embedding and array.shape == shape and len(shape) == 2 and not name.endswith("_param_tokens")
  ]


def _check_equal(where: str, arrays: dict[str, StoredArray], name: str, embedding: str) -> None:
  if arrays[name] == arrays[embedding]:  # Both names refer to the same bytes of the same file.
    return
  blocks = arrays[name].blocks(slice(None))
  if not all(np.array_equal(block, arrays[embedding].read(rows), equal_nan=True) for rows, block in blocks):
    raise ValueError(
      f"{where}: {quoted(name)} has the embedding's shape and other numbers than {quoted(embedding)}; a TokenFormer "
      "computes its logits from the embedding, so a model with an output matrix of its own cannot be read."
    )
