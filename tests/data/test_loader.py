from typing import NamedTuple

import numpy as np
import pytest

from tokenformer_jax.data import loader
from tokenformer_jax.data.loader import BatchIterator, batches, endless_order, held_out_order


class Row(NamedTuple):
  place: np.ndarray
  nothing: None = None


class Rows:
  """A packer of any kind of record: here the number of the row."""

  def __init__(self, length, first=0, broken=None):
    self._length, self._first, self._broken = length, first, broken

  def __len__(self):
    return self._length

  def row(self, index):
    if index == self._broken:
      raise ValueError(f"row {index} is broken")
    return Row(np.array([self._first + index, index]))


def iterator(packers, *, batch_size=4, weights=(1,), seed=0, **share):
  order = endless_order([len(p) for p in packers], weights, seed)
  return BatchIterator(batches(packers, order, batch_size=batch_size, **share))


def take(iterator, count):
  return np.concatenate([next(iterator).place[:, 0] for _ in range(count)])


@pytest.mark.parametrize("length", [1, 2, 3, 10, 37])
def test_epochs_are_exact_and_differ_while_batches_straddle_them(length):
  rows = take(iterator([Rows(length)]), 6 * length)
  epochs = rows[: rows.size // length * length].reshape(-1, length)
  assert len(epochs) == 24 and all(sorted(epoch) == list(range(length)) for epoch in epochs)
  if length >= 10:
    assert len({tuple(epoch) for epoch in epochs}) == 24


def test_the_order_depends_on_the_seed_alone():
  first = take(iterator([Rows(50)]), 30).tolist()
  assert first == take(iterator([Rows(50)]), 30).tolist()
  # grain's own epoch seeds are seed + epoch: seed 1 must not be seed 0 one epoch later.
  other = take(iterator([Rows(50)], seed=1), 30).tolist()
  assert first[:50] != other[:50] and first[50:100] != other[:50]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shares_side_by_side_are_the_global_batch(processes):
  whole = iterator([Rows(23)])
  shares = [iterator([Rows(23)], process_index=p, process_count=processes) for p in range(processes)]
  for _ in range(15):
    parts = [next(share).place for share in shares]
    assert all(len(part) == 4 // processes for part in parts)
    assert np.concatenate(parts).tolist() == next(whole).place.tolist()


@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_equals_uninterrupted_on_any_number_of_processes(processes):
  straight = iterator([Rows(23)])
  states, rows = [], []
  for _ in range(20):
    states.append(straight.get_state())
    rows.append(next(straight).place.tolist())
  for k in (0, 1, 5, 6, 19):
    shares = [iterator([Rows(23)], process_index=p, process_count=processes) for p in range(processes)]
    for share in shares:
      next(share)
      share.set_state(states[k])
      assert share.get_state() == states[k] == {"next_batch": k}
    for row in rows[k:]:
      assert np.concatenate([next(share).place for share in shares]).tolist() == row


@pytest.mark.parametrize("state", [None, {}, {"next_batch": -1}, {"next_batch": 1.5}, {"next_index": 3}, 3])
def test_states_that_are_no_position_are_refused(state):
  with pytest.raises(ValueError, match="data position"):
    iterator([Rows(3)]).set_state(state)


def test_mixtures_keep_their_weights_and_each_source_its_epochs():
  rows = take(iterator([Rows(30), Rows(10, first=100)], weights=(0.8, 0.2)), 300)
  small = rows[rows >= 100] - 100
  assert abs(len(small) / len(rows) - 0.2) < 0.01
  assert all(sorted(epoch) == list(range(10)) for epoch in small[: 20 * 10].reshape(-1, 10))
  large = rows[rows < 100]
  assert all(sorted(epoch) == list(range(30)) for epoch in large[: 30 * 30].reshape(-1, 30))


def test_held_out_rows_come_once_in_an_order_of_their_own():
  order = held_out_order([20], [1])
  rows = [order[i] for i in range(len(order))]
  assert sorted(rows) == [(0, i) for i in range(20)] and rows != sorted(rows)
  assert rows == [held_out_order([20], [1])[i] for i in range(20)]
  mixed = held_out_order([20, 10], [1, 1])
  rows = [mixed[i] for i in range(len(mixed))]
  assert len(set(rows)) == len(rows) == 20


def test_a_row_that_fails_is_read_again_and_never_skipped():
  packer = Rows(8, broken=3)
  broken = iterator([packer], batch_size=1)
  rows = []
  with pytest.raises(ValueError, match="row 3 is broken"):
    for _ in range(8):
      rows.append(int(next(broken).place[0, 0]))
  for _ in range(2):
    with pytest.raises(ValueError, match="row 3 is broken"):
      next(broken)
  packer._broken = None
  rows += take(broken, 8 - len(rows)).tolist()
  assert sorted(rows) == list(range(8))


@pytest.mark.parametrize("length", [0, 2**32])
def test_sources_that_cannot_be_shuffled_are_refused(length):
  with pytest.raises(ValueError, match=f"source with {length} windows"):
    loader.endless_order([length], [1], 0)


def test_columns_of_none_stay_none():
  assert next(iterator([Rows(3)])).nothing is None
