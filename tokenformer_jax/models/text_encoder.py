"""Encoders of whole texts: a vector of each text, and logits of classes made of it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.language_model import TextModel
from tokenformer_jax.nn.initializers import STD
from tokenformer_jax.nn.projection import Dense


class TextEncoder(TextModel):
  """A `TextModel` that gives a vector of each text: its first token's output h₀, or tanh(h₀ W + b) with a pooler.

  `config.classifier.pooler_size` says whether there is a pooler. The other parameters have the names of a
  `MaskedLanguageModel`'s, so that a pretrained one can be loaded into it. Matrices of heads begin at N(0, 0.02).
  """

  pooler: Dense | None = None

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    self.pooler = make_pooler(config, rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, "batch time"],
    real: Bool[Array, "batch time"] | None = None,
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
    types: Int[Array, "batch time"] | None = None,
  ) -> Float[Array, "batch pooled"]:
    """Float32 vectors [B, channels] of the texts; arguments as for a `MaskedLanguageModel`."""
    return self.pooled(self.hidden(tokens, positions, segments, real, types=types)[0])

  def pooled(self, hidden: Float[Array, "batch time embed"]) -> Float[Array, "batch pooled"]:
    """Float32 vectors [B, channels] from the outputs of the final norm [B, T, d]."""
    first = hidden[:, 0].astype(jnp.promote_types(hidden.dtype, jnp.float32))
    return first if self.pooler is None else jnp.tanh(self.pooler(first))

  def table(self) -> jax.Array:
    raise TypeError(f"a {type(self).__name__} has no logits of tokens.")


class TextClassifier(TextEncoder):
  """A `TextEncoder` with a head of classes, tanh(h₀ W + b) W' + b', which `config.classifier` describes."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    channels, normal = config.classifier.pooler_size or config.hidden_size, nnx.initializers.normal(STD)
    classes = config.classifier.num_classes
    self.classes = Dense(channels, classes, axes=("embed", None), bias=True, init=normal, rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, "batch time"],
    real: Bool[Array, "batch time"] | None = None,
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
    types: Int[Array, "batch time"] | None = None,
  ) -> Float[Array, "batch class"]:
    """Float32 logits [B, classes] of each text; arguments as for a `MaskedLanguageModel`."""
    return self.logits(self.hidden(tokens, positions, segments, real, types=types)[0])

  def logits(self, hidden: Float[Array, "batch time embed"]) -> Float[Array, "batch class"]:
    """Float32 logits [B, classes] from the outputs of the final norm [B, T, d]."""
    return self.classes(self.pooled(hidden))


def make_pooler(config: ModelConfig, *, rngs: nnx.Rngs) -> Dense | None:
  """The layer between a vector of the last block and its tanh, None where the configuration has none."""
  channels = config.classifier.pooler_size or (config.hidden_size if config.classifier.num_classes else 0)
  if not channels:
    return None
  normal = nnx.initializers.normal(STD)
  return Dense(config.hidden_size, channels, axes=("embed", None), bias=True, init=normal, rngs=rngs)
