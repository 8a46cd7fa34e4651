"""The TokenFormer language model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import constrain
from tokenformer_jax.models.decoding_model import DecodingModel
from tokenformer_jax.models.vocabulary import embed, logits, whole_channels
from tokenformer_jax.nn.block import Block
from tokenformer_jax.nn.layer_norm import LayerNorm
from tokenformer_jax.nn.parameters import logical_axes, parameter, split, stack_layers
from tokenformer_jax.nn.remat import LAYER_REMAT, gathered
from tokenformer_jax.nn.rotary import rotation


class LanguageModel(nnx.Module):
  """Embedding, `num_layers` blocks under one scan, a final norm, and logits from the same embedding.

  Parameters are float32; products run in `config.compute_dtype`, sums in float32 or wider.

  Args:
    config: sizes and choices, which the model keeps as `model.config`.
    rngs: parameters are drawn from `rngs.params()`.

  Raises:
    ValueError: `compute_dtype` is float64 and JAX has 64-bit types switched off.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    if config.compute_dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
      raise ValueError("compute_dtype='float64': JAX has it switched off; set jax_enable_x64, or choose float32.")
    self.config = config
    self.embedding = parameter(
      rngs, (config.vocab_size, config.hidden_size), ("vocab", "embed"), nnx.initializers.normal(0.02)
    )
    self.blocks = stack_layers(lambda rngs: Block(config, rngs=rngs), config.num_layers, rngs)
    self.final_norm = LayerNorm(config.hidden_size, rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
  ) -> Float[Array, "batch time vocab"]:
    """Float32 logits [B, T, V] of the next token after each of `tokens` [B, T].

    Args:
      tokens: ids in [0, vocab_size). They are not checked here; the CLI and `generate` check them on the host.
      positions: position of each token, for the rotary embedding; by default 0 … T − 1.
      segments: document of each token; attention stays inside a document. By default one document.
    """
    return self.logits(self.hidden(tokens, positions, segments))

  def hidden(
    self,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
  ) -> Float[Array, "batch time embed"]:
    """Outputs of the final norm, [B, T, d], for the same arguments as a call of the model."""
    hidden, _ = self.through_layers(lambda block, *inputs: (block(*inputs), None), tokens, positions, segments)
    return hidden

  def through_layers(
    self,
    apply: Callable[..., tuple[Array, Any]],
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
  ) -> tuple[Float[Array, "batch time embed"], Any]:
    """Scans a function over the layers, by default what `hidden` does, and collects what it observes.

    Args:
      apply: `(block, x [B, T, d], cos_sin, segments) -> (x, observed)`, called in the place of each block.
      tokens, positions, segments: as for a call of the model.

    Returns:
      (outputs of the final norm [B, T, d], what `apply` observed, each leaf with a leading layer axis).
    """
    if positions is None:
      positions = jnp.arange(tokens.shape[1])[None]
    cos_sin = rotation(positions, self.config.rotary_dims, self.config.rotary_base)
    graphdef, *leaves = split(self.blocks)
    axes, _ = logical_axes(self.blocks)

    def layer(x_BxTxD, leaves):
      # Without this constraint the partitioner splits the channels along fsdp and gathers the batch.
      x_BxTxD = constrain(x_BxTxD, "batch", "time", None)
      parameters, tau = leaves
      if self.config.remat != "none":
        # Gather the fsdp-sharded parameters once per layer; otherwise XLA gathers them again in the rematerialised
        # forward pass. Without remat this would keep the gathered parameters of all layers for the backward pass.
        parameters = jax.tree.map(
          lambda a, axes: gathered(a.astype(self.config.compute_dtype), axes[1:]) if "embed" in axes else a,
          parameters,
          axes,
        )
      return apply(nnx.merge(graphdef, parameters, tau), x_BxTxD, cos_sin, segments)

    x_BxTxD = embed(self.embedding[...], tokens, self.config.compute_dtype)
    x_BxTxD, observed = jax.lax.scan(LAYER_REMAT[self.config.remat](layer), x_BxTxD, leaves)
    return self.final_norm(constrain(x_BxTxD, "batch", "time", None)), observed

  def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
    """Float32 scores of every vocabulary entry, hidden · Eᵀ: [..., d] -> [..., vocab]."""
    return logits(self.embedding[...], hidden)

  def table(self) -> Float[Array, "vocab embed"]:
    """The embedding, which is also the matrix of the logits, with all its channels on each device."""
    return whole_channels(self.embedding[...])

  def for_decoding(self) -> DecodingModel:
    """A copy of the model for `prefill` and `extend`, in the form that decodes fastest."""
    return DecodingModel.of(self, self.config)
