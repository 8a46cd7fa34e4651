"""Meshes: their sizes, names and kinds, and the refusal of sizes that do not fit the devices."""

import jax
import pytest

from tokenformer_jax.config import MeshConfig
from tokenformer_jax.distributed.mesh import make_mesh


@pytest.mark.parametrize(
  "config, sizes",
  [
    (MeshConfig(), (8, 1, 1, 1)),
    (MeshConfig(data=1, fsdp=-1), (1, 8, 1, 1)),
    (MeshConfig(data=2, fsdp=2, token=-1), (2, 2, 1, 2)),
    (MeshConfig(data=2, fsdp=1, token=4), (2, 1, 1, 4)),
    (MeshConfig(data=-1, fsdp=2, token=4), (1, 2, 1, 4)),
    (MeshConfig(data=1, sequence=4, token=2), (1, 1, 4, 2)),
  ],
)
def test_sizes(config, sizes):
  mesh = make_mesh(config)
  assert dict(mesh.shape) == dict(zip(("data", "fsdp", "sequence", "token"), sizes))
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
  assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}


def test_chosen_devices():
  devices = jax.devices()[2:5]
  assert set(make_mesh(MeshConfig(), devices).devices.flat) == set(devices)


@pytest.mark.parametrize(
  "config, message",
  [
    (
      MeshConfig(data=3),
      "mesh data=3, fsdp=1, sequence=1, token=1 takes 3 devices, but there are 8: "
      "choose sizes whose product is 8, or -1 for all remaining devices",
    ),
    (MeshConfig(data=4, fsdp=4), "takes 16 devices, but there are 8"),
    (MeshConfig(fsdp=3), "mesh data=-1, fsdp=3, sequence=1, token=1 takes a multiple of 3 devices, but there are 8"),
    (MeshConfig(token=16), "takes a multiple of 16 devices, but there are 8"),
  ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(config, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(config)
