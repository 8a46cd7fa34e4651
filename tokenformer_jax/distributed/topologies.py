"""Devices of TPU slices that are not there, to compile for."""

from collections.abc import Iterator, Sequence
import contextlib
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from tokenformer_jax.checked import nearest
from tokenformer_jax.config import MeshConfig
from tokenformer_jax.distributed.chips import CHIPS, Chip
from tokenformer_jax.distributed.mesh import MESH_AXES, make_mesh, mesh_sizes

# What libtpu otherwise asks a metadata server for, in vain; and no lock, since nothing is run.
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
                "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def parse_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
  """The chip and the sizes of a slice, of a name such as v5e:4x4 or v5p:2x2x4.

  Raises:
    ValueError: another form, an unknown chip, or another number of axes than the chip's slices have.
  """
  found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
  if not found:
    raise ValueError(f"topology={topology!r}: expected a chip and the sizes of a slice, as v5e:4x4.")
  name, sizes = found.group(1), tuple(int(size) for size in found.group(2).split("x"))
  if name not in CHIPS:
    raise ValueError(f"topology={topology!r}: chip {name!r} is unknown: choose one of {', '.join(CHIPS)}."
                     + nearest(name, CHIPS))
  if len(sizes) != CHIPS[name].torus_axes or 0 in sizes:
    raise ValueError(f"topology={topology!r}: a slice of {name} has {CHIPS[name].torus_axes} sizes, from 1 on.")
  return CHIPS[name], sizes


def can_compile() -> str:
  """'' where programs can be compiled for TPUs, else the reason why not."""
  if importlib.util.find_spec("libtpu") is None:
    return "no libtpu here (pip install 'tokenformer_jax[tpu]')"
  return ""


def slice_devices(topology: str) -> Sequence[jax.Device]:
  """The devices of a slice, one a chip. They cannot hold arrays.

  Raises:
    ValueError: a slice that the compiler does not know.
  """
  _, sizes = parse_topology(topology)
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  options = {}
  if topology.startswith("v4:"):
    # As two cores, v4's default, a chip would be two devices.
    options = dict(chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1), num_slices=1,
                   wrap=tuple(size % 4 == 0 for size in sizes))
  elif math.prod(sizes) == 1:
    options = dict(chips_per_host_bounds=(1, 1, 1))
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"topology={topology!r}: {error}") from None


@contextlib.contextmanager
def kept_out_of_the_cache() -> Iterator[None]:
  """Programs for devices that are not there can be written into the compilation cache, but not read back: not here."""
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
  try:
    yield
  finally:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def slice_mesh(config: MeshConfig, topology: str) -> Mesh:
  """`make_mesh` over a slice."""
  return make_mesh(config, slice_devices(topology))


def abstract_mesh(config: MeshConfig, topology: str) -> AbstractMesh:
  """The same axes and sizes without devices: enough to lower a program, not to compile it."""
  _, slice_sizes = parse_topology(topology)
  sizes = mesh_sizes(config, math.prod(slice_sizes))
  return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
