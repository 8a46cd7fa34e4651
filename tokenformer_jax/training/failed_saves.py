"""What is left of a save that failed: one line that says why, and threads of Orbax that still write."""

import os
import re
import threading
import time

# Orbax ends its threads when their part of a save is done, and joins none after another one has failed.
_WRITER = "orbax.checkpoint."
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")


def cause(error: Exception) -> str:
  """Returns one line that says why a save failed; of an error of the system that tensorstore describes, the system's text."""
  text = " ".join(str(error).split())
  if code := _SYSTEM_ERROR.search(text):
    return os.strerror(int(code[1]))
  return text[:300] or type(error).__name__


def wait_for_writers(seconds: float = 60.0) -> None:
  """Waits until Orbax's threads have ended, so that none writes into a folder that is being removed."""
  end = time.monotonic() + seconds
  for thread in threading.enumerate():
    if type(thread).__module__.startswith(_WRITER):
      threading.Thread.join(thread, max(end - time.monotonic(), 0))  # Orbax's own `join` raises the thread's error.
