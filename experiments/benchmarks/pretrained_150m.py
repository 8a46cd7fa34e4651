"""The shape of the released 150M model: writing, loading, converting in both directions, and generating.

    python experiments/benchmarks/pretrained_150m.py [--size=150m]

Weights are random. Every step runs in a process of its own, so that its peak memory can be measured. Two cores that
were also busy with other work (load 6 to 8), November 2026, Python 3.11.7, jax 0.10.2:

    write         0.608 GB
    load          1.9 s; peak 0.97 GiB, of which 0.57 are the parameters and 0.17 Python and JAX
    convert       6.6 s, peak 1.07 GiB      .bin to an exported folder, including the CLI and its imports
    load_ours     1.7 s, peak 0.94 GiB; the logits of both are equal bit for bit
    convert_back  9.2 s, peak 1.02 GiB; the bytes are those of the first file
    write_text    first call 11.5 s with compiling, then 13.8 tokens a second, float32
"""

import filecmp
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from tokenformer_jax.cli import command

_SIZE = flags.DEFINE_string("size", "150m", "A named size.")
_STEP = flags.DEFINE_string("step", None, "Run one step in this process.")
_FOLDER = flags.DEFINE_string("folder", None, "Folder of the files; by default a temporary one.")
_GIB = 2**30


def write(folder):
  """Writes a released state dict of random numbers, as torch.save does."""
  from tokenformer_jax.config import ModelConfig
  from tokenformer_jax.interop.names import released_shapes
  from tokenformer_jax.interop.stored_array import ComputedArray
  from tokenformer_jax.interop.torch_file import write_torch

  rng = np.random.default_rng(0)
  arrays = {
    name: ComputedArray(shape, lambda shape=shape: 0.02 * rng.standard_normal(shape, np.float32))
    for name, shape in released_shapes(ModelConfig.named(_SIZE.value)).items()
  }
  write_torch(folder / "pytorch_model.bin", arrays, "float32")
  return {"gigabytes": (folder / "pytorch_model.bin").stat().st_size / 1e9}


def load(folder, path="pytorch_model.bin"):
  """Measures from_pretrained, and computes the logits of 16 tokens."""
  import jax

  from tokenformer_jax.interop.pretrained import from_pretrained

  before = resident()
  start = time.perf_counter()
  model = jax.block_until_ready(from_pretrained(folder / path))
  seconds = time.perf_counter() - start
  loaded = peak()
  logits = np.asarray(jax.jit(model)(np.arange(16)[None]))
  np.save(folder / f"{pathlib.Path(path).parent.name}logits.npy", logits)
  return {
    "load_seconds": seconds,
    "parameters": model.config.num_parameters,
    "parameters_gib": 4 * model.config.num_parameters / _GIB,
    "resident_before_gib": before / _GIB,
    "peak_after_loading_gib": loaded / _GIB,
  }


def load_ours(folder):
  """Does the same from the converted folder."""
  found = load(folder, "ours/model.safetensors")
  theirs, ours = (np.load(folder / f"{name}logits.npy") for name in ("", "ours"))
  return {**found, "largest_difference_of_logits": float(np.abs(theirs - ours).max())}


def convert(folder, source="pytorch_model.bin", target="ours"):
  """Runs the CLI from .bin to a folder."""
  start = time.perf_counter()
  subprocess.run(
    [sys.executable, "-m", "tokenformer_jax.cli.convert", f"--from={folder / source}", f"--to={folder / target}"],
    check=True,
    stdout=subprocess.DEVNULL,
  )
  return {
    "convert_seconds": time.perf_counter() - start,
    "peak_of_the_door_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / _GIB,
  }


def convert_back(folder):
  """Runs the CLI from the folder to a .bin, and compares the two files byte by byte."""
  found = convert(folder, "ours", "back/pytorch_model.bin")
  same = filecmp.cmp(folder / "pytorch_model.bin", folder / "back" / "pytorch_model.bin", shallow=False)
  return {**found, "same_bytes": same}


def write_text(folder):
  """Continues 64 tokens greedily by 64 more, and again with compiled programs."""
  from tokenformer_jax.data.tokenizer import ByteTokenizer
  from tokenformer_jax.inference.generate import generate
  from tokenformer_jax.interop.pretrained import from_pretrained

  model = from_pretrained(folder / "ours")
  prompt, seconds = list(range(64)), []
  for count in (64, 64, 1):
    start = time.perf_counter()
    generate(model, ByteTokenizer(), [prompt], max_new_tokens=count, temperature=0)
    seconds.append(time.perf_counter() - start)
  return {
    "first_call_seconds": seconds[0],
    "tokens_a_second_when_compiled": 63 / (seconds[1] - seconds[2]),
    "peak_gib": peak() / _GIB,
  }


STEPS = {step.__name__: step for step in (write, load, convert, load_ours, convert_back, write_text)}


def resident() -> int:
  """Returns the bytes of memory that this process has now."""
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
  """Returns the most bytes of memory that this process had."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv):
  del argv
  if _STEP.value:
    print(json.dumps(STEPS[_STEP.value](pathlib.Path(_FOLDER.value))))
    return
  with tempfile.TemporaryDirectory() as folder:
    for step in STEPS:
      flags_given = [f"--step={step}", f"--folder={_FOLDER.value or folder}", f"--size={_SIZE.value}"]
      command = [sys.executable, __file__, *flags_given]
      done = subprocess.run(command, check=True, capture_output=True, text=True)
      found = {
        name: round(value, 3) if type(value) is float else value
        for name, value in json.loads(done.stdout.splitlines()[-1]).items()
      }
      print(f"{step:12}", ", ".join(f"{name} {value}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
  command.run(main)
