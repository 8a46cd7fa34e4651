"""Progress of a long computation on stderr: a bar on a terminal, plain lines everywhere else."""

import sys
from time import monotonic

import tqdm

_SECONDS_BETWEEN_LINES = 60.0


class Progress:
  """Counts finished items and shows them; used as a context manager.

  A terminal shows a bar. A log file or a notebook's output would keep every redrawn bar, so there one plain line is
  printed per minute.

  Args:
    description: what is counted, e.g. the task's name; None shows nothing.
    total: how many items there are.
  """

  def __init__(self, description: str | None, total: int):
    self._description, self._total, self._done = description, total, 0
    self._start = self._last_line = monotonic()
    terminal = sys.stderr is not None and sys.stderr.isatty()
    self._bar = tqdm.tqdm(
      total=total, desc=description, disable=description is None or not terminal, dynamic_ncols=True, file=sys.stderr
    )
    self._lines = description is not None and not terminal

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *exception) -> None:
    self._bar.close()

  def update(self, count: int) -> None:
    """Adds `count` finished items."""
    self._done += count
    self._bar.update(count)
    now = monotonic()
    if self._lines and self._done and now - self._last_line >= _SECONDS_BETWEEN_LINES:
      self._last_line = now
      minutes_left = (now - self._start) / self._done * (self._total - self._done) / 60
      print(
        f"{self._description}: {self._done:,} of {self._total:,}, {minutes_left:.0f} min left",
        file=sys.stderr,
        flush=True,
      )
