"""What a run's data is, in a form that can be stored and compared."""

import hashlib
import os
from typing import Any

WHOLE = 256 * 2**20
BLOCK = 2**20


def check_same(stored: dict[str, Any], now: dict[str, Any]) -> None:
  """Raises ValueError naming the first difference between two data fingerprints.

  Args:
    stored: the fingerprint that lies with a checkpoint.
    now: the fingerprint of the data that is open.
  """
  difference = _first_difference(stored, now, "data")
  if difference:
    path, before, after = difference
    raise ValueError(
      f"{path} was {before!r} when this run began and is {after!r} now: give the old data "
      "back, start a new run, or pass --allow_data_change to go on knowingly."
    )


def _first_difference(a: Any, b: Any, path: str) -> tuple[str, Any, Any] | None:
  if isinstance(a, dict) and isinstance(b, dict):
    children = [(f"{path}.{key}", a.get(key), b.get(key)) for key in [*a, *(k for k in b if k not in a)]]
  elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
    children = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(a, b))]
  else:
    return None if a == b else (path, a, b)
  return next(filter(None, (_first_difference(x, y, p) for p, x, y in children)), None)


def hash_file(path: str | os.PathLike) -> str:
  """SHA-256 of a file's size and bytes; above 256 MiB, of 256 blocks of 1 MiB spread evenly over it."""
  size = os.path.getsize(path)
  digest = hashlib.sha256(size.to_bytes(8, "little"))
  starts = range(0, size, BLOCK)
  if size > WHOLE:
    count = WHOLE // BLOCK
    starts = [(size - BLOCK) * i // (count - 1) for i in range(count)]
  with open(path, "rb") as file:
    for start in starts:
      file.seek(start)
      digest.update(file.read(BLOCK))
  return digest.hexdigest()
