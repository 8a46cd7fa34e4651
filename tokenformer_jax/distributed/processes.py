"""The processes of a run: how they start, stop, agree and share data. A single process needs no network."""

import hashlib
import json
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from tokenformer_jax.distributed import failures, signals

# A process that is silent for this long ends the run. Heartbeats come from a separate thread, so compiling or reading
# data for longer does no harm.
HEARTBEAT_SECONDS = 30
# How long a process that is done waits for the others.
_SHUTDOWN_SECONDS = 60
# The exit code of a run that a signal stopped, and that is saved: what a shell reports where SIGTERM ended a process.
STOPPED_EXIT_CODE = 128 + signal.SIGTERM
# The most of an error's text that other processes are told.
_ERROR_BYTES = 4096

_alone_must_stop = threading.Event()  # Set by a signal to a run of one process.


def start(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  stops_by_itself: bool = False,
) -> None:
  """Joins the other processes of this run. Call it before anything that uses a device.

  Without arguments JAX asks the cluster (TPU slice, SLURM, Open MPI, Kubernetes). Without a cluster this process is the
  only one: no service is started and no port is opened.

  Args:
    coordinator_address: HOST:PORT of process 0, for machines without such a cluster.
    num_processes: the number of processes.
    process_id: the number of this process, from 0.
    stops_by_itself: a first SIGTERM, SIGINT or SIGHUP no longer ends the process; the caller asks `must_stop` after
      every step, and has to call this from its main thread. Several processes use JAX's preemption service, which makes
      them agree on the step after which they stop.

  Raises:
    ValueError: some of the three are missing or do not fit together.
  """
  jax.config.update("jax_enable_preemption_service", stops_by_itself)
  given = dict(coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id)
  try:
    jax.distributed.initialize(
      **given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=_SHUTDOWN_SECONDS
    )
  except ValueError as error:
    # JAX raises this where nothing was given and no cluster was found.
    nothing = all(value is None for value in given.values())
    if nothing and "coordinator_address should be defined" in str(error):
      if stops_by_itself:
        signals.catch(_alone_must_stop.set)
      return
    shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
    raise ValueError(
      f"{shown}: {error} Give all three, process_id from 0 to num_processes − 1, or none where JAX knows the cluster."
    ) from None
  failures.watch()
  if stops_by_itself:
    # JAX's service listens to SIGTERM alone.
    signals.catch(signals.handler_in_c(signal.SIGTERM))


def must_stop(step: int) -> bool:
  """Whether a process got a signal to stop and all processes have agreed to stop after this step.

  Args:
    step: the number of updates done. All processes call this after every step.
  """
  if _alone_must_stop.is_set():
    return True
  return bool(jax.config.jax_enable_preemption_service and multihost_utils.reached_preemption_sync_point(step))


def check_agree(**values: Any) -> None:
  """Raises ValueError on all processes unless all of them pass the same `values`, which JSON can represent."""
  texts = [json.dumps(value, sort_keys=True).encode() for value in values.values()]
  digests = b"".join(hashlib.sha256(text).digest()[:4] for text in texts)
  everywhere = multihost_utils.process_allgather(np.frombuffer(digests, np.uint32))
  everywhere = everywhere.reshape(jax.process_count(), -1)
  for name, column in zip(values, everywhere.T):
    others = np.flatnonzero(column != column[0])
    if others.size:
      raise ValueError(
        f"{name} is not the same on all {jax.process_count()} processes: {others.tolist()} differ from process 0; "
        "start all of them with the same command, on a shared file system."
      )


def on_first_process(action: Callable[[], None]) -> None:
  """Runs `action` on the first process. An error that it raises there is raised on all processes.

  Otherwise the others would wait for the first process in the next operation that they share.

  Raises:
    ValueError: a ValueError or an error of the file system on the first process, on the others with its text.
  """
  error: ValueError | OSError | None = None
  if jax.process_index() == 0:
    try:
      action()
    except (ValueError, OSError) as raised:
      error = raised
  if jax.process_count() > 1:
    text = np.zeros(_ERROR_BYTES, np.uint8)
    said = (f"{type(error).__name__}: {error}" if error else "").encode()[:_ERROR_BYTES]
    text[: len(said)] = np.frombuffer(said, np.uint8)
    text = np.asarray(multihost_utils.broadcast_one_to_all(text))
    if text.any() and error is None:
      raise ValueError(f"process 0: {bytes(text).rstrip(bytes(1)).decode(errors='replace')}")
  if error is not None:
    raise error


def share_of_rows(sharding: Sharding, shape: tuple[int, ...]) -> tuple[int, int]:
  """Which equal share of an array's rows the devices of this process hold.

  Processes whose devices differ only along mesh axes that do not split the rows have the same share.

  Args:
    sharding: the array's sharding.
    shape: its shape; rows are its first axis.

  Returns:
    (index of the share, number of shares).

  Raises:
    ValueError: the shares of two processes overlap without being equal.
  """
  rows: dict[int, set[int]] = {}
  for device, index in sharding.devices_indices_map(shape).items():
    rows.setdefault(device.process_index, set()).update(range(shape[0])[index[0]])
  shares = sorted({tuple(sorted(held)) for held in rows.values()})
  if sum(map(len, shares)) != shape[0] or len({len(share) for share in shares}) != 1:
    raise ValueError(
      f"mesh {dict(sharding.mesh.shape)}: {shape[0]} rows would lie unevenly on {len(rows)} "
      "processes; choose data and fsdp so that the devices of a process hold whole shares."
    )
  return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def whole(array: jax.Array) -> np.ndarray:
  """All of the array as NumPy on every process. All processes have to call this together."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)
