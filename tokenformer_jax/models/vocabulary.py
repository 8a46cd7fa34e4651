"""Both ends of a language model: the embedding of ids and positions, and the logits hidden · table ᵀ."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import constrain, is_split
from tokenformer_jax.kernels.products import row_products
from tokenformer_jax.nn.rotary import Rotation, rotation


class VocabularyEnds:
  """What `LanguageModel` and `DecodingModel` do before their first block and after their last one.

  Attributes:
    config: sizes and choices of the model.
    embedding: [vocab, d].
    position_embedding: [seq_length, d], where positions are learned.
    head: the matrix of the logits [vocab, d]; None where it is the embedding.
  """

  config: ModelConfig
  embedding: nnx.Param
  position_embedding: nnx.Param | None
  head: nnx.Param | None

  def embed(
    self, tokens: Int[Array, "batch time"], positions: Int[Array, "#batch time"]
  ) -> Float[Array, "batch time embed"]:
    """The residual stream before the first block [B, T, d], in `config.compute_dtype`."""
    dtype = self.config.compute_dtype
    x_BxTxD = embed(self.embedding[...], tokens, dtype)
    if self.position_embedding is not None:
      return x_BxTxD + constrain(self.position_embedding[...], None, None)[positions].astype(dtype)
    if self.config.attention.positions == "sinusoidal":
      return x_BxTxD + sinusoidal(positions, self.config.hidden_size).astype(dtype)
    return x_BxTxD

  def rotation(self, positions: Int[Array, "#batch time"]) -> Rotation | None:
    """The rotary tables of these positions; None for a model that embeds its positions."""
    if self.config.attention.positions != "rotary":
      return None
    return rotation(positions, self.config.rotary_dims, self.config.rotary_base)

  def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
    """Float32 scores of every vocabulary entry, hidden · tableᵀ: [..., d] -> [..., vocab]."""
    return logits(self._output_table(), hidden)

  def table(self) -> Float[Array, "vocab embed"]:
    """The matrix of the logits, with all its channels on each device."""
    return whole_channels(self._output_table())

  def _output_table(self) -> Array:
    return (self.embedding if self.head is None else self.head)[...]


def whole_channels(table: Float[Array, "vocab embed"]) -> Float[Array, "vocab embed"]:
  """The matrix with all its channels on each device, so that one gather along fsdp serves embedding and logits."""
  return constrain(table, "vocab", None)


def embed(
  table: Float[Array, "vocab embed"], tokens: Int[Array, "batch time"], dtype: str
) -> Float[Array, "batch time embed"]:
  """The rows of `tokens` [B, T] in `dtype`, [B, T, d]."""
  return whole_channels(table)[tokens].astype(dtype)


def sinusoidal(positions: Int[Array, "batch time"], channels: int) -> Float[Array, "batch time embed"]:
  """sin and cos, in turn along the channels, of position · 10,000^(−2i / channels), float32 (arXiv 1706.03762)."""
  frequencies = 10_000.0 ** (-jnp.arange(0, channels, 2, dtype=jnp.float32) / channels)
  angles = positions.astype(jnp.float32)[..., None] * jnp.expand_dims(frequencies, range(positions.ndim))
  return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, -1)[..., :channels]


def logits(table: Float[Array, "vocab embed"], hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
  """Scores of every vocabulary entry in float32 or wider: [..., d] -> [..., vocab]."""
  if hidden.ndim > 2 and is_split("time"):
    # Flattened rows [B·T] cannot be split along both B and T, so each row of the batch is computed on its own.
    return jax.vmap(lambda hidden: logits(table, hidden))(hidden)
  hidden_MxD = hidden.reshape(-1, hidden.shape[-1])
  logits_MxV = row_products(hidden_MxD, whole_channels(table).astype(hidden.dtype))
  return logits_MxV.reshape(*hidden.shape[:-1], -1)
