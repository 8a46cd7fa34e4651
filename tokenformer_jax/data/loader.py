"""Batches without end from packers: shuffled, mixed, shared among processes, prefetched, all by grain."""

import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from tokenformer_jax.data.packing import Batch, Packer

READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # Batches.


class BatchIterator(Iterator[Batch]):
  """One process's share of the global batches, endless; its position can be stored and restored.

  The state is the number of global batches that were taken; it means the same on any number of
  processes.
  """

  def __init__(self, batches: grain.MapDataset):
    self._iterator = iter(batches.to_iter_dataset(READ_AHEAD))

  def __next__(self) -> Batch:
    state = self._iterator.get_state()
    try:
      return next(self._iterator)
    except ValueError:
      self._iterator.set_state(state)  # grain would go on behind the batch that failed.
      raise

  def get_state(self) -> dict[str, int]:
    """JSON-able; `set_state` of it makes the next batch the one that would have come next."""
    return {"next_batch": self._iterator.get_state()["next_index"]}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to the position of a `get_state`; raises ValueError for anything else."""
    position = state.get("next_batch") if isinstance(state, dict) else None
    if type(position) is not int or position < 0:
      raise ValueError(f"data position {state!r}: expected {{'next_batch': number of batches taken}}.")
    self._iterator.set_state({"next_index": position})


def endless_order(lengths: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
  """(packer, row) of sample 0, 1, 2, …: all of a packer's rows once an epoch, each epoch in a new order."""
  return _mix([_shuffled(length, i, seed).repeat() for i, length in enumerate(lengths)], weights)


def held_out_order(lengths: Sequence[int], weights: Sequence[float]) -> grain.MapDataset:
  """(packer, row) of each held-out sample, in one order for all runs; ends before any row comes twice."""
  return _mix([_shuffled(length, i, seed=0) for i, length in enumerate(lengths)], weights)


def _shuffled(length: int, packer: int, seed: int) -> grain.MapDataset:
  if not 0 < length < 2**32:
    raise ValueError(f"a source with {length} windows cannot be shuffled: from 1 to {2**32 - 1} can.")
  # grain's seed of epoch e is seed + e; hashed, no two seeds or packers share an epoch's order.
  digest = hashlib.sha256(f"{seed} {packer}".encode()).digest()
  order = grain.MapDataset.range(length).shuffle(seed=int.from_bytes(digest[:4], "little"))
  return order.map(functools.partial(_with_packer, packer))


def _with_packer(packer: int, row: int) -> tuple[int, int]:
  return packer, row


def _mix(orders: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
  return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights=list(weights))


def batches(
  packers: Sequence[Packer],
  order: grain.MapDataset,
  *,
  batch_size: int,
  num_batches: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """Batch k of this process: its block of the rows `order[k · batch_size : (k + 1) · batch_size]`.

  Process p takes the p-th block, so that the blocks side by side are the global batch for any
  number of processes.
  """
  share = batch_size // process_count

  def read(k: int) -> Batch:
    first = k * batch_size + process_index * share
    places = [order[n] for n in range(first, first + share)]
    return _stack([packers[packer].row(row) for packer, row in places])

  end = sys.maxsize // batch_size if num_batches is None else num_batches
  return grain.MapDataset.range(end).map(read)


def _stack(rows: Sequence[Batch]) -> Batch:
  return type(rows[0])(*(None if column[0] is None else np.stack(column) for column in zip(*rows)))
