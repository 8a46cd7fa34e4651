"""Start-up: the time to import the package, to compile a train step of 4 and of 40 layers, and to the first step.

    python experiments/benchmarks/startup.py [--rounds=3]

Each measurement is a new process without a compilation cache; rounds are interleaved. Times are wall-clock and
processor times; compare the latter on a shared machine. The last two rows are the quickstart, from its start to its
first step, with an empty persistent compilation cache and then with the cache that this left.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags

_ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes for each measurement.")

_CLOCKS = "import os, time; begin = time.perf_counter(), sum(os.times()[:2])\n"
_TELL = "\nprint(time.perf_counter() - begin[0], sum(os.times()[:2]) - begin[1])"
_COMPILE = """
import jax, jax.numpy as jnp
from tokenformer_jax import data
from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.distributed.axes import batch_sharding
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.training.program import make_program
model = ModelConfig.named("tiny", num_layers={layers})
config, mesh = Config(model=model), make_mesh()
jax.jit(lambda x: x + 1)(1.0)  # JAX initialises its backend once.
begin = time.perf_counter(), sum(os.times()[:2])
ids = jax.ShapeDtypeStruct((8, 128), jnp.int32, sharding=batch_sharding(mesh, (8, 128)))
program = make_program(config, model, mesh)
program.train_step.lower(program.shapes, data.Batch(ids, ids)).compile()
"""
_MEASURED = {
  "import jax": "import jax",
  "import jax, flax, optax": "import jax, flax.nnx, optax",
  "import tokenformer_jax": "import tokenformer_jax",
  "train step, L = 4": _COMPILE.format(layers=4),
  "train step, L = 40": _COMPILE.format(layers=40),
}


def seconds_to_the_first_step(environment: dict[str, str], folder: str) -> float:
  """Seconds until the quickstart, in a new work folder, prints the line of its first step."""
  quickstart = pathlib.Path(__file__).parent.parent / "quickstart.py"
  train = ["-m", "tokenformer_jax.cli.train", f"--config={quickstart}", "--config.training.log_every=1"]
  begin, told = time.perf_counter(), b""
  with subprocess.Popen(
    [sys.executable, *train, f"--workdir={folder}"],
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  ) as process:
    while b" 1/600" not in told:
      told += os.read(process.stderr.fileno(), 4096) or sys.exit(told.decode())
    taken = time.perf_counter() - begin
    process.kill()
  return taken


def main(argv):
  del argv
  environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
  seconds = {name: [] for name in _MEASURED}
  for _ in range(_ROUNDS.value):
    for name, code in _MEASURED.items():
      told = subprocess.run(
        [sys.executable, "-c", _CLOCKS + code + _TELL], env=environment, check=True, capture_output=True, text=True
      ).stdout
      seconds[name].append([float(number) for number in told.split()])
  print("| | wall-clock s | processor s |\n|---|---|---|")
  medians = {name: [statistics.median(column) for column in zip(*rounds)] for name, rounds in seconds.items()}
  for name, (clock, processor) in medians.items():
    print(f"| {name} | {clock:.2f} | {processor:.2f} |")
  four, forty = medians["train step, L = 4"], medians["train step, L = 40"]
  print(f"| L = 40 / L = 4 | {forty[0] / four[0]:.2f} | {forty[1] / four[1]:.2f} |")
  with tempfile.TemporaryDirectory() as folder:
    environment["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
    for name in ("empty", "warm"):
      seconds = seconds_to_the_first_step(environment, f"{folder}/{name}")
      print(f"| quickstart's first step, {name} cache | {seconds:.2f} | |", flush=True)


if __name__ == "__main__":
  app.run(main)
