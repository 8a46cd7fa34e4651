"""Safetensors files: eight bytes with the header's length, a JSON header, then the bytes of the arrays.

The format admits much that a hostile or damaged file can use (a name that occurs twice, names such as ../../x, a header of
90 MB); the limits here are tighter. The `safetensors` package is not used: it reads only local files, does not report
names that occur twice, and its writer needs all arrays in memory. The tests compare both directions with it.
"""

import json
import re
import struct
from collections.abc import Mapping

import numpy as np
from etils import epath

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
# The header of the released 1.5B model has 60 kB. Parsing a megabyte of JSON takes milliseconds.
_LARGEST_HEADER = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


def read_safetensors(path: epath.Path) -> Weights:
  """Reads the header of a safetensors file; the arrays are read later.

  Args:
    path: the file, local or in an object store.

  Returns:
    The arrays and the metadata strings.

  Raises:
    ValueError: the file is not in the safetensors format, its header is larger than 1 MiB, a name occurs
      twice or has characters other than letters, digits, `_`, `-` and `.`, a type is unknown, or the arrays
      overlap, leave gaps, or do not fill the file.
  """
  with path.open("rb") as file:
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
      raise ValueError(
        f"{path}: the header claims {length} bytes in a file of {size}; the file is truncated or is not in the "
        "safetensors format, get it again."
      )
    if length > _LARGEST_HEADER:
      raise ValueError(f"{path}: the header has {length} bytes; more than {_LARGEST_HEADER} are refused.")
    raw = file.read(length)
  header = _parse(raw, path)
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
    raise ValueError(f"{path}: __metadata__ is {quoted(metadata)}; all its values must be strings.")
  arrays = {name: _array(name, entry, path, 8 + length) for name, entry in header.items()}
  end = 8 + length
  # The ends take part in the sorting, because an empty array begins at the same byte as the next one.
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
      f"{path}: the arrays end at byte {end} and the file at {size}; it is truncated or damaged, get it again."
    )
  return Weights(str(path), arrays, metadata)


def write_safetensors(path: epath.Path, arrays: Mapping, dtype: str, metadata: Mapping[str, str]) -> None:
  """Writes a safetensors file, completely or not at all, with one array in memory at a time.

  Args:
    path: the file to write.
    arrays: name -> object with a `shape` and a `read()` that returns the array.
    dtype: the type of all arrays in the file, a name in `DTYPES`.
    metadata: strings to store beside the arrays.
  """
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


def _parse(raw: bytes, path: epath.Path) -> dict:
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
      raise ValueError("it is not a JSON object")
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{path}: broken header ({error}); the file is damaged or is not in the safetensors format."
    ) from None
  return header


def _array(name: str, entry, path: epath.Path, base: int) -> StoredArray:
  where = f"{path}: {quoted(name)}"
  if not _NAME.fullmatch(name) or ".." in name:
    raise ValueError(f"{where} is not a valid array name; letters, digits, '_', '-' and single '.' are allowed.")
  if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
    raise ValueError(f"{where} is described by {quoted(entry)}; expected dtype, shape and data_offsets.")
  if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
    raise ValueError(f"{where} is of type {quoted(entry['dtype'])}; known: {', '.join(_DTYPES)}.")
  shape, offsets = entry["shape"], entry["data_offsets"]
  if not isinstance(shape, list):
    raise ValueError(f"{where}: {quoted(shape)} is not a valid array shape.")
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
