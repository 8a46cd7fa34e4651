"""A language model in the form that decodes fastest: unstacked layers, parameters in the dtype of the products."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.vocabulary import embed, logits
from tokenformer_jax.nn.block import Block
from tokenformer_jax.nn.kv_cache import KVCache
from tokenformer_jax.nn.layer_norm import LayerNorm
from tokenformer_jax.nn.parameters import logical_axes, split, unstack_layers
from tokenformer_jax.nn.rotary import rotation


class DecodingModel(nnx.Module):
  """What `LanguageModel.for_decoding` returns: a copy that reads prompts and decodes, and does nothing else.

  Decoding reads every parameter once for each token. Here each layer has arrays of its own, because a scan would first
  copy a layer's parameters out of the stack; and parameters with channels are cast to `config.compute_dtype` once.

  It cannot be called, trained, grown or exported; these take the `LanguageModel`.

  Attributes:
    config: the configuration of the language model.
  """

  only_decodes: ClassVar[bool] = True  # `nn.pattention.require_float_tokens` refuses modules with this mark.

  def __init__(self, config: ModelConfig, embedding: nnx.Param, blocks: nnx.List, final_norm: LayerNorm):
    self.config = config
    self.embedding = embedding
    self.blocks = blocks
    self.final_norm = final_norm

  @classmethod
  def of(cls, model: nnx.Module, config: ModelConfig) -> "DecodingModel":
    """The copy of a `LanguageModel` and its configuration; the model stays as it is."""
    graphdef, parameters, tau = split(model)
    axes, _ = logical_axes(model)

    def narrowed(a, axes):
      return a.astype(config.compute_dtype) if "embed" in axes and a.dtype != jnp.int8 else a

    copy = nnx.merge(graphdef, jax.tree.map(narrowed, parameters, axes), tau)
    blocks = unstack_layers(copy.blocks, config.num_layers)
    return cls(config, copy.embedding, blocks, copy.final_norm)

  def __call__(self, *args, **kwargs):
    raise TypeError(
      "a DecodingModel cannot be called: use prefill and extend, or call the LanguageModel whose for_decoding() made "
      "it."
    )

  def for_decoding(self) -> "DecodingModel":
    """The model itself, so that a loop may take either form."""
    return self

  def prefill(
    self, tokens: Int[Array, "batch time"], start: Int[Array, "batch"], num_slots: int
  ) -> tuple[Float[Array, "batch time embed"], KVCache]:
    """Reads prompts into a new cache.

    Args:
      tokens: prompts [B, T] that end together, padded on their left.
      start: the position of each prompt's first token, [B].
      num_slots: how many tokens the cache can hold in each row.

    Returns:
      (outputs of the final norm [B, T, d], the cache with the prompts in it).

    Raises:
      ValueError: the prompts need more than `num_slots` slots.
    """
    # The padding gets a segment of its own, so that no token of the prompt sees it.
    segments = (jnp.arange(tokens.shape[1])[None] >= start[:, None]).astype(jnp.int32)
    cache = KVCache.empty(self.config, start, num_slots)
    return self._through_layers(cache, tokens, Block.prefill, segments)

  def extend(
    self, tokens: Int[Array, "batch time"], cache: KVCache
  ) -> tuple[Float[Array, "batch time embed"], KVCache]:
    """Reads tokens [B, T] that follow those in `cache`.

    Returns:
      (outputs of the final norm [B, T, d], the cache with the tokens in it).

    Raises:
      ValueError: the tokens need more slots than are free.
    """
    return self._through_layers(cache, tokens, Block.extend, cache.mask(tokens.shape[1]))

  def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
    """Float32 scores of every vocabulary entry: [..., d] -> [..., vocab]."""
    return logits(self.embedding[...], hidden)

  def _through_layers(self, cache, tokens, read, visible):
    """Applies `read`, `Block.prefill` or `Block.extend`, of each layer; `visible` are the segments or the mask."""
    num_new = tokens.shape[1]
    cache.check_free(num_new)
    cos_sin = rotation(cache.positions(num_new), self.config.rotary_dims, self.config.rotary_base)
    x_BxTxD = embed(self.embedding[...], tokens, self.config.compute_dtype)
    for layer, block in enumerate(self.blocks):
      x_BxTxD, cache = read(block, x_BxTxD, cos_sin, visible, cache, layer)
    return self.final_norm(x_BxTxD), cache.advanced(num_new)
