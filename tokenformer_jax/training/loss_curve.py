"""The loss curve of a run as a picture."""

import matplotlib
import matplotlib.figure

from tokenformer_jax.paths import user_path
from tokenformer_jax.training.run_log import read_metrics


def plot_losses(workdir: str, unit: str = "nats a token") -> str:
  """Draws loss against step into WORKDIR/loss.png, with a dashed line at each growth.

  Args:
    workdir: the run's folder.
    unit: of the loss.

  Returns:
    The picture's path.
  """
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
  axes.set_ylabel(f"loss ({unit})")
  if axes.get_lines():
    axes.legend()
  path = user_path(workdir, "workdir") / "loss.png"
  with path.open("wb") as file:
    figure.savefig(file, dpi=120)
  return str(path)
