"""Disturbs small runs for a while and demands that each ends with the bits of the run that nothing disturbed.

    nice -n 19 python -m tests.faults.soak --minutes=30 --seed=1

A run is started again and again until it is complete. Each start is killed, gets a signal or two, meets a full disk or an
error of the disk at a random file operation, or is left alone; between two starts a bit of the newest checkpoint may
flip, or one of its files may be cut or deleted. The seed decides all choices, but not the moments at which they act.
Printed at the end: how often each thing was done, the exit codes, and the completed runs. Exit code 1: a run had other
bits, an exit code that docs/reliability.md does not name, or no end.
"""

import argparse
import collections
import contextlib
import ctypes
import errno
import faulthandler
import json
import os
import pathlib
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
STEPS = 40
PATIENCE = 900  # Seconds; a start takes less than 20 on a machine that does nothing else.
EVENTS = ("kill", "SIGTERM", "SIGINT", "SIGHUP", "two signals", "full disk", "disk error", "nothing")
DAMAGES = ("flipped bit", "cut file", "deleted file", "nothing", "nothing")
# What a start may end with: complete, saved, ended by a second signal or before it handles signals, killed.
CODES = {
  0,
  143,
  128 + signal.SIGINT,
  128 + signal.SIGHUP,
  -signal.SIGTERM,
  -signal.SIGINT,
  -signal.SIGHUP,
  -signal.SIGKILL,
}


def train(arguments, log, failing):
  """`cli.train` in a process of its own; `failing` is (folder, number of the file operation, errno) or None."""
  for number in (1, 2):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
  sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
  faulthandler.register(signal.SIGUSR1, file=sys.stderr)
  if failing:
    folder, number, error = failing
    ctypes.CDLL(None).fail_at(folder.encode(), number, error)
  sys.argv[1:] = arguments
  runpy.run_module("tokenformer_jax.cli.train", run_name="__main__", alter_sys=True)


class Soak:
  def __init__(self, folder: pathlib.Path, seed: int):
    self.folder, self.random, self.counts = folder, random.Random(seed), collections.Counter()
    (folder / "text.txt").write_text(small_run.TEXT)
    config = small_run.config(
      f"text:{folder}/text.txt",
      [small_run.stage(STEPS // 2)],
      num_steps=STEPS,
      log_every=1,
      eval_every=10,
      checkpoint_every=2,
      checkpoints_kept=4,
    )
    (folder / "config.py").write_text(
      "import json\nimport ml_collections\n\n\ndef get_config():\n"
      f"  return ml_collections.ConfigDict(json.loads({json.dumps(config.to_dict())!r}))\n"
    )

  def start(self, workdir: pathlib.Path, failing=None):
    arguments = [f"--config={self.folder}/config.py", f"--workdir={workdir}"]
    process = CONTEXT.Process(target=train, args=(arguments, str(workdir) + ".log", failing))
    process.start()
    return process

  def undisturbed(self) -> tuple:
    process = self.start(self.folder / "whole")
    process.join()
    assert process.exitcode == 0, (self.folder / "whole.log").read_text()[-3000:]
    return result(self.folder / "whole")

  def disturbed(self, name: str, until: float) -> tuple | None:
    """What the run ended with; None if the time was up before."""
    workdir = self.folder / name
    while time.monotonic() < until:
      event = self.random.choice(EVENTS)
      failing = None
      if event in ("full disk", "disk error"):
        number = self.random.randint(1, 600)
        failing = (f"{workdir}/", number, errno.ENOSPC if event == "full disk" else errno.EIO)
      process = self.start(workdir, failing)
      self.act(event, process)
      process.join(timeout=PATIENCE)
      if process.exitcode is None:
        os.kill(process.pid, signal.SIGUSR1)  # Its threads' stacks go to its log.
        process.join(timeout=5)
        process.kill()
        raise AssertionError(f"{name}: {event}: no end after {PATIENCE} s\n{tail(workdir, 20_000)}")
      self.counts[event] += 1
      self.counts[f"code {process.exitcode}"] += 1
      allowed = CODES | ({1} if failing or "SIGINT" in event or event == "two signals" else set())
      assert process.exitcode in allowed, f"{name}: {event}: code {process.exitcode}\n{tail(workdir)}"
      if process.exitcode == 0:
        return result(workdir)
      self.damage(workdir)
    return None

  def act(self, event: str, process) -> None:
    wait = self.random.uniform(0, 12)
    if event == "nothing":
      return
    process.join(timeout=wait)
    sent = {"kill": [signal.SIGKILL]} | {name: [signal.Signals[name]] for name in EVENTS[1:4]}
    sent["two signals"] = self.random.sample([signal.SIGTERM, signal.SIGINT, signal.SIGHUP], 2)
    for number in sent.get(event, ()):
      if process.exitcode is None:
        os.kill(process.pid, number)
        process.join(timeout=1.5)

  def damage(self, workdir: pathlib.Path) -> None:
    """Damages the newest step, if there are others before it."""
    steps = sorted(
      (path for path in workdir.glob("checkpoints/*") if path.name.isdigit()), key=lambda path: int(path.name)
    )
    damage = self.random.choice(DAMAGES)
    if len(steps) < 3 or damage == "nothing":
      return
    file = self.random.choice(sorted(path for path in steps[-1].rglob("*") if path.is_file()))
    raw = bytearray(file.read_bytes())
    if damage == "deleted file":
      file.unlink()
    elif damage == "cut file" and raw:
      file.write_bytes(raw[: self.random.randrange(len(raw))])
    elif raw:
      raw[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
      file.write_bytes(raw)
    self.counts[damage] += 1


def result(workdir: pathlib.Path) -> tuple:
  """(digest of the last state, what was measured at each step)."""
  program = make_program(small_run.config(), small_run.GROWN, small_run.mesh())
  state = Checkpoints(str(workdir)).restore(STEPS, program.shapes)
  rows = [
    {name: value for name, value in row.items() if name not in ("train/tokens_per_second", "train/utilisation")}
    for row in read_metrics(str(workdir))
  ]
  return small_run.digest(state), rows


def tail(workdir: pathlib.Path, size: int = 3000) -> str:
  return pathlib.Path(f"{workdir}.log").read_text(errors="replace")[-size:]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--minutes", type=float, default=30)
  parser.add_argument("--seed", type=int, default=1)
  given = parser.parse_args()
  until = time.monotonic() + 60 * given.minutes
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak_")))
    soak = Soak(folder, given.seed)
    whole = soak.undisturbed()
    complete = 0
    while time.monotonic() < until:
      ended = soak.disturbed(f"run{complete}", until)
      if ended is None:
        break  # The time is up.
      assert ended[0] == whole[0], f"run{complete}: the last state has other bits"
      assert ended[1] == whole[1], f"run{complete}: metrics.jsonl has other rows"
      complete += 1
      shutil.rmtree(folder / f"run{complete - 1}")
      print(f"{complete} complete, {dict(soak.counts)}", flush=True)
  print(
    f"seed {given.seed}: {complete} runs complete with the bits of the undisturbed one; {dict(sorted(soak.counts.items()))}"
  )


def build_library() -> str:
  """Compiles fail_at.c, which lets file operations fail, and returns its path."""
  compiler = shutil.which("gcc") or shutil.which("cc")
  assert compiler, "a C compiler is needed"
  path = pathlib.Path(tempfile.mkdtemp(prefix="soak_library_"), "fail_at.so")
  subprocess.run(
    [compiler, "-shared", "-fPIC", "-O1", "-U_FORTIFY_SOURCE", HERE / "fail_at.c", "-o", path, "-ldl"], check=True
  )
  return str(path)


if __name__ == "__main__":
  if "LD_PRELOAD" not in os.environ:
    os.execve(
      sys.executable,
      [sys.executable, "-m", "tests.faults.soak", *sys.argv[1:]],
      os.environ | {"LD_PRELOAD": build_library()},
    )
  from tests import (
    conftest,  # noqa: F401
    small_run,
  )
  from tests.commands import CONTEXT
  from tokenformer_jax.training.checkpoints import Checkpoints
  from tokenformer_jax.training.program import make_program
  from tokenformer_jax.training.run_log import read_metrics

  main()
