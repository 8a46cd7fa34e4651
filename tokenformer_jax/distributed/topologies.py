"""TPU slices and GPUs that are not present, for compiling programs for them."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from tokenformer_jax.config import MeshConfig
from tokenformer_jax.config.validation import nearest
from tokenformer_jax.distributed.chips import CHIPS, Chip
from tokenformer_jax.distributed.mesh import MESH_AXES, make_mesh, mesh_sizes

# Without these libtpu asks a metadata server that does not exist, and takes a lock although nothing is run.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_CUDA_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
# The properties that XLA reads from a GPU: the limits of a multiprocessor by compute capability, from the CUDA
# programming guide.
_GPU = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: {units}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_optin}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {cores} clock_rate_ghz: {clock} l2_cache_size: {l2} cuda_compute_capability {{ major: {major} }}
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory}
}}
platform_name: "CUDA" device_description_str: "{kind}"
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}"""
_AMPERE = dict(major=8, cores=108, units=64, shared=167936, shared_optin=166912, clock=1.41, l2=40 * 2**20)
_HOPPER = dict(major=9, cores=132, units=128, shared=233472, shared_optin=232448, clock=1.98, l2=50 * 2**20)
_GPUS = {"a100": _AMPERE, "h100": _HOPPER, "h200": _HOPPER}
# The most GPUs that NVLink connects in one machine.
_MOST_GPUS = 8


def parse_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
  """Parses a name such as v5e:4x4, v5p:2x2x4 or h100:8.

  Returns:
    (the chip, the sizes of the slice).

  Raises:
    ValueError: the name has another form, the chip is unknown, or its slices have another number of axes.
  """
  found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
  if not found:
    raise ValueError(f"topology={topology!r}: expected a chip and the sizes of a slice, such as v5e:4x4 or h100:8.")
  name, sizes = found.group(1), tuple(int(size) for size in found.group(2).split("x"))
  if name not in CHIPS:
    raise ValueError(
      f"topology={topology!r}: chip {name!r} is unknown: choose one of {', '.join(CHIPS)}." + nearest(name, CHIPS)
    )
  if name in _GPUS and not (len(sizes) == 1 and 1 <= sizes[0] <= _MOST_GPUS):
    raise ValueError(f"topology={topology!r}: a machine has 1 to {_MOST_GPUS} GPUs, such as {name}:{_MOST_GPUS}.")
  if len(sizes) != CHIPS[name].torus_axes or 0 in sizes:
    raise ValueError(f"topology={topology!r}: a slice of {name} has {CHIPS[name].torus_axes} sizes, each at least 1.")
  return CHIPS[name], sizes


def can_compile(chip: Chip) -> str:
  """Returns '' if programs can be compiled for such a chip, otherwise the reason why they cannot."""
  if chip.platform == "tpu":
    return "" if _installed("libtpu") else "libtpu is not installed (pip install 'tokenformer_jax[tpu]')"
  return (
    ""
    if any(map(_installed, _CUDA_PLUGINS))
    else "JAX's CUDA plugin is not installed (pip install 'tokenformer_jax[gpu]')"
  )


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # The package that would contain it is not installed.
    return False


def slice_devices(topology: str) -> Sequence[jax.Device]:
  """The devices of a slice, one for each chip. They cannot hold arrays.

  Raises:
    ValueError: the name is invalid, or the compiler does not know such a slice.
  """
  chip, sizes = parse_topology(topology)
  if chip.platform == "cuda":
    target = _GPU.format(
      **_GPUS[topology.partition(":")[0]], kind=chip.kinds[0], memory=chip.memory, bandwidth=chip.memory_bandwidth
    )
    # The topology is the number of slices, of machines in each, and of GPUs in each.
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{sizes[0]}").devices
  for name, value in _LIBTPU.items():
    os.environ.setdefault(name, value)
  options = {}
  if topology.startswith("v4:"):
    # By default each of the two cores of a v4 chip is a device; megacore makes the chip one device.
    options = dict(
      chip_config_name="megacore",
      chips_per_host_bounds=(2, 2, 1),
      num_slices=1,
      wrap=tuple(size % 4 == 0 for size in sizes),
    )
  elif math.prod(sizes) == 1:
    options = dict(chips_per_host_bounds=(1, 1, 1))
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"topology={topology!r}: {error}") from None


@contextlib.contextmanager
def kept_out_of_the_cache() -> Iterator[None]:
  """A context in which programs are not cached: those for absent devices can be written but not read back."""
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
  try:
    yield
  finally:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def slice_mesh(config: MeshConfig, topology: str) -> Mesh:
  """`make_mesh` over the devices of a slice."""
  return make_mesh(config, slice_devices(topology))


def abstract_mesh(config: MeshConfig, topology: str) -> AbstractMesh:
  """`slice_mesh` without devices, which is enough to lower a program but not to compile it."""
  _, slice_sizes = parse_topology(topology)
  sizes = mesh_sizes(config, math.prod(slice_sizes))
  return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
