"""Results as a table for people and as JSON for programs."""

import json
import math
import os
import pathlib


def table(results: dict[str, dict[str, float]]) -> str:
  """Lines `task  metric  value ± standard error`; groups within a task are left to the JSON."""
  rows = [("task", "metric", "value")]
  for task, metrics in results.items():
    for name, value in metrics.items():
      if name.endswith("_stderr") or "/" in name:
        continue
      error = metrics.get(f"{name}_stderr", math.nan)
      shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
      rows.append((task, name, shown + (f" ± {error:.4f}" if math.isfinite(error) else "")))
  widths = [max(len(row[column]) for row in rows) for column in range(3)]
  return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def write_json(path: str | os.PathLike, results: dict) -> None:
  """Writes the results whole or not at all, making the folder; a number that is not finite becomes null."""

  def clean(node):
    if isinstance(node, dict):
      return {key: clean(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node

  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(path.name + ".unfinished")
  unfinished.write_text(json.dumps(clean(results), indent=2) + "\n", encoding="utf-8")
  unfinished.replace(path)
