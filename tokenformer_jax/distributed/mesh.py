"""The one place where a mesh is made."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from tokenformer_jax.config import MeshConfig

# data: copies of the parameters. fsdp: channels of the parameters, gathered where they are used.
# sequence: positions; keys and values of attention are gathered. token: parameter tokens and vocabulary, whose
# partial sums are added up: the most talkative axis, and so the one of the nearest devices.
MESH_AXES = ("data", "fsdp", "sequence", "token")


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the axes `MESH_AXES` over all of `devices` (by default all of `jax.devices()`).

  The axes are Auto: the partitioner chooses the shardings inside a jitted function.

  Raises:
    ValueError: the sizes do not use all the devices exactly.
  """
  devices = jax.devices() if devices is None else devices
  auto = (AxisType.Auto,) * len(MESH_AXES)
  return jax.make_mesh(mesh_sizes(config, len(devices)), MESH_AXES, axis_types=auto, devices=devices)


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
  """Devices along each of `MESH_AXES`, −1 filled in.

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
      f"choose sizes whose product is {num_devices}, or -1 for the rest."
    )
  return tuple(sizes)
