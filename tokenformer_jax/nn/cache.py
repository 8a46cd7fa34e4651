"""The cache of keys and values for decoding: buffers for each layer, updated in place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.distributed.axes import constrain


@functools.partial(
  jax.tree_util.register_dataclass, meta_fields=[], data_fields=["keys", "values", "value_sum", "filled"]
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """What one layer keeps of the tokens read so far.

  Attributes:
    keys: rotated keys, [batch, head, slot, channel].
    values: [batch, head, slot, channel].
    value_sum: the sum of the values of each row's real tokens, float32 [batch, head, channel], for centred attention;
      None without it.
    filled: the number of slots that each row has filled, [batch], in a block that only some tokens go through; None in
      others, whose rows have all filled `KVCache.length`.
  """

  keys: Float[Array, "batch head slot channel"]
  values: Float[Array, "batch head slot channel"]
  value_sum: Float[Array, "batch head channel"] | None = None
  filled: Int[Array, "batch"] | None = None

  @property
  def num_slots(self) -> int:
    return self.keys.shape[2]

  def write(
    self,
    keys: Float[Array, "batch head time channel"],
    values: Float[Array, "batch head time channel"],
    filled: Int[Array, "*rows"],
  ) -> "LayerCache":
    """The cache with new keys and values in the slots from `filled` on, one number or one for each row."""

    def written(buffer, new):
      new = new.astype(buffer.dtype)
      if filled.ndim and len(buffer) > 1:
        return jax.vmap(lambda b, n, f: jax.lax.dynamic_update_slice_in_dim(b, n, f, axis=1))(buffer, new, filled)
      return jax.lax.dynamic_update_slice_in_dim(buffer, new, filled.reshape(()), axis=2)

    return dataclasses.replace(self, keys=written(self.keys, keys), values=written(self.values, values))


@functools.partial(jax.tree_util.register_dataclass, meta_fields=[], data_fields=["layers", "start", "length"])
@dataclasses.dataclass(frozen=True)
class KVCache:
  """The caches of all layers.

  Rows of a batch end together: a shorter prompt is padded on its left, and `start` is its first real slot. All rows
  write the same slots next, `length` onwards.

  Attributes:
    layers: one cache for each layer.
    start: [batch], the first real slot of each row.
    length: [], the number of slots filled so far. Inside `jax.jit` the caller keeps it within the number of slots.
  """

  layers: tuple[LayerCache, ...]
  start: Int[Array, "batch"]
  length: Int[Array, ""]

  @classmethod
  def empty(cls, config: ModelConfig, start: Int[Array, "batch"], num_slots: int) -> "KVCache":
    """A cache without tokens, with `num_slots` slots in each row.

    Args:
      config: the configuration of the model that fills it.
      start: the first real slot of each row, [batch].
      num_slots: the number of tokens that fit into each row, padding included.
    """
    batch, heads, channels = start.shape[0], config.num_kv_heads, config.head_dim

    def layer(index: int) -> LayerCache:
      keys, values = (jnp.zeros((batch, heads, num_slots, channels), config.compute_dtype) for _ in range(2))
      is_centred = config.attention.shaped == "centred"
      value_sum = jnp.zeros((batch, heads, channels), jnp.float32) if is_centred else None
      return LayerCache(keys, values, value_sum, jnp.zeros(batch, jnp.int32) if config.is_routed(index) else None)

    return cls(tuple(map(layer, range(config.num_layers))), start, jnp.int32(0))

  @property
  def num_slots(self) -> int:
    return self.layers[0].num_slots

  def with_slots(self, num_slots: int) -> "KVCache":
    """The cache with more slots, `num_slots` in each row, the new ones empty. Its own keys and values are freed.

    One layer follows the other, so that the old and the new buffers of one layer only are there at the same time.
    """
    layers = []
    for layer in self.layers:
      layers.append(_with_slots(layer, num_slots))
      layer.keys.delete()
      layer.values.delete()
    return dataclasses.replace(self, layers=tuple(layers))

  def check_free(self, num_new: int) -> None:
    """Raises ValueError unless `num_new` more tokens fit. Inside `jax.jit` `length` is unknown and taken as 0."""
    filled = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
    if filled + num_new > self.num_slots:
      raise ValueError(
        f"the cache has {self.num_slots} slots, of which {filled} are filled, and {num_new} more tokens do not fit; "
        "make a cache with more slots."
      )

  def positions(self, num_new: int) -> Int[Array, "batch time"]:
    """Positions of the next `num_new` tokens, counted from each row's first real token."""
    slots = self.length + jnp.arange(num_new)
    return jnp.maximum(slots[None, :] - self.start[:, None], 0)

  def mask(self, num_new: int) -> Bool[Array, "batch 1 time slot"]:
    """Which slots each of the next `num_new` tokens may see: the row's real slots up to the token's own."""
    key_slots = jnp.arange(self.num_slots)
    query_slots = self.length + jnp.arange(num_new)
    causal = key_slots[None, None, :] <= query_slots[None, :, None]
    real = key_slots[None, None, :] >= self.start[:, None, None]
    return (causal & real)[:, None]

  def advanced(self, num_new: int) -> "KVCache":
    """The cache after all layers have written `num_new` tokens, split over the devices of a mesh by rows and heads."""
    axes = ("batch", "heads", None, None)
    layers = jax.tree.map(lambda leaf: constrain(leaf, *axes[: leaf.ndim]), self.layers)
    start, length = constrain(self.start, None), constrain(self.length + num_new)
    return KVCache(layers, start, length)


@functools.partial(jax.jit, static_argnames="num_slots")
def _with_slots(layer: LayerCache, num_slots: int) -> LayerCache:
  empty = ((0, 0), (0, 0), (0, num_slots - layer.num_slots), (0, 0))
  return dataclasses.replace(layer, keys=jnp.pad(layer.keys, empty), values=jnp.pad(layer.values, empty))
