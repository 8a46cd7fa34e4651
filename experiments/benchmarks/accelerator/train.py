"""The library's own train step at batch sizes that fill the memory, and a profile of the first and largest case."""

import gzip
import math
import statistics
import time
from typing import NamedTuple

import jax
import numpy as np

from experiments.benchmarks.accelerator.profile import add_profile
from tokenformer_jax.config import Config, DataConfig, ModelConfig
from tokenformer_jax.distributed.mesh import make_mesh
from tokenformer_jax.training.flops import peak_flops, product_flops
from tokenformer_jax.training.program import Program, make_program

# Named size, positions and remat policy, most important first.
CASES = [
  ("450m", 2048, "none"),
  ("150m", 2048, "none"),
  ("124m", 1024, "none"),
  ("1.5b", 2048, "none"),
  ("450m", 2048, "dots"),
  ("450m", 1024, "none"),
  ("1.5b", 2048, "dots"),
  ("150m", 1024, "none"),
  ("1.5b", 1024, "none"),
]
TINY_CASES = [("tiny", 64, "none")]
TABLE = "Train steps in bfloat16 with float32 parameters and AdamW"
# Bytes to fill on a CPU.
TINY_MEMORY = 2e7
# The share of the memory that JAX may use which a compiled step may take.
_FILLED = 0.93


class Batch(NamedTuple):
  """The fields of `tokenformer_jax.data.Batch`, whose package imports readers of data sets that are not needed here."""

  inputs: jax.Array | jax.ShapeDtypeStruct
  labels: jax.Array | jax.ShapeDtypeStruct
  positions: None = None
  segments: None = None
  weights: None = None


class Step(NamedTuple):
  """A compiled train step.

  Attributes:
    program: of which it is the train step.
    rows: rows of its batch.
    compiled: the executable.
    peak: bytes that it takes, state and batch included, as counted by the compiler.
    products: FLOPs of the products of the traced program.
    seconds: how long tracing and compilation took.
  """

  program: Program
  rows: int
  compiled: jax.stages.Compiled
  peak: int
  products: int
  seconds: float


def compiled_step(name: str, length: int, remat: str, rows: int, quick: bool = False) -> Step:
  """Compiles the train step of a named size. `quick` leaves out XLA:GPU's search for the fastest products."""
  begin = time.perf_counter()
  vocab = {"vocab_size": 512} if name == "tiny" else {}
  model = ModelConfig.named(name, compute_dtype="bfloat16", remat=remat, seq_length=length, **vocab)
  config = Config(model=model, data=DataConfig(batch_size=rows))
  program = make_program(config, model, make_mesh(devices=jax.devices()[:1]))
  ids = jax.ShapeDtypeStruct((rows, length), np.int32)
  traced = program.train_step.trace(program.shapes, Batch(ids, ids))
  compiled = traced.lower().compile(compiler_options={"xla_gpu_autotune_level": 0} if quick else None)
  memory = compiled.memory_analysis()
  peak = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
  )
  return Step(program, rows, compiled, peak, product_flops(traced.jaxpr.jaxpr), time.perf_counter() - begin)


def filling_step(name: str, length: int, remat: str, memory: float, least: int) -> Step:
  """Compiles the step with the most rows that fit, from the memory of one with few rows and at most three compilations.

  Args:
    name, length, remat: the case.
    memory: bytes that the step may take.
    least: rows of the first compilation.

  Raises:
    ValueError: not even `least` / 4 rows fit.
  """
  try:
    small = compiled_step(name, length, remat, least, quick=True)
  except jax.errors.JaxRuntimeError:  # A kernel that has no default form without the search.
    small = compiled_step(name, length, remat, least)
  parameters = 4 * small.program.model.num_parameters
  fixed, row = small.peak, (small.peak - 4 * parameters) / least  # Parameters, two moments and the gradient stay.
  rows = _rounded(least + (memory - fixed) / row)
  for _ in range(2):
    if rows < max(1, least // 4):
      raise ValueError(
        f"{least // 4} rows do not fit: {least} rows take {small.peak / 1e9:.1f} GB of {memory / 1e9:.1f}."
      )
    step = compiled_step(name, length, remat, rows)
    if step.peak <= memory:
      return step
    rows = min(_rounded(rows * (memory - 4 * parameters) / (step.peak - 4 * parameters)), rows - 1)
  raise ValueError(f"{step.rows} rows take {step.peak / 1e9:.1f} GB of {memory / 1e9:.1f}.")


def _rounded(rows: float) -> int:
  """Rounds down to a number of rows whose products fill whole tiles."""
  unit = 8 if rows >= 16 else 4 if rows >= 8 else 1
  return max(0, math.floor(rows / unit) * unit)


def random_batch(rows: int, length: int, vocab_size: int) -> Batch:
  ids = np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1)).astype(np.int32)
  return Batch(jax.device_put(ids[:, :-1]), jax.device_put(ids[:, 1:]))


class Running:
  """A step with a state and a batch on the device."""

  def __init__(self, step: Step):
    self.model = step.program.model
    self._compiled = step.compiled
    self._state = step.program.initial_state()
    self._batch = random_batch(step.rows, self.model.seq_length, self.model.vocab_size)

  def run(self, steps: int = 1) -> tuple[float, float]:
    """Returns (seconds a step, loss of the last step)."""
    begin = time.perf_counter()
    for _ in range(steps):
      self._state, metrics = self._compiled(self._state, self._batch)
    jax.block_until_ready(self._state)
    return (time.perf_counter() - begin) / steps, float(metrics["loss"])


def run(results, clock, tiny):
  took = 0.0
  for number, case in enumerate(TINY_CASES if tiny else CASES):
    label = dict(zip(("size", "T", "remat"), case))
    if clock.left < 1.1 * took:
      results.add("train", TABLE, **label, note=f"skipped: {clock.left:.0f} s were left")
      continue
    begin = time.perf_counter()
    try:
      _measure(results, case, label, tiny, with_profile=number == 0)
    except Exception as error:
      results.add("train", TABLE, **label, note=f"failed: {type(error).__name__}: {str(error)[:300]}")
    took = time.perf_counter() - begin


def _measure(results, case, label, tiny, with_profile):
  device = jax.devices()[0]
  statistics_of = device.memory_stats() or {}
  memory = _FILLED * statistics_of.get("bytes_limit", TINY_MEMORY)
  step = filling_step(*case, memory, least=2 if tiny else 4)
  before = statistics_of.get("peak_bytes_in_use", 0)
  running = Running(step)
  running.run(2)
  once, _ = running.run()
  calls = max(1, min(20, int(0.5 / once)))
  rounds = [running.run(calls) for _ in range(3 if tiny else 5)]
  taken, loss = statistics.median(each for each, _ in rounds), rounds[-1][1]
  measured = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
  model, tokens = running.model, step.rows * running.model.seq_length
  work = 3 * model.forward_flops_per_token * tokens
  published = peak_flops(make_mesh(devices=jax.devices()[:1])) if device.platform != "cpu" else None
  results.add(
    "train",
    TABLE,
    **label,
    B=step.rows,
    **{
      "ms a step": 1e3 * taken,
      "tokens/s": tokens / taken,
      "model TFLOP/s": 1e-12 * work / taken,
      "share of the product rate, %": 100 * work / taken / results.rates["product"]
      if "product" in results.rates
      else "",
      "share of the published peak, %": 100 * work / taken / published if published else "",
      "products computed / model FLOPs": step.products / work,
      "predicted peak GB": step.peak / 1e9,
      # The device's peak is that of the whole process, so a smaller one cannot be seen.
      "measured peak GB": measured / 1e9 if measured > before else "",
      "compiled in s": step.seconds,
      "loss": loss,
    },
  )
  if with_profile:
    text = step.compiled.as_text()
    with gzip.open(results.folder / "train_step.hlo.txt.gz", "wt") as file:
      file.write(text)
    add_profile(results, lambda: running.run(2), text, " ".join(map(str, case)), 2)
