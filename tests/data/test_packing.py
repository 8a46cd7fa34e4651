import numpy as np
import pytest

from tests.data.test_corpus import corpus_of
from tokenformer_jax.data.corpus import Part
from tokenformer_jax.data.packing import ContiguousWindows, PackedDocuments, best_fit

T = 16


@pytest.mark.parametrize("tokens, windows, dropped", [(16, 0, 16), (17, 1, 0), (18, 1, 1), (32, 1, 15), (33, 2, 0)])
def test_contiguous_windows_predict_every_id_but_the_first_and_the_tail(tokens, windows, dropped):
  corpus = corpus_of([tokens])
  packer = ContiguousWindows(Part(corpus), T)
  assert len(packer) == windows and packer.report == dict(windows=windows, dropped_tokens=dropped)
  rows = [packer.row(i) for i in range(windows)]
  assert all(row.positions is row.segments is row.weights is None for row in rows)
  assert all(row.inputs.dtype == row.labels.dtype == np.int32 for row in rows)
  used = windows * T
  assert np.concatenate([[], *(row.inputs for row in rows)]).tolist() == corpus.tokens[:used].tolist()
  assert np.concatenate([[], *(row.labels for row in rows)]).tolist() == corpus.tokens[1 : used + 1].tolist()


def packed(lengths):
  corpus = corpus_of(lengths)
  corpus.tokens = np.arange(len(corpus.tokens), dtype=np.uint32)  # Each id is its own position.
  packer = PackedDocuments(Part(corpus), T, padding_id=7)
  return corpus, packer, [packer.row(i) for i in range(len(packer))]


LENGTHS = [1, 2, 17, 18, 33, 40, *np.random.default_rng(3).integers(1, 30, 200)]


def test_every_pair_inside_a_document_occurs_once_and_no_pair_spans_two():
  corpus, packer, rows = packed(LENGTHS)
  pairs = sorted((i, label) for row in rows for i, label, weight in zip(row.inputs, row.labels, row.weights) if weight)
  last = set((corpus.ends - 1).tolist())
  assert pairs == [(i, i + 1) for i in range(len(corpus.tokens)) if i not in last]
  report = packer.report
  assert report["dropped_tokens"] == LENGTHS.count(1) and report["windows"] == len(rows)
  assert report["padding"] == sum((row.weights == 0).sum() for row in rows) < 0.02 * len(rows) * T + T


def test_segments_are_stretches_of_one_document_with_positions_from_zero():
  corpus, _, rows = packed(LENGTHS)
  for row in rows:
    for segment in range(1, row.segments.max() + 1):
      inputs = row.inputs[row.segments == segment]
      assert row.positions[row.segments == segment].tolist() == list(range(len(inputs)))
      assert np.all(np.diff(np.flatnonzero(row.segments == segment)) == 1)
      assert np.all(np.diff(inputs) == 1)
      assert len(set(np.searchsorted(corpus.ends, inputs, side="right"))) == 1


def test_documents_are_cut_only_if_they_do_not_fit_into_a_row():
  corpus, _, rows = packed(LENGTHS)
  places = {}
  for number, row in enumerate(rows):
    for i in row.inputs[row.weights > 0]:
      places.setdefault(int(np.searchsorted(corpus.ends, i, side="right")), set()).add(number)
  for document, where in places.items():
    assert len(where) == -(-(LENGTHS[document] - 1) // T)


def test_padding_is_one_segment_of_valid_ids_without_weight():
  _, _, rows = packed([3])
  (row,) = rows
  assert row.weights.tolist() == [1, 1] + [0] * 14 and row.segments.tolist() == [1, 1] + [0] * 14
  assert row.inputs[2:].tolist() == row.labels[2:].tolist() == [7] * 14
  assert (row.weights.dtype, row.segments.dtype, row.positions.dtype) == (np.float32, np.int32, np.int32)


def test_best_fit_never_exceeds_the_size_of_a_row_and_wastes_little():
  lengths = np.random.default_rng(0).integers(1, 101, 5000)
  rows = best_fit(lengths, 100)
  fill = np.bincount(rows, weights=lengths)
  assert fill.max() <= 100 and fill.min() > 0
  assert len(fill) <= 1.02 * lengths.sum() / 100
  assert best_fit(np.array([60, 30, 50, 40, 10]), 100).tolist() == [0, 1, 1, 0, 1]
  assert best_fit(np.array([], int), 100).tolist() == []
