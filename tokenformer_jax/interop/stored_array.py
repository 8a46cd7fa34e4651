"""Arrays that are still in their file: known by name, shape and type, read when and as far as needed."""

import contextlib
import dataclasses
import math
import os
import pathlib
import reprlib
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np

_PLAIN = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), **{name: np.dtype(name) for name in _PLAIN}}
# What a damaged or hostile file may claim; no real array comes near.
_MOST_AXES = 8
_MOST_ELEMENTS = 2**48
_BLOCK_BYTES = 2**24
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
    size = num_bytes(shape, self.dtype)
    offset = self.offset + num_bytes((start, *self.shape[1:]), self.dtype)
    raw = np.fromfile(self.path, np.uint8, size, offset=offset)
    if raw.size != size:
      raise ValueError(f"{self.path}: ends inside an array; the file is truncated, get it again.")
    return raw.view(DTYPES[self.dtype]).reshape(shape)

  def blocks(self, rows: slice) -> Iterator[tuple[slice, np.ndarray]]:
    """The same in pieces of some 16 MB: (which of the asked rows, their array)."""
    start, stop, _ = rows.indices(self.shape[0])
    step = max(1, _BLOCK_BYTES // max(1, num_bytes(self.shape[1:], self.dtype)))
    for begin in range(start, stop, step):
      end = min(begin + step, stop)
      yield slice(begin - start, end - start), self.read(slice(begin, end))


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
  if (
    len(shape) > _MOST_AXES
    or not all(type(size) is int and 0 <= size <= _MOST_ELEMENTS for size in shape)
    or math.prod(shape) > _MOST_ELEMENTS
  ):
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
  """A path to write to, beside `path`, whose place it takes at the end; after an error it is removed."""
  path = pathlib.Path(path)
  unfinished = path.with_name(path.name + ".unfinished")
  try:
    yield unfinished
    unfinished.replace(path)
  finally:
    unfinished.unlink(missing_ok=True)
