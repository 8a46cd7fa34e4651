"""Runs CLI commands in processes of their own that begin with this package imported: a tenth of a second each.

A server process imports the package once and forks for every command.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tokenformer_jax.training.loop", "tokenformer_jax.training.resize"])


def _run(command, flags, descriptors, encoding, variables):
  os.environ.update(variables)
  for number, path in enumerate(descriptors, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  sys.stdout = open(1, "w", encoding=encoding, closefd=False)
  sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
  sys.argv[1:] = flags
  if command.endswith(".py"):
    runpy.run_path(command, run_name="__main__")
  else:
    runpy.run_module(f"tokenformer_jax.cli.{command}", run_name="__main__", alter_sys=True)


def call(command: str, *flags: str, stdout: str | None = None, encoding: str = "utf-8", **variables: str):
  """Returns exit code, stdout and the lines of stderr of `python -m tokenformer_jax.cli.COMMAND FLAGS`.

  Args:
    command: the module's name, or the path of a script.
    stdout: a file that takes the place of stdout, such as /dev/full.
    encoding: of stdout.
    variables: set in the command's environment.
  """
  with tempfile.TemporaryDirectory() as folder:
    out, errors = os.path.join(folder, "out"), os.path.join(folder, "errors")
    process = CONTEXT.Process(target=_run, args=(command, flags, (stdout or out, errors), encoding, variables))
    process.start()
    process.join(timeout=300)
    said = b""
    if not stdout:
      with open(out, "rb") as file:
        said = file.read()
    with open(errors, encoding="utf-8") as file:
      return process.exitcode, said.decode(encoding), file.read().splitlines()
