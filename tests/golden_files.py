"""Files of arrays that another implementation gave, and how far ours are from them.

A file is an npz of arrays and a description, which is the json beside it or its own array `meta_json`. An array `name` may
also be there in float64, as `name__f64` or `name_f64`; then ours is compared with that one.
"""

import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
OUTPUT_BOUND = 2e-5
GRADIENT_BOUND = 1e-5
_WIDE = re.compile("__?f64$")
# A trajectory of optimizer steps from the initial model has that model's description.
_TRAJECTORY, _START = "_train60", "_init"


class Golden(NamedTuple):
  """One file: its name, its arrays and its description, which is empty where there is none."""

  name: str
  arrays: dict[str, np.ndarray]
  description: dict[str, Any]


class Row(NamedTuple):
  """One row of the parity table: the largest errors, None where nothing was compared; or why there is no model."""

  case: str
  output: float | None = None
  gradient: float | None = None
  output_bound: float = OUTPUT_BOUND
  missing: str = ""

  @property
  def passes(self) -> bool:
    """Whether all that was compared is within its bound; NaN is not."""
    bounds = ((self.output, self.output_bound), (self.gradient, GRADIENT_BOUND))
    return all(error is None or error <= bound for error, bound in bounds)


class NoModelError(Exception):
  """Says why the library has no model for a description."""


# Runs all that a file holds.
Builder = Callable[[Golden], list[Row]]


@functools.cache
def read(path: pathlib.Path) -> Golden:
  """Reads a file."""
  with np.load(path) as archive:
    arrays = dict(archive)
  beside = path.with_suffix(".json")
  if "meta_json" in arrays:
    description = json.loads(str(arrays.pop("meta_json")))
  elif beside.is_file():
    description = json.loads(beside.read_text())
  elif path.stem.endswith(_TRAJECTORY) and (start := _start_of(path)).is_file():
    description = read(start).description
  else:
    description = {}
  return Golden(path.stem, arrays, description)


def golden(name: str) -> Golden:
  """One of the project's own files, by its path without its ending."""
  return read(GOLDEN / f"{name}.npz")


def under(arrays, prefix, suffix=""):
  """Returns the arrays whose names have this prefix and suffix, under names without them."""
  return {
    name[len(prefix) : len(name) - len(suffix)]: array
    for name, array in arrays.items()
    if name.startswith(prefix) and name.endswith(suffix)
  }


def widest(arrays, prefix=""):
  """Returns the arrays with this prefix under names without it, each in float64 where the file has it so."""
  found = under(arrays, prefix)
  wide = {_WIDE.sub("", name): array for name, array in found.items() if _WIDE.search(name)}
  return {name: array for name, array in found.items() if not _WIDE.search(name)} | wide


def largest(ours, theirs):
  """Returns the largest absolute difference, infinity for different shapes."""
  if np.shape(ours) != np.shape(theirs):
    return np.inf
  return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)))


def output_error(ours, theirs):
  """Returns the largest absolute difference in any of ours that the file has, which must have the logits."""
  assert "logits" in theirs, sorted(theirs)
  return max(largest(ours[name], theirs[name]) for name in ours if name in theirs)


def gradient_error(ours, theirs):
  """Returns the largest max|g − ĝ| / max|ĝ| of any of theirs; where ĝ is 0, the largest |g|.

  The gradient of a single number that multiplies whole activations is a sum of many terms that nearly cancel, where a norm
  follows that undoes the factor. In float32 only few of its digits are right, in any implementation. It is therefore
  measured by the largest gradient of the file.
  """
  assert ours.keys() == theirs.keys(), set(ours) ^ set(theirs)
  sizes = {name: float(np.max(np.abs(gradient))) for name, gradient in theirs.items()}
  sizes |= {name: max(sizes.values()) for name, gradient in theirs.items() if np.size(gradient) == 1}
  return max(largest(ours[name], theirs[name]) / (sizes[name] or 1.0) for name in theirs)


def _start_of(path):
  return path.with_name(path.name.replace(_TRAJECTORY, _START))
