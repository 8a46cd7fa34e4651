"""Compares our float32 results with those of other implementations, which are float64 where their files have it so.

    python -m tests.parity_table [FOLDER …]

prints a row for each file of the folders, by default of `tests/golden`. The errors are the
largest absolute difference of the outputs, and the largest max|g − ĝ| / max|ĝ| of any gradient. The model is built from the
file's own description. The exit code is 1 if an error is over its bound; a description for which there is no model gets a
row that says so, and counts as an error with `--strict`.
"""

import argparse
import pathlib
import sys

import jax

from tests import parity_dense, parity_encoders, parity_simplified, parity_tokenformer
from tests.golden_files import GOLDEN, GRADIENT_BOUND, Builder, NoModelError, Row, read

# Module with `recognises(description)` and `rows(golden)`, for each family of models.
_FAMILIES = (parity_tokenformer, parity_dense, parity_encoders, parity_simplified)


def builder_for(description) -> Builder:
  """What runs the files with such a description.

  Raises:
    NoModelError: the library has no model for it.
  """
  if not description:
    raise NoModelError("no description beside it or in it")
  for family in _FAMILIES:
    if family.recognises(description):
      return family.rows
  name = description.get("config", description)
  kind = (
    name.get("model_type") or next(iter(name.get("architectures") or []), None) or ", ".join(list(name)[:4]) + ", …"
  )
  raise NoModelError(f"no model for {kind}")


def rows_of(path: pathlib.Path) -> list[Row]:
  """The rows of one file."""
  golden = read(path)
  try:
    return builder_for(golden.description)(golden)
  except NoModelError as error:
    return [Row(golden.name, missing=str(error))]


def formatted(row: Row) -> str:
  """One line of the table. An error over its bound names it."""
  if row.missing:
    return f"| {row.case} | {row.missing} | – |"
  return f"| {row.case} | {_number(row.output, row.output_bound)} | {_number(row.gradient, GRADIENT_BOUND)} |"


def _number(error, bound):
  if error is None:
    return "–"
  return f"{error:.1e}" if error <= bound else f"**{error:.1e}** > {bound:.0e}"


def main(arguments: list[str] | None = None) -> int:
  """Prints the table and returns the exit code."""
  parser = argparse.ArgumentParser(prog="python -m tests.parity_table", description=__doc__.partition("\n")[0])
  parser.add_argument("folders", nargs="*", type=pathlib.Path, metavar="FOLDER", help="files here and in folders below")
  parser.add_argument("--strict", action="store_true", help="a file without a model counts as an error")
  options = parser.parse_args(arguments)
  paths = [path for folder in options.folders or [GOLDEN] for path in sorted(folder.rglob("*.npz"))]
  if not paths:
    print(f"no npz file in {', '.join(map(str, options.folders))}: name a folder of golden files.", file=sys.stderr)
    return 2
  print("| golden file, case | largest output error | largest gradient error |\n|---|---|---|", flush=True)
  failed = False
  with jax.default_matmul_precision("highest"):
    for path in paths:
      for row in rows_of(path):
        print(formatted(row), flush=True)
        failed |= not row.passes or (options.strict and bool(row.missing))
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())
