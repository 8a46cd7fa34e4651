"""What growth did, for people."""

import dataclasses
import math
from collections import Counter

from tokenformer_jax.growth.plan import LeafPlan, NewRows


@dataclasses.dataclass(frozen=True)
class GrowthReport:
  """The plan that was carried out; prints as a table."""

  leaves: tuple[LeafPlan, ...]

  @property
  def num_parameters(self) -> tuple[int, int]:
    """Parameters before and after."""
    params = [leaf for leaf in self.leaves if leaf.path.startswith("params/")]
    return sum(math.prod(p.old_shape) for p in params), sum(math.prod(p.new_shape) for p in params)

  @property
  def summary(self) -> str:
    """One line: how many leaves were copied, extended and reset, and the numbers of parameters."""
    resets = (NewRows.NEW_TAU, NewRows.SCALED_TAU)
    kinds = Counter(
      "reset" if leaf.new_rows in resets else "copied" if leaf.new_rows is NewRows.NONE else "extended"
      for leaf in self.leaves
    )
    old, new = self.num_parameters
    leaves = ", ".join(f"{kinds[kind]} leaves {kind}" for kind in ("copied", "extended", "reset"))
    return f"{old:,} -> {new:,} parameters; {leaves}."

  def __str__(self) -> str:
    rows = [("leaf", "old shape", "new shape", "new rows")]
    rows += [(p.path, str(p.old_shape), str(p.new_shape), p.new_rows.value) for p in self.leaves]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    old, new = self.num_parameters
    return "\n".join([*lines, f"parameters: {old:,} -> {new:,}"])
