"""What a model reads in one step, for each task: tuples of arrays, [B, …] in a batch and without B in one row."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
  """Rows of texts whose next tokens are predicted: [B, T] in a batch, [T] in one row.

  Attributes:
    inputs: int32, the ids.
    labels: int32, the id that follows each input; always inside the vocabulary.
    positions: int32, counted from 0 in every segment; None means 0 … T − 1.
    segments: int32, attention is restricted to equal numbers; 0 is padding; None means one segment.
    weights: float32, 1 where the label counts in the loss and 0 elsewhere; None means 1 everywhere.
  """

  inputs: np.ndarray
  labels: np.ndarray
  positions: np.ndarray | None = None
  segments: np.ndarray | None = None
  weights: np.ndarray | None = None


class MaskedBatch(NamedTuple):
  """Rows of texts some of whose tokens are masked; logits are computed for those M alone.

  Attributes:
    inputs: int32 [B, T], the ids, masked.
    places: int32 [B, M], the positions in the row whose ids are to be found, rising.
    labels: int32 [B, M], the ids that stood there.
    weights: float32 [B, M], 0 for places that only fill a row with less text; None means 1 everywhere.
    positions, segments: int32 [B, T], as in a `Batch`.
  """

  inputs: np.ndarray
  places: np.ndarray
  labels: np.ndarray
  weights: np.ndarray | None = None
  positions: np.ndarray | None = None
  segments: np.ndarray | None = None


class ClassBatch(NamedTuple):
  """Texts or images with their classes.

  Attributes:
    inputs: int32 [B, T], the ids of texts; or float32 [B, height, width, channels], normalised images.
    labels: the classes: int32 [B]; or float32 [B, classes], the share of each class, for mixtures and smoothed labels;
      or float32 [B], the numbers that a regression is to give.
    segments: int32 [B, T], 1 for the tokens of a text and 0 for padding; None for images, and where nothing is padded.
    weights: float32 [B], 0 for rows that only fill the last batch; None means 1 everywhere.
    types: int32 [B, T], 1 for the tokens of the second text of a pair and its separator, and 0 elsewhere; None for images.
  """

  inputs: np.ndarray
  labels: np.ndarray
  segments: np.ndarray | None = None
  weights: np.ndarray | None = None
  types: np.ndarray | None = None
