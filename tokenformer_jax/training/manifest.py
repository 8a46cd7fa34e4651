"""The manifest of a checkpoint: the size and SHA-256 of its files, so that damage is found before anything is used.

Orbax and tensorstore load most single flipped bits as other numbers. The first process writes STEP/manifest.json after
all files are there and before Orbax commits the checkpoint, so that a committed step has a manifest.
"""

import concurrent.futures
import hashlib
import json
import os
from typing import Any

from etils import epath

from tokenformer_jax.paths import is_uri

FORMAT = 1  # Of what lies in the folder of a step; increased when an earlier version could not read it.
MANIFEST = "manifest.json"
# Orbax writes these when it commits, and needs neither to read a checkpoint from a disk.
_WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_PARTS = ("model", "optimizer", "record")
_BLOCK = 2**20  # Bytes.
_THREADS = min(8, os.cpu_count() or 1)


def write_manifest(folder: epath.Path) -> None:
  """Writes the manifest of the files in the folder of a step, which Orbax is about to commit; all are on disk then."""
  names = sorted(_files(folder))
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = list(pool.map(lambda name: _sha256(folder / name, to_disk=True), names))
  content = {
    "format": FORMAT,
    "step": int(
      folder.name.partition(".")[0]
    ),  # Until it is committed, the folder is called STEP.orbax-checkpoint-tmp.
    "files": {name: [size, digest] for name, (size, digest) in zip(names, digests)},
  }
  path = folder / MANIFEST
  path.write_text(json.dumps({"sha256": _digest(content), **content}))
  _sha256(path, to_disk=True)


def incomplete(folder: epath.Path) -> str:
  """Why the folder of a step is not whole, or "". Only names and sizes are compared, so it takes no time.

  A folder that an earlier version wrote has no manifest; it is whole where all its parts are there.

  Raises:
    ValueError: a newer version wrote the folder.
  """
  if not folder.is_dir():
    return "it is not a folder"
  if missing := [part for part in _PARTS if not (folder / part).is_dir()]:
    return f"it has no {missing[0]}"
  if is_uri(folder) and not (folder / "commit_success.txt").exists():
    return "it was never committed"
  content, problem = _read(folder)
  if problem:
    return problem
  if content is None:
    return ""
  if str(content["step"]) != folder.name:
    return f"its {MANIFEST} is that of step {content['step']}"
  present = _files(folder)
  for name, (size, _) in content["files"].items():
    if present.get(name) != size:
      return f"its file {name} is missing" if name not in present else f"its file {name} has another size"
  return ""


def damaged(folder: epath.Path, share: int = 0, shares: int = 1) -> str:
  """Which file of a whole step differs from the manifest, or "". Every `shares`-th file is read, from `share` on.

  A step without a manifest cannot be checked.
  """
  problem = incomplete(folder)
  content, _ = _read(folder)
  if problem or content is None:
    return problem
  names = sorted(content["files"])[share::shares]

  def found(name: str) -> str:
    try:
      same = list(_sha256(folder / name)) == content["files"][name]
    except OSError as error:
      return f"its file {name} cannot be read ({error.strerror})"
    return "" if same else f"its file {name} is not what was saved"

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:  # hashlib releases the GIL.
    return next(filter(None, pool.map(found, names)), "")


def has_manifest(folder: epath.Path) -> bool:
  """Whether the files of a step can be checked."""
  return (folder / MANIFEST).exists()


def read_record(folder: epath.Path) -> dict[str, Any]:
  """Returns the record of a step, with the format as its entry `format` if it has one. Raises ValueError."""
  try:
    record = json.loads((folder / "record" / "metadata").read_text())
  except (OSError, ValueError, RecursionError):
    record = None
  if not isinstance(record, dict):
    raise ValueError(f"{folder}: its record cannot be read; use another checkpoint.")
  return record


def _read(folder: epath.Path) -> tuple[dict[str, Any] | None, str]:
  """Returns (the manifest, None for a folder of an earlier version; what is wrong with it, or "")."""
  path = folder / MANIFEST
  if not path.exists():
    try:
      return None, f"its {MANIFEST} is missing" if "format" in read_record(folder) else ""
    except ValueError:
      return None, "its record cannot be read"
  try:
    content = json.loads(path.read_text())
    digest = content.pop("sha256")
  except (OSError, ValueError, AttributeError, KeyError, RecursionError):
    return None, f"its {MANIFEST} cannot be read"
  if digest != _digest(content):
    return None, f"its {MANIFEST} is not what was saved"
  if content["format"] > FORMAT:
    raise ValueError(
      f"{folder}: a newer version of tokenformer_jax wrote this checkpoint (format {content['format']}, this one reads up "
      f"to {FORMAT}); install that version."
    )
  return content, ""


def _digest(content: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(folder: epath.Path, below: str = "") -> dict[str, int]:
  """Maps the path of each file in the folder of a step, except those that are written later, to its size."""
  sizes: dict[str, int] = {}
  for path in folder.iterdir():
    name = below + path.name
    if path.is_dir():
      sizes |= _files(path, name + "/")
    elif name not in (MANIFEST, *_WRITTEN_LATER):
      sizes[name] = path.stat().length
  return sizes


def _sha256(path: epath.Path, to_disk: bool = False) -> tuple[int, str]:
  """Returns (size, SHA-256). With `to_disk`, a local file survives a loss of power when this returns."""
  hashed, size = hashlib.sha256(), 0
  with path.open("rb") as file:
    while block := file.read(_BLOCK):
      hashed.update(block)
      size += len(block)
    if to_disk and not is_uri(path):
      os.fsync(file.fileno())
  return size, hashed.hexdigest()
