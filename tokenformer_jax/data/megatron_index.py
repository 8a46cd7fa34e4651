"""The .idx file of a Megatron or GPT-NeoX data set: the type of the ids in the .bin and where documents end."""

import pathlib
import struct

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # Magic, version, code of the dtype, number of sequences, number of bounds.
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_LONGEST = 2**31 - 1


def read_index(path: pathlib.Path) -> tuple[np.dtype, np.ndarray]:
  """Reads an index.

  Args:
    path: the .idx file.

  Returns:
    The dtype of the ids, and [documents] int64 where each document ends in the .bin; empty documents are left out.

  Raises:
    ValueError: the file is not such an index, is truncated or contradicts itself.
  """
  raw = path.read_bytes()
  if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
    raise ValueError(f"{path} is not a Megatron index (MMIDIDX): write it again with --dataset-impl mmap.")
  _, version, code, sequences, bounds = _HEADER.unpack_from(raw)
  if version != 1 or code not in _DTYPES:
    raise ValueError(
      f"{path}: version {version} with ids of type {code} cannot be read; version 1 with "
      f"types {', '.join(map(str, _DTYPES))} can."
    )
  expected = _HEADER.size + 12 * sequences + 8 * bounds
  if len(raw) < expected:
    raise ValueError(f"{path} has {len(raw)} bytes and its header says {expected}: it is truncated; write it again.")
  dtype = np.dtype(_DTYPES[code])
  sizes = np.frombuffer(raw, "<i4", sequences, _HEADER.size)
  pointers = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
  documents = np.frombuffer(raw, "<i8", bounds, _HEADER.size + 12 * sequences)
  sequence_ends = np.cumsum(sizes, dtype=np.int64)
  if not sequences or np.any(pointers[1:] != sequence_ends[:-1] * dtype.itemsize) or pointers[0]:
    raise ValueError(f"{path}: its sequences do not lie end to end in the .bin file, as they must; write it again.")
  if bounds < 2 or documents[0] or documents[-1] != sequences or np.any(np.diff(documents) < 0):
    raise ValueError(
      f"{path}: its document bounds do not increase from 0 to its {sequences} sequences; write it again."
    )
  ends = np.concatenate([[0], sequence_ends])[documents[1:]]
  return dtype, ends[np.diff(ends, prepend=0) > 0]


def write_index(path: pathlib.Path, dtype: np.dtype, lengths: np.ndarray) -> None:
  """Writes the index of documents that lie end to end, each as one sequence.

  Args:
    path: the .idx file.
    dtype: the type of the ids in the .bin, one that the format knows.
    lengths: [documents] the number of ids of each.

  Raises:
    ValueError: a document has more ids than the format can say.
  """
  code = next(code for code, known in _DTYPES.items() if known == dtype)
  lengths = np.asarray(lengths)
  if lengths.max(initial=0) > _LONGEST:
    raise ValueError(
      f"{path}: document {int(lengths.argmax())} has {lengths.max()} ids and the format holds at most {_LONGEST} "
      "in one document: split it."
    )
  pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
  with open(path, "wb") as file:
    file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
    for array, kind in ((lengths, "<i4"), (pointers, "<i8"), (np.arange(len(lengths) + 1), "<i8")):
      file.write(np.asarray(array).astype(kind).tobytes())
