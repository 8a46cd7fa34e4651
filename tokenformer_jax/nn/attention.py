"""Causal attention between tokens, its four projections being pattention layers."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.distributed.axes import constrain
from tokenformer_jax.nn.kv_cache import KVCache
from tokenformer_jax.nn.rotary import Rotation, rotate
from tokenformer_jax.nn.token_attention import causal_attention, masked_attention


class Attention(nnx.Module):
  """Multi-head attention of the released models: separate q, k, v and proj, partial rotary.

  Args:
    num_heads: attention heads H.
    projection: makes one `hidden -> hidden` projection of as many parameter tokens as the named count of the model's
      configuration says, `name -> nnx.Module`.
  """

  def __init__(self, num_heads: int, projection):
    self.num_heads = num_heads
    self.query = projection("qkv_tokens")
    self.key = projection("qkv_tokens")
    self.value = projection("qkv_tokens")
    self.proj = projection("proj_tokens")

  def project(self, x_BxTxD: Float[Array, "batch time embed"], by: Rotation) -> tuple[Array, Array, Array]:
    """Queries and keys, rotated, and values, [B, T, H, C] each."""
    q, k, v = (self._by_heads(projection(x_BxTxD)) for projection in (self.query, self.key, self.value))
    return rotate(q, by), rotate(k, by), v

  def attend(
    self, q: Array, k: Array, v: Array, segments: Int[Array, "batch time"] | None = None
  ) -> Float[Array, "batch time embed"]:
    """Every token attends to itself and those before it in its segment, of which there is one by default."""
    k, v = (constrain(a, "batch", None, "heads", None) for a in (k, v))
    y_BxTxD = _merge_heads(causal_attention(q, k, v, segments))
    return self.proj(constrain(y_BxTxD, "batch", "time", None))

  def prefill(
    self,
    x_BxTxD: Float[Array, "batch time embed"],
    by: Rotation,
    segments: Int[Array, "batch time"],
    cache: KVCache,
    layer: int,
  ) -> tuple[Array, KVCache]:
    """`project` and `attend` for the first tokens of an empty `cache`; returns the output and the cache with them."""
    q, k, v = self.project(x_BxTxD, by)
    return self.attend(q, k, v, segments), cache.write(layer, k.swapaxes(1, 2), v.swapaxes(1, 2))

  def extend(
    self,
    x_BxTxD: Float[Array, "batch time embed"],
    by: Rotation,
    mask: Bool[Array, "batch 1 time slot"],
    cache: KVCache,
    layer: int,
  ) -> tuple[Array, KVCache]:
    """`prefill` for tokens that follow those in `cache`; the slots that each may see are its `mask`."""
    q, k, v = (a.swapaxes(1, 2) for a in self.project(x_BxTxD, by))
    past, cache = cache, cache.write(layer, k, v)
    if x_BxTxD.shape[:2] == (1, 1):
      # XLA:CPU would copy a buffer of one row between writing and reading it: read what it had before, and the new.
      had = (jnp.arange(past.num_slots) < past.length)[None, None, None]
      mask = jnp.concatenate([mask & had, jnp.ones_like(mask[..., :1])], axis=-1)
      y_BxHxTxC = masked_attention(q, (past.keys[layer], k), (past.values[layer], v), mask)
    else:
      y_BxHxTxC = masked_attention(q, cache.keys[layer : layer + 1], cache.values[layer : layer + 1], mask)
    return self.proj(_merge_heads(y_BxHxTxC.swapaxes(1, 2))), cache

  def _by_heads(self, x_BxTxD):
    """[B, T, H, C], split along heads on the token axis; docs/sharding.md counts why."""
    # Whole first: where the sum over tokens itself is split by heads, the partitioner moves Θ's weights about.
    x_BxTxD = constrain(x_BxTxD, "batch", "time", None)
    x_BxTxHxC = x_BxTxD.reshape(*x_BxTxD.shape[:2], self.num_heads, -1)
    return constrain(x_BxTxHxC, "batch", "time", "heads", None)


def _merge_heads(x_BxTxHxC):
  return x_BxTxHxC.reshape(*x_BxTxHxC.shape[:2], -1)
