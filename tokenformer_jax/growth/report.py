"""What growth did, for people."""

import dataclasses
import math

from tokenformer_jax.growth.plan import LeafPlan


@dataclasses.dataclass(frozen=True)
class GrowthReport:
  """The carried-out plan; prints as a table."""

  leaves: tuple[LeafPlan, ...]

  @property
  def num_parameters(self) -> tuple[int, int]:
    """Parameters before and after."""
    params = [leaf for leaf in self.leaves if leaf.path.startswith("params/")]
    return sum(math.prod(p.old_shape) for p in params), sum(math.prod(p.new_shape) for p in params)

  def __str__(self) -> str:
    rows = [("leaf", "old shape", "new shape", "new rows")]
    rows += [(p.path, str(p.old_shape), str(p.new_shape), p.new_rows.value) for p in self.leaves]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    old, new = self.num_parameters
    return "\n".join([*lines, f"parameters: {old:,} -> {new:,}"])
