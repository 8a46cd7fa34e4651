"""The tables of a run, written as JSON and as a markdown page after every row."""

import json
import os
import pathlib


class Results:
  """Tables by section. A process that ends early loses nothing that was added before.

  Args:
    folder: has, or gets, `results.json` and `results.md`. Tables that are already in it are kept.
  """

  def __init__(self, folder: str):
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    path = self.folder / "results.json"
    self._all = json.loads(path.read_text()) if path.exists() else {"about": {}, "rates": {}, "sections": {}}

  @property
  def about(self) -> dict:
    """Device, versions, command and time."""
    return self._all["about"]

  @property
  def rates(self) -> dict:
    """Measured rates that other sections refer to: `product` in FLOP/s, `copy` and `read` in bytes/s."""
    return self._all["rates"]

  def status(self, section: str) -> str:
    return self._all["sections"].get(section, {}).get("status", "")

  def set_status(self, section: str, status: str) -> None:
    """Notes that a section runs, is done, failed or was skipped, and writes both files."""
    self._all["sections"].setdefault(section, {"tables": {}})["status"] = status
    self.write()

  def add(self, section: str, table: str, **cells) -> None:
    """Adds a row to a table, and writes both files."""
    tables = self._all["sections"].setdefault(section, {"status": "running", "tables": {}})["tables"]
    tables.setdefault(table, []).append(cells)
    print(f"{section} | {table}: " + ", ".join(f"{name} {_text(cell)}" for name, cell in cells.items()), flush=True)
    self.write()

  def write(self) -> None:
    for name, text in (("results.json", json.dumps(self._all, indent=1)), ("results.md", self._page())):
      unfinished = self.folder / (name + ".unfinished")
      unfinished.write_text(text, encoding="utf-8")
      os.replace(unfinished, self.folder / name)

  def _page(self) -> str:
    lines = ["# Measured on this accelerator", "", *(f"- {name}: {text}" for name, text in self.about.items())]
    for section, content in self._all["sections"].items():
      lines += ["", f"## {section}: {content['status']}"]
      for title, rows in content["tables"].items():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines += ["", f"{title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_text(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(cell) -> str:
  if isinstance(cell, float):
    return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
  return str(cell).replace("|", "/").replace("\n", " ")
