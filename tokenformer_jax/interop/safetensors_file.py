"""Safetensors files: eight bytes of header length, a JSON header, then the arrays' bytes.

The format leaves much open that a hostile or broken file can use; the limits here are tighter than its own.
"""

import json
import pathlib
import re
import struct
from collections.abc import Mapping

import numpy as np

from tokenformer_jax.interop.stored_array import (
  DTYPES,
  StoredArray,
  Weights,
  checked_shape,
  num_bytes,
  quoted,
  written_whole,
)

_NAMES = {
  "float64": "F64",
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
  "int64": "I64",
  "int32": "I32",
  "int16": "I16",
  "int8": "I8",
  "uint8": "U8",
  "bool": "BOOL",
}
_DTYPES = {theirs: ours for ours, theirs in _NAMES.items()}
# The released 1.5B's header takes 60 kB. JSON of a megabyte is parsed in milliseconds.
_LARGEST_HEADER = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


def read_safetensors(path: pathlib.Path) -> Weights:
  """What the file holds; of its arrays only the header's account is read.

  Raises:
    ValueError: it is no safetensors file, or one with a header above 1 MiB, a name twice or of other
      characters than letters, digits, `_`, `-` and `.`, an unknown type, or arrays that overlap, leave
      gaps, or do not fill the file.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
      raise ValueError(
        f"{path}: a header of {length} bytes in a file of {size}; it is truncated or no safetensors file, get it again."
      )
    if length > _LARGEST_HEADER:
      raise ValueError(f"{path}: a header of {length} bytes; more than {_LARGEST_HEADER} are refused.")
    raw = file.read(length)
  header = _parse(raw, path)
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
    raise ValueError(f"{path}: __metadata__ is {quoted(metadata)}; it must hold strings.")
  arrays = {name: _array(name, entry, path, 8 + length) for name, entry in header.items()}
  end = 8 + length
  # By their ends too, for an empty array begins where the next one does.
  spans = sorted(
    (array.offset, array.offset + num_bytes(array.shape, array.dtype), name) for name, array in arrays.items()
  )
  for start, stop, name in spans:
    if start != end:
      raise ValueError(
        f"{path}: {name} begins at byte {start}, the array before it ends at {end}; the file is damaged, get it again."
      )
    end = stop
  if end != size:
    raise ValueError(
      f"{path}: its arrays end at byte {end}, the file at {size}; it is truncated or damaged, get it again."
    )
  return Weights(str(path), arrays, metadata)


def write_safetensors(path: pathlib.Path, arrays: Mapping, dtype: str, metadata: Mapping[str, str]) -> None:
  """Writes `arrays`, each with a `shape` and `read()`, one after the other in `dtype`."""
  header: dict = {"__metadata__": dict(metadata)}
  end = 0
  for name, array in arrays.items():
    start, end = end, end + num_bytes(array.shape, dtype)
    header[name] = {"dtype": _NAMES[dtype], "shape": list(array.shape), "data_offsets": [start, end]}
  raw = json.dumps(header, separators=(",", ":")).encode()
  raw += b" " * (-len(raw) % 8)
  with written_whole(path) as unfinished, unfinished.open("wb") as file:
    file.write(struct.pack("<Q", len(raw)) + raw)
    for array in arrays.values():
      file.write(np.ascontiguousarray(array.read(), DTYPES[dtype]).view(np.uint8).data)


def _parse(raw: bytes, path: pathlib.Path) -> dict:
  def unique(pairs):
    fields = {}
    for name, value in pairs:
      if name in fields:
        raise ValueError(f"{quoted(name)} occurs twice")
      fields[name] = value
    return fields

  try:
    header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(header, dict):
      raise ValueError("it is no object")
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: broken header ({error}); not a safetensors file, or a damaged one.") from None
  return header


def _array(name: str, entry, path: pathlib.Path, base: int) -> StoredArray:
  where = f"{path}: {quoted(name)}"
  if not _NAME.fullmatch(name) or ".." in name:
    raise ValueError(f"{where} is no array's name; letters, digits, '_', '-' and single '.' are allowed.")
  if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
    raise ValueError(f"{where} is described by {quoted(entry)}; expected dtype, shape and data_offsets.")
  if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
    raise ValueError(f"{where} is of type {quoted(entry['dtype'])}; known: {', '.join(_DTYPES)}.")
  shape, offsets = entry["shape"], entry["data_offsets"]
  if not isinstance(shape, list):
    raise ValueError(f"{where}: {quoted(shape)} is no array's shape.")
  shape, dtype = checked_shape(shape, where), _DTYPES[entry["dtype"]]
  if not (
    isinstance(offsets, list)
    and len(offsets) == 2
    and all(type(offset) is int for offset in offsets)
    and 0 <= offsets[0]
    and offsets[1] - offsets[0] == num_bytes(shape, dtype)
  ):
    raise ValueError(
      f"{where} is at bytes {quoted(offsets)}, but its shape {list(shape)} takes {num_bytes(shape, dtype)}."
    )
  return StoredArray(path, base + offsets[0], shape, dtype)
