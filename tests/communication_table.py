"""Prints what the compiled train step of a model sends, as a table.

`python -m tests.communication_table` compiles the 150m model for 8 simulated CPU devices, with a batch of 8 × 2048; with
`--topology=v5e:2x4` it compiles for a slice of TPUs that need not be present. No arrays are made. Other models are named by
size and preset:

    python -m tests.communication_table --size=small --preset=mixtral --remat=none --meshes=1x1x1x2,1x1x1x4,1x1x1x8
"""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
from absl import app, flags

from tokenformer_jax import data
from tokenformer_jax.config import COMPUTE_DTYPES, REMAT_POLICIES, Config, DataConfig, MeshConfig, ModelConfig
from tokenformer_jax.config.presets import LANGUAGE_MODELS
from tokenformer_jax.config.sizes import NAMED_SIZES
from tokenformer_jax.distributed.axes import batch_sharding
from tokenformer_jax.distributed.collectives import Collective, collectives
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.distributed.topologies import slice_devices
from tokenformer_jax.training.program import make_program

_TOPOLOGY = flags.DEFINE_string(
  "topology", "", "A slice of 8 TPUs, such as v5e:2x4; by default 8 simulated CPU devices."
)
_REMAT = flags.DEFINE_enum("remat", "full", REMAT_POLICIES, "What is computed again in the backward pass.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", COMPUTE_DTYPES, "The dtype of matrix products.")
_SIZE = flags.DEFINE_enum("size", "150m", list(NAMED_SIZES), "Size of the model.")
_PRESET = flags.DEFINE_enum("preset", "tokenformer", LANGUAGE_MODELS, "Architecture of the model.")
_HEADS = flags.DEFINE_integer("heads", None, "The number of attention heads; by default that of the size.")
_LENGTH = flags.DEFINE_integer(
  "seq_length", None, "Tokens of a row, by default that of the size; above 512 compiling for TPUs takes long."
)
_MESHES = flags.DEFINE_list(
  "meshes",
  ["8x1x1x1", "1x8x1x1", "1x1x1x8", "2x2x1x2", "1x1x8x1"],
  "Meshes to compile for, as data × fsdp × sequence × token.",
)
ROWS = 8


def main(_):
  jax.config.update("jax_num_cpu_devices", 8)
  model = ModelConfig.named(_SIZE.value, _PRESET.value, remat=_REMAT.value, compute_dtype=_DTYPE.value)
  model = dataclasses.replace(
    model, num_heads=_HEADS.value or model.num_heads, seq_length=_LENGTH.value or model.seq_length
  )
  devices = slice_devices(_TOPOLOGY.value) if _TOPOLOGY.value else jax.devices()
  print(
    f"{_SIZE.value} {_PRESET.value}, remat {model.remat}, {model.compute_dtype}, {model.num_heads} heads, batch {ROWS} × "
    f"{model.seq_length}, {_TOPOLOGY.value or 'CPUs'}",
    flush=True,
  )
  repeats = (model.num_layers - model.has_first_block) // len(model.pattern)
  for sizes in _MESHES.value:
    data_size, fsdp, sequence, token = map(int, sizes.split("x"))
    mesh = make_mesh(MeshConfig(data_size, fsdp, token, sequence), devices[: data_size * fsdp * sequence * token])
    found, peak = compiled(model, mesh)
    print(f"\n{sizes}: {sum(c.bytes_sent for c in found) / 1e6:,.0f} MB sent by a device, {peak / 2**30:.2f} GiB held")
    for name, part in (
      ("a layer", [c for c in found if c.trips == repeats]),
      ("once", [c for c in found if c.trips == 1 and c.bytes > 4096]),
    ):
      for line, count in sorted(Counter(map(describe, part)).items()):
        print(f"  {name:8}{line}  × {count}", flush=True)


def compiled(model: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[list[Collective], int]:
  """(what a step sends, the most bytes that a device holds at once)."""
  program = make_program(Config(model=model, data=DataConfig(batch_size=ROWS)), model, mesh)
  shape = (ROWS, model.seq_length)
  ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, shape))
  step = program.train_step.lower(program.shapes, data.Batch(ids, ids)).compile()
  memory = step.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return collectives(step.as_text(), mesh), held + memory.temp_size_in_bytes


def describe(sent: Collective) -> str:
  when = "backward" if sent.backward else "forward"
  shape = "×".join(map(str, sent.shape))
  return (
    f"{when:9}{sent.kind:19}{' '.join(sent.axes):11}{sent.dtype}[{shape}]{' of a parameter' if sent.argument else ''}"
  )


if __name__ == "__main__":
  app.run(main)
