"""PyTorch's weight files (`torch.save`), read and written without PyTorch.

Such a file is a zip archive: `data.pkl` describes nested dicts of arrays, and each storage of numbers is
an uncompressed member `data/KEY`. Several arrays may share one storage, as in the files of DeepSpeed's
`zero_to_fp32`.
"""

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
from etils import epath

from tokenformer_jax.interop import pickle_machine
from tokenformer_jax.interop.pickle_machine import STORAGES, PickledArray
from tokenformer_jax.interop.stored_array import DTYPES, StoredArray, Weights, quoted, written_whole

# The pickle of the released 1.5B model has 60 kB. A megabyte is interpreted in about a second.
_LARGEST_PICKLE = 1 << 20
# Keys under which training programs keep the state dict inside a larger one.
_WRAPPERS = ("module", "model", "state_dict")
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError, zlib.error, RuntimeError)


def read_torch(path: epath.Path) -> Weights:
  """Reads the description of the state dict in a file of `torch.save`; the arrays are read later.

  The archive's checksums are verified here, and nothing of the pickle is executed.

  Args:
    path: the file, local or in an object store.

  Returns:
    The arrays of the state dict; other values in it are left out.

  Raises:
    ValueError: the file is damaged, its pickle asks for anything other than arrays and dicts, an array is
      not contiguous, or there are no arrays.
  """
  try:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
      found, storages = _described(archive, path)
      arrays = {
        name: array for name, array in found.items() if isinstance(name, str) and isinstance(array, PickledArray)
      }
      used = sorted({array.storage for array in arrays.values()})
      starts = {key: _start(archive, storages[key], file) for key in used}
  except _DAMAGE as error:
    raise ValueError(
      f"{path}: damaged zip archive ({error}); the file is truncated or was changed, get it again."
    ) from None
  if not arrays:
    raise ValueError(f"{path}: has no arrays with names; its keys are {quoted(list(found))}.")

  def stored(array: PickledArray) -> StoredArray:
    start = starts[array.storage] + array.offset * DTYPES[array.dtype].itemsize
    return StoredArray(path, start, array.shape, array.dtype)

  return Weights(str(path), {name: stored(array) for name, array in arrays.items()})


def write_torch(path: epath.Path, arrays: Mapping, dtype: str) -> None:
  """Writes a state dict as `torch.save` does, completely or not at all, with one array in memory at a time.

  Args:
    path: the file to write.
    arrays: name -> object with a `shape` and a `read()` that returns the array.
    dtype: the type of all arrays in the file, a name in `DTYPES`.
  """
  with (
    written_whole(path) as unfinished,
    unfinished.open("wb") as file,
    zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
  ):
    pickled = _pickled({name: array.shape for name, array in arrays.items()}, dtype)
    # A ZipInfo has a fixed date, so that the same weights give the same bytes.
    for name, content in (("data.pkl", pickled), ("byteorder", "little"), ("version", "3\n")):
      archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    for key, array in enumerate(arrays.values()):
      with archive.open(f"archive/data/{key}", "w", force_zip64=True) as member:
        member.write(np.ascontiguousarray(array.read(), DTYPES[dtype]).view(np.uint8).data)


def _described(archive: zipfile.ZipFile, path: epath.Path) -> tuple[dict, dict[str, zipfile.ZipInfo]]:
  """Returns the state dict of `PickledArray`s, and the archive's members by the key of their storage."""
  members = {member.filename: member for member in archive.infolist()}
  pickles = [name for name in members if name.endswith("/data.pkl")]
  if len(pickles) != 1:
    raise ValueError(
      f"{path}: a zip archive that torch.save did not write: it has {len(pickles)} data.pkl, expected 1."
    )
  root = pickles[0].removesuffix("data.pkl")
  byteorder = members.get(f"{root}byteorder")
  if byteorder and _small(archive, byteorder) != b"little":
    raise ValueError(f"{path}: its numbers are big-endian; save it on a little-endian machine.")
  storages = {name.removeprefix(f"{root}data/"): member for name, member in members.items()}
  sizes = {key: member.file_size for key, member in storages.items()}
  found = pickle_machine.run(_small(archive, members[pickles[0]]), sizes, str(path))
  return next((found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)), found), storages


def _small(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
  if member.file_size > _LARGEST_PICKLE:
    raise zipfile.BadZipFile(f"{member.filename} has {member.file_size} bytes, above {_LARGEST_PICKLE}")
  return archive.read(member)


def _start(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: BinaryIO) -> int:
  """Verifies a member's checksum and returns the position of its first byte in the file."""
  if member.compress_type != zipfile.ZIP_STORED:
    raise zipfile.BadZipFile(f"{member.filename} is compressed")
  with archive.open(member) as stream:
    while stream.read(1 << 20):  # Raises BadZipFile at the end if the checksum is wrong.
      pass
  file.seek(member.header_offset)
  name_length, extra_length = struct.unpack("<26xHH", file.read(30))
  return member.header_offset + 30 + name_length + extra_length


def _pickled(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
  """The pickle (protocol 2) of a dict of contiguous arrays; array number i has the storage with key i."""
  storage_type = next(name for name, ours in STORAGES.items() if ours == dtype)

  def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw

  def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw

  def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"

  def array(key: int, shape: tuple[int, ...]) -> bytes:
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    kind = f"ctorch\n{storage_type}\n".encode()
    storage = b"(" + text("storage") + kind + text(str(key)) + text("cpu") + number(math.prod(shape)) + b"tQ"
    no_hooks = b"ccollections\nOrderedDict\n)R"
    return (
      b"ctorch._utils\n_rebuild_tensor_v2\n("
      + storage
      + number(0)
      + numbers(shape)
      + numbers(strides)
      + b"\x89"
      + no_hooks
      + b"tR"
    )

  items = b"".join(text(name) + array(key, shape) for key, (name, shape) in enumerate(shapes.items()))
  return b"\x80\x02}(" + items + b"u."
