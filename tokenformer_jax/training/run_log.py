"""The records of a run: metrics.jsonl, samples.txt, TensorBoard events and, where asked for, Weights & Biases.

Only the first process writes.
"""

import json
import re

import jax
from absl import logging

from tokenformer_jax.config import Config
from tokenformer_jax.paths import replace_text, user_path
from tokenformer_jax.training.log_file import LogFile
from tokenformer_jax.training.trackers import TensorBoard, WandB

_HEADING = re.compile(r"^--- step (\d+)$", re.MULTILINE)
# A line of a sample that looks like a heading gets a backslash, and so does one that has backslashes already.
_LIKE_HEADING = re.compile(r"^(\\*--- step \d+)$", re.MULTILINE)
_ESCAPED_HEADING = re.compile(r"^\\(\\*--- step \d+)$", re.MULTILINE)


class RunLog:
  """Writes the metrics and samples of one run."""

  def __init__(self, workdir: str, start_step: int, config: Config | None = None):
    """Opens the records; what was written after `start_step` is removed, because the resumed run writes it again.

    Args:
      config: the run's configuration, for Weights & Biases; None writes no records there.
    """
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    folder = user_path(workdir, "workdir")
    rows, broken = _read_rows(folder / "metrics.jsonl")
    for number in broken:
      logging.warning("%s: line %d cannot be read and is left out.", folder / "metrics.jsonl", number)
    metrics = "".join(json.dumps(row) + "\n" for row in rows if not _comes_after(row, start_step))
    replace_text(folder / "metrics.jsonl", metrics)
    self._metrics = LogFile(folder / "metrics.jsonl", metrics.encode())
    self._samples_path = folder / "samples.txt"
    self._samples: LogFile | None = None  # It is opened for the first sample, so that runs without any have no file.
    self._earlier_samples = ""
    if self._samples_path.exists():
      self._earlier_samples = _samples_until(start_step, _read(self._samples_path))
      replace_text(self._samples_path, self._earlier_samples)
    self._trackers: list[TensorBoard | WandB] = [TensorBoard(folder / "tensorboard", start_step)]
    if config is not None and config.training.wandb_project:
      self._trackers.append(WandB(folder, config))

  def write(self, step: int, **metrics: float) -> None:
    """Writes one row of metrics at `step` (the number of updates done), under names such as `train/loss`."""
    if not self._writes:
      return
    self._metrics.write((json.dumps({"step": step, **metrics}) + "\n").encode())
    for tracker in self._trackers:
      tracker.write(step, metrics)

  def write_sample(self, step: int, text: str) -> None:
    """Writes a text that the model generated at `step`."""
    if not self._writes:
      return
    if self._samples is None:
      self._samples = LogFile(self._samples_path, self._earlier_samples.encode())
    escaped = _LIKE_HEADING.sub(r"\\\1", text)
    self._samples.write(f"--- step {step}\n{escaped}\n".encode())
    for tracker in self._trackers:
      tracker.write_sample(step, text)

  def flush(self) -> None:
    """Makes all that was written visible in an object store too; called at each checkpoint."""
    if self._writes:
      self._metrics.flush()
      if self._samples:
        self._samples.flush()

  def close(self) -> None:
    if self._writes:
      self._metrics.close()
      if self._samples:
        self._samples.close()
      for tracker in self._trackers:
        tracker.close()


def read_metrics(workdir: str) -> list[dict[str, float]]:
  """Returns the rows of a run's metrics.jsonl; a line that cannot be read, such as one cut off by a kill, is left out."""
  return _read_rows(user_path(workdir, "workdir") / "metrics.jsonl")[0]


def read_samples(workdir: str) -> list[tuple[int, str]]:
  """Returns (step, text) of each sample in a run's samples.txt."""
  path = user_path(workdir, "workdir") / "samples.txt"
  _, *parts = _HEADING.split(_read(path)) if path.exists() else [""]
  texts = (_ESCAPED_HEADING.sub(r"\1", text[1:-1]) for text in parts[1::2])
  return [(int(step), text) for step, text in zip(parts[::2], texts)]


def _read(path) -> str:
  return path.read_bytes().decode("utf-8", "replace")


def _read_rows(path) -> tuple[list[dict[str, float]], list[int]]:
  """Returns the rows, and the numbers (from 1) of the lines that are none; a cut-off last line is not counted."""
  rows, broken = [], []
  *lines, last = _read(path).split("\n") if path.exists() else [""]
  for number, line in enumerate([*lines, last], start=1):
    try:
      row = json.loads(line)
      if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(line)
      rows.append(row)
    except (ValueError, RecursionError):
      if number <= len(lines):
        broken.append(number)
  return rows, broken


def _comes_after(row: dict[str, float], step: int) -> bool:
  # A growth at a checkpoint's own step happens after the checkpoint was written.
  return row["step"] > step or (row["step"] == step and "growth/parameters" in row)


def _samples_until(step: int, samples: str) -> str:
  """Returns `samples` without those of later steps.

  Steps rise through the file. Files of earlier versions did not escape headings inside a sample; such a line is
  followed by headings of earlier steps, so that the text is cut after the last heading that is not later than `step`.
  """
  headings = list(_HEADING.finditer(samples))
  kept = max((index for index, heading in enumerate(headings) if int(heading[1]) <= step), default=-1) + 1
  return samples[: headings[kept].start()] if kept < len(headings) else samples
