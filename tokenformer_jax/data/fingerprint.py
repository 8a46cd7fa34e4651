"""Fingerprints of a run's data, which are stored with its checkpoints and compared when it resumes."""

import hashlib
import os
from typing import Any

from tokenformer_jax.data.tokenizer import Tokenizer

WHOLE = 256 * 2**20
BLOCK = 2**20
SHOWN = 200  # Characters of a value in a message.


def check_same(stored: dict[str, Any], now: dict[str, Any], tokenizer: Tokenizer | None = None) -> None:
  """Raises ValueError naming the first difference between two data fingerprints.

  Args:
    stored: the fingerprint in a checkpoint.
    now: the fingerprint of the data that is open.
    tokenizer: the tokenizer that is open. If it is given, the stored fingerprint of the tokenizer may be in the form of
      an earlier release (see `Tokenizer.matches`).
  """
  if tokenizer is not None and tokenizer.matches(stored.get("tokenizer", "")):
    stored = {**stored, "tokenizer": now["tokenizer"]}
  difference = _first_difference(stored, now, "data")
  if difference:
    path, before, after = difference
    way_out = "set data.tokenizer to the work folder's" if path == "data.tokenizer" else "restore the old data"
    raise ValueError(
      f"{path} was {_shown(before)} when this run began and is {_shown(after)} now: {way_out}, start a new run, or "
      "pass --allow_data_change to resume with other data."
    )


def _first_difference(a: Any, b: Any, path: str) -> tuple[str, Any, Any] | None:
  """(path, value in `a`, value in `b`) of the first leaf that differs; None stands for a missing value."""
  if isinstance(a, dict) and isinstance(b, dict):
    children = [(f"{path}.{key}", a.get(key), b.get(key)) for key in [*a, *(k for k in b if k not in a)]]
  elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
    children = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(a, b))]
  else:
    return None if a == b else (path, a, b)
  return next(filter(None, (_first_difference(x, y, p) for p, x, y in children)), None)


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def hash_file(path: str | os.PathLike, whole: int | None = None) -> str:
  """SHA-256, hexadecimal, of a file's size and bytes.

  Above `whole` bytes (by default 256 MiB), blocks of 1 MiB are hashed that are spread evenly over the file and are
  `whole` bytes together (at least two), so that opening a large corpus takes no longer than opening a small one.
  Truncation and replacement are found; a change between the blocks is not.
  """
  size = os.path.getsize(path)
  digest = hashlib.sha256(size.to_bytes(8, "little"))
  count = max((whole or WHOLE) // BLOCK, 2)
  is_whole = size <= count * BLOCK
  starts = range(0, size, BLOCK) if is_whole else [(size - BLOCK) * i // (count - 1) for i in range(count)]
  with open(path, "rb") as file:
    for start in starts:
      file.seek(start)
      digest.update(file.read(BLOCK))
  return digest.hexdigest()
