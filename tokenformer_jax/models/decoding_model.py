"""A language model in the form that decodes fastest: unstacked layers, parameters in the dtype of the products."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tokenformer_jax.distributed.axes import constrain
from tokenformer_jax.models.vocabulary import VocabularyEnds
from tokenformer_jax.nn.cache import KVCache
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.parameters import logical_axes, split
from tokenformer_jax.nn.stack import each_block

if TYPE_CHECKING:
  from tokenformer_jax.models.language_model import LanguageModel


class DecodingModel(VocabularyEnds, nnx.Module):
  """What `LanguageModel.for_decoding` returns: a copy that reads prompts and decodes, and does nothing else.

  Decoding reads every parameter once for each token. Here each layer has arrays of its own, because a scan would first
  copy a layer's parameters out of the stack; and parameters with channels are cast to `config.compute_dtype` once.

  It cannot be called, trained, grown or exported; these take the `LanguageModel`.
  """

  only_decodes: ClassVar[bool] = True  # `nn.pattention.require_float_tokens` refuses modules with this mark.

  def __init__(self, model: "LanguageModel"):
    self.config = model.config
    self.embedding = model.embedding
    self.blocks = each_block(model.first, model.blocks, model.config)
    self.final_norm = model.final_norm
    self.position_embedding, self.position_scale = model.position_embedding, model.position_scale
    self.embedding_norm = model.embedding_norm
    self.head = model.head

  @classmethod
  def of(cls, model: "LanguageModel") -> "DecodingModel":
    """The copy of a `LanguageModel`, which stays as it is."""
    graphdef, parameters, tau = split(model)
    axes, _ = logical_axes(model)

    def narrowed(a, axes):
      return a.astype(model.config.compute_dtype) if "embed" in axes and a.dtype != jnp.int8 else a

    return cls(nnx.merge(graphdef, jax.tree.map(narrowed, parameters, axes), tau))

  def __call__(self, *args, **kwargs):
    raise TypeError(
      "a DecodingModel cannot be called: use prefill and extend, or call the LanguageModel whose for_decoding() made "
      "it."
    )

  def for_decoding(self) -> "DecodingModel":
    """The model itself, so that a loop may take either form."""
    return self

  def _gathered(self, table: Array) -> Array:
    """The table as it is: few rows of it are read, so that the rows travel along fsdp and the table does not."""
    return table

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
    cache = KVCache.empty(self.config, start, num_slots)
    cache.check_free(tokens.shape[1])
    positions = cache.positions(tokens.shape[1])
    # The padding gets a segment of its own, so that no token of the prompt sees it.
    real = jnp.arange(tokens.shape[1])[None] >= start[:, None]
    context = Context(positions, self.rotation(positions), real.astype(jnp.int32), real, filled=cache.length)
    return self._through_layers(tokens, context, cache)

  def extend(
    self, tokens: Int[Array, "batch time"], cache: KVCache
  ) -> tuple[Float[Array, "batch time embed"], KVCache]:
    """Reads tokens [B, T] that follow those in `cache`.

    Returns:
      (outputs of the final norm [B, T, d], the cache with the tokens in it).

    Raises:
      ValueError: the tokens need more slots than are free.
    """
    num_new = tokens.shape[1]
    cache.check_free(num_new)
    positions = cache.positions(num_new)
    context = Context(positions, self.rotation(positions), visible=cache.mask(num_new), filled=cache.length)
    return self._through_layers(tokens, context, cache)

  def _through_layers(self, tokens: Array, context: Context, cache: KVCache) -> tuple[Array, KVCache]:
    # Every device looks up its part of the vocabulary and of the channels.
    x_BxTxD = constrain(self.embed(constrain(tokens, "step", None), context.positions), "step", None, "embed")
    layers = list(cache.layers)
    for index, block in enumerate(self.blocks):
      x_BxTxD, layers[index], _ = block(context.split(x_BxTxD), context.observed(), layers[index])
    return self.final_norm(x_BxTxD), dataclasses.replace(cache, layers=tuple(layers)).advanced(tokens.shape[1])
