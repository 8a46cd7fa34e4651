"""PyTorch's weight files (`torch.save`), read and written without PyTorch.

Such a file is a zip archive: `data.pkl` describes nested dicts, and each storage of numbers is an
uncompressed member `data/KEY`. A pickle is a program for a small stack machine that may import and
call anything; so it is not unpickled. Its opcodes are walked through by the machine below, which knows
those that `torch.save` writes for a state dict, and builds dicts, tuples and `StoredArray`s and nothing
else. Whatever else a pickle asks for is refused by name.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import pickletools
import struct
import zipfile
import zlib

import numpy as np

from tokenformer_jax.interop.stored_array import (DTYPES, StoredArray, Weights, checked_shape, num_bytes, quoted,
                                                  written_whole)

_STORAGES = {"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
             "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
             "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool"}
# The released 1.5B's takes 60 kB; a megabyte is walked through in about a second.
_LARGEST_PICKLE = 1 << 20
# Keys under which trainers keep the state dict inside a larger one.
_WRAPPERS = ("module", "model", "state_dict")


def read_torch(path: pathlib.Path) -> Weights:
  """The state dict in a file of `torch.save`; its checksums are verified, its arrays read later.

  Raises:
    ValueError: a damaged file, a pickle that asks for anything but arrays and dicts, arrays that are
      not contiguous, or no arrays at all.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      members = {member.filename: member for member in archive.infolist()}
      pickles = [name for name in members if name.endswith("/data.pkl")]
      if len(pickles) != 1:
        raise ValueError(f"{path}: a zip archive, but not one of torch.save (it has {len(pickles)} data.pkl).")
      root = pickles[0].removesuffix("data.pkl")
      program = _small(archive, members[pickles[0]])
      if f"{root}byteorder" in members and _small(archive, members[f"{root}byteorder"]) != b"little":
        raise ValueError(f"{path}: written with the most significant byte first; write it again on a usual machine.")
      storages = {name.removeprefix(f"{root}data/"): member for name, member in members.items()}
      found = _Machine(path, storages).run(program)
      found = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)), found)
      arrays = {name: array for name, array in found.items() if isinstance(name, str) and isinstance(array, _Array)}
      starts = {key: _start(archive, storages[key]) for key in sorted({array.storage for array in arrays.values()})}
  except (zipfile.BadZipFile, NotImplementedError, struct.error, EOFError, zlib.error, RuntimeError) as error:
    raise ValueError(f"{path}: damaged zip archive ({error}); it is truncated or was changed, get it again.") from None
  if not arrays:
    raise ValueError(f"{path}: holds no arrays by name, but {quoted(list(found))}.")
  return Weights(str(path), {
      name: StoredArray(path, starts[array.storage] + array.offset * DTYPES[array.dtype].itemsize, array.shape,
                        array.dtype)
      for name, array in arrays.items()})


def write_torch(path: pathlib.Path, arrays: Mapping, dtype: str) -> None:
  """Writes `arrays`, each with a `shape` and `read()`, as `torch.save` writes a state dict of `dtype`."""
  with written_whole(path) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
    # ZipInfo's own date, so that the same weights give the same file.
    pickled = _pickled({name: array.shape for name, array in arrays.items()}, dtype)
    for name, content in (("data.pkl", pickled), ("byteorder", "little"), ("version", "3\n")):
      archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    for key, array in enumerate(arrays.values()):
      with archive.open(zipfile.ZipInfo(f"archive/data/{key}"), "w", force_zip64=True) as member:
        member.write(np.ascontiguousarray(array.read(), DTYPES[dtype]).view(np.uint8).data)


@dataclasses.dataclass(frozen=True)
class _Array:
  """An array as the pickle describes it: `offset` elements into a storage."""

  storage: str
  dtype: str
  offset: int
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Storage:
  key: str
  dtype: str
  size: int


class _Machine:
  """Walks through the opcodes of a pickle. Values are numbers, strings, tuples, dicts, arrays and names of globals."""

  def __init__(self, path: pathlib.Path, storages: Mapping[str, zipfile.ZipInfo]):
    self._path = path
    self._storages = storages
    self._stack: list = []
    self._marks: list[int] = []
    self._memo: dict = {}

  def run(self, program: bytes) -> dict:
    try:
      for opcode, argument, _ in pickletools.genops(program):
        self._step(opcode.name, argument)
      (result,) = self._stack
    except _Refused:
      raise
    except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
      raise ValueError(f"{self._path}: its data.pkl is broken ({quoted(error)}).") from None
    if not isinstance(result, dict):
      raise ValueError(f"{self._path}: holds a {type(result).__name__}; expected a dict of arrays.")
    return result

  def _step(self, opcode: str, argument) -> None:
    push, pop = self._stack.append, self._stack.pop
    match opcode:
      case "PROTO" | "STOP":
        pass
      case "MARK":
        self._marks.append(len(self._stack))
      case "EMPTY_DICT":
        push({})
      case "EMPTY_TUPLE":
        push(())
      case "EMPTY_LIST":
        push([])
      case "TUPLE":
        push(tuple(self._to_mark()))
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        push(tuple(reversed([pop() for _ in range(int(opcode[-1]))])))
      case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "NONE" | "NEWTRUE" | "NEWFALSE":
        push({"NEWTRUE": True, "NEWFALSE": False}.get(opcode, argument))
      case "BINPUT" | "LONG_BINPUT":
        self._memo[argument] = self._stack[-1]
      case "BINGET" | "LONG_BINGET":
        push(self._memo[argument])
      case "SETITEM":
        value, key = pop(), pop()
        self._set([key, value])
      case "SETITEMS":
        self._set(self._to_mark())
      case "APPEND":
        value = pop()
        self._stack[-1].append(value)
      case "APPENDS":
        values = self._to_mark()
        self._stack[-1].extend(values)
      case "GLOBAL":
        push(_Global(argument))
      case "BINPERSID":
        push(self._storage(pop()))
      case "REDUCE":
        arguments, function = pop(), pop()
        push(self._call(function, arguments))
      case "BUILD":
        pop()  # Attributes of a dict, which a state dict's `_metadata` is.
      case _:
        raise _Refused(f"{self._path}: its data.pkl uses {opcode}, which torch.save does not for a state dict; "
                       "nothing of it was run.")

  def _to_mark(self) -> list:
    mark = self._marks.pop()
    values = self._stack[mark:]
    del self._stack[mark:]
    return values

  def _set(self, items: list) -> None:
    target = self._stack[-1]
    if type(target) is not dict:
      raise TypeError(f"items for {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
      if not isinstance(key, (str, int)):
        raise TypeError(f"{quoted(key)} for a key")
      target[key] = value

  def _storage(self, described) -> _Storage:
    kind, storage_type, key, _, size = described
    name = storage_type.removeprefix("torch ") if isinstance(storage_type, _Global) else ""
    if kind != "storage" or name not in _STORAGES or not isinstance(key, str):
      raise _Refused(f"{self._path}: its data.pkl asks for {quoted(described)}, which is no storage of numbers; "
                     "nothing of it was run.")
    if num_bytes(checked_shape([size], key), _STORAGES[name]) > self._storages[key].file_size:
      raise ValueError(f"storage {key} is smaller than the pickle says")
    return _Storage(key, _STORAGES[name], size)

  def _call(self, function, arguments: tuple):
    match function:
      case _Global("collections OrderedDict") if arguments == ():
        return {}
      case _Global("torch._utils _rebuild_parameter"):
        return arguments[0]
      case _Global("torch._utils _rebuild_tensor_v2"):
        return self._array(*arguments[:4])
    raise _Refused(f"{self._path}: its data.pkl wants to call {quoted(function)}, which is no part of a state dict; "
                   "nothing of it was run. Do not open this file with other tools.")

  def _array(self, storage: _Storage, offset: int, shape: tuple, strides: tuple) -> _Array:
    shape = checked_shape(shape, "array")
    contiguous, step = [], 1
    for size in reversed(shape):
      contiguous.insert(0, step)
      step *= size
    # The stride of an axis of one element is of no account.
    if step and any(size > 1 and a != b for size, a, b in zip(shape, strides, contiguous, strict=True)):
      raise _Refused(f"{self._path}: an array of shape {shape} is stored with strides {strides}; save it with "
                     ".contiguous().")
    if not 0 <= offset <= storage.size - step:
      raise ValueError(f"array of {step} numbers at {offset} in a storage of {storage.size}")
    return _Array(storage.key, storage.dtype, offset, shape)


class _Global(str):
  """The name of something that a pickle would import: «module name»."""

  __match_args__ = ("name",)

  @property
  def name(self) -> str:
    return str(self)


class _Refused(ValueError):
  """Said to the user as it is."""


def _small(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
  if member.file_size > _LARGEST_PICKLE:
    raise zipfile.BadZipFile(f"{member.filename} has {member.file_size} bytes, at most {_LARGEST_PICKLE} are read")
  return archive.read(member)


def _start(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
  """Where a member's bytes begin in the file, after its checksum was found right."""
  if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
    raise zipfile.BadZipFile(f"{member.filename} is compressed")
  with archive.open(member) as stream:
    while stream.read(1 << 20):  # Raises BadZipFile at the end if the checksum is wrong.
      pass
  archive.fp.seek(member.header_offset)
  name_length, extra_length = struct.unpack("<26xHH", archive.fp.read(30))
  return member.header_offset + 30 + name_length + extra_length


def _pickled(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
  """The pickle, protocol 2, of a dict of contiguous arrays, array number i in a storage with key i."""
  storage_type = next(name for name, ours in _STORAGES.items() if ours == dtype)

  def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw

  def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw

  def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"

  def array(key: int, shape: tuple[int, ...]) -> bytes:
    size = int(np.prod(shape, dtype=np.int64))
    strides = [int(np.prod(shape[axis + 1:], dtype=np.int64)) for axis in range(len(shape))]
    storage = (b"(" + text("storage") + f"ctorch\n{storage_type}\n".encode() + text(str(key)) + text("cpu")
               + number(size) + b"tQ")
    no_hooks = b"ccollections\nOrderedDict\n)R"
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + numbers(shape) + numbers(strides)
            + b"\x89" + no_hooks + b"tR")

  items = b"".join(text(name) + array(key, shape) for key, (name, shape) in enumerate(shapes.items()))
  return b"\x80\x02}(" + items + b"u."
