"""Causal attention between tokens, whose four projections are pattention layers."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.distributed.axes import constrain
from tokenformer_jax.nn.kv_cache import KVCache
from tokenformer_jax.nn.rotary import Rotation, rotate
from tokenformer_jax.nn.token_attention import causal_attention, masked_attention


class Attention(nnx.Module):
  """Multi-head attention of the released models: separate q, k, v and proj, partial rotary embedding.

  Args:
    num_heads: the number of attention heads H.
    projection: makes one `hidden -> hidden` projection, given the name of the count in the model's configuration that
      sets its number of parameter tokens.
  """

  def __init__(self, num_heads: int, projection: Callable[[str], nnx.Module]):
    self.num_heads = num_heads
    self.query = projection("qkv_tokens")
    self.key = projection("qkv_tokens")
    self.value = projection("qkv_tokens")
    self.proj = projection("proj_tokens")

  def project(self, x_BxTxD: Float[Array, "batch time embed"], cos_sin: Rotation) -> tuple[Array, Array, Array]:
    """Rotated queries, rotated keys, and values: three arrays [B, T, H, C]."""
    q, k, v = (self._split_heads(projection(x_BxTxD)) for projection in (self.query, self.key, self.value))
    return rotate(q, cos_sin), rotate(k, cos_sin), v

  def attend(
    self, q: Array, k: Array, v: Array, segments: Int[Array, "batch time"] | None = None
  ) -> Float[Array, "batch time embed"]:
    """The output [B, T, d] for q, k and v [B, T, H, C].

    Every token attends to itself and to the tokens before it in its segment; by default there is one segment.
    """
    k, v = (constrain(a, "batch", None, "heads", None) for a in (k, v))
    y_BxTxD = _merge_heads(causal_attention(q, k, v, segments))
    return self.proj(constrain(y_BxTxD, "batch", "time", None))

  def prefill(
    self,
    x_BxTxD: Float[Array, "batch time embed"],
    cos_sin: Rotation,
    segments: Int[Array, "batch time"],
    cache: KVCache,
    layer: int,
  ) -> tuple[Array, KVCache]:
    """`project` and `attend` for the first tokens of an empty cache.

    Returns:
      (output [B, T, d], the cache with the keys and values of this layer in it).
    """
    q, k, v = self.project(x_BxTxD, cos_sin)
    return self.attend(q, k, v, segments), cache.write(layer, k.swapaxes(1, 2), v.swapaxes(1, 2))

  def extend(
    self,
    x_BxTxD: Float[Array, "batch time embed"],
    cos_sin: Rotation,
    mask: Bool[Array, "batch 1 time slot"],
    cache: KVCache,
    layer: int,
  ) -> tuple[Array, KVCache]:
    """`prefill` for tokens that follow those in the cache; `mask` says which slots each of them may see."""
    q, k, v = (a.swapaxes(1, 2) for a in self.project(x_BxTxD, cos_sin))
    past, cache = cache, cache.write(layer, k, v)
    if x_BxTxD.shape[:2] == (1, 1):
      # XLA:CPU would copy the buffer of a single row between writing and reading it. Reading the buffer as it was
      # before the write, and the new key and value beside it, avoids the copy.
      filled = (jnp.arange(past.num_slots) < past.length)[None, None, None]
      mask = jnp.concatenate([mask & filled, jnp.ones_like(mask[..., :1])], axis=-1)
      y_BxHxTxC = masked_attention(q, (past.keys[layer], k), (past.values[layer], v), mask)
    else:
      y_BxHxTxC = masked_attention(q, cache.keys[layer : layer + 1], cache.values[layer : layer + 1], mask)
    return self.proj(_merge_heads(y_BxHxTxC.swapaxes(1, 2))), cache

  def _split_heads(self, x_BxTxD):
    """[B, T, d] -> [B, T, H, C], with the heads split along the token axis of the mesh; docs/sharding.md says why."""
    # Replicate before reshaping; otherwise the partitioner splits the sum over parameter tokens by heads and reshards
    # the [rows, N] weights.
    x_BxTxD = constrain(x_BxTxD, "batch", "time", None)
    x_BxTxHxC = x_BxTxD.reshape(*x_BxTxD.shape[:2], self.num_heads, -1)
    return constrain(x_BxTxHxC, "batch", "time", "heads", None)


def _merge_heads(x_BxTxHxC):
  return x_BxTxHxC.reshape(*x_BxTxHxC.shape[:2], -1)
