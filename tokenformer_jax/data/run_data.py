"""`open_run_data`: the data of a run, chosen by what its model is for."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from tokenformer_jax.config import Config
from tokenformer_jax.data.batches import Batch, ClassBatch, MaskedBatch
from tokenformer_jax.data.dataset import open_data
from tokenformer_jax.data.image_dataset import open_image_data
from tokenformer_jax.data.loader import BatchIterator
from tokenformer_jax.data.text_classes import TextClasses
from tokenformer_jax.data.tokenizer import Tokenizer


class RunData(Protocol):
  """What a run needs of its data."""

  @property
  def tokenizer(self) -> Tokenizer | None:
    """The tokenizer of texts; None for images."""

  @property
  def fingerprint(self) -> dict[str, Any]:
    """JSON-able; equal for equal data and different for different data."""

  @property
  def report(self) -> dict[str, list[dict[str, Any]]]:
    """JSON-able; for `train` a list with an entry for each source, which has the source's name as `source`.

    Beside it are `tokens`, `windows` and `dropped_tokens` of texts, or the number of `examples` of classes.
    """

  def train_batches(self) -> BatchIterator:
    """An endless iterator of this process's share of the global batches, from the beginning."""

  def named_held_out_batches(self, num_batches: int | None = None) -> dict[str, Iterator[Any]]:
    """This process's share of the batches of every held-out set, the main one first under the name `held_out`."""


def open_run_data(config: Config, *, process_index: int = 0, process_count: int = 1) -> RunData:
  """Opens what a run reads: texts, masked texts, or texts or images with classes.

  Args:
    config: the run.
    process_index: which share of every batch is this process's.
    process_count: the number of shares.

  Raises:
    ValueError: a field of the config or a piece of the data cannot be used.
  """
  share: dict[str, Any] = dict(process_index=process_index, process_count=process_count)
  model = config.model
  if model.task != "classify":
    return open_data(config.data, seq_length=model.seq_length, masks=model.task == "masked_token", **share)
  if model.reads_images:
    return open_image_data(config.data, model.vision, **share)
  classes = model.classifier.num_classes
  return TextClasses(config.data, seq_length=model.seq_length, num_classes=classes, **share)


def empty_batch(config: Config) -> NamedTuple:
  """A batch of zeros with the shapes and dtypes of the run's, which takes no memory."""

  def zeros(*shape: int, dtype: type = np.int32) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), (config.data.batch_size, *shape))

  model, length = config.model, config.model.seq_length
  if model.task == "classify":
    if model.reads_images:
      size = model.vision.image_size
      images, labels = (
        zeros(size, size, model.vision.channels, dtype=np.float32),
        zeros(model.vision.num_classes, dtype=np.float32),
      )
      return ClassBatch(images, labels, weights=zeros(dtype=np.float32))
    is_regression = model.classifier.num_classes == 1
    labels = zeros(dtype=np.float32 if is_regression else np.int32)
    return ClassBatch(zeros(length), labels, zeros(length), zeros(dtype=np.float32), zeros(length))
  documents = config.data.packing == "documents"
  positions, segments = (zeros(length), zeros(length)) if documents else (None, None)
  if model.task == "masked_token":
    count = round(config.data.mask_rate * length)
    of_places = zeros(count, dtype=np.float32) if documents else None
    return MaskedBatch(zeros(length), zeros(count), zeros(count), of_places, positions, segments)
  weights = zeros(length, dtype=np.float32) if documents else None
  return Batch(zeros(length), zeros(length), positions, segments, weights)
