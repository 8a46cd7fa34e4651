"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import io
import re
import sys

import pytest

from tokenformer_jax import progress
from tokenformer_jax.progress import Progress, say


@pytest.fixture
def clock(monkeypatch):
  """Time that passes only when it is set: `clock[0]` seconds."""
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def test_without_a_terminal_each_report_is_one_plain_line(clock, capsys):
  with Progress(1000, "step", initial=400) as shown:
    for _ in range(3):
      clock[0] += 10
      shown.update(100)
      shown.report(loss="3.1416", **{"tok/s": "1,234"})
  assert capsys.readouterr().err.splitlines() == [
    # The first estimate counts the compilation; the next ones are from the time since.
    "step 500/1,000, loss 3.1416, tok/s 1,234, ETA 0:00:50",
    "step 600/1,000, loss 3.1416, tok/s 1,234, ETA 0:00:40",
    "step 700/1,000, loss 3.1416, tok/s 1,234, ETA 0:00:30",
  ]


def test_an_estimate_leaves_out_what_came_before_the_first_report(clock, capsys):
  with Progress(100, "step") as shown:
    clock[0] += 3600
    shown.update(1)
    shown.report()
    clock[0] += 9
    shown.update(9)
    shown.report()
  assert capsys.readouterr().err.splitlines()[-1] == "step 10/100, ETA 0:01:30"


def test_updates_print_a_line_at_most_every_so_many_seconds_and_at_the_end(clock, capsys):
  with Progress(8, "leaf", title="grow", seconds=30) as shown:
    for _ in range(8):
      clock[0] += 10
      shown.update()
  assert capsys.readouterr().err.splitlines() == [
    "grow: leaf 3/8, ETA 0:00:50",
    "grow: leaf 6/8, ETA 0:00:20",
    "grow: leaf 8/8",
  ]


def test_a_process_that_is_not_the_first_prints_nothing(capsys):
  with Progress(2, "step", shown=False) as shown:
    shown.update()
    shown.report(loss="1")
  assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  with Progress(2, "step") as shown:
    shown.update()
    shown.report(loss="1.5")
    shown.update()
  assert "\r" in terminal.getvalue() and re.search(r"100%.*2/2", terminal.getvalue())
  assert "step 1/2" not in terminal.getvalue()


def test_a_line_on_stdout_is_there_at_once(capfd):
  say("step 1: held-out loss 1.0")
  assert capfd.readouterr().out == "step 1: held-out loss 1.0\n"
