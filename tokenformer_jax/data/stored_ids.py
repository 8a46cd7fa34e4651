"""Files of token ids as other programs write them: NumPy's .npy, the headed .bin of llm.c, bare .bin files."""

import os
import pathlib
from typing import NamedTuple

import numpy as np
from absl import logging

BARE_DTYPES = ("uint16", "uint32", "int32", "int64")
# The headers of llm.c and modded-nanogpt: the magic number, the version, and the type of the ids after it.
_HEADED: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype(np.uint16)), 20240801: (7, np.dtype(np.uint32))}
_HEADER_SIZE = 256 * 4  # Bytes; 256 int32: magic, version, number of ids, zeros.
_LOOKED_AT = 2**22  # Bytes at the start of a bare file that decide about its type.
_LARGEST_ID = 2**22  # No tokenizer has this many ids.
_FEWEST = 256  # A file of fewer ids does not show its type.


class FileIds:
  """The ids in a file, read when a slice of them is asked for: unsigned integers, so that negative ids are large ones.

  Mapped memory would end the process by a signal where the file is truncated while a run reads it.

  Args:
    path: the file.
    dtype: the type in which it holds the ids.
    offset: bytes before the first id.
    count: how many ids; None takes all up to the end of the file.
  """

  def __init__(self, path: pathlib.Path, dtype: np.dtype, offset: int = 0, count: int | None = None):
    self.dtype = np.dtype(f"u{dtype.itemsize}")
    self._path, self._offset, self._version = path, offset, _version(path.stat())
    self._count = (path.stat().st_size - offset) // dtype.itemsize if count is None else count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, where: slice) -> np.ndarray:
    """Raises ValueError if the file is another than the one that was opened."""
    start, stop, _ = where.indices(len(self))
    size = max(stop - start, 0) * self.dtype.itemsize
    try:
      with open(self._path, "rb", buffering=0) as file:
        changed = _version(os.fstat(file.fileno())) != self._version
        raw = os.pread(file.fileno(), size, self._offset + start * self.dtype.itemsize)
        while raw and len(raw) < size:  # One call reads at most 2 GiB.
          more = os.pread(file.fileno(), size - len(raw), self._offset + start * self.dtype.itemsize + len(raw))
          raw = raw + more if more else b""
    except OSError as error:
      raise ValueError(f"{self._path} can no longer be read: {error.strerror}.") from None
    if changed or len(raw) < size:
      raise ValueError(
        f"{self._path} was changed or truncated while it was read: restore it, and run the same command again."
      )
    return np.frombuffer(raw, self.dtype)


def _version(status: os.stat_result) -> tuple[int, int]:
  return status.st_size, status.st_mtime_ns


class StoredIds(NamedTuple):
  """The ids of one file.

  Attributes:
    path: the file.
    ids: the ids.
    dtype: the type in which the file holds them.
    is_stated: whether the file or the user states that type; otherwise it was recognised.
  """

  path: pathlib.Path
  ids: FileIds
  dtype: np.dtype
  is_stated: bool = True


def open_ids(path: pathlib.Path, dtype: str = "") -> StoredIds:
  """Opens a .npy file, a headed .bin file or a bare file of ids.

  Args:
    path: the file. A .npy file holds one dimension of integers. A file that begins with the header of llm.c and
      modded-nanogpt is read as that says. Every other file is bare.
    dtype: the type of a bare file's ids, one of `BARE_DTYPES`. If it is empty, the type is recognised: as ids are
      small numbers, the high bytes of a wide type are zeros.

  Raises:
    ValueError: the file is empty, damaged or holds no ids; the type is unknown, contradicts the file, or is needed
      because more than one is possible.
  """
  if dtype and dtype not in BARE_DTYPES:
    raise ValueError(f"{path}#{dtype}: ids of type {dtype!r} are unknown; known: {', '.join(BARE_DTYPES)}.")
  if not path.stat().st_size:
    raise ValueError(f"{path} is empty: write it again.")
  stored = _open_npy(path) if path.suffix == ".npy" else _open_headed(path)
  if stored is None:
    return _open_bare(path, dtype)
  check_stated(path, dtype, stored.dtype)
  return stored


def check_stated(path: pathlib.Path, stated: str, dtype: np.dtype) -> None:
  """Raises ValueError if the user states another type than the file itself does."""
  if stated and np.dtype(stated) != dtype:
    raise ValueError(f"{path}#{stated}: the file itself says that its ids are {dtype}; leave out #{stated}.")


def _open_npy(path: pathlib.Path) -> StoredIds:
  try:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise ValueError(f"{path} is not a NumPy file of ids ({error}): write it again with numpy.save.") from None
  if array.ndim != 1 or array.dtype.kind not in "iu" or not array.dtype.isnative or not array.size:
    raise ValueError(
      f"{path} holds an array of {array.dtype} with shape {array.shape}, not one dimension of integer ids: "
      "flatten it, and save it in this machine's byte order."
    )
  return StoredIds(path, FileIds(path, array.dtype, array.offset, array.size), array.dtype)


def _open_headed(path: pathlib.Path) -> StoredIds | None:
  """The ids after a header; None if the file has none."""
  if path.stat().st_size < _HEADER_SIZE:
    return None
  header = np.fromfile(path, "<i4", _HEADER_SIZE // 4)
  if int(header[0]) not in _HEADED:
    return None
  version, dtype = _HEADED[int(header[0])]
  if header[1] != version:
    raise ValueError(
      f"{path}: its header has the magic number {header[0]} and version {header[1]}; version {version} can be read."
    )
  count, size = int(header[2]), path.stat().st_size
  if count < 1 or size != _HEADER_SIZE + count * dtype.itemsize:
    raise ValueError(
      f"{path} has {size} bytes and its header says {_HEADER_SIZE} + {count} ids of {dtype.itemsize} bytes: it is "
      "truncated or damaged; write it again."
    )
  return StoredIds(path, FileIds(path, dtype, _HEADER_SIZE, count), dtype)


def _open_bare(path: pathlib.Path, stated: str) -> StoredIds:
  dtype = np.dtype(stated) if stated else _recognised(path)
  size = path.stat().st_size
  if size % dtype.itemsize:
    raise ValueError(
      f"{path} has {size} bytes, which is not a whole number of {dtype} ids: it is truncated, or of another type "
      f"(state it, as in {path}#uint32)."
    )
  return StoredIds(path, FileIds(path, dtype), dtype, bool(stated))


def _recognised(path: pathlib.Path) -> np.dtype:
  """The type of a bare file's ids: the widest in which all are so small that a tokenizer may have them."""
  with open(path, "rb") as file:
    start = file.read(_LOOKED_AT)
  possible: list[np.dtype] = [np.dtype(np.uint16)]
  ids = np.empty(0, np.int64)
  for kind in ("int32", "int64"):
    dtype = np.dtype(kind)
    # The size of the file does not count here: a truncated file must not be read as one of a narrower type.
    wide = np.frombuffer(start, dtype, len(start) // dtype.itemsize).astype(np.int64)
    if len(wide) and np.all((wide > -_LARGEST_ID) & (wide < _LARGEST_ID)):
      possible, ids = [*possible, dtype], wide
  if len(possible) > 1 and (len(ids) < _FEWEST or not ids.any()):
    raise ValueError(
      f"{path} is too short to show whether its ids are {' or '.join(map(str, possible))}: "
      f"state the type, as in {path}#uint16."
    )
  if len(possible) > 1:
    logging.info("%s: its ids are recognised as %s.", path, possible[-1])
  return possible[-1]
