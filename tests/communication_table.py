"""Prints what the compiled train step of the 150m model sends, as a table.

`python -m tests.communication_table` compiles for 8 simulated CPU devices; with `--topology=v5e:2x4` it compiles for a
slice of TPUs that need not be present. The batch is 8 × 2048, and no arrays are made.
"""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
from absl import app, flags

from tokenformer_jax import data
from tokenformer_jax.config import COMPUTE_DTYPES, REMAT_POLICIES, Config, DataConfig, MeshConfig, ModelConfig
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
_HEADS = flags.DEFINE_integer("heads", 12, "The number of attention heads.")
_LENGTH = flags.DEFINE_integer("seq_length", 2048, "Tokens of a row; above 512 compiling for TPUs takes long.")
_MESHES = flags.DEFINE_list(
  "meshes",
  ["8x1x1x1", "1x8x1x1", "1x1x1x8", "2x2x1x2", "1x1x8x1"],
  "Meshes to compile for, as data × fsdp × sequence × token.",
)
ROWS = 8


def main(_):
  jax.config.update("jax_num_cpu_devices", 8)
  model = dataclasses.replace(
    ModelConfig.named("150m"),
    remat=_REMAT.value,
    compute_dtype=_DTYPE.value,
    num_heads=_HEADS.value,
    seq_length=_LENGTH.value,
  )
  devices = slice_devices(_TOPOLOGY.value) if _TOPOLOGY.value else None
  print(
    f"remat {model.remat}, {model.compute_dtype}, {model.num_heads} heads, {_TOPOLOGY.value or '8 CPUs'}", flush=True
  )
  for sizes in _MESHES.value:
    data_size, fsdp, sequence, token = map(int, sizes.split("x"))
    found, peak = compiled(model, make_mesh(MeshConfig(data_size, fsdp, token, sequence), devices))
    print(f"\n{sizes}: {sum(c.bytes_sent for c in found) / 1e6:,.0f} MB sent by a device, {peak / 2**30:.2f} GiB held")
    for name, part in (
      ("a layer", [c for c in found if c.trips == model.num_layers]),
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
