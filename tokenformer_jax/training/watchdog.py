"""Ends the process where one step takes far too long, which no signal and no other process might do."""

import faulthandler
import sys


class Watchdog:
  """A context manager around one step: after `seconds` it prints the stacks of all threads and exits with code 1.

  It is a thread in C, so it also acts where Python waits for a device or for another process. Nothing is watched
  outside its blocks: compiling, evaluating and saving may take as long as they need.
  """

  def __init__(self, seconds: float):
    """Args: `seconds` of one step; 0 watches nothing."""
    self._seconds = seconds

  def __enter__(self) -> None:
    if self._seconds:
      # sys.stderr may be a notebook's, which has no file.
      faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__ or 2)

  def __exit__(self, *error) -> None:
    if self._seconds:
      faulthandler.cancel_dump_traceback_later()
