"""One process ends with an error, all end: it tells the others why, through JAX's coordination service.

Otherwise they would wait for it in their next collective operation, and it for them where JAX's processes part.
"""

import json
import os
import sys
import threading
import time
from typing import NoReturn

import jax
from jax._src import distributed

_KEY = "tokenformer_jax/failure"
_POLL_SECONDS = 1.0
# Processes that meet the same error report it themselves within this time.
_GRACE_SECONDS = 1.0
# Set where the main thread of this process reports a failure itself.
_reporting = threading.Event()
# Words of the errors that a collective operation raises where another process is gone.
_LOST = ("gloo", "nccl", "coordination service")


def watch() -> None:
  """Starts a thread that ends this process after another one has told that it failed."""
  threading.Thread(target=_watch, name="failures", daemon=True).start()


def several() -> bool:
  """Whether this process has others to tell; asks for no device."""
  return distributed.global_state.client is not None and distributed.global_state.num_processes > 1


def end_all(code: int, text: str) -> NoReturn:
  """Ends this process with `code`, and the others with it too; they print `text` as the reason.

  Call it after this process has printed its own line, where `several()`.
  """
  _reporting.set()
  sys.stdout.flush()
  sys.stderr.flush()
  state = distributed.global_state
  assert state.client is not None
  try:
    state.client.key_value_set(_KEY, json.dumps([state.process_id, code, " ".join(text.split())]))
  except Exception:  # Another process was first, or the service is gone, of which the others will learn.
    pass
  if state.service is not None:  # It holds what the others are still to read.
    time.sleep(2 * _POLL_SECONDS + _GRACE_SECONDS)
  os._exit(code)


def reason(error: BaseException) -> tuple[int, str] | None:
  """(exit code, one line) where `error` only says that another process is gone; None for every other error."""
  if not isinstance(error, Exception) or not any(word in str(error).lower() for word in _LOST):
    return None
  _reporting.set()
  until = time.monotonic() + 2 * _POLL_SECONDS
  while time.monotonic() < until:  # The process that failed may have said why.
    try:
      if said := _said():
        return said
    except jax.errors.JaxRuntimeError:
      break  # Process 0 is gone, and the service with it.
    time.sleep(0.1)
  return 1, f"another process is gone: {str(error).splitlines()[0]}"


def _said() -> tuple[int, str] | None:
  client = distributed.global_state.client
  assert client is not None
  try:
    process, code, text = json.loads(client.key_value_try_get(_KEY))
  except jax.errors.JaxRuntimeError as error:
    if "NOT_FOUND" in str(error):
      return None
    raise
  return code, f"process {process} failed: {text}"


def _watch() -> None:
  said = None
  while said is None:
    time.sleep(_POLL_SECONDS)
    try:
      said = _said()
    except (jax.errors.JaxRuntimeError, AssertionError):
      return  # The run has ended; or process 0 is gone, after which JAX ends this process.
  time.sleep(_GRACE_SECONDS)
  if not _reporting.is_set():
    code, text = said
    print("error:", text, file=sys.stderr, flush=True)
    os._exit(code)
