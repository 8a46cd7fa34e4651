"""The wrapper of all CLI commands, tried on a small command."""

import os
import re
import threading

import pytest

from tests.commands import call

COMMAND = '''"""Runs a small command."""

import errno
import os
import sys
import types

import jax
from absl import flags, logging

from tokenformer_jax.cli import command
from tokenformer_jax.config import ModelConfig

_DO = flags.DEFINE_string("do", None, "What to do.")
_COUNT = flags.DEFINE_integer("count", 1, "How often.")
flags.mark_flags_as_required(["do"])


def main(argv):
  assert len(argv) == 1
  match _DO.value:
    case "work":
      print("done", _COUNT.value)
    case "write much":
      print("much " * 100_000)
    case "write Greek":
      print("naïve Θ")
    case "our ValueError":
      ModelConfig.named("150")
    case "a missing file":
      open("/nowhere/text.txt")
    case "numbers":
      raise FloatingPointError("loss is nan")
    case "a full device":
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/metrics.jsonl")
    case "an exceeded quota":
      raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "run/metrics.jsonl")
    case "a broken disk":
      raise OSError("run/checkpoints/8: the checkpoint could not be saved")
    case "a full device behind a library":
      raise ValueError("RESOURCE_EXHAUSTED: Error writing run/d/0: No space left on device")
    case "a failed save of Orbax":
      logging.error("ours")
      code = compile("logging.error('a page'); logging.warning('news')", "/orbax/checkpoint/save.py", "exec")
      exec(code, {"logging": logging})
      sys.unraisablehook(types.SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed")))
    case "a foreign ValueError":
      int("seven")
    case "an internal KeyError":
      {}["key"]
    case "an encoding":
      # As if this package had encoded the text.
      exec(compile("'Θ'.encode('latin-1')", command.__file__, "exec"))
    case "cuda" | "tpuu" as platform:
      jax.config.update("jax_platforms", platform)
      jax.devices()
    case "promotion":
      jax.config.update("jax_numpy_dtype_promotion", "strict")
      jax.numpy.float32(1) + jax.numpy.int32(1)


if __name__ == "__main__":
  command.run(main, renamed={"times": "count"})
'''


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Runs the small command with these flags."""
  path = tmp_path_factory.mktemp("command") / "small_command.py"
  path.write_text(COMMAND)
  return lambda *flags, **options: call(str(path), *flags, **options)


def test_work_and_help(command):
  assert command("--do=work", "--count=3") == (0, "done 3\n", [])
  for flag in ("--help", "-helpfull"):
    code, stdout, stderr = command(flag)
    assert (code, stderr) == (0, [])
    assert stdout.startswith("Runs a small command.\n")
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
def test_a_mistake_is_one_line_and_exit_code_2(command, arguments, message):
  code, stdout, errors = command(*arguments)
  assert (code, stdout, len(errors)) == (2, "", 1), errors
  assert errors[0].startswith("error: ") and message in errors[0]


@pytest.mark.parametrize(
  "what, message",
  [
    ("a full device", "the device is full, and what was being written is not complete: .*run/metrics.jsonl"),
    ("an exceeded quota", "the device is full, .*run/metrics.jsonl"),
    ("a full device behind a library", "the device is full, .*run/d/0"),
    ("a broken disk", "run/checkpoints/8: the checkpoint could not be saved"),
  ],
)
def test_a_run_that_cannot_continue_is_one_line_and_exit_code_1(command, what, message):
  code, _, errors = command(f"--do={what}")
  assert code == 1 and len(errors) == 1, errors
  assert re.match(f"error: {message}", errors[0])


def test_of_a_failed_save_orbaxs_pages_are_not_shown_unless_asked_for(command):
  for verbosity, shown in (-1, ["ours", "news"]), (0, ["ours", "a page", "news"]):
    code, _, errors = command("--do=a failed save of Orbax", f"--verbosity={verbosity}")
    text = "\n".join(errors)
    assert code == 0 and [said for said in ("ours", "a page", "news", "Event loop") if said in text] == shown


def test_a_run_that_diverged_is_one_line_and_exit_code_3(command):
  assert command("--do=numbers") == (3, "", ["error: loss is nan"])


@pytest.mark.parametrize(
  "what, last",
  [
    ("a foreign ValueError", "ValueError: invalid literal for int()"),
    ("an internal KeyError", "KeyError: 'key'"),
    ("an encoding", "UnicodeEncodeError: 'latin-1'"),
  ],
)
def test_a_fault_of_the_package_keeps_its_traceback(command, what, last):
  code, _, errors = command(f"--do={what}")
  assert code == 1
  assert any("Traceback" in line for line in errors) and last in errors[-1]


def test_a_terminal_that_cannot_show_a_character_gets_its_number(command):
  assert command("--do=write Greek", encoding="latin-1") == (0, "naïve \\u0398\n", [])


@pytest.mark.parametrize("what", [["--do=work"], ["--do=write much"], ["--help"]])
def test_a_closed_pipe_ends_the_command_in_silence(command, tmp_path, what):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  reader = threading.Thread(target=lambda: os.close(os.open(pipe, os.O_RDONLY)))
  reader.start()
  code, _, errors = command(*what, stdout=str(pipe))
  reader.join()
  assert (code, errors) == (141, [])


def test_a_full_device_under_stdout_is_one_line(command):
  code, _, errors = command("--do=work", stdout="/dev/full")
  assert code == 1 and len(errors) == 1 and errors[0].startswith("error: the device is full"), errors


@pytest.mark.parametrize(
  "what, message",
  [
    ("cuda", "error: JAX_PLATFORMS='cuda': this machine has no such device"),
    ("tpuu", "error: JAX_PLATFORMS='tpuu': this machine has no such device"),
    ("promotion", "error: JAX_NUMPY_DTYPE_PROMOTION=strict: this package"),
  ],
)
def test_a_setting_of_jax_that_cannot_work_is_one_line(command, what, message):
  code, _, errors = command(f"--do={what}")
  assert code == 2 and len(errors) == 1 and errors[0].startswith(message), errors


def test_a_flag_is_read_under_its_earlier_name_with_a_warning(command):
  code, stdout, errors = command("--do=work", "--times=3")
  assert (code, stdout) == (0, "done 3\n")
  assert errors == ["warning: --times is now called --count; the earlier name is still read."]
