"""Results as a table for people and as JSON for programs.

A metric's standard error has the metric's name with `_stderr`. Metrics of EleutherAI's harness may have a filter behind
a comma, which the standard error keeps: `exact_match,strict-match` and `exact_match_stderr,strict-match`.
"""

import json
import math
import os

from tokenformer_jax.paths import replace_text, user_path

Metrics = dict[str, int | float]
Results = dict[str, Metrics]  # By the name of the task or text.


def table(results: Results) -> str:
  """Lines `task  metric  value ± standard error`; metrics of groups within a task are only in the JSON."""
  rows = [("task", "metric", "value")]
  for task, metrics in results.items():
    for name, value in metrics.items():
      if is_stderr(name) or "/" in name:
        continue
      error = metrics.get(stderr_name(name), math.nan)
      shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if value < 1e6 else f"{value:.4e}"
      rows.append((task, name, shown + (f" ± {error:.4f}" if math.isfinite(error) else "")))
  widths = [max(len(row[column]) for row in rows) for column in range(3)]
  return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def stderr_name(name: str) -> str:
  """The name of the standard error of the metric `name`."""
  metric, comma, filter_name = name.partition(",")
  return f"{metric}_stderr{comma}{filter_name}"


def is_stderr(name: str) -> bool:
  """Whether `name` is that of a standard error."""
  return name.partition(",")[0].endswith("_stderr")


class Report:
  """Results as they come: the JSON file is written after each, and the table is printed at the end, even of a failure.

  Used as a context manager, so that a task that fails does not lose the results of the tasks before it. The path is
  checked at the beginning: its folder is made and must take files.

  Args:
    path: the JSON file, local or a URI; None writes none.
    show: whether the table is printed.

  Raises:
    ValueError: an empty path or a folder.
    OSError: a folder that cannot be made or written.
  """

  def __init__(self, path: str | os.PathLike | None, show: bool = True):
    self.results: Results = {}
    self._path, self._show = None if path is None else user_path(path, "output"), show
    if self._path is None:
      return
    if self._path.is_dir():
      raise ValueError(f"output={self._path} is a folder; name a file in it, such as {self._path / 'scores.json'}.")
    self._path.parent.mkdir(parents=True, exist_ok=True)
    trial = self._path.with_name(self._path.name + ".unfinished")
    trial.write_text("")
    trial.unlink()

  def add(self, name: str, metrics: Metrics) -> None:
    """Adds the metrics of a task or text and writes the file."""
    self.results[name] = metrics
    if self._path is not None:
      write_json(self._path, self.results)

  def __enter__(self) -> "Report":
    return self

  def __exit__(self, *exception) -> None:
    if self._show and self.results:
      print(table(self.results), flush=True)


def write_json(path: str | os.PathLike, results: Results) -> None:
  """Writes the results completely or not at all; a number that is not finite becomes null, for JSON has no other."""

  def finite(node):
    if isinstance(node, dict):
      return {key: finite(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node

  replace_text(user_path(path, "output"), json.dumps(finite(results), indent=2) + "\n")
