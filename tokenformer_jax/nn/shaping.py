"""Shaped attention: α I + β A − γ C instead of the softmax A (He & Hofmann, arXiv 2311.01906, eq. 5).

C is A for scores of zero: each token attends equally to all that it may see. The product with the values needs no matrix:

    (α I + β A − γ C) V = α V + β (A V) − γ mean(V),   the mean over the tokens that each token may see.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tokenformer_jax.distributed.axes import is_split
from tokenformer_jax.nn.cache import LayerCache
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.parameters import parameter


class Shaping(nnx.Module):
  """α V + β (A V) − γ mean(V), with one α, β and γ for each head, trained without decay.

  Args:
    num_heads: the number of heads.
    kind: `centred`, which begins with α = β = γ = 1; or `skip`, which has no γ and begins with α = 1 and β = 0.
    rngs: as for every layer.
  """

  def __init__(self, num_heads: int, kind: str, *, rngs: nnx.Rngs):
    def gains(initial: float) -> nnx.Param:
      return parameter(rngs, (num_heads,), (None,), nnx.initializers.constant(initial), decayed=False)

    self.alpha = gains(1.0)
    self.beta = gains(1.0 if kind == "centred" else 0.0)
    self.gamma = gains(1.0) if kind == "centred" else None

  def __call__(
    self,
    mixed: Float[Array, "batch time head channel"],
    v: Float[Array, "batch time kv_head channel"],
    context: Context,
    cache: LayerCache | None = None,
  ) -> tuple[Float[Array, "batch time head channel"], LayerCache | None]:
    """(the shaped output, the cache with the sum of the values updated).

    Args:
      mixed: A V, the softmax's output.
      v: the values, with as many heads or with fewer that are shared.
      context: which tokens see each other.
      cache: the layer's cache, whose keys and values are written and whose sum is that before these tokens; None outside
        decoding.
    """
    alpha, beta = _along_heads(self.alpha), _along_heads(self.beta)
    y = alpha * _each_head(v, mixed) + beta * mixed.astype(jnp.promote_types(mixed.dtype, jnp.float32))
    if self.gamma is not None:
      mean, cache = _visible_mean(v, context, cache)
      y = y - _along_heads(self.gamma) * _each_head(mean, mixed)
    return y.astype(mixed.dtype), cache


def _along_heads(gain: nnx.Param) -> Array:
  return gain[...][None, None, :, None]


def _each_head(v, mixed):
  """v with its heads repeated for the query heads that share them, in float32 or wider."""
  v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
  return jnp.repeat(v, mixed.shape[2] // v.shape[2], axis=2)


def _visible_mean(v, context: Context, cache: LayerCache | None):
  """The mean of the values that each token may see, and the cache with their sum."""
  wide = v.astype(jnp.promote_types(v.dtype, jnp.float32))
  if not context.causal:
    return segment_mean(wide, context.segments, context.key_segments()), None
  if cache is None:
    return causal_mean(wide, context.segments), None
  assert cache.value_sum is not None
  if context.real is not None:
    wide = jnp.where(context.real[:, :, None, None], wide, 0.0)
  sums = cache.value_sum[:, None] + jnp.cumsum(wide, axis=1)
  seen = context.positions + 1 if context.seen is None else context.seen
  mean = sums / seen[:, :, None, None]
  return mean, dataclasses.replace(cache, value_sum=sums[:, -1].astype(cache.value_sum.dtype))


def causal_mean(
  v: Float[Array, "batch time head channel"], segments: Int[Array, "batch time"] | None = None
) -> Float[Array, "batch time head channel"]:
  """The mean over each token and those before it in its segment, whose tokens follow one another.

  Raises:
    ValueError: devices split the positions of a sequence, so that no device has all values of a mean.
  """
  if is_split("time"):
    raise ValueError(
      "mesh.sequence > 1 with attention.shaped='centred': each token needs the mean of all values before it; choose "
      "mesh.sequence=1."
    )
  time = jnp.arange(v.shape[1])[None]
  first = jnp.zeros_like(time)
  if segments is not None:
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(begins, time, 0), axis=1)

  def add(one, other):
    # A sum of parts of sequences, which begins anew where the later part contains the beginning of a segment.
    (sum_1, begins_1), (sum_2, begins_2) = one, other
    return jnp.where(begins_2, sum_2, sum_1 + sum_2), begins_1 | begins_2

  begins = jnp.broadcast_to((time == first)[:, :, None, None], (*v.shape[:2], 1, 1))
  sums, _ = jax.lax.associative_scan(add, (v, begins), axis=1)
  return sums / (time - first + 1)[:, :, None, None]


def segment_mean(
  v: Float[Array, "batch time head channel"],
  segments: Int[Array, "batch time"] | None = None,
  key_segments: Int[Array, "batch time"] | None = None,
) -> Float[Array, "batch #time head channel"]:
  """The mean over all tokens of each token's segment; for C of an encoder, whose entries are 1 / T.

  Args:
    v: the values.
    segments: document of each token; by default there is one, and the result has a time axis of 1.
    key_segments: as `segments`, but with another number for padding, which counts in no mean.
  """
  if key_segments is None:
    return jnp.mean(v, axis=1, keepdims=True)
  queries = jnp.zeros_like(key_segments[:, :1]) if segments is None else segments
  visible = (queries[:, :, None] == key_segments[:, None, :]).astype(v.dtype)
  count = jnp.maximum(jnp.sum(visible, axis=2), 1.0)
  return jnp.einsum("bts,bshc->bthc", visible, v) / count[:, :, None, None]
