"""Both ends of a language model, with one matrix E [vocab, d]: the embedding of ids, and the logits hidden · Eᵀ."""

import jax
from jaxtyping import Array, Float, Int

from tokenformer_jax.distributed.axes import constrain, is_split
from tokenformer_jax.kernels.products import row_products


def whole_channels(table: Float[Array, "vocab embed"]) -> Float[Array, "vocab embed"]:
  """The matrix with all its channels on each device, so that one gather along fsdp serves embedding and logits."""
  return constrain(table, "vocab", None)


def embed(
  table: Float[Array, "vocab embed"], tokens: Int[Array, "batch time"], dtype: str
) -> Float[Array, "batch time embed"]:
  """The rows of `tokens` [B, T] in `dtype`, [B, T, d]."""
  return whole_channels(table)[tokens].astype(dtype)


def logits(table: Float[Array, "vocab embed"], hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
  """Scores of every vocabulary entry in float32 or wider: [..., d] -> [..., vocab]."""
  if hidden.ndim > 2 and is_split("time"):
    # Flattened rows [B·T] cannot be split along both B and T, so each row of the batch is computed on its own.
    return jax.vmap(lambda hidden: logits(table, hidden))(hidden)
  hidden_MxD = hidden.reshape(-1, hidden.shape[-1])
  logits_MxV = row_products(hidden_MxD, whole_channels(table).astype(hidden.dtype))
  return logits_MxV.reshape(*hidden.shape[:-1], -1)
