"""Packers make model inputs of documents. A packer has a length and computes any row without the others."""

from typing import NamedTuple, Protocol

import numpy as np

from tokenformer_jax.data.batches import Batch
from tokenformer_jax.data.corpus import Part


class Packer(Protocol):
  """What the loader needs from a source of model inputs, be it text or anything else."""

  def __len__(self) -> int:
    """The number of rows in one epoch."""

  def row(self, index: int) -> NamedTuple:
    """Row `index`, a NamedTuple of arrays or None; the loader stacks rows into batches."""


class ContiguousWindows:
  """Windows of seq_length + 1 ids with stride seq_length over the documents laid end to end.

  Every id except the very first is a label once; the tail that fills no window is dropped. The released models were
  trained this way (GPT-NeoX's GPT2Dataset).

  Args:
    part: the documents.
    seq_length: T, the number of ids in one row.
  """

  def __init__(self, part: Part, seq_length: int):
    self._part, self._seq_length = part, seq_length

  def __len__(self) -> int:
    """The number of rows in one epoch."""
    return max(len(self._part) - 1, 0) // self._seq_length

  @property
  def report(self) -> dict[str, int]:
    """The number of windows, and of the tokens of the tail that are in no window."""
    used = len(self) * self._seq_length + 1 if len(self) else 0
    return dict(windows=len(self), dropped_tokens=len(self._part) - used)

  def row(self, index: int) -> Batch:
    """The window whose first input is id `index · seq_length` of the text; arrays are [T]."""
    ids = self._part.read(index * self._seq_length, self._seq_length + 1).astype(np.int32)
    return Batch(ids[:-1], ids[1:])


class PackedDocuments:
  """Rows of whole documents side by side; attention, positions and loss are restricted to each document.

  A document of n ids gives n − 1 pairs of input and label. A document of more than seq_length pairs is cut into pieces
  of seq_length pairs, so every label occurs once. Pieces are placed longest first, each into the fullest row in which it
  fits (best-fit decreasing). The rest of a row is padding: the padding id in segment 0 with weight 0.

  Args:
    part: the documents.
    seq_length: T, the number of ids in one row.
    padding_id: the id of padding, inside the vocabulary.
  """

  def __init__(self, part: Part, seq_length: int, padding_id: int):
    self._part, self._seq_length, self._padding_id = part, seq_length, padding_id
    documents = part.documents
    pairs = documents[:, 1] - documents[:, 0] - 1
    counts = -(-pairs // seq_length)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    self._starts = np.repeat(documents[:, 0], counts) + within * seq_length
    self._lengths = np.minimum(np.repeat(pairs, counts) - within * seq_length, seq_length)
    rows = best_fit(self._lengths, seq_length)
    self._order = np.argsort(rows, kind="stable")
    self._row_ends = np.searchsorted(rows[self._order], np.arange(rows.max(initial=-1) + 1), side="right")
    self._empty = int((pairs == 0).sum())

  def __len__(self) -> int:
    """The number of rows in one epoch."""
    return len(self._row_ends)

  @property
  def report(self) -> dict[str, int]:
    """The number of rows, of padding ids in them, and of tokens that are in no row (documents of one id)."""
    places = len(self) * self._seq_length
    return dict(windows=len(self), padding=places - int(self._lengths.sum()), dropped_tokens=self._empty)

  def row(self, index: int) -> Batch:
    """Row `index`, with positions, segments and weights; arrays are [T]."""
    inputs, labels = np.full((2, self._seq_length), self._padding_id, np.int32)
    positions, segments = np.zeros((2, self._seq_length), np.int32)
    first = self._row_ends[index - 1] if index else 0
    start = 0
    for segment, piece in enumerate(self._order[first : self._row_ends[index]], 1):
      end = start + self._lengths[piece]
      ids = self._part.corpus.read(self._starts[piece], self._starts[piece] + self._lengths[piece] + 1)
      inputs[start:end], labels[start:end] = ids[:-1], ids[1:]
      positions[start:end], segments[start:end] = np.arange(end - start), segment
      start = end
    return Batch(inputs, labels, positions, segments, (segments > 0).astype(np.float32))


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
  """Best-fit decreasing: places pieces longest first, each into the fullest row in which it fits.

  Args:
    lengths: [n] integers from 1 to size.
    size: the capacity of a row.

  Returns:
    [n] int64, the row of each piece.
  """
  rows = np.empty(len(lengths), np.int64)
  rows_by_space: list[list[int]] = [[] for _ in range(size + 1)]
  spaces = 0  # Bit s is set if some row has exactly s free places.
  num_rows = 0
  for piece in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[piece])
    fitting = spaces >> length
    if fitting:
      space = length + (fitting & -fitting).bit_length() - 1  # The lowest set bit is the fullest row.
      row = rows_by_space[space].pop()
      if not rows_by_space[space]:
        spaces ^= 1 << space
    else:
      row, space, num_rows = num_rows, size, num_rows + 1
    rows[piece] = row
    space -= length
    if space:
      rows_by_space[space].append(row)
      spaces |= 1 << space
  return rows
