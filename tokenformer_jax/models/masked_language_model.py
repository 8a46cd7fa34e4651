"""The masked language model: logits of what stands at each token itself."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.language_model import TextModel
from tokenformer_jax.nn.feed_forward import ACTIVATIONS
from tokenformer_jax.nn.initializers import STD
from tokenformer_jax.nn.norm import Norm
from tokenformer_jax.nn.parameters import parameter
from tokenformer_jax.nn.projection import Dense


class MaskedLanguageModel(TextModel):
  """A `TextModel` whose tokens see those before and behind them, as BERT's do (arXiv 1810.04805).

  With `config.transform` its logits are LayerNorm(f(h W + b)) tableᵀ + bias, where f is the feed-forward's activation.
  """

  transform: "LogitsTransform | None" = None

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    if config.transform:
      self.transform = LogitsTransform(config, rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, "batch time"],
    real: Bool[Array, "batch time"] | None = None,
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
    types: Int[Array, "batch time"] | None = None,
  ) -> Float[Array, "batch time vocab"]:
    """Float32 logits [B, T, V] of what stands at each of `tokens` [B, T], some of which are masks.

    A loss on few of the tokens takes `logits(hidden[…])` of those alone.

    Args:
      tokens: ids in [0, vocab_size).
      real: which tokens are not padding, by default all. No token sees padding.
      positions: position of each token in its document; by default 0 … T − 1.
      segments: document of each token; attention stays inside a document. By default one document.
      types: the kind of each token, in [0, config.token_types); by default 0.
    """
    return self.logits(self.hidden(tokens, positions, segments, real, types=types)[0])

  def factors(
    self, hidden: Float[Array, "*batch embed"]
  ) -> tuple[Float[Array, "*batch channel"], Float[Array, "vocab channel"]]:
    """As `VocabularyEnds.factors`. The bias of the logits is one more channel of the table, which the tokens have at 1."""
    if self.transform is None:
      return super().factors(hidden)
    transformed = self.transform(hidden)
    ones = jnp.ones((*hidden.shape[:-1], 1), hidden.dtype)
    table = jnp.concatenate([super().table(), self.transform.logits_bias[...][:, None]], axis=1)
    return jnp.concatenate([transformed, ones], axis=-1), self._gathered(table)

  def table(self) -> Float[Array, "vocab embed"]:
    if self.transform is not None:
      raise TypeError("with transform=True the logits are no product with the hidden states; take `factors(hidden)`.")
    return super().table()


class LogitsTransform(nnx.Module):
  """What BERT does between the last block and the logits: x -> LayerNorm(f(x W + b)); and the bias of the logits [vocab].

  Args:
    config: of the model; f is its feed-forward's activation.
    rngs: W is drawn from `rngs.params()`.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    size, normal, zeros = config.hidden_size, nnx.initializers.normal(STD), nnx.initializers.zeros
    self.activation = config.ffn.activation
    self.dense = Dense(size, size, axes=("embed", None), bias=True, init=normal, rngs=rngs)
    self.norm = Norm("layer_norm", size, config.norm_epsilon, rngs=rngs)
    self.logits_bias = parameter(rngs, (config.vocab_size,), ("vocab",), zeros, decayed=False)

  def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
    return self.norm(ACTIVATIONS[self.activation](self.dense(x)))
