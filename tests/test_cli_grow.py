"""`python -m tokenformer_jax.cli.grow` and `.shrink` as a user calls them: what they print, and each mistake in one line."""

import pytest

from tests import small_run, test_stream
from tests.commands import call
from tests.small_run import GROWN, MODEL
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.run_log import read_metrics

COUNTS = ["--qkv_tokens=16", "--proj_tokens=24", "--ffn_tokens=32"]


@pytest.mark.slow
def test_a_run_is_grown_trained_and_shrunk(tmp_path):
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  config = small_run.config(f"text:{tmp_path}/text.txt", num_steps=test_stream.STEP + 1, log_every=1)
  run = test_stream.write_source(tmp_path / "run", config)
  code, out, errors = call("grow", f"--workdir={run}", f"--output={tmp_path}/grown", *COUNTS)
  assert code == 0 and errors == ["leaf 60/60"], errors
  table, parameters, onward = out.splitlines()[:-2], *out.splitlines()[-2:]
  assert "params/blocks/ffn/keys                        (2, 16, 16)  (2, 32, 16)  mixtures of the old" in table
  assert parameters == f"parameters: {MODEL.num_parameters:,} -> {GROWN.num_parameters:,}"
  assert onward == f"Resume with: python -m tokenformer_jax.cli.train --workdir={tmp_path}/grown"

  code, out, errors = call("train", f"--workdir={tmp_path}/grown", "--allow_data_change")
  assert code == 0 and out.startswith(f"{tmp_path}/grown: {GROWN.num_parameters:,} parameters, resumed at step 40."), (
    errors
  )
  assert [row["step"] for row in read_metrics(str(tmp_path / "grown")) if "train/loss" in row] == [41]

  code, out, errors = call("shrink", f"--workdir={tmp_path}/grown", f"--output={tmp_path}/small", "--ffn_tokens=20")
  assert code == 0, errors
  assert "blocks/ffn                  32     20 " in out and out.splitlines()[-2].startswith("loss: ")
  assert Checkpoints(str(tmp_path / "small")).latest_step() == 41


MISTAKES = {
  "no flags": ("grow", [], ["--workdir", "--output"]),
  "no output": ("shrink", ["--workdir={0}/run"], ["--output"]),
  "unknown flag": (
    "grow",
    ["--workdir={0}/run", "--output={0}/new", "--ffn_token=32"],
    ["'ffn_token'", "ffn_tokens ?"],
  ),
  "wrong type": ("grow", ["--workdir={0}/run", "--output={0}/new", "--ffn_tokens=many"], ["--ffn_tokens=many"]),
  "unknown method": (
    "grow",
    ["--workdir={0}/run", "--output={0}/new", "--method=magic"],
    ["--method=magic", "exact|live|released|duplicate"],
  ),
  "no such run": ("grow", ["--workdir={0}/missing", "--output={0}/new", *COUNTS], ["{0}/missing: no checkpoint there"]),
  "no counts": ("grow", ["--workdir={0}/run", "--output={0}/new"], ["growth changes nothing: qkv_tokens=8"]),
  "no counts to shrink to": ("shrink", ["--workdir={0}/run", "--output={0}/new"], ["shrinking changes nothing"]),
  "more to shrink to": (
    "shrink",
    ["--workdir={0}/run", "--output={0}/new", *COUNTS],
    ["qkv_tokens: 8 -> 16", "at most 8"],
  ),
  "target that is there": ("grow", ["--workdir={0}/run", "--output={0}/text", *COUNTS], ["{0}/text: already there"]),
  "mesh that does not divide": (
    "grow",
    ["--workdir={0}/run", "--output={0}/new", *COUNTS, "--mesh.token=5"],
    ["param_token=16 cannot be split over the 5 devices along mesh axis token"],
  ),
  "no multiple": (
    "grow",
    ["--workdir={0}/run", "--output={0}/new", "--ffn_tokens=40", "--method=duplicate"],
    ["ffn_tokens: 16 -> 40", "32 or 48"],
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A run's work folder and a file; tests must not change them."""
  folder = tmp_path_factory.mktemp("runs")
  (folder / "text").write_text("")
  test_stream.write_source(folder / "run")
  return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(folder, mistake):
  name, flags, words = MISTAKES[mistake]
  before = small_run.folder_digest(folder)
  code, out, errors = call(name, *(flag.format(folder) for flag in flags))
  assert (code, out, len(errors)) == (2, "", 1), errors
  assert errors[0].startswith("error: ")
  for word in words:
    assert word.format(folder) in errors[0]
  assert small_run.folder_digest(folder) == before


@pytest.mark.parametrize(
  "name, begins", [("grow", "Gives a run more"), ("shrink", "Removes the least used parameter tokens")]
)
def test_help_says_what_the_flags_are(name, begins):
  code, out, errors = call(name, "--help")
  assert code == 0 and not errors
  assert out.startswith(begins) and all(
    flag in out for flag in ("--workdir", "--output", "--mesh.token", "--ffn_tokens")
  )


def test_the_method_is_read_under_its_earlier_name_with_a_warning(folder):
  code, _, (warning, error) = call("grow", f"--workdir={folder}/run", f"--output={folder}/new", "--how", "magic")
  assert warning == "warning: --how is now called --method; the earlier name is still read."
  assert code == 2 and "--method=magic" in error
