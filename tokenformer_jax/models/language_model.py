"""The language model: TokenFormer by default, and every other architecture that its configuration describes."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.decoding_model import DecodingModel
from tokenformer_jax.models.vocabulary import VocabularyEnds
from tokenformer_jax.nn.block import Said
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.initializers import STD
from tokenformer_jax.nn.norm import Norm
from tokenformer_jax.nn.parameters import parameter
from tokenformer_jax.nn.stack import Apply, make_blocks, mean_over_layers, run_block, through_blocks


class TextModel(VocabularyEnds, nnx.Module):
  """Embedding, `num_layers` blocks under one scan, a final norm, and logits from the embedding or a matrix of their own.

  It is what `LanguageModel` and the encoders of texts share.

  Parameters are float32; products run in `config.compute_dtype`, sums in float32 or wider.

  Args:
    config: sizes and choices, which the model keeps as `model.config`.
    rngs: parameters are drawn from `rngs.params()`.

  Raises:
    ValueError: `compute_dtype` is float64 and JAX has 64-bit types switched off.
  """

  head: nnx.Param | None = None

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    normal, size = nnx.initializers.normal(STD), config.hidden_size
    self.embedding = parameter(rngs, (config.vocab_size, size), ("vocab", "embed"), normal)
    self.first, self.blocks = make_blocks(config, rngs=rngs)
    self.final_norm = Norm(config.final_norm, size, config.norm_epsilon, rngs=rngs)
    self.make_positions(rngs)
    if config.token_types:
      self.type_embedding = parameter(rngs, (config.token_types, size), (None, "embed"), normal)
    self.embedding_norm = Norm(config.embedding_norm, size, config.norm_epsilon, rngs=rngs)
    if not config.tied:
      self.head = parameter(rngs, (config.vocab_size, size), ("vocab", "embed"), normal)

  def hidden(
    self,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
    real: Bool[Array, "batch time"] | None = None,
    training: bool = False,
    types: Int[Array, "batch time"] | None = None,
  ) -> tuple[Float[Array, "batch time embed"], Said]:
    """(outputs of the final norm [B, T, d], what the blocks say beside them: scalars by name, means over the layers).

    Args:
      tokens: ids [B, T].
      positions: position of each token in its document; by default 0 … T − 1.
      segments: document of each token; attention stays inside a document. By default one document.
      real: which tokens are not padding, by default all. No token of an encoder sees padding; a language model reads
        this for the statistics of routers alone, since the padding is behind its tokens or in segments of its own.
      training: whether routers may drop tokens, as they do in training.
      types: the kind of each token, in [0, config.token_types); by default 0.
    """

    hidden, said = self.through_layers(run_block, tokens, positions, segments, real, training, types)
    return hidden, mean_over_layers(said)

  def through_layers(
    self,
    apply: Apply,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
    real: Bool[Array, "batch time"] | None = None,
    training: bool = False,
    types: Int[Array, "batch time"] | None = None,
  ) -> tuple[Float[Array, "batch time embed"], dict]:
    """Applies a function to each layer, and collects what it observes.

    Args:
      apply: `(block, x [B, T, d], context) -> (x, observed)`, called in the place of each block.
      tokens, positions, segments, real, training, types: as for `hidden`.

    Returns:
      (outputs of the final norm [B, T, d], what `apply` observed, by path as in `nn.stack.through_blocks`).

    Raises:
      ValueError: there are more tokens than learned positions, and no `positions`.
    """
    if positions is None:
      if self.position_embedding is not None and tokens.shape[1] > self.config.seq_length:
        raise ValueError(
          f"tokens {tokens.shape}: attention.positions='learned' has seq_length={self.config.seq_length} of them; give at "
          f"most {self.config.seq_length} tokens a row."
        )
      positions = jnp.arange(tokens.shape[1])[None]
    x_BxTxD = self.embed(tokens, positions, types)
    context = Context(
      positions, self.rotation(positions), segments, real, causal=self.config.is_causal, training=training
    )
    x_BxTxD, observed = through_blocks(self.first, self.blocks, x_BxTxD, context, self.config, apply)
    return self.final_norm(x_BxTxD), observed


class LanguageModel(TextModel):
  """A `TextModel` that predicts each token from those before it."""

  def __call__(
    self,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
  ) -> Float[Array, "batch time vocab"]:
    """Float32 logits [B, T, V] of the next token after each of `tokens` [B, T].

    Args:
      tokens: ids in [0, vocab_size). They are not checked here; the CLI and `generate` check them on the host.
      positions: position of each token in its document; by default 0 … T − 1.
      segments: document of each token; attention stays inside a document. By default one document.
    """
    return self.logits(self.hidden(tokens, positions, segments)[0])

  def for_decoding(self) -> DecodingModel:
    """A copy of the model for `prefill` and `extend`, in the form that decodes fastest."""
    return DecodingModel.of(self)
