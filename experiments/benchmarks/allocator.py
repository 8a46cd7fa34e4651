"""A train step on this machine's CPU cores with glibc's usual allocator, and with the one that `cli.train` sets.

    python -m experiments.benchmarks.allocator [--shape=l4-d256] [--rounds=5] [--steps=5]

Rounds alternate; each measurement is a process of its own. Times and page faults are those of a step.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

from absl import app, flags

from tokenformer_jax import allocator

# Layers, channels, heads, attention tokens, feed-forward tokens, T, B, as in train_step_torch.py.
_SHAPES = {
  "tiny": (2, 64, 4, 64, 256, 64, 2),
  "l4-d256": (4, 256, 4, 256, 1024, 256, 8),
  "l6-d384": (6, 384, 6, 384, 1536, 256, 8),
}
_SHAPE = flags.DEFINE_enum("shape", "l4-d256", list(_SHAPES), "Shape of the model and its batch.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Measurements of each kind; medians are reported.")
_STEPS = flags.DEFINE_integer("steps", 5, "Steps of a measurement, after two that are not counted.")
_KIND = flags.DEFINE_enum("kind", None, ["usual", "kept"], "Used by this script itself, in the process that measures.")


def measure() -> dict[str, float]:
  """Milliseconds, milliseconds of the processor and page faults of a step, and the process's largest memory, MB."""
  if _KIND.value == "kept":
    allocator.keep_freed_memory_on_cpus()
  import jax
  import numpy as np

  from tokenformer_jax.config import Config, DataConfig, ModelConfig
  from tokenformer_jax.data import Batch
  from tokenformer_jax.distributed.mesh import make_mesh
  from tokenformer_jax.training.program import make_program

  layers, width, heads, attention, ffn, length, rows = _SHAPES[_SHAPE.value]
  model = ModelConfig(
    vocab_size=5120,
    num_layers=layers,
    hidden_size=width,
    num_heads=heads,
    qkv_tokens=attention,
    proj_tokens=attention,
    ffn_tokens=ffn,
    seq_length=length,
  )
  program = make_program(Config(model=model, data=DataConfig(batch_size=rows)), model, make_mesh())
  state = program.initial_state()
  batch = Batch(*np.random.default_rng(0).integers(0, 5120, (2, rows, length), np.int32))
  for _ in range(2):
    state, _ = program.train_step(state, batch)
  jax.block_until_ready(state)
  before, wall, processor = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), time.process_time()
  for _ in range(_STEPS.value):
    state, _ = program.train_step(state, batch)
  jax.block_until_ready(state)
  after = resource.getrusage(resource.RUSAGE_SELF)
  return {
    "ms": (time.perf_counter() - wall) * 1e3 / _STEPS.value,
    "processor ms": (time.process_time() - processor) * 1e3 / _STEPS.value,
    "page faults": (after.ru_minflt - before.ru_minflt) / _STEPS.value,
    "MB": after.ru_maxrss / 1e3,
  }


def main(argv):
  del argv
  if _KIND.value:
    print(json.dumps(measure()))
    return
  found: dict[str, list[dict[str, float]]] = {"usual": [], "kept": []}
  for _ in range(_ROUNDS.value):
    for kind, rows in found.items():
      command = [sys.executable, "-m", "experiments.benchmarks.allocator", f"--kind={kind}"]
      command += [f"--shape={_SHAPE.value}", f"--steps={_STEPS.value}"]
      done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
      rows.append(json.loads(done.stdout.splitlines()[-1]))
      print(kind, rows[-1], file=sys.stderr, flush=True)
  print("| allocator | ms | processor ms | page faults | largest memory, MB |\n|---|---|---|---|---|")
  for kind, rows in found.items():
    print(
      f"| {kind} | " + " | ".join(f"{statistics.median(row[name] for row in rows):,.0f}" for name in rows[0]) + " |"
    )


if __name__ == "__main__":
  app.run(main)
