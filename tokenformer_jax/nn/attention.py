"""Attention between tokens, with projections of parameter tokens or dense ones."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import constrain
from tokenformer_jax.nn.cache import LayerCache
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.initializers import STD, output_std
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.nn.projection import Dense, IdentityPlus, give_zero, make_projection
from tokenformer_jax.nn.rotary import rotate
from tokenformer_jax.nn.shaping import Shaping
from tokenformer_jax.nn.token_attention import bidirectional_attention, causal_attention, masked_attention

# The initial β of values and outputs α x + β x W: in the one layer that has them, and where all layers do.
_FIRST_BETA, _EVERY_BETA = 1.0, 0.2


class Attention(nnx.Module):
  """Multi-head attention: projections to queries, keys and values, and an output projection, as `config.attention` says.

  Args:
    config: sizes and choices of the model; `config.attention` describes this part.
    is_first: whether this is the first layer, the only one with a value projection where `values` is `identity`.
    rngs: parameters are drawn from `rngs.params()`.
  """

  value: Pattention | Dense | IdentityPlus | None
  proj: Pattention | Dense | IdentityPlus | None = None
  shaping: Shaping | None = None

  def __init__(self, config: ModelConfig, *, is_first: bool = False, rngs: nnx.Rngs):
    part = config.attention
    self.head_dim = config.head_dim
    d, d_kv = config.hidden_size, config.num_kv_heads * config.head_dim
    make = functools.partial(make_projection, config, rngs=rngs)
    into_heads = functools.partial(make, count="qkv_tokens", axes=("embed", "heads"))
    out_of_heads = functools.partial(make, d, d, "proj_tokens", axes=("heads", "embed"), bias=part.bias == "all")
    normal, orthogonal = nnx.initializers.normal(STD), nnx.initializers.orthogonal()

    self.query = into_heads(d, d, init=normal, bias=part.bias != "none")
    self.key = into_heads(d, d_kv, init=normal, bias=part.bias != "none")
    if part.values in ("projected", "orthogonal"):
      is_orthogonal = part.values == "orthogonal"
      self.value = into_heads(d, d_kv, init=orthogonal if is_orthogonal else normal, bias=part.bias == "all")
      self.proj = out_of_heads(init=orthogonal if is_orthogonal else nnx.initializers.normal(output_std(config)))
    elif part.values == "identity_plus":
      self.value = IdentityPlus(into_heads(d, d, init=normal), _EVERY_BETA, rngs=rngs)
      self.proj = IdentityPlus(out_of_heads(init=normal), _EVERY_BETA, rngs=rngs)
    else:
      self.value = IdentityPlus(into_heads(d, d, init=normal), _FIRST_BETA, rngs=rngs) if is_first else None
    if part.shaped != "none":
      give_zero(self.query)  # All scores are 0 then, and the centred attention of a new model is the identity.
      self.shaping = Shaping(config.num_heads, part.shaped, rngs=rngs)

  def project(self, x_BxTxD: Float[Array, "batch time embed"], context: Context) -> tuple[Array, Array, Array]:
    """Rotated queries [B, T, H, C], rotated keys and values [B, T, Hkv, C]."""
    values = x_BxTxD if self.value is None else self.value(x_BxTxD)
    # Split as x is before they are split by heads; otherwise the partitioner gathers the parameters of a decode step.
    q, k, v = (self._split_heads(context.split(y)) for y in (self.query(x_BxTxD), self.key(x_BxTxD), values))
    if context.rotation is not None:
      q, k = rotate(q, context.rotation), rotate(k, context.rotation)
    return q, k, v

  def mix(
    self, q: Array, k: Array, v: Array, context: Context, cache: LayerCache | None = None
  ) -> tuple[Float[Array, "batch time embed"], LayerCache | None]:
    """The output [B, T, d] for what `project` returned, and the cache with these keys and values.

    Every token attends to itself and to the tokens before it in its segment; where `context.causal` is not set, to all of
    its segment that are not padding; where `context.visible` is set, to those slots of the cache.
    """
    past = cache
    if cache is not None:
      assert context.filled is not None
      cache = cache.write(k.swapaxes(1, 2), v.swapaxes(1, 2), context.filled)
    if context.visible is None:
      mixed = self._among_themselves(q, k, v, context)
    else:
      mixed = self._to_cache(q, k, v, context, past, cache)
    if self.shaping is not None:
      mixed, cache = self.shaping(mixed, v, context, cache)
    # Without this constraint the partitioner splits the rows of decoding in one order and reads them in another.
    y_BxTxD = context.split(constrain(mixed.reshape(*mixed.shape[:2], -1), "batch", "time", None))
    return y_BxTxD if self.proj is None else self.proj(y_BxTxD), cache

  def _among_themselves(self, q, k, v, context):
    k, v = (constrain(a, "batch", None, "heads", None) for a in (k, v))
    if context.causal:
      return causal_attention(q, k, v, context.segments)
    return bidirectional_attention(q, k, v, context.segments, context.key_segments())

  def _to_cache(self, q, k, v, context, past, cache):
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    if q.shape[0] == q.shape[2] == 1:
      # XLA:CPU would copy the buffer of a single row between writing and reading it. Reading the buffer as it was
      # before the write, and the new key and value beside it, avoids the copy.
      filled = (jnp.arange(past.num_slots) < context.filled)[None, None, None]
      visible = jnp.concatenate([context.visible & filled, jnp.ones_like(context.visible[..., :1])], axis=-1)
      mixed = masked_attention(q, (past.keys, k), (past.values, v), visible)
    else:
      mixed = masked_attention(q, (cache.keys,), (cache.values,), context.visible)
    return constrain(mixed.swapaxes(1, 2), "batch", "time", "heads", None)

  def _split_heads(self, x_BxTxD: jax.Array) -> jax.Array:
    """[B, T, H · C] -> [B, T, H, C], with the heads split along the token axis of the mesh; docs/sharding.md says why."""
    # Replicate before reshaping; otherwise the partitioner splits the sum over parameter tokens by heads and reshards
    # the [rows, N] weights.
    x_BxTxD = constrain(x_BxTxD, "batch", "time", None)
    x_BxTxHxC = x_BxTxD.reshape(*x_BxTxD.shape[:2], -1, self.head_dim)
    return constrain(x_BxTxHxC, "batch", "time", "heads", None)
