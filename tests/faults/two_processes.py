"""What each of two processes does in `test_processes`: it takes steps together, and --fault happens to process --failing.

It stands for a run: it starts, stops, is watched and fails as `cli.train` does, and compiles nothing. A command's module
defines flags, some of which other commands define too: tests import only the names above `_main`.
"""

import ctypes
import os
import signal
import sys
import time

# The step before which the fault happens.
FAULTY_STEP = 3
STEP_TIMEOUT = 5.0
# Printed with the time, in seconds since 1970, just before the fault.
AT = "fault at"


def wait_in_c() -> None:
  """Waits for ever as a broken driver would: no signal interrupts it."""
  libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
  libc.pthread_mutex_lock(mutex)
  libc.pthread_mutex_lock(mutex)


def fail(fault: str) -> None:
  print(AT, time.time(), flush=True)
  if fault == "raise":
    raise RuntimeError("the loader broke")
  if fault == "mistake":
    from tokenformer_jax.config import ModelConfig

    ModelConfig.named("150")
  if fault == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
  if fault == "freeze":
    os.kill(os.getpid(), signal.SIGSTOP)
  if fault == "hang":
    wait_in_c()
  if fault.startswith("SIG"):
    os.kill(os.getpid(), signal.Signals[fault])


def _main(argv):
  del argv
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  from tokenformer_jax.distributed import processes
  from tokenformer_jax.training.watchdog import Watchdog

  given = flags.FLAGS
  processes.HEARTBEAT_SECONDS = 10
  process_flags.start(stops_by_itself=True)
  watched = Watchdog(STEP_TIMEOUT)
  for step in range(1, 200):
    if step == FAULTY_STEP and jax.process_index() == given.failing and given.fault != "hang":
      fail(given.fault)
    with watched:
      if step == FAULTY_STEP and jax.process_index() == given.failing and given.fault == "hang":
        fail(given.fault)
      if jax.process_count() > 1:
        assert multihost_utils.process_allgather(np.int32(step)).tolist() == [step] * jax.process_count()
      if processes.must_stop(step):
        print("stopped after", step, flush=True)
        sys.exit(processes.STOPPED_EXIT_CODE)
    time.sleep(0.05)


if __name__ == "__main__":
  from absl import flags

  from tokenformer_jax.cli import command, process_flags

  flags.DEFINE_string("fault", None, "What happens.")
  flags.DEFINE_integer("failing", None, "To which process.")
  process_flags.define()
  command.run(_main)
