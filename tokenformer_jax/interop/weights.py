"""Opening weights, whatever they are in: a file of either format, or a folder with one or with shards."""

import json
import os
import pathlib

from tokenformer_jax.interop.safetensors_file import read_safetensors
from tokenformer_jax.interop.stored_array import Weights, quoted
from tokenformer_jax.interop.torch_file import read_torch

# In a folder, the first of these that is there.
WEIGHT_FILES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)
_LARGEST_INDEX = 1 << 20


def open_weights(path: str | os.PathLike) -> Weights:
  """The arrays in a weight file or a folder, none of them read yet.

  A file's format is told by its first bytes and not by its name.

  Raises:
    ValueError: nothing there, something else than weights, or a damaged file.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = _file_in(path)
  if not path.is_file():
    raise ValueError(f"{path}: no such file or folder.")
  if path.name.endswith(".index.json"):
    return _sharded(path)
  with path.open("rb") as file:
    first = file.read(64)
  if first.startswith(b"PK\x03\x04"):
    return read_torch(path)
  if first[8:9] == b"{":
    return read_safetensors(path)
  raise ValueError(f"{path}: {_looks_like(first)}; expected a .safetensors file or a .bin of torch.save.")


def _file_in(folder: pathlib.Path) -> pathlib.Path:
  for name in WEIGHT_FILES:
    if (folder / name).is_file():
      return folder / name
  found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
  if len(found) != 1:
    raise ValueError(
      f"{folder}: has none of {', '.join(WEIGHT_FILES)}, and {len(found)} files that end in "
      ".safetensors or .bin; name the file itself."
    )
  return found[0]


def _sharded(index: pathlib.Path) -> Weights:
  """Several files as one, by an index's `weight_map` from array to file name."""
  try:
    if index.stat().st_size > _LARGEST_INDEX:
      raise ValueError(f"has {index.stat().st_size} bytes, at most {_LARGEST_INDEX} are read")
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    names = sorted({str(name) for name in weight_map.values()})
  except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{index}: no index of weight files ({quoted(error)}).") from None
  for name in names:
    if pathlib.PurePath(name).name != name or not name.endswith((".safetensors", ".bin")):
      raise ValueError(f"{index}: {quoted(name)} is no weight file in the folder of the index.")
  shards = {name: open_weights(index.parent / name) for name in names}
  lost = [array for array, name in weight_map.items() if array not in shards[name].arrays]
  if lost:
    raise ValueError(
      f"{index}: {quoted(lost[0])} is not in {weight_map[lost[0]]}, nor are {len(lost) - 1} "
      "more where the index puts them; get the files again."
    )
  return Weights(str(index), {array: shards[name].arrays[array] for array, name in weight_map.items()})


def _looks_like(first: bytes) -> str:
  if not first:
    return "an empty file"
  if first.lstrip().startswith(b"<"):
    return "an HTML or XML page, perhaps a download that was refused"
  if first.startswith(b"version https://git-lfs"):
    return "a git-lfs pointer and not the file it stands for (git lfs pull)"
  if first.startswith(b"\x80"):
    return "a bare pickle, as PyTorch wrote before version 1.6, and not opened because it could run code"
  return f"begins with {quoted(first[:16])}, and so is no weight file"
