"""Softmax attention between tokens, causal or not, by the implementation that is fastest on the device."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.config.validation import require_choice
from tokenformer_jax.distributed.axes import is_split, parts, per_device, platform, splits
from tokenformer_jax.kernels.products import wide_einsum

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
# Splash attention works on tiles of 128 rows; tiles of 512 keep a TPU's matrix unit busy.
_TILE, _LARGEST_TILE = 128, 512
_BLOCKS_OF_SPLASH = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
# Plain attention splits its queries into this many blocks, if each block gets at least this many queries.
_BLOCKS, _LEAST_BLOCK = 4, 64


def causal_attention(
  q: Float[Array, "batch time head channel"],
  k: Float[Array, "batch time kv_head channel"],
  v: Float[Array, "batch time kv_head channel"],
  segments: Int[Array, "batch time"] | None = None,
  implementation: str | None = None,
) -> Float[Array, "batch time head channel"]:
  """softmax(q kᵀ / √C) v, where every token attends to itself and to the tokens before it in its own segment.

  Args:
    q: queries [B, T, H, C].
    k: keys [B, T, K, C], each head of which is read by H / K query heads that follow one another.
    v: values [B, T, K, C].
    segments: document of each token; by default one document.
    implementation: `xla`, for every device; `cudnn`, for GPUs; `splash`, for TPUs. By default the one that
      `default_implementation` gives for this device, dtype and shape.

  Returns:
    [B, T, H, C] in the dtype of v.

  Raises:
    ValueError: the implementation is unknown, or it does not support this device or this number of positions.
  """
  return _attention(q, k, v, segments, segments, implementation, causal=True)


def bidirectional_attention(
  q: Float[Array, "batch time head channel"],
  k: Float[Array, "batch time kv_head channel"],
  v: Float[Array, "batch time kv_head channel"],
  segments: Int[Array, "batch time"] | None = None,
  key_segments: Int[Array, "batch time"] | None = None,
  implementation: str | None = None,
) -> Float[Array, "batch time head channel"]:
  """`causal_attention` without an order: every token attends to all tokens of its own segment.

  Args:
    q, k, v, implementation: as for `causal_attention`.
    segments: document of each token as a query; None is document 0.
    key_segments: document of each token as a key, which is that of no query for padding; by default `segments`. A query
      that no key belongs to gets some finite output.
  """
  if segments is None and key_segments is not None:
    segments = jnp.zeros_like(key_segments)
  return _attention(q, k, v, segments, segments if key_segments is None else key_segments, implementation, causal=False)


def _attention(q, k, v, segments, key_segments, implementation, causal):
  if implementation is None:
    implementation = default_implementation(platform(), q.dtype, q.shape)
  require_choice("implementation", implementation, IMPLEMENTATIONS)
  needed = {"cudnn": "gpu", "splash": "tpu"}.get(implementation)
  if needed is not None and platform() != needed:
    raise ValueError(
      f"implementation={implementation!r} runs on a {needed.upper()}, and this is {platform()}; choose 'xla', or None "
      "for the fastest one of the device."
    )
  if implementation == "splash":
    if q.shape[1] % (_TILE * parts("time")):
      raise ValueError(
        f"implementation='splash' takes a multiple of {_TILE} positions on each device, and there are {q.shape[1]} on "
        f"{parts('time')}; choose 'xla'."
      )
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) if q.shape[2] != k.shape[2] else a for a in (k, v))
    return _splash(q, k, v, segments, key_segments, causal)
  if implementation == "xla":
    return _plain(q, k, v, segments, key_segments, causal)
  mask = None if segments is None else (segments[:, None, :, None] == key_segments[:, None, None, :])
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")


def default_implementation(platform: str, dtype: jnp.dtype, shape: tuple[int, ...]) -> str:
  """The fastest implementation on a platform for arrays of this dtype and shape [B, T, H, C].

  It is `cudnn` on a GPU and `splash` on a TPU, where they support the dtype and shape, and otherwise `xla`.
  """
  _, time, _, channels = shape
  if platform == "gpu" and dtype == jnp.bfloat16 and channels % 8 == 0 and channels <= 128:
    return "cudnn"
  if platform == "tpu" and time % (_TILE * parts("time")) == 0:
    return "splash"
  return "xla"


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(5,))
def _plain(q, k, v, segments, key_segments, causal):
  """Attention in blocks of queries. A causal one reads only the keys up to its end, which saves up to 3/8 of the scores.

  The backward pass computes the scores again, because they would be the largest arrays that a layer keeps.
  """
  time = q.shape[1]
  size = time // (1 if is_split("time") else math.gcd(time, min(_BLOCKS, max(1, time // _LEAST_BLOCK))))
  q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))

  def block(first):
    last = first + size
    end = last if causal else time
    visible = jnp.ones((1, 1, size, end), bool)
    if causal:
      visible = (jnp.arange(first, last)[:, None] >= jnp.arange(end)[None, :])[None, None]
    if segments is not None:
      visible &= segments[:, None, first:last, None] == key_segments[:, None, None, :end]
    return masked_attention(q[:, :, first:last], (k[:, :, :end],), (v[:, :, :end],), visible)

  return jnp.concatenate([block(first) for first in range(0, time, size)], axis=2).swapaxes(1, 2)


def masked_attention(
  q: Float[Array, "batch head time channel"],
  keys: tuple[Array, ...],
  values: tuple[Array, ...],
  visible: Bool[Array, "#batch 1 time slot"],
) -> Float[Array, "batch head time channel"]:
  """softmax(q kᵀ / √C) v of each query over its visible slots; over all slots equally if none is visible.

  Args:
    q: queries [batch, head, time, channel].
    keys: one or several arrays [batch, kv_head, slot, channel], whose slots follow one another; head / kv_head query
      heads that follow one another read the same one.
    values: arrays like `keys`.
    visible: which slots each query may see.
  """
  heads, kv_heads = q.shape[1], keys[0].shape[1]
  if heads != kv_heads:
    # Query heads that share keys are further queries of one head, so that no key is repeated.
    shared = heads // kv_heads
    q_BxKxGTxC = q.reshape(q.shape[0], kv_heads, shared * q.shape[2], q.shape[3])
    y_BxKxGTxC = masked_attention(q_BxKxGTxC, keys, values, jnp.tile(visible, (1, 1, shared, 1)))
    return y_BxKxGTxC.reshape(q.shape)
  scores_BxHxTxS = jnp.concatenate([wide_einsum("bhtc,bhsc->bhts", q, k) for k in keys], axis=-1) * q.shape[-1] ** -0.5
  masked_BxHxTxS = jnp.where(visible, scores_BxHxTxS, jnp.finfo(scores_BxHxTxS.dtype).min)
  weights_BxHxTxS = jax.nn.softmax(masked_BxHxTxS, axis=-1).astype(q.dtype)
  ends = list(itertools.accumulate(k.shape[2] for k in keys))
  parts = zip(jnp.split(weights_BxHxTxS, ends[:-1], axis=-1), values)
  return functools.reduce(jnp.add, [jnp.einsum("bhts,bhsc->bhtc", weights, v) for weights, v in parts])


def _splash(q, k, v, segments, key_segments, causal, interpret=False):
  """Splash attention for T a multiple of 128; on a mesh, each device computes its own rows, heads and queries.

  A device whose queries are a part of the sequence gathers all keys and values, and has that part of the mask.
  """
  # Imported only here, because importing Pallas takes longer than importing the rest of this package.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  _, time, heads, channels = q.shape
  rows, times, by_heads = splits("batch", q.shape[0]), splits("time", time), splits("heads", heads)
  queries = PartitionSpec(rows or None, times or None, by_heads or None, None)
  keys = PartitionSpec(rows or None, None, by_heads or None, None)

  tile = math.gcd(time // parts("time"), _LARGEST_TILE)
  mask_class = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
  kernel = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([mask_class((time, time))] * (heads // (parts("heads") if by_heads else 1))),
    block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(_BLOCKS_OF_SPLASH, tile)),
    head_shards=1,
    q_seq_shards=parts("time"),
    interpret=interpret,
  )

  def local(kernel, q, k, v, segments, key_segments):
    ids = None if segments is None else splash_attention_kernel.SegmentIds(segments, key_segments)
    q, k, v = (a.swapaxes(1, 2) for a in (q * channels**-0.5, k, v))
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2).astype(v.dtype)

  mesh = jax.sharding.get_abstract_mesh()
  of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, times or None))) if times else None
  specs = (of_kernel or PartitionSpec(), queries, keys, keys)
  if segments is None:
    alone = functools.partial(local, segments=None, key_segments=None)
    return per_device(alone, specs, queries)(kernel, q, k, v)
  specs += (PartitionSpec(*queries[:2]), PartitionSpec(*keys[:2]))
  return per_device(local, specs, queries)(kernel, q, k, v, segments, key_segments)
