"""Reads, changes and writes the leaves of a checkpoint in slices, so that a model larger than memory can grow.

Orbax still writes the checkpoint, its metadata and its commit; only its handling of a leaf is replaced.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from tokenformer_jax.growth.grow import check_leaf_rank, grow_leaf, leaf_key
from tokenformer_jax.growth.plan import LeafPlan, NewRows
from tokenformer_jax.growth.shrink import Kept, kept_of, shrink_leaf

# A slice is at most this large, and slices of this size in all may wait to be written.
SLICE_BYTES = 2**23


@dataclasses.dataclass(frozen=True)
class LeafStream:
  """An array that need not be in memory completely.

  Attributes:
    rows: how many entries of the first axis a read should take at a time, so that no part of a file is read twice.
    read: `(start, stop) -> array[start:stop]`; of a scalar `(0, 1) -> array`.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  rows: int
  read: Callable[[int, int], Any]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def slices(self) -> list[tuple[int, int]]:
    """The (start, stop) of each read, of equal length where possible."""
    length = self.shape[0] if self.shape else 1
    pieces = -(-length // self.rows)
    most = max(SLICE_BYTES * pieces // max(self.nbytes, 1), 1)
    rows = self.rows * max(n for n in range(1, pieces + 1) if n <= most and pieces % n == 0)
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def grown(leaf: LeafStream, plan: LeafPlan, seed: int, step: int) -> LeafStream:
  """The leaf that `grow_state` would make, computed on the host a slice at a time."""
  if plan.new_rows is NewRows.NONE:
    return leaf
  nameless = dataclasses.replace(plan, path="")  # Leaves of one shape share a program.

  def grow(old: np.ndarray, first_layer: int) -> np.ndarray:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
      if plan.new_rows is NewRows.LIVE:
        check_leaf_rank(old, plan)
      return np.asarray(_grow_slice(old, nameless, leaf_key(plan, seed), np.int32(step), np.int32(first_layer)))

  if plan.axis == 0:  # Births of rows have no layer axis.
    return LeafStream(plan.new_shape, leaf.dtype, plan.new_shape[0], lambda *_: grow(leaf.read(0, leaf.shape[0]), 0))
  return LeafStream(plan.new_shape, leaf.dtype, leaf.rows, lambda start, stop: grow(leaf.read(start, stop), start))


def shrunk(path: str, leaf: LeafStream, kept: Mapping[str, Kept]) -> LeafStream:
  """The leaf that `shrink_leaf` would make, a slice at a time."""
  one = kept_of(path, kept)
  if one is None or one.rows is None:
    return leaf
  if path.startswith("tau/"):
    return dataclasses.replace(leaf, read=lambda start, stop: shrink_leaf(path, leaf.read(start, stop), kept, start))
  count = one.rows.shape[-1]
  if len(leaf.shape) == 1 or one.rows.ndim == 1:  # Births of rows, and the layer before the stack, have no layer axis.
    shape = (count, *leaf.shape[1:])
    return LeafStream(shape, leaf.dtype, count, lambda *_: shrink_leaf(path, leaf.read(0, leaf.shape[0]), kept))
  return LeafStream(
    (leaf.shape[0], count, *leaf.shape[2:]),
    leaf.dtype,
    leaf.rows,
    lambda start, stop: shrink_leaf(path, leaf.read(start, stop), kept, start),
  )


_grow_slice = jax.jit(grow_leaf, static_argnums=1)


def save_args(leaf: jax.Array | LeafStream) -> ocp.SaveArgs:
  """How a leaf is cut into chunks on disk: a large stacked one by its layers, so that slices can be read alone."""
  stacked = len(leaf.shape) >= 3 and leaf.nbytes > SLICE_BYTES
  return ocp.SaveArgs(shard_axes=(0,) if stacked else ())


def stream_handler(written: Callable[[str], None] = lambda name: None) -> ocp.PyTreeCheckpointHandler:
  """A handler that restores trees of `LeafStream`s, whose files stay open, and saves such trees leaf by leaf.

  Args:
    written: called after each leaf is on disk, with its name.
  """
  registry = type_handlers.create_type_handler_registry(
    (jax.Array, type_handlers.ArrayHandler(array_metadata_store=None)), (LeafStream, _LeafHandler(written))
  )
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class _LeafHandler(type_handlers.TypeHandler):
  def __init__(self, written: Callable[[str], None]):
    self._written = written

  def typestr(self) -> str:
    return "jax.Array"  # Other handlers restore them as arrays.

  async def metadata(self, infos: Sequence[type_handlers.ParamInfo]) -> Any:
    return await type_handlers.NumpyHandler().metadata(infos)

  async def deserialize(self, infos: Sequence[type_handlers.ParamInfo], args: Any = None) -> list[LeafStream]:
    del args
    return [await _open(info) for info in infos]

  async def serialize(
    self, values: Sequence[LeafStream], infos: Sequence[type_handlers.ParamInfo], args: Any = None
  ) -> list:
    del args
    for leaf, info in zip(values, infos):
      await info.await_path_creation()
      _write(leaf, info)
      self._written(info.name)
    return []


async def _open(info: type_handlers.ParamInfo) -> LeafStream:
  spec = type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
  store = await ts.open(spec, context=info.ts_context)

  def read(start: int, stop: int) -> np.ndarray:
    try:
      return (store[start:stop] if store.rank else store).read().result()
    except ValueError as error:  # tensorstore raises it for missing and for damaged files.
      raise ValueError(f"{info.parent_dir}: {info.name} cannot be read; choose another checkpoint. {error}") from None

  chunk = store.chunk_layout.read_chunk.shape
  rows = (chunk[0] or 1) if chunk else 1
  return LeafStream(store.shape, store.dtype.numpy_dtype, rows, read)


def _write(leaf: LeafStream, info: type_handlers.ParamInfo) -> None:
  slices = leaf.slices()
  chunk = (slices[0][1], *leaf.shape[1:]) if leaf.shape else ()
  spec = type_handlers.get_json_tspec_write(
    info,
    use_ocdbt=True,
    global_shape=leaf.shape,
    local_shape=chunk,
    dtype=leaf.dtype,
    process_index=0,
    arg=save_args(leaf),
  )
  store = ts.open(spec, create=True, open=True, context=info.ts_context).result()
  under_way: collections.deque[tuple[Any, int]] = collections.deque()
  for start, stop in slices:
    block = leaf.read(start, stop)
    if block.shape != (*(stop - start,) * bool(leaf.shape), *leaf.shape[1:]) or block.dtype != leaf.dtype:
      raise AssertionError(
        f"{info.name} {leaf.shape} {leaf.dtype}: rows {start} to {stop} came as {block.shape} {block.dtype}."
      )
    target = store[start:stop] if leaf.shape else store
    under_way.append((target.write(block, can_reference_source_data_indefinitely=True), block.nbytes))
    while sum(size for _, size in under_way) > SLICE_BYTES:
      under_way.popleft()[0].result()
  for done, _ in under_way:
    done.result()
