"""The mesh of devices. This is the only place that makes one for a run."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from tokenformer_jax.config import MeshConfig

# data replicates the parameters. fsdp splits their channels, which are gathered where they are used. sequence splits
# positions; the keys and values of attention are gathered. token splits parameter tokens and the vocabulary and sums
# partial results, which sends the most, so it is the last axis, whose devices are nearest to each other.
MESH_AXES = ("data", "fsdp", "sequence", "token")


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the axes `MESH_AXES`, which are Auto: the partitioner chooses the shardings inside a jitted function.

  Args:
    config: number of devices along each axis.
    devices: the devices, all of which are used; by default `jax.devices()`.

  Raises:
    ValueError: the sizes do not use all the devices exactly.
  """
  devices = jax.devices() if devices is None else devices
  auto = (AxisType.Auto,) * len(MESH_AXES)
  return jax.make_mesh(mesh_sizes(config, len(devices)), MESH_AXES, axis_types=auto, devices=devices)


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
  """The number of devices along each of `MESH_AXES`, with −1 replaced.

  Raises:
    ValueError: the sizes do not use all the devices exactly.
  """
  sizes = [getattr(config, axis) for axis in MESH_AXES]
  shown = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes))
  fixed = math.prod(size for size in sizes if size != -1)
  if -1 in sizes and num_devices % fixed == 0:
    sizes[sizes.index(-1)] = num_devices // fixed
  elif fixed != num_devices:
    needed = f"a multiple of {fixed}" if -1 in sizes else f"{fixed}"
    raise ValueError(
      f"mesh {shown} takes {needed} devices, but there are {num_devices}: "
      f"choose sizes whose product is {num_devices}, or -1 for all remaining devices."
    )
  return tuple(sizes)
