"""Arrays that stay in their file until they are read, and the checks that every weight format shares."""

import contextlib
import dataclasses
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np
from etils import epath

from tokenformer_jax.paths import is_uri

_PLAIN = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), **{name: np.dtype(name) for name in _PLAIN}}
# The types of a model's arrays.
FLOATS = ("float64", "float32", "float16", "bfloat16")
# Limits for what a damaged or hostile file may claim. No real array comes near them.
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
    path: the file, local or in an object store.
    offset: the position of the array's first byte in the file.
    shape: its shape.
    dtype: its type, a name in `DTYPES`.
  """

  path: epath.Path
  offset: int
  shape: tuple[int, ...]
  dtype: str

  def read(self, rows: slice = slice(None)) -> np.ndarray:
    """Reads the array, or consecutive rows of its first axis.

    Args:
      rows: the rows to read, with step 1; by default all.

    Returns:
      A read-only array [rows, *shape[1:]] of the stored type.

    Raises:
      ValueError: the file ends before the array does.
    """
    start, stop, _ = rows.indices(self.shape[0])
    shape = (stop - start, *self.shape[1:])
    size = num_bytes(shape, self.dtype)
    with self.path.open("rb") as file:
      file.seek(self.offset + num_bytes((start, *self.shape[1:]), self.dtype))
      raw = file.read(size)
    if len(raw) != size:
      raise ValueError(f"{self.path}: the file ends inside an array; it is truncated, get it again.")
    return np.frombuffer(raw, DTYPES[self.dtype]).reshape(shape)

  def blocks(self, rows: slice) -> Iterator[tuple[slice, np.ndarray]]:
    """Reads the same rows in blocks of about 16 MB.

    Yields:
      Pairs of a slice into the requested rows and the array of these rows.
    """
    start, stop, _ = rows.indices(self.shape[0])
    step = max(1, _BLOCK_BYTES // max(1, num_bytes(self.shape[1:], self.dtype)))
    for begin in range(start, stop, step):
      end = min(begin + step, stop)
      yield slice(begin - start, end - start), self.read(slice(begin, end))


@dataclasses.dataclass(frozen=True)
class ComputedArray:
  """An array that is computed when it is written, so that no two need to be in memory at once."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weights:
  """The content of a weight file, or of a folder of weight files.

  Attributes:
    where: the file or folder, for messages.
    arrays: the arrays by name.
    metadata: the strings that a safetensors file carries beside its arrays.
  """

  where: str
  arrays: Mapping[str, StoredArray]
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def checked_shape(shape, name: str) -> tuple[int, ...]:
  """Returns `shape` as a tuple of sizes.

  Args:
    shape: any iterable that a file gave.
    name: the array, for the message.

  Raises:
    ValueError: no array can have this shape.
  """
  shape = tuple(shape)
  if (
    len(shape) > _MOST_AXES
    or not all(type(size) is int and 0 <= size <= _MOST_ELEMENTS for size in shape)
    or math.prod(shape) > _MOST_ELEMENTS
  ):
    raise ValueError(f"{name}: {quoted(shape)} is not a valid array shape.")
  return shape


def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
  """The number of bytes of an array with this shape and type."""
  return math.prod(shape) * DTYPES[dtype].itemsize


def quoted(value) -> str:
  """The `repr` of any value that a file may have produced, in one line and shortened where it is long or deep."""
  return _SHORT.repr(value)


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[epath.Path]:
  """Gives a path to write to, such that `path` has all of the content at the end or, after an error, none of it.

  An object in a store is visible only when its upload is complete, and cannot be renamed; a local file is written under
  another name first.
  """
  whole = epath.Path(path)
  target = whole if is_uri(whole) else whole.with_name(whole.name + ".unfinished")
  try:
    yield target
    if target != whole:
      target.replace(whole)
  except BaseException:
    target.unlink(missing_ok=True)
    raise
