"""Everything that this package does, measured on whatever accelerator JAX finds, most important first.

    python -m experiments.benchmarks.accelerator --out=DIR [--minutes=8] [--sections=products,train]

The tables are in DIR/results.md and DIR/results.json, which are complete after every row: what is cut off loses nothing.
Beside them are the compiled program of the first train step and its trace. On a CPU all shapes are tiny, as a test that
the command works. Needs no network, and nothing but the package's own dependencies; sections that take an optional
package (PyTorch, qwix) say so where it is missing.

Sections run in processes of their own, started one after the other, so that a section that crashes or hangs costs only
itself. Each may begin until its share of the minutes is over; time that a section leaves is the next one's.
"""

import faulthandler
import importlib
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging

from experiments.benchmarks.accelerator.results import Results

# Section -> (module, function, share of the minutes until which it may run).
SECTIONS = {
  "products": ("rates", "run", 0.06),
  "train": ("train", "run", 0.40),
  "torch": ("torch_model", "run", 0.60),
  "decode": ("decode", "run", 0.74),
  "attention": ("layers", "run_attention", 0.80),
  "pattention": ("layers", "run_pattention", 0.90),
  "growth": ("growth", "run", 1.0),
}
# How long a section may overrun, in which its case ends, before its process is stopped.
_GRACE = 40.0

_OUT = flags.DEFINE_string("out", None, "Folder of the tables.", required=True)
_MINUTES = flags.DEFINE_float("minutes", 8.0, "Everything ends after this time.")
_SECTIONS = flags.DEFINE_list("sections", list(SECTIONS), f"What to measure: any of {', '.join(SECTIONS)}.")
_ENDS = flags.DEFINE_string("ends", None, "Set by the command itself in the processes of sections: when each ends.")


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax writes a page of notes for each checkpoint.
  for name in _SECTIONS.value:
    if name not in SECTIONS:
      raise app.UsageError(f"--sections: {name} is unknown; choose from {', '.join(SECTIONS)}.")
  if _ENDS.value:
    _measure(json.loads(_ENDS.value))
  else:
    _start_processes()


def _start_processes():
  begin, total = time.time(), 60.0 * _MINUTES.value
  names = [name for name in SECTIONS if name in _SECTIONS.value]
  last = SECTIONS[names[-1]][2]  # The shares of sections that are left out are the others'.
  ends = {name: begin + total * SECTIONS[name][2] / last for name in names}
  results = Results(_OUT.value)
  results.about.update(command=" ".join(["python -m experiments.benchmarks.accelerator", *sys.argv[1:]]))
  results.about.update(time=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
  for name in names:
    results.set_status(name, "waits")
  left = list(names)
  with tempfile.TemporaryDirectory() as cache:
    while left and time.time() < begin + total:
      together = left[: left.index("torch")] or ["torch"] if "torch" in left else list(left)
      code = _run_process(together, ends, begin + total, cache)
      results = Results(_OUT.value)
      for name in together:
        status = results.status(name)
        if status == "running":
          results.set_status(name, f"stopped: its process ended with {code}")
        if status != "waits" or code == 0:
          left.remove(name)
      if not code:
        continue
      if results.status(together[0]) == "waits":  # The process ended before its first section began.
        results.set_status(left.pop(0), f"failed: its process ended with {code} before it began")
  for name in left:
    Results(_OUT.value).set_status(name, "skipped: no time was left")
  print(f"{time.time() - begin:.0f} s; {pathlib.Path(_OUT.value, 'results.md')}", flush=True)


def _run_process(names, ends, end, cache):
  """Runs sections in one process, which is stopped when one overruns. Returns its exit code."""
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}
  environment.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
  environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  if names == ["torch"]:  # Both libraries share the GPU's memory.
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
  command = [sys.executable, "-m", "experiments.benchmarks.accelerator", f"--out={_OUT.value}"]
  command += [f"--sections={','.join(names)}", f"--ends={json.dumps(ends)}"]
  process = subprocess.Popen(command, env=environment)
  try:
    while process.poll() is None:
      now = time.time()
      running = [name for name in names if Results(_OUT.value).status(name) == "running"]
      if now > end or (running and now > ends[running[0]] + _GRACE):
        process.send_signal(signal.SIGABRT)  # It prints where it was.
        try:
          process.wait(5.0)
        except subprocess.TimeoutExpired:
          pass
        return "a stop after its time"
      time.sleep(1.0)
  finally:
    process.kill()
  return process.returncode


def _measure(ends):
  import jax

  from experiments.benchmarks.accelerator.timing import Clock

  faulthandler.enable()
  results, device = Results(_OUT.value), jax.devices()[0]
  memory = (device.memory_stats() or {}).get("bytes_limit")
  results.about.update(
    device=f"{device.device_kind} ({device.platform}), {len(jax.devices())} of them, the first one is used",
    memory=f"{memory / 2**30:.1f} GiB for JAX" if memory else "unknown",
    machine=f"{os.cpu_count()} processors, Python {platform.python_version()}",
    versions=", ".join(
      f"{name} {importlib.import_module(name).__version__}" for name in ("jax", "jaxlib", "flax", "optax")
    ),
  )
  for name in _SECTIONS.value:
    if time.time() > ends[name]:
      results.set_status(name, "skipped: no time was left")
      continue
    module, function, _ = SECTIONS[name]
    results.set_status(name, "running")
    begin = time.perf_counter()
    try:
      section = importlib.import_module(f"experiments.benchmarks.accelerator.{module}")
      getattr(section, function)(results, Clock(ends[name]), tiny=device.platform == "cpu")
      results.set_status(name, f"{time.perf_counter() - begin:.0f} s")
    except Exception as error:
      results.set_status(name, f"failed: {type(error).__name__}: {str(error)[:500]}")


if __name__ == "__main__":
  app.run(main)
