"""Causal softmax attention between tokens, computed as the device does it best."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.distributed.axes import is_split, per_device, platform, splits
from tokenformer_jax.kernels.products import wide_einsum

# Splash attention's rows come in tiles of 128; tiles of 512 keep a TPU's matrix unit busy.
_TILE, _LARGEST_TILE = 128, 512
# Plain attention takes its queries in this many blocks where each has at least so many.
_BLOCKS, _LEAST_BLOCK = 4, 64


def causal_attention(
  q: Float[Array, "batch time head channel"],
  k: Float[Array, "batch time head channel"],
  v: Float[Array, "batch time head channel"],
  segments: Int[Array, "batch time"] | None = None,
  implementation: str | None = None,
) -> Float[Array, "batch time head channel"]:
  """softmax(q kᵀ / √C) v of every token over itself and those before it, in its own segment.

  Args:
    q, k, v: [B, T, H, C].
    segments: document of each token; by default one.
    implementation: `cudnn`, `splash` or `xla`; by default `kernel_for` this device, dtype and shape.
  """
  implementation = implementation or kernel_for(platform(), q.dtype, q.shape)
  if implementation == "splash":
    return _splash(q, k, v, segments)
  if implementation == "xla":
    return _plain(q, k, v, segments)
  mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)


def kernel_for(platform: str, dtype: jnp.dtype, shape: tuple[int, int, int, int]) -> str:
  """`cudnn` on a GPU and `splash` on a TPU, where they take arrays of that dtype and shape [B, T, H, C]; else `xla`."""
  _, time, _, channels = shape
  if platform == "gpu" and dtype == jnp.bfloat16 and channels % 8 == 0 and channels <= 128:
    return "cudnn"
  # Where positions are split, which keys a query may see depends on the device, and splash's mask cannot.
  if platform == "tpu" and time % _TILE == 0 and not is_split("time"):
    return "splash"
  return "xla"


@functools.partial(jax.checkpoint, prevent_cse=False)
def _plain(q, k, v, segments):
  """Each block of queries has the keys up to its end, so up to three of eight scores are never computed.

  The gradient computes scores again: kept, they would be the largest arrays of a layer.
  """
  time = q.shape[1]
  size = time // (1 if is_split("time") else math.gcd(time, min(_BLOCKS, max(1, time // _LEAST_BLOCK))))
  q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))

  def block(first):
    end = first + size
    seen = (jnp.arange(first, end)[:, None] >= jnp.arange(end)[None, :])[None, None]
    if segments is not None:
      seen &= segments[:, None, first:end, None] == segments[:, None, None, :end]
    return masked_attention(q[:, :, first:end], (k[:, :, :end],), (v[:, :, :end],), seen)

  return jnp.concatenate([block(first) for first in range(0, time, size)], axis=2).swapaxes(1, 2)


def masked_attention(
  q: Float[Array, "batch head time channel"],
  keys: tuple[Array, ...],
  values: tuple[Array, ...],
  seen: Bool[Array, "#batch 1 time slot"],
) -> Float[Array, "batch head time channel"]:
  """softmax(q kᵀ / √C) v of each query over the slots that it has `seen`; over all of them equally if it has none.

  Args:
    keys, values: [batch, head, slot, channel] each; where they are several, their slots follow one another.
  """
  scores_BxHxTxS = jnp.concatenate([wide_einsum("bhtc,bhsc->bhts", q, k) for k in keys], axis=-1) * q.shape[-1] ** -0.5
  seen_BxHxTxS = jnp.where(seen, scores_BxHxTxS, jnp.finfo(scores_BxHxTxS.dtype).min)
  weights_BxHxTxS = jax.nn.softmax(seen_BxHxTxS, axis=-1).astype(q.dtype)
  ends = list(itertools.accumulate(k.shape[2] for k in keys))
  parts = zip(jnp.split(weights_BxHxTxS, ends[:-1], axis=-1), values)
  return functools.reduce(jnp.add, [jnp.einsum("bhts,bhsc->bhtc", weights, v) for weights, v in parts])


def _splash(q, k, v, segments, interpret=False):
  """Splash attention, for T a multiple of 128; on a mesh of each device's rows and heads."""
  # Here, for Pallas takes longer to import than the rest of us.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  by_heads = PartitionSpec(splits("batch", q.shape[0]) or None, None, splits("heads", q.shape[2]) or None, None)
  by_rows = PartitionSpec(by_heads[0], None)

  def local(q, k, v, segments):
    time, heads, channels = q.shape[1:]
    tile = math.gcd(time, _LARGEST_TILE)
    sizes = splash_attention_kernel.BlockSizes(
      block_q=tile, block_kv=tile, block_q_dkv=tile, block_kv_dkv=tile, block_q_dq=tile, block_kv_dq=tile
    )
    kernel = splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((time, time))] * heads),
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
    )
    ids = None if segments is None else splash_attention_kernel.SegmentIds(segments, segments)
    q, k, v = (a.swapaxes(1, 2) for a in (q * channels**-0.5, k, v))
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2).astype(v.dtype)

  if segments is None:
    return per_device(functools.partial(local, segments=None), (by_heads,) * 3, by_heads)(q, k, v)
  return per_device(local, (by_heads,) * 3 + (by_rows,), by_heads)(q, k, v, segments)
