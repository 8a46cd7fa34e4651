"""The wrapper of all doors, tried on a small door in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

DOOR = '''"""Opens a small door."""

from absl import flags

from tokenformer_jax.cli import command
from tokenformer_jax.config import ModelConfig

_DO = flags.DEFINE_string("do", None, "What to do.")
_COUNT = flags.DEFINE_integer("count", 1, "How often.")
flags.mark_flags_as_required(["do"])


def main(argv):
  assert len(argv) == 1
  if _DO.value == "work":
    print("done", _COUNT.value)
  elif _DO.value == "our ValueError":
    ModelConfig.named("150")
  elif _DO.value == "a missing file":
    open("/nowhere/text.txt")
  elif _DO.value == "a foreign ValueError":
    int("seven")
  elif _DO.value == "an internal KeyError":
    {}["key"]


if __name__ == "__main__":
  command.run(main)
'''


@pytest.fixture
def door(tmp_path):
  """Runs the door with these arguments; gives exit code, stdout, stderr."""
  (tmp_path / "small_door.py").write_text(DOOR)
  root = pathlib.Path(__file__).parent.parent

  def run(*arguments):
    result = subprocess.run(
      [sys.executable, str(tmp_path / "small_door.py"), *arguments],
      text=True,
      capture_output=True,
      check=False,
      env={**os.environ, "PYTHONPATH": str(root)},
    )
    return result.returncode, result.stdout, result.stderr

  return run


def test_work_and_help(door):
  assert door("--do=work", "--count=3") == (0, "done 3\n", "")
  for flag in ("--help", "-helpfull"):
    code, stdout, stderr = door(flag)
    assert (code, stderr) == (0, "")
    assert stdout.startswith("Opens a small door.\n")
    assert "--do: What to do." in stdout and "--count: How often." in stdout


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--do=work", "--cuont=3"], "cuont"),
    (["--do=work", "--count=three"], "flag --count=three"),
    ([], "--do"),
    (["--do=work", "extra"], "argument 'extra' is not a flag: flags look like --name=value."),
    (["--do=our ValueError"], "model size '150' is unknown"),
    (["--do=a missing file"], "/nowhere/text.txt"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(door, arguments, message):
  code, stdout, stderr = door(*arguments)
  assert (code, stdout) == (2, "")
  assert stderr.startswith("error: ") and message in stderr
  assert stderr.count("\n") == 1, stderr


@pytest.mark.parametrize(
  "what, last",
  [("a foreign ValueError", "ValueError: invalid literal for int()"), ("an internal KeyError", "KeyError: 'key'")],
)
def test_what_is_ours_to_mend_keeps_its_traceback(door, what, last):
  code, _, stderr = door(f"--do={what}")
  assert code == 1
  assert "Traceback" in stderr and last in stderr
