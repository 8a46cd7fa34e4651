"""PyTorch's weight files (`torch.save`), read and written without PyTorch.

Such a file is a zip archive: `data.pkl` describes nested dicts of arrays, and each storage of numbers is
an uncompressed member `data/KEY`. Several arrays may be parts of one storage, as DeepSpeed's
`zero_to_fp32` leaves them.
"""

import math
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from tokenformer_jax.interop import pickle_machine
from tokenformer_jax.interop.pickle_machine import STORAGES, PickledArray
from tokenformer_jax.interop.stored_array import DTYPES, StoredArray, Weights, quoted, written_whole

# The pickle of the released 1.5B takes 60 kB; a megabyte is walked through in about a second.
_LARGEST_PICKLE = 1 << 20
# Keys under which trainers keep the state dict inside a larger one.
_WRAPPERS = ("module", "model", "state_dict")
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError, zlib.error, RuntimeError)


def read_torch(path: pathlib.Path) -> Weights:
  """The state dict in a file of `torch.save`; its checksums are verified, its arrays read later.

  Raises:
    ValueError: a damaged file, a pickle that asks for anything but arrays and dicts, arrays that are
      not contiguous, or no arrays at all.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      found, storages = _described(archive, path)
      arrays = {
        name: array for name, array in found.items() if isinstance(name, str) and isinstance(array, PickledArray)
      }
      used = sorted({array.storage for array in arrays.values()})
      starts = {key: _start(archive, storages[key], path) for key in used}
  except _DAMAGE as error:
    raise ValueError(f"{path}: damaged zip archive ({error}); it is truncated or was changed, get it again.") from None
  if not arrays:
    raise ValueError(f"{path}: holds no arrays by name, but {quoted(list(found))}.")

  def stored(array: PickledArray) -> StoredArray:
    start = starts[array.storage] + array.offset * DTYPES[array.dtype].itemsize
    return StoredArray(path, start, array.shape, array.dtype)

  return Weights(str(path), {name: stored(array) for name, array in arrays.items()})


def write_torch(path: pathlib.Path, arrays: Mapping, dtype: str) -> None:
  """Writes `arrays`, each with a `shape` and `read()`, as `torch.save` writes a state dict of `dtype`."""
  with written_whole(path) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
    pickled = _pickled({name: array.shape for name, array in arrays.items()}, dtype)
    # ZipInfo has a date of its own, and the same weights give the same file.
    for name, content in (("data.pkl", pickled), ("byteorder", "little"), ("version", "3\n")):
      archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    for key, array in enumerate(arrays.values()):
      with archive.open(f"archive/data/{key}", "w", force_zip64=True) as member:
        member.write(np.ascontiguousarray(array.read(), DTYPES[dtype]).view(np.uint8).data)


def _described(archive: zipfile.ZipFile, path: pathlib.Path) -> tuple[dict, dict[str, zipfile.ZipInfo]]:
  """The state dict of `PickledArray`s, and the members of the archive that are its storages."""
  members = {member.filename: member for member in archive.infolist()}
  pickles = [name for name in members if name.endswith("/data.pkl")]
  if len(pickles) != 1:
    raise ValueError(f"{path}: a zip archive, but not one of torch.save: it has {len(pickles)} data.pkl.")
  root = pickles[0].removesuffix("data.pkl")
  byteorder = members.get(f"{root}byteorder")
  if byteorder and _small(archive, byteorder) != b"little":
    raise ValueError(f"{path}: its numbers have the most significant byte first; save it on a usual machine.")
  storages = {name.removeprefix(f"{root}data/"): member for name, member in members.items()}
  sizes = {key: member.file_size for key, member in storages.items()}
  found = pickle_machine.run(_small(archive, members[pickles[0]]), sizes, str(path))
  return next((found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)), found), storages


def _small(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
  if member.file_size > _LARGEST_PICKLE:
    raise zipfile.BadZipFile(f"{member.filename} has {member.file_size} bytes, above {_LARGEST_PICKLE}")
  return archive.read(member)


def _start(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: pathlib.Path) -> int:
  """Where a member's bytes begin in the file, after its checksum was found right."""
  if member.compress_type != zipfile.ZIP_STORED:
    raise zipfile.BadZipFile(f"{member.filename} is compressed")
  with archive.open(member) as stream:
    while stream.read(1 << 20):  # Raises BadZipFile at the end if the checksum is wrong.
      pass
  with path.open("rb") as file:
    file.seek(member.header_offset)
    name_length, extra_length = struct.unpack("<26xHH", file.read(30))
  return member.header_offset + 30 + name_length + extra_length


def _pickled(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
  """The pickle, protocol 2, of a dict of contiguous arrays, array number i in a storage with key i."""
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
