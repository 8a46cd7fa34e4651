"""Arrays that are still in their file: known by name, shape and type, read when and as far as needed."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import math
import os
import pathlib
import reprlib

import ml_dtypes
import numpy as np

DTYPES = {name: np.dtype(dtype) for name, dtype in {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
}.items()}
FLOATS = tuple(name for name in DTYPES if "float" in name)
# What a damaged or hostile file may claim; no real array comes near.
_MOST_AXES = 8
_MOST_ELEMENTS = 2**48
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = 120


@dataclasses.dataclass(frozen=True)
class StoredArray:
  """A contiguous array of little-endian numbers in a file.

  Attributes:
    offset: where its first byte is in the file.
    dtype: a name in `DTYPES`.
  """

  path: pathlib.Path
  offset: int
  shape: tuple[int, ...]
  dtype: str

  def read(self, rows: slice = slice(None)) -> np.ndarray:
    """The array, or the given consecutive rows of its first axis, in memory of its own.

    Raises:
      ValueError: the file ends before the array.
    """
    start, stop, _ = rows.indices(self.shape[0])
    shape = (stop - start, *self.shape[1:])
    row_bytes = math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
    raw = np.fromfile(self.path, np.uint8, (stop - start) * row_bytes, offset=self.offset + start * row_bytes)
    if raw.size != (stop - start) * row_bytes:
      raise ValueError(f"{self.path}: ends inside an array; the file is truncated, get it again.")
    return raw.view(DTYPES[self.dtype]).reshape(shape)


@dataclasses.dataclass(frozen=True)
class ComputedArray:
  """An array that is made when it is written."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weights:
  """What a weight file, or a folder of them, holds.

  Attributes:
    where: the file or folder, for messages.
    arrays: by name.
    metadata: the strings a safetensors file carries beside its arrays.
  """

  where: str
  arrays: Mapping[str, StoredArray]
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def checked_shape(shape, name: str) -> tuple[int, ...]:
  """`shape` as a tuple of sizes, or a ValueError for what cannot be an array's shape."""
  shape = tuple(shape)
  if (len(shape) > _MOST_AXES or not all(type(size) is int and 0 <= size <= _MOST_ELEMENTS for size in shape)
      or math.prod(shape) > _MOST_ELEMENTS):
    raise ValueError(f"{name}: {quoted(shape)} is no array's shape.")
  return shape


def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
  """Size of an array of `shape`."""
  return math.prod(shape) * DTYPES[dtype].itemsize


def quoted(value) -> str:
  """`repr` of anything a file may have made, cut where it is long or deep, in one line."""
  return _SHORT.repr(value)


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A path beside `path` to write to; it takes the place of `path` at the end, or is removed after an error."""
  path = pathlib.Path(path)
  unfinished = path.with_name(path.name + ".unfinished")
  try:
    yield unfinished
    unfinished.replace(path)
  finally:
    unfinished.unlink(missing_ok=True)
