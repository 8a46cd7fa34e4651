"""`python -m tokenformer_jax.cli.train`: each mistake is one line and exit code 2, and nothing is overwritten."""

import dataclasses
import json
import multiprocessing
import os
import runpy
import sys

import pytest

from tests import small_run

# The server imports what a door does once, and forks for every call of `door`.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tokenformer_jax.training.loop"])


def run_module(out, errors, flags):
  for descriptor, path in ((1, out), (2, errors)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
  sys.argv[1:] = flags
  runpy.run_module("tokenformer_jax.cli.train", run_name="__main__", alter_sys=True)


@pytest.fixture
def door(tmp_path_factory):
  """Runs the door with these flags in a process of its own: exit code, stdout, lines of stderr."""
  said = tmp_path_factory.mktemp("said")

  def run(*flags):
    process = PROCESSES.Process(target=run_module, args=(said / "out", said / "errors", flags))
    process.start()
    process.join(timeout=300)
    return process.exitcode, (said / "out").read_text(), (said / "errors").read_text().splitlines()

  return run


@pytest.fixture
def folder(tmp_path):
  """Config files and texts, good and bad, and the work folder of a run that was begun."""
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  (tmp_path / "empty.txt").write_text("")
  (tmp_path / "latin1.txt").write_bytes("née".encode("latin-1"))
  begun = small_run.config(f"text:{tmp_path}/text.txt")
  (tmp_path / "good.py").write_text(
    f"import json\nimport ml_collections\n\ndef get_config():\n"
    f"  return ml_collections.ConfigDict(json.loads({json.dumps(begun.to_dict())!r}))\n"
  )
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  (tmp_path / "empty.py").write_text("")
  other = dataclasses.replace(begun, model=dataclasses.replace(begun.model, num_layers=7))
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(json.dumps(other.to_dict()))
  return tmp_path


MISTAKES = {
  "no flags": ([], ["--workdir"]),
  "neither a config nor a run to go on with": (["--workdir={0}/new"], ["{0}/new: no config.json there; give --config"]),
  "no workdir": (["--config={0}/good.py"], ["--workdir"]),
  "unknown flag": (["--config={0}/good.py", "--workdir={0}/run", "--work_dir=x"], ["'work_dir'", "workdir ?"]),
  "no such file": (["--config={0}/missing.py", "--workdir={0}/run"], ["--config={0}/missing.py: no such file"]),
  "a file that is no Python": (
    ["--config={0}/broken.py", "--workdir={0}/run"],
    ["--config: SyntaxError: ", "broken.py, line 1"],
  ),
  "a file without get_config": (
    ["--config={0}/empty.py", "--workdir={0}/run"],
    ["--config: ", "no attribute 'get_config'"],
  ),
  "unknown key": (
    ["--config={0}/good.py", "--workdir={0}/run", "--config.training.num_step=5"],
    ["--config: ", 'Did you mean "num_steps" instead of "num_step"?'],
  ),
  "wrong type": (
    ["--config={0}/good.py", "--workdir={0}/run", "--config.training.num_steps=many"],
    ["--config.training.num_steps=many: ", "'many'"],
  ),
  "out of range": (
    ["--config={0}/good.py", "--workdir={0}/run", "--config.data.batch_size=0"],
    ["data", "batch_size=0", "at least 1"],
  ),
  "another run's folder": (
    ["--config={0}/good.py", "--workdir={0}/run"],
    ["{0}/run", "num_layers=7", "2", "another --workdir"],
  ),
  "empty text": (
    ["--config={0}/good.py", "--workdir={0}/new", "--config.data.source=text:{0}/empty.txt"],
    ["{0}/empty.txt is empty"],
  ),
  "text that is not UTF-8": (
    ["--config={0}/good.py", "--workdir={0}/new", "--config.data.source=text:{0}/latin1.txt"],
    ["{0}/latin1.txt is not UTF-8 at byte 1", "bad_text"],
  ),
  "no text": (["--config={0}/good.py", "--workdir={0}/new", "--config.data.source=text:{0}/*.md"], ["{0}/*.md"]),
  "half told of the other processes": (
    ["--config={0}/good.py", "--workdir={0}/new", "--num_processes=2"],
    ["num_processes=2", "coordinator_address", "Give all three"],
  ),
  "a workdir that is a file": (["--config={0}/good.py", "--workdir={0}/text.txt"], ["{0}/text.txt: not a folder"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(door, folder, mistake):
  flags, words = MISTAKES[mistake]
  before = small_run.folder_digest(folder)
  code, out, errors = door(*(flag.format(folder) for flag in flags))
  assert (code, out, len(errors)) == (2, "", 1), errors
  assert errors[0].startswith("error: ")
  for word in words:
    assert word.format(folder) in errors[0]
  assert small_run.folder_digest(folder) == before


def test_help_says_what_the_flags_are(door):
  code, out, errors = door("--help")
  assert code == 0 and not errors
  assert out.startswith("Trains a TokenFormer") and all(
    flag in out for flag in ("--config", "--workdir", "--[no]profile")
  )
