"""`open_image_data`: from a DataConfig to batches of images with their classes."""

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import logging

from tokenformer_jax.config import DataConfig
from tokenformer_jax.config.data import MAIN_HELD_OUT
from tokenformer_jax.config.task import VisionConfig
from tokenformer_jax.data import loader
from tokenformer_jax.data.augmentation import pixels_of
from tokenformer_jax.data.batches import ClassBatch
from tokenformer_jax.data.image_sources import BadImage, ImageSource, open_images
from tokenformer_jax.data.mixing import mix
from tokenformer_jax.data.spec import parse_sources

_THREADS = min(16, os.cpu_count() or 1)  # Pillow decodes and resizes without holding Python's lock.
_READ_AHEAD = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * _THREADS)
_PAIRS = 2**32  # Distinguishes the generators of pairs from those of images.


class ImageSet(NamedTuple):
  """The images of one source that a run trains on, or those that it holds out.

  Attributes:
    source: the source.
    rows: int64 [n], their indices in the source.
  """

  source: ImageSource
  rows: np.ndarray


class ImageData:
  """Images to train on and held-out sets of them; `open_image_data` makes it.

  Attributes:
    tokenizer: None: images have no tokens.
    fingerprint: as `Data.fingerprint`.
    report: JSON-able; for `train` and for each held-out set a list with the source, and the numbers of images and of classes.
    classes: the names of the classes, or () where they have none.
  """

  tokenizer = None

  def __init__(
    self,
    config: DataConfig,
    vision: VisionConfig,
    sets: dict[str, tuple[list[ImageSet], list[float]]],
    fingerprint: dict[str, Any],
    process_index: int,
    process_count: int,
  ):
    self.fingerprint, self._config, self._vision, self._sets = fingerprint, config, vision, sets
    self.classes = sets["train"][0][0].source.classes
    self._process, self._share = process_index, config.batch_size // process_count
    self._bad: set[str] = set()
    self._one_hot = np.eye(vision.num_classes, dtype=np.float32)
    self.report = {
      name: [dict(source=part.source.name, examples=len(part.rows), classes=part.source.num_classes) for part in parts]
      for name, (parts, _) in sets.items()
    }
    for name, entries in self.report.items():
      for entry in entries:
        logging.info("%s: %s", name, ", ".join(f"{key} {value}" for key, value in entry.items()))
    parts, weights = sets["train"]
    self._train_order = loader.endless_order([len(part.rows) for part in parts], weights, config.seed)

  @property
  def skipped(self) -> int:
    """How many different images could not be read so far, with `bad_image=skip`."""
    return len(self._bad)

  def train_batches(self) -> loader.BatchIterator:
    """An endless iterator of this process's share of the global batches, from the beginning."""
    read = functools.partial(self._train_batch, self._sets["train"][0], self._train_order)
    return loader.BatchIterator(grain.MapDataset.range(sys.maxsize // self._config.batch_size).map(read), _READ_AHEAD)

  def named_held_out_batches(self, num_batches: int | None = None) -> dict[str, Iterator[ClassBatch]]:
    """For each held-out set by its name this process's share of its batches, the same ones at every call.

    Every image of a set is in one batch; the last one is filled with images of weight 0.

    Args:
      num_batches: how many global batches of each set, in an order that is the same in every run; fewer come where a
        set has fewer. None gives all of them.
    """
    return {name: self._held_out_batches(name, num_batches) for name in self._sets if name != "train"}

  def _held_out_batches(self, name: str, num_batches: int | None) -> Iterator[ClassBatch]:
    parts, _ = self._sets[name]
    places = [(part, row) for part, images in enumerate(parts) for row in range(len(images.rows))]
    order = np.random.default_rng(0).permutation(len(places))
    available = -(-len(places) // self._config.batch_size)
    count = available if num_batches is None else min(num_batches, available)

    def read(k: int) -> ClassBatch:
      samples = [places[order[n]] if n < len(places) else None for n in self._samples(k)]
      return self._batch([self._image(parts, place, None) for place in samples])

    return iter(grain.MapDataset.range(count).map(read).to_iter_dataset(_READ_AHEAD))

  def _samples(self, k: int) -> range:
    """The numbers of this process's samples in global batch k, as in `loader.batches`."""
    first = k * self._config.batch_size + self._process * self._share
    return range(first, first + self._share)

  def _train_batch(self, parts: list[ImageSet], order: grain.MapDataset, k: int) -> ClassBatch:
    config, samples = self._config, self._samples(k)
    batch = self._batch([self._image(parts, order[n], np.random.default_rng((config.seed, n))) for n in samples])
    smoothing = np.float32(config.images.label_smoothing)
    batch.labels[:] = (1 - smoothing) * batch.labels + smoothing / self._vision.num_classes
    if config.images.mixes:
      assert batch.weights is not None
      # A share begins with an even number, so the pairs are the same for any number of processes.
      for pair in range(0, self._share, 2):
        if batch.weights[pair : pair + 2].all():
          rng = np.random.default_rng((config.seed, _PAIRS + samples[pair]))
          mix(batch.inputs[pair : pair + 2], batch.labels[pair : pair + 2], config.images, rng)
    return batch

  def _image(
    self, parts: list[ImageSet], place: tuple[int, int] | None, rng: np.random.Generator | None
  ) -> tuple[np.ndarray, int, float]:
    """(uint8 pixels [H, W, C], label, weight); the weight is 0 where there is no image, or none that can be read."""
    vision, config = self._vision, self._config.images
    if place is not None:
      part, row = parts[place[0]], int(parts[place[0]].rows[place[1]])
      try:
        image, label = part.source.read(row)
        _check_label(part.source, label, vision)
        return pixels_of(image, vision.image_size, vision.channels, config, rng), label, 1.0
      except BadImage as error:
        where = f"{part.source.where(row)} cannot be read as an image ({error})"
        if config.bad_image == "error":
          raise ValueError(f"{where}: remove it, or choose data.images.bad_image=skip.") from None
        if where not in self._bad:
          self._bad.add(where)
          logging.warning("%s; it is left out (%d such images so far).", where, self.skipped)
      except ValueError as error:
        raise ValueError(f"{part.source.where(row)} {error}.") from None
    return np.zeros((vision.image_size, vision.image_size, vision.channels), np.uint8), 0, 0.0

  def _batch(self, images: list[tuple[np.ndarray, int, float]]) -> ClassBatch:
    pixels, labels, weights = zip(*images)
    mean, std = (np.asarray(value, np.float32) for value in (self._config.images.mean, self._config.images.std))
    normalised = np.stack(pixels).astype(np.float32) / (255 * std) - mean / std
    return ClassBatch(normalised, self._one_hot[list(labels)], weights=np.asarray(weights, np.float32))


def open_image_data(
  config: DataConfig, vision: VisionConfig, *, process_index: int = 0, process_count: int = 1
) -> ImageData:
  """Opens the sources of images that a config names.

  Args:
    config: what to read.
    vision: the sizes of the images and the number of classes.
    process_index: which share of every batch is this process's.
    process_count: the number of shares.

  Raises:
    ValueError: a field of the config or a source cannot be used.
  """
  if vision.channels not in (1, 3):
    raise ValueError(f"model.vision.channels={vision.channels}: images are read with 1 or 3 channels, grey or colours.")
  multiple = process_count * (2 if config.images.mixes else 1)
  if config.batch_size % multiple:
    mixed = ", which mixup and CutMix mix in pairs," if config.images.mixes else ""
    raise ValueError(
      f"batch_size={config.batch_size}: its images{mixed} cannot be shared by {process_count} processes: make it a "
      f"multiple of {multiple}."
    )
  train = _opened(config.source, vision)
  sets = {"train": train}
  specs = dict(config.named_held_out_sources())
  identities: dict[str, Any] = {MAIN_HELD_OUT: {"fraction": config.held_out_fraction}}
  if config.held_out_source:
    specs = {MAIN_HELD_OUT: config.held_out_source, **specs}
  else:
    halves = [_split(part, config.held_out_fraction) for part in train[0]]
    sets["train"], sets[MAIN_HELD_OUT] = (([half[k] for half in halves], train[1]) for k in (0, 1))
  for name, spec in specs.items():
    sets[name] = _opened(spec, vision)
    identities[name] = _identities(sets[name])
  first = train[0][0].source
  for parts, _ in sets.values():
    for part in parts:
      _check_classes(first, part.source)
      if not len(part.rows):
        raise ValueError(f"source {part.source.name} has too few images to hold some out: give data.held_out_source.")
  fingerprint = dict(
    source=_identities(train),
    held_out=identities.pop(MAIN_HELD_OUT),
    held_out_sets=identities,
    images=dataclasses.asdict(config.images),
    vision=dataclasses.asdict(vision),
    batch_size=config.batch_size,
    seed=config.seed,
  )
  fingerprint = json.loads(json.dumps(fingerprint))  # Tuples become lists, as they do in a checkpoint.
  return ImageData(config, vision, sets, fingerprint, process_index, process_count)


def _opened(spec: str, vision: VisionConfig) -> tuple[list[ImageSet], list[float]]:
  """(all images of each source, the weight of each in a mixture) of a spec string."""
  parts, weights = [], []
  for one in parse_sources(spec):
    source = open_images(one)
    _check_label(source, source.num_classes - 1, vision)
    parts.append(ImageSet(source, np.arange(source.length)))
    weights.append(one.weight)
  return parts, weights


def _identities(parts: tuple[list[ImageSet], list[float]]) -> list[dict[str, Any]]:
  return [dict(weight=weight, **part.source.identity) for part, weight in zip(*parts)]


def _split(part: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
  """(images to train on, held-out images): a hash of its index decides for each image."""
  hashes = [int.from_bytes(hashlib.sha256(b"%d" % row).digest()[:8], "little") for row in part.rows]
  held_out = np.array(hashes, np.float64) < fraction * 2**64
  return ImageSet(part.source, part.rows[~held_out]), ImageSet(part.source, part.rows[held_out])


def _check_label(source: ImageSource, label: int, vision: VisionConfig) -> None:
  if not 0 <= label < vision.num_classes:
    raise ValueError(
      f"source {source.name}: label {label} is out of range for model.vision.num_classes={vision.num_classes}; set it to "
      f"{max(source.num_classes, label + 1)}."
    )


def _check_classes(first: ImageSource, other: ImageSource) -> None:
  """Raises ValueError where two sources give the same label to classes of different names."""
  if first.classes and other.classes and first.classes != other.classes:
    missing = [name for name in first.classes if name not in other.classes]
    extra = [name for name in other.classes if name not in first.classes]
    difference = (
      f"lacks the class {missing[0]!r}"
      if missing
      else f"has another class {extra[0]!r}"
      if extra
      else "orders its classes otherwise"
    )
    raise ValueError(
      f"source {other.name} {difference}, so its labels would not be those of {first.name}; of a folder:, an empty folder "
      "stands for a class without images."
    )
