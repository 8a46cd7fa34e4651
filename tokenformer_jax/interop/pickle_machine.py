"""Reads what the pickle of a state dict describes, without unpickling it.

A pickle is a program for a small stack machine that may import and call anything. `torch.save` needs few
of its opcodes for a state dict; the interpreter below knows these and builds dicts, lists, tuples, numbers,
strings and `PickledArray`s. It imports and calls nothing that the pickle names, and refuses every other
request with its name.
"""

import dataclasses
import pickletools
from collections.abc import Mapping

from tokenformer_jax.interop.stored_array import checked_shape, num_bytes, quoted

STORAGES = {
  "DoubleStorage": "float64",
  "FloatStorage": "float32",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "LongStorage": "int64",
  "IntStorage": "int32",
  "ShortStorage": "int16",
  "CharStorage": "int8",
  "ByteStorage": "uint8",
  "BoolStorage": "bool",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


@dataclasses.dataclass(frozen=True)
class PickledArray:
  """A contiguous array that begins `offset` elements after the start of the storage with this key."""

  storage: str
  dtype: str
  offset: int
  shape: tuple[int, ...]


def run(program: bytes, storage_bytes: Mapping[str, int], where: str) -> dict:
  """Returns the dict that the pickle `program` describes.

  Args:
    program: the bytes of the pickle.
    storage_bytes: the size of each storage in the file, by key.
    where: the file, for messages.

  Raises:
    ValueError: the pickle asks for anything other than arrays and dicts, for an array that does not fit
      into its storage or is not contiguous, or is broken.
  """
  machine = _Machine(storage_bytes, where)
  try:
    for opcode, argument, _ in pickletools.genops(program):
      machine.step(opcode.name, argument)
    (result,) = machine.stack
  except _Refused:
    raise
  except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
    raise ValueError(f"{where}: its pickle is broken ({quoted(error)}).") from None
  if not isinstance(result, dict):
    raise ValueError(f"{where}: its pickle is a {type(result).__name__}; expected a dict of arrays.")
  return result


@dataclasses.dataclass(frozen=True)
class _Global:
  """The name of an object that a pickle would import."""

  name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
  key: str
  dtype: str
  size: int


class _Refused(ValueError):
  """An error whose message is complete and is not wrapped into another one."""


class _Machine:
  def __init__(self, storage_bytes: Mapping[str, int], where: str):
    self.stack: list = []
    self._marks: list[int] = []
    self._memo: dict = {}
    self._storage_bytes = storage_bytes
    self._where = where

  def step(self, opcode: str, argument) -> None:
    push, pop = self.stack.append, self.stack.pop
    match opcode:
      case "PROTO" | "STOP":
        pass
      case "MARK":
        self._marks.append(len(self.stack))
      case "EMPTY_DICT":
        push({})
      case "EMPTY_LIST":
        push([])
      case "EMPTY_TUPLE":
        push(())
      case "TUPLE":
        push(tuple(self._to_mark()))
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        push(tuple(reversed([pop() for _ in range(int(opcode[-1]))])))
      case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
        push(argument)
      case "NONE" | "NEWTRUE" | "NEWFALSE":
        push(_CONSTANTS[opcode])
      case "BINPUT" | "LONG_BINPUT":
        self._memo[argument] = self.stack[-1]
      case "BINGET" | "LONG_BINGET":
        push(self._memo[argument])
      case "APPEND":
        value = pop()
        self.stack[-1].append(value)
      case "APPENDS":
        values = self._to_mark()
        self.stack[-1].extend(values)
      case "SETITEM":
        value, key = pop(), pop()
        self._set([key, value])
      case "SETITEMS":
        self._set(self._to_mark())
      case "GLOBAL":
        push(_Global(argument))
      case "BINPERSID":
        push(self._storage(pop()))
      case "REDUCE":
        arguments, function = pop(), pop()
        push(self._call(function, arguments))
      case "BUILD":
        pop()  # This sets attributes of a dict, such as a state dict's `_metadata`.
      case _:
        raise self._refusal(f"uses the opcode {opcode}, which torch.save does not use for a state dict")

  def _to_mark(self) -> list:
    mark = self._marks.pop()
    values = self.stack[mark:]
    del self.stack[mark:]
    return values

  def _set(self, items: list) -> None:
    target = self.stack[-1]
    if type(target) is not dict:
      raise TypeError(f"items are set in a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
      # Other keys are refused before they are hashed, because the hash of nested tuples may take exponential time.
      if not isinstance(key, (str, int)):
        raise TypeError(f"{quoted(key)} is used as a key")
      target[key] = value

  def _storage(self, described) -> _Storage:
    kind, storage_type, key, _, size = described
    name = storage_type.name.removeprefix("torch ") if isinstance(storage_type, _Global) else ""
    if kind != "storage" or name not in STORAGES or not isinstance(key, str):
      raise self._refusal(f"asks for {quoted(described)}, which is not a storage of numbers")
    if num_bytes(checked_shape([size], f"storage {key}"), STORAGES[name]) > self._storage_bytes[key]:
      raise ValueError(f"storage {key} is smaller than the pickle claims")
    return _Storage(key, STORAGES[name], size)

  def _call(self, function, arguments: tuple):
    match function:
      case _Global("collections OrderedDict") if arguments == ():
        return {}
      case _Global("torch._utils _rebuild_parameter"):
        return arguments[0]
      case _Global("torch._utils _rebuild_tensor_v2"):
        return self._array(*arguments[:4])
    called = quoted(function.name if isinstance(function, _Global) else function)
    raise self._refusal(f"wants to call {called}, which no state dict needs")

  def _array(self, storage: _Storage, offset: int, shape: tuple, strides: tuple) -> PickledArray:
    shape = checked_shape(shape, "an array")
    contiguous: list[int] = []
    size = 1
    for axis in reversed(shape):
      contiguous.insert(0, size)
      size *= axis
    # The stride of an axis with one element has no meaning, and an empty array has no meaningful strides.
    if size and any(axis > 1 and a != b for axis, a, b in zip(shape, strides, contiguous, strict=True)):
      raise _Refused(
        f"{self._where}: an array of shape {shape} has strides {quoted(strides)}; call .contiguous() before saving it."
      )
    if type(offset) is not int or not 0 <= offset <= storage.size - size:
      raise ValueError(f"an array of {size} numbers begins at {quoted(offset)} in a storage of {storage.size}")
    return PickledArray(storage.key, storage.dtype, offset, shape)

  def _refusal(self, what: str) -> _Refused:
    return _Refused(
      f"{self._where}: its pickle {what}; nothing of it was run. Do not open this file with tools that run pickles."
    )
