"""Encoders of texts: logits of each token itself, for masked ones, and a classifier of whole texts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.language_model import TextModel
from tokenformer_jax.nn.initializers import STD
from tokenformer_jax.nn.projection import Dense


class MaskedLanguageModel(TextModel):
  """A `TextModel` whose tokens see those before and behind them, as BERT's do (arXiv 1810.04805)."""

  def __call__(
    self,
    tokens: Int[Array, "batch time"],
    real: Bool[Array, "batch time"] | None = None,
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
  ) -> Float[Array, "batch time vocab"]:
    """Float32 logits [B, T, V] of what stands at each of `tokens` [B, T], some of which are masks.

    A loss on few of the tokens takes `logits(hidden[…])` of those alone.

    Args:
      tokens: ids in [0, vocab_size).
      real: which tokens are not padding, by default all. No token sees padding.
      positions: position of each token in its document; by default 0 … T − 1.
      segments: document of each token; attention stays inside a document. By default one document.
    """
    return self.logits(self.hidden(tokens, positions, segments, real)[0])


class TextClassifier(TextModel):
  """A `TextModel` with a head of classes on its first token: tanh(h₀ W + b) W' + b'.

  `config.classifier` describes the head, whose matrices begin at N(0, 0.02) and biases at 0. The other parameters have
  the names of a `MaskedLanguageModel`'s, so that a pretrained one can be loaded into it.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    part, size = config.classifier, config.hidden_size
    pooled, normal = part.pooler_size or size, nnx.initializers.normal(STD)
    self.pooler = Dense(size, pooled, axes=("embed", None), bias=True, init=normal, rngs=rngs)
    self.classes = Dense(pooled, part.num_classes, axes=("embed", None), bias=True, init=normal, rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, "batch time"],
    real: Bool[Array, "batch time"] | None = None,
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
  ) -> Float[Array, "batch class"]:
    """Float32 logits [B, classes] of each text; arguments as for a `MaskedLanguageModel`."""
    return self.logits(self.hidden(tokens, positions, segments, real)[0])

  def logits(self, hidden: Float[Array, "batch time embed"]) -> Float[Array, "batch class"]:
    """Float32 logits [B, classes] from the outputs of the final norm [B, T, d]."""
    first = hidden[:, 0].astype(jnp.promote_types(hidden.dtype, jnp.float32))
    return self.classes(jnp.tanh(self.pooler(first)))

  def table(self) -> jax.Array:
    raise TypeError("a TextClassifier has no logits of tokens; `logits(hidden)` gives those of the classes.")
