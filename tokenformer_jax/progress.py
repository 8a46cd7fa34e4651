"""Progress of long work: a bar on a terminal, plain lines in a log file or a notebook."""

import datetime
import sys
import time

import tqdm


class Progress:
  """Counts units of work on stderr; a context manager.

  On a terminal this is a tqdm bar. Elsewhere a bar would leave hundreds of overwritten lines, so that one plain line
  is printed at each `report`, and at most one every `seconds` at an `update`.
  """

  def __init__(
    self, total: int | None, unit: str, *, initial: int = 0, title: str = "", shown: bool = True, seconds: float = 0.0
  ):
    """Args:
    total: how many units there are; None where that is not known.
    unit: one word for what is counted, such as "step".
    initial: how many units were done before.
    title: a prefix for the bar and the lines.
    shown: False prints nothing.
    seconds: where no terminal is, the least time between two lines that `update` prints; 0 leaves the lines to
      `report`.
    """
    self._total, self._unit, self._title, self._seconds = total, unit, title, seconds
    self._done = initial
    self._started_at = self._printed_at = time.monotonic()
    self._started_from = initial
    self._rate_begun = False
    terminal = sys.stderr.isatty()
    self._bar = tqdm.tqdm(
      total=total,
      initial=initial,
      unit=unit,
      desc=title or None,
      dynamic_ncols=True,
      disable=not (shown and terminal),
      file=sys.stderr,
    )
    self._prints = shown and not terminal

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def update(self, count: int = 1) -> None:
    """Counts `count` more units."""
    self._done += count
    self._bar.update(count)
    if self._prints and self._seconds:
      now = time.monotonic()
      if now - self._printed_at >= self._seconds or self._done == self._total:
        self._printed_at = now
        self._print()

  def report(self, **values: str) -> None:
    """Shows `values` beside the count, such as `loss="3.1416"`."""
    self._bar.set_postfix(values, refresh=False)
    if self._prints:
      self._print(**values)
    if not self._rate_begun:
      # What happens before the first report includes compilation, which says nothing about the time to come.
      self._rate_begun, self._started_at, self._started_from = True, time.monotonic(), self._done

  def close(self) -> None:
    self._bar.close()

  def _print(self, **values: str) -> None:
    count = f"{self._done:,}" + (f"/{self._total:,}" if self._total else "")
    parts = [f"{self._unit} {count}", *(f"{name} {value}" for name, value in values.items())]
    if self._total and self._done > self._started_from and self._done < self._total:
      elapsed = time.monotonic() - self._started_at
      left = elapsed * (self._total - self._done) / (self._done - self._started_from)
      parts.append(f"ETA {datetime.timedelta(seconds=round(left))}")
    print((f"{self._title}: " if self._title else "") + ", ".join(parts), file=sys.stderr, flush=True)


def say(text: str) -> None:
  """Prints one line on stdout at once, above a bar that may be shown."""
  tqdm.tqdm.write(text)
  sys.stdout.flush()
