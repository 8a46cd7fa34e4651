"""Peak memory and products of a train step on one TPU chip, from its compiled program; no TPU is needed.

    python experiments/benchmarks/train_memory.py 150m v5e:1x1 --batch_size=4 none,reference dots,reference full,fused

Each further argument is a remat policy and a kernel. Bfloat16, T = 2048. The predicted time is that of the products
at the chip's published peak, or of reading the arguments once; nothing is run.
"""

import dataclasses
import sys

from absl import app, flags

from tokenformer_jax.config import Config, DataConfig, ModelConfig
from tokenformer_jax.distributed.topologies import parse_topology, slice_mesh
from tokenformer_jax.training.compile_check import _train_step
from tokenformer_jax.training.program import make_program

_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Rows of a batch.")
_MOMENTS = flags.DEFINE_string("moment_dtype", "float32", "Dtype of Adam's moments.")


def main(argv):
  _, name, topology, *variants = argv
  print(f"{name}, {_BATCH_SIZE.value} × 2048 tokens, {topology}, moments {_MOMENTS.value}")
  print("| remat | kernel | peak GiB | activations and the rest GiB | TFLOP | at the peak ms |")
  print("|---|---|---|---|---|---|", flush=True)
  for remat, kernel in (variant.split(",") for variant in variants):
    model = ModelConfig.named(name, compute_dtype="bfloat16", remat=remat, kernel=kernel)
    config = Config(model=model, data=DataConfig(batch_size=_BATCH_SIZE.value))
    config = dataclasses.replace(
      config,
      optimizer=dataclasses.replace(
        config.optimizer, first_moment_dtype=_MOMENTS.value, second_moment_dtype=_MOMENTS.value
      ),
    )
    mesh = slice_mesh(config.mesh, topology)
    try:
      step = _train_step(config, make_program(config, model, mesh), mesh, parse_topology(topology)[0])
    except ValueError as error:
      print(f"| {remat} | {kernel} | {error} |", flush=True)
      continue
    rest = step.peak - sum(step.held.values())
    print(
      f"| {remat} | {kernel} | {step.peak / 2**30:.2f} | {rest / 2**30:.2f} | {step.flops / 1e12:.2f} | "
      f"{1e3 * step.step_seconds[0]:.1f} |",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main, sys.argv)
