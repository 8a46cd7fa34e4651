"""What a run leaves to look at: metrics.jsonl, TensorBoard events, samples.txt and a loss curve.

Only the first process writes.
"""

import json
import re

import jax
import matplotlib
import matplotlib.figure
from tensorboardX import SummaryWriter

from tokenformer_jax.paths import replace_text, user_path


class RunLog:
  """Metrics of one run; `start_step` drops what a resumed run is going to write again."""

  def __init__(self, workdir: str, start_step: int):
    self._folder = user_path(workdir)
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    kept = [row for row in read_metrics(workdir) if not _comes_after(row, start_step)]
    path = self._folder / "metrics.jsonl"
    replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    self._jsonl = path.open("a")
    self._samples = self._folder / "samples.txt"
    if self._samples.exists():
      replace_text(self._samples, _samples_until(start_step, self._samples.read_text()))
    self._events = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start_step + 1)

  def write(self, step: int, **metrics: float) -> None:
    """One row of metrics at `step` (updates done); names like `train/loss`, `held_out/loss`."""
    if not self._writes:
      return
    self._jsonl.write(json.dumps({"step": step, **metrics}) + "\n")
    self._jsonl.flush()
    for name, value in metrics.items():
      self._events.add_scalar(name, value, step)

  def write_sample(self, step: int, text: str) -> None:
    """Generated text at `step`."""
    if self._writes:
      with self._samples.open("a") as samples:
        samples.write(f"--- step {step}\n{text}\n")
      self._events.add_text("sample", text, step)

  def close(self) -> None:
    if self._writes:
      self._jsonl.close()
      self._events.close()


def read_metrics(workdir: str) -> list[dict[str, float]]:
  """The rows of a run's metrics.jsonl; a last line cut off by a kill is left out."""
  path = user_path(workdir) / "metrics.jsonl"
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def _comes_after(row: dict[str, float], step: int) -> bool:
  # A growth at a checkpoint's own step comes after the checkpoint.
  return row["step"] > step or (row["step"] == step and "growth/parameters" in row)


def _samples_until(step: int, samples: str) -> str:
  later = (head.start() for head in re.finditer(r"^--- step (\d+)$", samples, re.MULTILINE) if int(head[1]) > step)
  return samples[: next(later, None)]


def plot_losses(workdir: str) -> str:
  """Draws loss against step, growths as dashed lines, into WORKDIR/loss.png; returns its path."""
  rows = read_metrics(workdir)
  figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
  axes = figure.subplots()
  for name, label in (("train/loss", "training"), ("held_out/loss", "held out")):
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
      axes.plot(*zip(*points), label=label, alpha=0.5 if name == "train/loss" else 1.0)
  for row in rows:
    if "growth/parameters" in row:
      axes.axvline(row["step"], color="grey", linestyle="--")
      axes.annotate(
        f" grown to {row['growth/parameters']:,.0f} parameters",
        (row["step"], 0.95),
        xycoords=("data", "axes fraction"),
        fontsize="small",
      )
  axes.set_xlabel("step")
  axes.set_ylabel("loss (nats a token)")
  axes.legend()
  path = user_path(workdir) / "loss.png"
  with path.open("wb") as file:
    figure.savefig(file, dpi=120)
  return str(path)
