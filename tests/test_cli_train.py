"""`python -m tokenformer_jax.cli.train`: each mistake is one line and exit code 2, and nothing is overwritten."""

import dataclasses
import json

import pytest

from tests import small_run
from tests.commands import call


@pytest.fixture
def folder(tmp_path):
  """Config files and texts, good and bad, and the work folder of a run that has begun."""
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  (tmp_path / "empty.txt").write_text("")
  (tmp_path / "latin1.txt").write_bytes("née".encode("latin-1"))
  begun = small_run.config(f"text:{tmp_path}/text.txt")
  (tmp_path / "good.py").write_text(
    f"import json\nimport ml_collections\n\ndef get_config():\n"
    f"  return ml_collections.ConfigDict(json.loads({json.dumps(begun.to_dict())!r}))\n"
  )
  (tmp_path / "grows.py").write_text(
    (tmp_path / "good.py").read_text()
    + """
def get_config(good=get_config):
  config = good()
  config.growth.stages = [dict(step=1000, qkv_tokens=16, proj_tokens=16, ffn_tokens=16)]
  return config
"""
  )
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "tokenizer.json").write_text('{"model": "of something else"}')
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  (tmp_path / "empty.py").write_text("")
  other = dataclasses.replace(begun, model=dataclasses.replace(begun.model, num_layers=7))
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(json.dumps(other.to_dict()))
  return tmp_path


MISTAKES = {
  "no flags": ([], ["--workdir"]),
  "neither a config nor a run to resume": (["--workdir={0}/new"], ["{0}/new: no config.json there; give --config"]),
  "a field of a run that is not there": (
    ["--workdir", "{0}/new", "--config.training.num_steps=5"],
    ["error: {0}/new: no config.json there; give --config"],
  ),
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
    ["--config.training.num_step is unknown", "Did you mean 'num_steps'?", "Known: num_steps, seed"],
  ),
  "unknown section": (
    ["--config={0}/good.py", "--workdir={0}/run", "--config.trainin.num_steps", "5"],
    ["--config.trainin is unknown", "Did you mean 'training'?"],
  ),
  "an empty workdir": (["--config={0}/good.py", "--workdir="], ["workdir=''", "the path is empty"]),
  "a bucket of an unknown scheme": (
    ["--config={0}/good.py", "--workdir=gss://a/b"],
    ["workdir='gss://a/b'", "the scheme gss:// is unknown"],
  ),
  "a growth that never happens": (
    ["--config={0}/grows.py", "--workdir={0}/new"],
    ["growth.stages: step=1000", "the run ends at training.num_steps=1000"],
  ),
  "a seed that JAX would cut": (
    ["--config={0}/good.py", "--workdir={0}/new", "--config.training.seed=4294967296"],
    ["training: seed=4294967296", "2**32"],
  ),
  "another tokenizer.json in the folder": (
    ["--config={0}/good.py", "--workdir={0}/other", "--config.training.num_steps=1"],
    ["{0}/other/tokenizer.json", "not overwritten"],
  ),
  "wrong type": (
    ["--config={0}/good.py", "--workdir={0}/run", "--config.training.num_steps=many"],
    ["--config.training.num_steps=many: ", "'many'"],
  ),
  "out of range": (
    ["--config={0}/good.py", "--workdir={0}/run", "--config.data.batch_size=0"],
    ["data", "batch_size=0", "at least 1"],
  ),
  "out of range, set on the stored configuration": (
    ["--workdir={0}/run", "--config.data.batch_size=0"],
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
  "only some of the flags about other processes": (
    ["--config={0}/good.py", "--workdir={0}/new", "--num_processes=2"],
    ["num_processes=2", "coordinator_address", "Give all three"],
  ),
  "a workdir that is a file": (["--config={0}/good.py", "--workdir={0}/text.txt"], ["{0}/text.txt: not a folder"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(folder, mistake):
  flags, words = MISTAKES[mistake]
  before = small_run.folder_digest(folder)
  code, out, errors = call("train", *(flag.format(folder) for flag in flags))
  assert (code, out, len(errors)) == (2, "", 1), errors
  assert errors[0].startswith("error: ")
  for word in words:
    assert word.format(folder) in errors[0]
  assert small_run.folder_digest(folder) == before


def test_help_says_what_the_flags_are():
  code, out, errors = call("train", "--help")
  assert code == 0 and not errors
  assert out.startswith("Trains a TokenFormer") and all(
    flag in out for flag in ("--config", "--workdir", "--[no]profile")
  )


def test_a_field_is_read_under_its_earlier_name_with_a_warning(folder):
  flags = [f"--config={folder}/good.py", f"--workdir={folder}/new", "--config.growth.how=magic"]
  code, _, (warning, error) = call("train", *flags)
  assert warning == "warning: --config.growth.how is now called --config.growth.method; the earlier name is still read."
  assert code == 2 and "method='magic': choose one of auto, exact, " in error
