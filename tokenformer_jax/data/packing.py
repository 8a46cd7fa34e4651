"""Packers: from documents of token ids to model inputs. A packer has a length and gives row i on its own."""

from typing import NamedTuple, Protocol

import numpy as np

from tokenformer_jax.data.corpus import Part


class Batch(NamedTuple):
  """Rows of model inputs: [B, T] in a batch, [T] in one row.

  Attributes:
    inputs: int32 ids.
    labels: int32, the id that follows each input; always inside the vocabulary.
    positions: int32, restarting at 0 with every segment; None means 0 … T − 1.
    segments: int32, attention stays among equal numbers; 0 is padding; None means one segment.
    weights: float32, 1 where the label counts in the loss and 0 where not; None means 1 everywhere.
  """

  inputs: np.ndarray
  labels: np.ndarray
  positions: np.ndarray | None = None
  segments: np.ndarray | None = None
  weights: np.ndarray | None = None


class Packer(Protocol):
  """What the loader needs of a source of model inputs, of text or of anything else."""

  def __len__(self) -> int:
    """The number of rows in one epoch."""

  def row(self, index: int) -> NamedTuple:
    """Row `index` as a NamedTuple of arrays (or None); the loader stacks rows into batches."""


class ContiguousWindows:
  """Windows of seq_length + 1 ids with stride seq_length over the documents laid end to end.

  Every label but the very first id of the text occurs once; the tail that fills no window is dropped.
  As in the released models' training (GPT-NeoX's GPT2Dataset).
  """

  def __init__(self, part: Part, seq_length: int, vocab_size: int):
    self._part, self._seq_length, self._vocab_size = part, seq_length, vocab_size
    self._length = max(len(part) - 1, 0) // seq_length
    self.dropped_tokens = len(part) - (self._length * seq_length + 1) if self._length else len(part)

  def __len__(self):
    return self._length

  def row(self, index: int) -> Batch:
    ids = self._part.read(index * self._seq_length, self._seq_length + 1)
    check_ids(ids, self._vocab_size, self._part.corpus.name)
    ids = ids.astype(np.int32)
    return Batch(ids[:-1], ids[1:])


def check_ids(ids: np.ndarray, vocab_size: int, name: str) -> None:
  """Raises ValueError for an id that the vocabulary does not have."""
  if ids.max() >= vocab_size:
    at = int(np.argmax(ids >= vocab_size))
    raise ValueError(f"{name}: token id {ids[at]} is outside the tokenizer's {vocab_size} ids: give the "
                     "tokenizer that wrote these tokens.")
