"""Both ends of a language model: the embedding of ids and positions, and the logits hidden · table ᵀ."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tokenformer_jax.distributed.axes import constrain, is_split
from tokenformer_jax.kernels.products import row_products
from tokenformer_jax.models.positions import WithPositions
from tokenformer_jax.nn.norm import Norm


class VocabularyEnds(WithPositions):
  """What `TextModel` and `DecodingModel` do before their first block and after their last one.

  Attributes:
    embedding: [vocab, d].
    type_embedding: [types, d], where the configuration has `token_types`.
    embedding_norm: what is applied to the embedded tokens.
    head: the matrix of the logits [vocab, d]; None where it is the embedding.
  """

  embedding: nnx.Param
  type_embedding: nnx.Param | None = None
  embedding_norm: Norm
  head: nnx.Param | None

  def embed(
    self,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "#batch time"],
    types: Int[Array, "batch time"] | None = None,
  ) -> Float[Array, "batch time embed"]:
    """The residual stream before the first block [B, T, d], in `config.compute_dtype`; `types` None is type 0."""
    x_BxTxD = self.placed(self._gathered(self.embedding[...])[tokens].astype(self.config.compute_dtype), positions)
    if self.type_embedding is not None:
      of_type = constrain(self.type_embedding[...], None, None)
      x_BxTxD = x_BxTxD + of_type[jnp.zeros_like(tokens) if types is None else types].astype(x_BxTxD.dtype)
    return self.embedding_norm(x_BxTxD)

  def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
    """Float32 scores of every vocabulary entry, hidden · tableᵀ: [..., d] -> [..., vocab]."""
    hidden, table = self.factors(hidden)
    return logits(table, hidden)

  def table(self) -> Float[Array, "vocab embed"]:
    """The matrix of the logits, in training with all its channels on each device."""
    return self._gathered((self.embedding if self.head is None else self.head)[...])

  def factors(
    self, hidden: Float[Array, "*batch embed"]
  ) -> tuple[Float[Array, "*batch channel"], Float[Array, "vocab channel"]]:
    """Two arrays whose product is `logits(hidden)`, for a loss that never has all logits at once."""
    return hidden, self.table()

  def _gathered(self, table: Array) -> Array:
    """The table with all its channels on each device, so that one gather along fsdp serves embedding and logits."""
    return constrain(table, "vocab", None)


def logits(table: Float[Array, "vocab embed"], hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
  """Scores of every vocabulary entry in float32 or wider: [..., d] -> [..., vocab]."""
  if hidden.ndim > 2 and is_split("time"):
    # Flattened rows [B·T] cannot be split along both B and T, so each row of the batch is computed on its own.
    return jax.vmap(lambda hidden: logits(table, hidden))(hidden)
  hidden_MxD = hidden.reshape(-1, hidden.shape[-1])
  logits_MxV = row_products(hidden_MxD, table.astype(hidden.dtype))
  return logits_MxV.reshape(*hidden.shape[:-1], -1)
