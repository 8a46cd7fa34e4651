"""The TokenFormer language model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import constrain, is_split
from tokenformer_jax.kernels.products import row_products
from tokenformer_jax.nn.block import Block
from tokenformer_jax.nn.kv_cache import KVCache
from tokenformer_jax.nn.layer_norm import LayerNorm
from tokenformer_jax.nn.parameters import logical_axes, parameter, split, stack_layers, unstack_layers
from tokenformer_jax.nn.remat import LAYER_REMAT, gathered
from tokenformer_jax.nn.rotary import rotation


class LanguageModel(nnx.Module):
  """Embedding, `num_layers` blocks under one scan, a final norm, and logits from the same embedding.

  Parameters are float32; products run in `config.compute_dtype`, sums in float32 or wider.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    if config.compute_dtype == "float64" and not jax.config.jax_enable_x64:
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
      tokens: ids in [0, vocab_size). Ids are not checked here; the doors check them on the host.
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
    """Outputs of the final norm, [B, T, d]."""
    hidden, _ = self.through_layers(lambda block, *inputs: (block(*inputs), None), tokens, positions, segments)
    return hidden

  def through_layers(
    self,
    apply,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
  ) -> tuple[Float[Array, "batch time embed"], Any]:
    """`hidden` with `apply(block, x, by, segments) -> (x, seen)` in the place of each block; and `seen`, [layer, …]."""
    if positions is None:
      positions = jnp.arange(tokens.shape[1])[None]
    by = rotation(positions, self.config.rotary_dims, self.config.rotary_base)
    graphdef, *leaves = split(self.blocks)
    axes, _ = logical_axes(self.blocks)

    def layer(x_BxTxD, leaves):
      # Else the partitioner splits fsdp's channels and gathers the batch.
      x_BxTxD = constrain(x_BxTxD, "batch", "time", None)
      parameters, tau = leaves
      if self.config.remat != "none":
        # Else it may gather them once for what is computed again and once for the gradient. Without remat this would
        # keep the gathered parameters of all layers for the backward pass.
        parameters = jax.tree.map(
          lambda a, axes: gathered(a.astype(self.config.compute_dtype), axes[1:]) if "embed" in axes else a,
          parameters,
          axes,
        )
      return apply(nnx.merge(graphdef, parameters, tau), x_BxTxD, by, segments)

    x_BxTxD, seen = jax.lax.scan(LAYER_REMAT[self.config.remat](layer), self._embed(tokens), leaves)
    return self.final_norm(constrain(x_BxTxD, "batch", "time", None)), seen

  def prefill(
    self, tokens: Int[Array, "batch time"], start: Int[Array, "batch"], num_slots: int
  ) -> tuple[Float[Array, "batch time embed"], KVCache]:
    """`hidden` of prompts, and a new cache that holds them, with room for `num_slots` tokens.

    Args:
      tokens: prompts that end together, padded on their left.
      start: where each begins.

    Raises:
      ValueError: they do not fit.
    """
    # Padding is a document of its own.
    segments = (jnp.arange(tokens.shape[1])[None] >= start[:, None]).astype(jnp.int32)
    return self._into(KVCache.empty(self.config, start, num_slots), tokens, Block.prefill, segments)

  def extend(
    self, tokens: Int[Array, "batch time"], cache: KVCache
  ) -> tuple[Float[Array, "batch time embed"], KVCache]:
    """`hidden` of tokens that follow those in `cache`, and the cache with them in it.

    Raises:
      ValueError: the cache is full.
    """
    return self._into(cache, tokens, Block.extend, cache.mask(tokens.shape[1]))

  def _into(self, cache, tokens, through, seen):
    cache.check_room(tokens.shape[1])
    by = rotation(cache.positions(tokens.shape[1]), self.config.rotary_dims, self.config.rotary_base)
    x_BxTxD = self._embed(tokens)
    for layer, block in enumerate(self.for_decoding().blocks):
      x_BxTxD, cache = through(block, x_BxTxD, by, seen, cache, layer)
    return self.final_norm(x_BxTxD), cache.advanced(tokens.shape[1])

  def for_decoding(self) -> "LanguageModel":
    """The model for `prefill` and `extend` alone: a copy, each layer with leaves of its own, in the dtype of products.

    Decoding reads each parameter once a token, and a scan would copy every layer's out of the stack before.
    """
    if isinstance(self.blocks, nnx.List):
      return self
    graphdef, parameters, tau = split(self)
    axes, _ = logical_axes(self)

    def narrowed(a, axes):
      return a.astype(self.config.compute_dtype) if "embed" in axes and a.dtype != jnp.int8 else a

    parameters = jax.tree.map(narrowed, parameters, axes)
    model = nnx.merge(graphdef, parameters, tau)
    model.blocks = unstack_layers(model.blocks, self.config.num_layers)
    return model

  def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
    """Float32 scores of every vocabulary entry, hidden · Eᵀ."""
    if hidden.ndim > 2 and is_split("time"):
      return jax.vmap(self.logits)(hidden)
    hidden_MxD = hidden.reshape(-1, hidden.shape[-1])
    logits_MxV = row_products(hidden_MxD, self.table().astype(hidden.dtype))
    return logits_MxV.reshape(*hidden.shape[:-1], -1)

  def table(self) -> Float[Array, "vocab embed"]:
    """The embedding, which is also the logits' matrix, with its channels whole."""
    # One gathering along fsdp serves the lookup and the logits.
    return constrain(self.embedding[...], "vocab", None)

  def _embed(self, tokens):
    return self.table()[tokens].astype(self.config.compute_dtype)
