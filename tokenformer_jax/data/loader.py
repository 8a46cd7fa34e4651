"""Endless batches of the rows of packers: shuffled, mixed, shared among processes and prefetched by grain."""

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from tokenformer_jax.data.packing import Packer

READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # Batches.


class BatchIterator(Iterator[Any]):
  """An endless iterator of one process's share of the global batches, whose position can be stored and restored.

  The state is the number of global batches taken so far, so it is valid for any number of processes.

  Args:
    batches: batch k of this process, as `batches` makes it.
    read_ahead: how many threads read how many batches ahead; the batches come in the same order.
  """

  def __init__(self, batches: grain.MapDataset, read_ahead: grain.ReadOptions = READ_AHEAD):
    self._iterator = iter(batches.to_iter_dataset(read_ahead))

  def __next__(self) -> Any:
    state = self._iterator.get_state()
    try:
      return next(self._iterator)
    except ValueError:
      self._iterator.set_state(state)  # Otherwise grain continues after the batch that failed.
      raise

  def get_state(self) -> dict[str, int]:
    """The position, JSON-able; after `set_state` of it the same batches follow as now."""
    return {"next_batch": self._iterator.get_state()["next_index"]}

  def set_state(self, state: dict[str, int]) -> None:
    """Moves to a position that `get_state` gave; raises ValueError for anything else."""
    position = state.get("next_batch") if isinstance(state, dict) else None
    if type(position) is not int or position < 0:
      raise ValueError(f"data position {state!r}: expected {{'next_batch': the number of batches taken}}.")
    self._iterator.set_state({"next_index": position})


def endless_order(lengths: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
  """The endless order of training rows: each epoch of a packer has every row once, in an order of its own.

  Args:
    lengths: the number of rows of each packer.
    weights: the share of each packer in the mixture, not normalised.
    seed: the seed of the orders.

  Returns:
    (packer, row) of sample 0, 1, 2, ….

  Raises:
    ValueError: a packer has no row, or 2³² rows or more.
  """
  return _mix([_shuffled(length, i, seed).repeat() for i, length in enumerate(lengths)], weights)


def held_out_order(lengths: Sequence[int], weights: Sequence[float]) -> grain.MapDataset:
  """The order of held-out rows, the same in every run; it ends before any row comes twice.

  Args:
    lengths: the number of rows of each packer.
    weights: the share of each packer in the mixture, not normalised.

  Returns:
    (packer, row) of each sample. A mixture ends where its first packer has no row left.

  Raises:
    ValueError: a packer has no row, or 2³² rows or more.
  """
  return _mix([_shuffled(length, i, seed=0) for i, length in enumerate(lengths)], weights)


def _shuffled(length: int, packer: int, seed: int) -> grain.MapDataset:
  if not 0 < length < 2**32:
    raise ValueError(f"a source with {length} windows cannot be shuffled: it must have 1 to {2**32 - 1}.")
  # grain's seed of epoch e is seed + e; without the hash, seed 1 would repeat the orders of seed 0 one epoch earlier.
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
  finish: Callable[[Any, int], Any] | None = None,
) -> grain.MapDataset:
  """This process's share of each global batch; global batch k is `order[k · batch_size : (k + 1) · batch_size]`.

  Process p takes the p-th block of consecutive rows, so the blocks side by side are the same global batch for any number
  of processes.

  Args:
    packers: the packers that `order` speaks of.
    order: (packer, row) of each sample.
    batch_size: the rows of a global batch, a multiple of `process_count`.
    num_batches: how many batches; None for as many as an index can number.
    process_index: which block is this process's.
    process_count: the number of blocks.
    finish: `(row, n) -> row`, applied to sample n of `order`; None leaves the packers' rows as they are.

  Returns:
    Batches [batch_size / process_count, …].
  """
  share = batch_size // process_count

  def read(k: int) -> Any:
    first = k * batch_size + process_index * share
    rows = []
    for n in range(first, first + share):
      packer, index = order[n]
      row = packers[packer].row(index)
      rows.append(row if finish is None else finish(row, n))
    return _stack(rows)

  end = sys.maxsize // batch_size if num_batches is None else num_batches
  return grain.MapDataset.range(end).map(read)


def _stack(rows: Sequence[Any]) -> Any:
  return type(rows[0])(*(None if column[0] is None else np.stack(column) for column in zip(*rows)))
