"""The processes of a run, on JAX's own runtime, which is started also where there is only one."""

import hashlib
import json
import os
import signal
import socket
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

# A process that is not heard of for so long ends the run. Beats come from a thread of their own, so that
# compiling or reading for longer does no harm; a host that swaps or is moved may be silent for a minute.
HEARTBEAT_SECONDS = 100
# What a shell shows for a process that SIGTERM ended.
STOPPED_EXIT_CODE = 128 + signal.SIGTERM
_LOCAL = "127.0.0.1"


def start(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  stops_by_itself: bool = False,
) -> None:
  """Joins the other processes of this run. Comes before anything that uses a device.

  Without arguments JAX asks the cluster (TPU slice, SLURM, Open MPI, Kubernetes); where there is none, this
  process is the only one, and needs no network.

  Args:
    coordinator_address: HOST:PORT of process 0, for machines without such a cluster.
    stops_by_itself: SIGTERM no longer ends the process; the caller asks `must_stop` after every step.

  Raises:
    ValueError: some of the three are missing or do not fit together.
  """
  jax.config.update("jax_enable_preemption_service", stops_by_itself)
  given = dict(coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id)
  try:
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except ValueError as error:
    # So says JAX where nothing was given and no cluster found.
    nothing = all(value is None for value in given.values())
    if nothing and "coordinator_address should be defined" in str(error):
      _start_alone()
      return
    shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
    raise ValueError(
      f"{shown}: {error} Give all three, process_id from 0 to num_processes − 1, or none where JAX knows the cluster."
    ) from None


def _start_alone() -> None:
  with socket.socket() as free:
    free.bind((_LOCAL, 0))
    address = f"{_LOCAL}:{free.getsockname()[1]}"
  # gRPC would ask an http_proxy even for the way to this machine itself.
  direct = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
  os.environ["no_grpc_proxy"] = f"{direct},{_LOCAL}" if direct else _LOCAL
  jax.config.update("jax_check_proxy_envs", False)
  jax.distributed.initialize(
    address,
    num_processes=1,
    process_id=0,
    coordinator_bind_address=address,
    cluster_detection_method="deactivate",
    heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
  )


def must_stop(step: int) -> bool:
  """Whether a process got SIGTERM and all have agreed to stop after this step; ask after every step."""
  return jax.config.jax_enable_preemption_service and multihost_utils.reached_preemption_sync_point(step)


def check_agree(**values: Any) -> None:
  """Raises ValueError on all processes unless every one of them gives the same JSON-able `values`."""
  texts = [json.dumps(value, sort_keys=True).encode() for value in values.values()]
  digests = b"".join(hashlib.sha256(text).digest()[:4] for text in texts)
  everywhere = multihost_utils.process_allgather(np.frombuffer(digests, np.uint32))
  everywhere = everywhere.reshape(jax.process_count(), -1)
  for name, column in zip(values, everywhere.T):
    others = np.flatnonzero(column != column[0])
    if others.size:
      raise ValueError(
        f"{name} is not the same on all {jax.process_count()} processes: {others.tolist()} have "
        "another than process 0; start all with one command, on a shared file system."
      )


def share_of_rows(sharding: Sharding, shape: tuple[int, ...]) -> tuple[int, int]:
  """(index, count): which of `count` equal shares of an array's first axis this process's devices hold.

  Processes whose devices differ only along axes that do not split the rows have the same share.

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
      "processes; choose data and fsdp so that a process's devices hold whole shares."
    )
  return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def whole(array: jax.Array) -> np.ndarray:
  """The array as NumPy, all of it on every process; all processes call this together."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)
