"""SIGTERM, SIGINT and SIGHUP: the first one asks the run to save and end, and a later one ends the process at once."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Schedulers and terminals may send one request as several signals; those within this time count as one.
_SAME_SECONDS = 1.0


def catch(ask_to_stop: Callable[[], object]) -> None:
  """Calls `ask_to_stop` at the first signal. Call it from the main thread.

  A signal that the process was started to ignore, as by nohup or in the background of a shell script, stays ignored.
  A thread reads the signals, so that they act even while the main thread waits for a device.
  """
  read_end, write_end = os.pipe()
  os.set_blocking(write_end, False)
  signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
  for number in SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, lambda number, frame: None)
  threading.Thread(target=_wait, args=(read_end, ask_to_stop), name="signals", daemon=True).start()


def handler_in_c(number: signal.Signals) -> Callable[[], object]:
  """Removes the handler that a C library installed, which Python cannot see, and returns what calls it.

  Raises:
    RuntimeError: there is none.
  """
  libc = ctypes.CDLL(None)
  libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
  address = libc.signal(number, None)
  if address in (None, 1):  # SIG_DFL and SIG_IGN.
    raise RuntimeError(f"no library handles {number.name}.")
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
  return lambda: handler(number)


def _wait(read_end: int, ask_to_stop: Callable[[], object]) -> None:
  first = None
  while True:
    for number in os.read(read_end, 64):
      if number not in SIGNALS:
        continue
      name = signal.Signals(number).name
      if first is None:
        first = time.monotonic()
        print(f"{name}: saving after this step; a second signal ends the process at once.", file=sys.stderr, flush=True)
        ask_to_stop()
      elif time.monotonic() - first > _SAME_SECONDS:
        print(f"{name}: ended at once; the newest checkpoint is from before.", file=sys.stderr, flush=True)
        os._exit(128 + number)
