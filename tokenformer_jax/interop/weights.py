"""Opens weights in every form: a file of either format, a folder with one, with shards, or with layer files."""

import json
import os
import pathlib

from etils import epath

from tokenformer_jax.interop.pipeline_folder import is_pipeline_folder, newest_step, read_pipeline_folder
from tokenformer_jax.interop.safetensors_file import read_safetensors
from tokenformer_jax.interop.stored_array import Weights, quoted
from tokenformer_jax.interop.torch_file import read_torch
from tokenformer_jax.paths import user_path

# Endings of weight files. Of several kinds on the hub, the first is downloaded.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# In a folder, the first of these that exists is read.
WEIGHT_FILES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)
_LARGEST_INDEX = 1 << 20


def open_weights(path: str | os.PathLike) -> Weights:
  """Reads the descriptions of all arrays in a weight file or a folder; the arrays are read later.

  The first bytes of a file tell its format; its name does not.

  Args:
    path: a safetensors file, a file of `torch.save`, the index of several such files, a folder with one of
      these, or a checkpoint folder of DeepSpeed's pipeline (`pipeline_folder`); local or a URI.

  Raises:
    ValueError: there is no such file, it is not a weight file, or it is damaged.
  """
  found = user_path(path)
  if found.is_dir():
    return _open_folder(found)
  if not found.is_file():
    raise ValueError(f"{found}: there is no such file or folder.")
  if found.name.endswith(".index.json"):
    return _sharded(found)
  with found.open("rb") as file:
    first = file.read(64)
  if first.startswith(b"PK\x03\x04"):
    return read_torch(found)
  if first[8:9] == b"{":
    return read_safetensors(found)
  raise ValueError(f"{found}: {_description(first)}; expected a safetensors file or a file of torch.save.")


def _open_folder(folder: epath.Path) -> Weights:
  for name in WEIGHT_FILES:
    if (folder / name).is_file():
      return open_weights(folder / name)
  if is_pipeline_folder(folder):
    return read_pipeline_folder(folder)
  newest = newest_step(folder)
  if newest != folder:
    return open_weights(newest)
  found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
  if len(found) != 1:
    raise ValueError(
      f"{folder}: has none of {', '.join(WEIGHT_FILES)}, no layer files of DeepSpeed's pipeline, and {len(found)} files "
      f"that end in {', '.join(SUFFIXES)}; name the file itself."
    )
  return open_weights(found[0])


def _sharded(index: epath.Path) -> Weights:
  """Reads the files that an index names in its `weight_map` from array name to file name."""
  try:
    with index.open("rb") as file:
      raw = file.read(_LARGEST_INDEX + 1)
    if len(raw) > _LARGEST_INDEX:
      raise ValueError(f"it has more than {_LARGEST_INDEX} bytes")
    weight_map = json.loads(raw)["weight_map"]  # From bytes, so that a byte-order mark is accepted.
    names = sorted({str(name) for name in weight_map.values()})
  except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{index}: not an index of weight files ({quoted(error)}).") from None
  for name in names:
    if pathlib.PurePath(name).name != name or not name.endswith(SUFFIXES):
      raise ValueError(f"{index}: {quoted(name)} is not a weight file in the folder of the index.")
  shards = {name: open_weights(index.parent / name) for name in names}
  lost = [array for array, name in weight_map.items() if array not in shards[name].arrays]
  if lost:
    raise ValueError(
      f"{index}: {quoted(lost[0])} is not in {weight_map[lost[0]]}, and {len(lost) - 1} other arrays are not in the "
      "files that the index names; get the files again."
    )
  metadata: dict[str, str] = {}
  for name, shard in shards.items():
    for key, value in shard.metadata.items():
      if metadata.setdefault(key, value) != value:
        raise ValueError(f"{index}: {name} has another {quoted(key)} in its metadata than the files before it.")
  return Weights(str(index), {array: shards[name].arrays[array] for array, name in weight_map.items()}, metadata)


def _description(first: bytes) -> str:
  """What a file with these first bytes is, if it is not a weight file."""
  if not first:
    return "an empty file"
  if first.lstrip().startswith(b"<"):
    return "an HTML or XML page, perhaps the error page of a failed download"
  if first.startswith(b"version https://git-lfs"):
    return "a git-lfs pointer instead of the file it refers to (run git lfs pull)"
  if first.startswith(b"\x80"):
    return "a bare pickle, as PyTorch wrote before version 1.6, which is refused because it could run code"
  return f"it begins with {quoted(first[:16])}, which no weight file does"
