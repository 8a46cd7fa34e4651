"""The flags that split a model over several devices when it is read, with the names and the meaning of `config.mesh`."""

import dataclasses

from absl import flags

from tokenformer_jax.config import MeshConfig

flags.disclaim_key_flags()  # They belong to the command that defines them.

_HELP = {
  "mesh.data": "Devices that each take some of the rows; -1 for all that the other axes leave.",
  "mesh.fsdp": "Devices that share the channels of the parameters, and the rows.",
  "mesh.token": "Devices that share the parameter tokens, the attention heads and the vocabulary.",
  "mesh.sequence": "Devices that share the positions of long texts.",
}


def define() -> None:
  """Defines --mesh.data, --mesh.fsdp, --mesh.token and --mesh.sequence."""
  for name, text in _HELP.items():
    flags.DEFINE_integer(name, None, f"{text} Without any of these flags one device has the whole model.")


def mesh():
  """The mesh of all devices that the flags describe; None where none of them was given.

  Raises:
    ValueError: the sizes do not use all devices exactly.
  """
  from tokenformer_jax.distributed.mesh import make_mesh  # It imports jax, which --help does not need.

  values = {name.removeprefix("mesh."): flags.FLAGS[name].value for name in _HELP}
  given = {axis: value for axis, value in values.items() if value is not None}
  return make_mesh(dataclasses.replace(MeshConfig(), **given)) if given else None
