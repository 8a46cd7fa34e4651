"""Opens sources of images with labels: idx and npz files, folders of classes, and tensorflow-datasets.

idx:FOLDER[@SPLIT]     MNIST's four files, plain or gzipped; the split is train (by default) or test
npz:FILE               `images` [n, H, W] or [n, H, W, 1 or 3], or JPEG and PNG files end to end in `jpeg_bytes` with
                       their bounds `offsets` [n + 1]; beside them `labels` [n] and, if they are known, `class_names`
folder:FOLDER          one folder of JPEG and PNG files for each class; the classes are in the order of their names
tfds:NAME[/CONFIG][:VERSION][@SPLIT]
"""

import gzip
import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from tokenformer_jax.data.catalogues import tfds_builder, tfds_records
from tokenformer_jax.data.files import first_line
from tokenformer_jax.data.fingerprint import hash_file
from tokenformer_jax.data.spec import SourceSpec
from tokenformer_jax.paths import user_path

_SUFFIXES = (".jpg", ".jpeg", ".png")


class BadImage(ValueError):
  """Why an image cannot be read; the others of its source are good."""


class ImageSource(NamedTuple):
  """Images with labels, read one at a time.

  Attributes:
    name: the source, for messages.
    length: the number of images.
    read: `index -> (image, label)`; raises BadImage.
    where: `index -> the name of the image`, for messages: its path where it is a file.
    classes: the names of the classes in the order of their labels, or () where they have none.
    num_classes: the number of classes; at least the largest label + 1.
    identity: JSON-able; differs where the images do.
  """

  name: str
  length: int
  read: Callable[[int], tuple[Image.Image, int]]
  where: Callable[[int], str]
  classes: tuple[str, ...]
  num_classes: int
  identity: dict[str, Any]


def open_images(spec: SourceSpec) -> ImageSource:
  """Opens a source of images.

  Raises:
    ValueError: the source is one of texts, or it cannot be opened.
  """
  if spec.kind not in _OPENERS:
    raise ValueError(f"source {spec} holds texts, and the model reads images: give one of {', '.join(_OPENERS)}.")
  source = _OPENERS[spec.kind](spec)
  if not source.length:
    raise ValueError(f"source {spec}: it has no images.")
  return source


def decoded(data: bytes) -> Image.Image:
  """The image in the bytes of a file; BadImage if it cannot be decoded as a whole."""
  try:
    image = Image.open(io.BytesIO(data))
    image.load()
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise BadImage(first_line(error)) from None
  return image


def _idx(spec: SourceSpec) -> ImageSource:
  folder, _, split = spec.rest.partition("@")
  names = {"": "train", "train": "train", "test": "t10k"}
  if split not in names:
    raise ValueError(f"source {spec}: split {split!r} is unknown; choose train or test.")
  root = user_path(folder, "source")
  (images, images_path), (labels, labels_path) = (
    _idx_array(root, f"{names[split]}-{what}-idx{rank}-ubyte", rank, spec)
    for what, rank in (("images", 3), ("labels", 1))
  )
  paths = (images_path, labels_path)
  return _arrays(spec, images, labels, (), dict(files=[hash_file(path) for path in paths]))


def _idx_array(folder: epath.Path, name: str, rank: int, spec: SourceSpec) -> tuple[np.ndarray, epath.Path]:
  """(uint8 array, path) of a file in the format of MNIST: magic 0x0800 + rank and sizes, big-endian int32, then bytes."""
  path = next((path for path in (folder / f"{name}.gz", folder / name) if path.exists()), None)
  if path is None:
    raise ValueError(f"source {spec}: {folder / name}[.gz] does not exist.")
  try:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
  except (OSError, EOFError, zlib.error) as error:
    raise ValueError(f"source {spec}: {path} cannot be read ({first_line(error)}).") from None
  head = np.frombuffer(data[: 4 * (1 + rank)], ">i4")
  sizes = head[1:].tolist()
  if len(sizes) != rank or head[0] != 0x0800 + rank or min(sizes) < 0 or math.prod(sizes) != len(data) - head.nbytes:
    raise ValueError(f"source {spec}: {path} is no idx file of {rank} axes of bytes, or it breaks off.")
  return np.frombuffer(data, np.uint8, offset=head.nbytes).reshape(sizes), path


def _npz(spec: SourceSpec) -> ImageSource:
  path = user_path(spec.rest, "source")
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file}
  except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
    raise ValueError(f"source {spec}: {path} cannot be read ({first_line(error)}).") from None
  is_encoded = "jpeg_bytes" in arrays
  missing = {"labels", *(("offsets",) if is_encoded else ("images",))} - set(arrays)
  if missing:
    raise ValueError(f"source {spec}: {path} has no array {sorted(missing)[0]!r}; it has {', '.join(arrays)}.")
  labels, classes = arrays["labels"], tuple(map(str, arrays.get("class_names", ())))
  identity = dict(file=hash_file(path))
  if not is_encoded:
    return _arrays(spec, arrays["images"], labels, classes, identity)
  data, offsets = arrays["jpeg_bytes"], arrays["offsets"].astype(np.int64)
  if offsets.ndim != 1 or not len(offsets) or offsets[0] or offsets[-1] != len(data) or np.any(np.diff(offsets) < 0):
    raise ValueError(f"source {spec}: {path}: offsets must rise from 0 to the {len(data)} bytes of jpeg_bytes.")
  _check_labels(spec, labels, len(offsets) - 1)

  def read(index: int) -> tuple[Image.Image, int]:
    file = data[offsets[index] : offsets[index + 1]].tobytes()
    return decoded(file), int(labels[index])

  return ImageSource(
    str(spec),
    len(labels),
    read,
    lambda index: f"{path} image {index}",
    classes,
    _num_classes(labels, classes),
    identity,
  )


def _arrays(
  spec: SourceSpec, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], identity
) -> ImageSource:
  """A source of images that are in memory as pixels."""
  if images.ndim == 4 and images.shape[-1] == 1:
    images = images[..., 0]
  if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)):
    raise ValueError(
      f"source {spec}: images are {images.dtype}{list(images.shape)}; expected uint8 [n, height, width] or, with "
      "colours, [n, height, width, 3]."
    )
  _check_labels(spec, labels, len(images))

  def read(index: int) -> tuple[Image.Image, int]:
    return Image.fromarray(images[index]), int(labels[index])

  return ImageSource(
    str(spec),
    len(images),
    read,
    lambda index: f"{spec} image {index}",
    classes,
    _num_classes(labels, classes),
    identity,
  )


def _check_labels(spec: SourceSpec, labels: np.ndarray, count: int) -> None:
  if labels.shape != (count,) or labels.dtype.kind not in "iu" or (count and labels.min() < 0):
    raise ValueError(
      f"source {spec}: labels are {labels.dtype}{list(labels.shape)}; expected one whole number, not negative, for each "
      f"of {count} images."
    )


def _num_classes(labels: np.ndarray, classes: tuple[str, ...]) -> int:
  return max(len(classes), int(labels.max()) + 1 if len(labels) else 0)


def _folder(spec: SourceSpec) -> ImageSource:
  root = user_path(spec.rest, "source")
  if not root.is_dir():
    raise ValueError(f"source {spec}: {root} is no folder.")
  classes = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))
  if not classes:
    raise ValueError(f"source {spec}: {root} has no folders; expected one for each class.")
  files, others, listing = [], 0, hashlib.sha256()
  for label, name in enumerate(classes):
    for path in sorted((root / name).iterdir()):
      if path.suffix.lower() not in _SUFFIXES:
        others += not path.name.startswith(".")
        continue
      files.append((path, label))
      listing.update(f"{name}/{path.name} {path.stat().length}\n".encode())
  if others:
    logging.warning("source %s: %d files are left out; images end in %s.", spec, others, ", ".join(_SUFFIXES))

  def read(index: int) -> tuple[Image.Image, int]:
    path, label = files[index]
    return decoded(path.read_bytes()), label

  # Names and sizes stand for the images: to read millions of files would take longer than many a run.
  identity = dict(files=len(files), listing=listing.hexdigest(), classes=list(classes))
  return ImageSource(str(spec), len(files), read, lambda index: str(files[index][0]), classes, len(classes), identity)


def _tfds(spec: SourceSpec) -> ImageSource:
  name, _, split = spec.rest.partition("@")
  split = split or "train"
  tfds, builder = tfds_builder(name, str(spec))
  features = dict(builder.info.features.items())
  kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
  missing = [key for key, kind in kinds.items() if not isinstance(features.get(key), kind)]
  if missing:
    raise ValueError(
      f"source {spec}: it has no feature {missing[0]!r} of {kinds[missing[0]].__name__}; its features are "
      f"{', '.join(sorted(features))}."
    )
  records = tfds_records(builder, split, str(spec), decoders={"image": tfds.decode.SkipDecoding()})

  def read(index: int) -> tuple[Image.Image, int]:
    record = records[index]
    return decoded(record["image"]), int(record["label"])

  label = features["label"]
  identity = dict(data_set=builder.info.full_name, split=split, records=len(records))
  return ImageSource(
    str(spec),
    len(records),
    read,
    lambda index: f"{spec} record {index}",
    tuple(label.names),
    label.num_classes,
    identity,
  )


_OPENERS: dict[str, Callable[[SourceSpec], ImageSource]] = {"idx": _idx, "npz": _npz, "folder": _folder, "tfds": _tfds}
