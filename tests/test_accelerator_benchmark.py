"""The accelerator benchmark ends in time with all its tables, here with tiny shapes on the CPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def call(folder, *flags):
  command = [sys.executable, "-m", "experiments.benchmarks.accelerator", f"--out={folder}", *flags]
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
  subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_every_section_has_its_tables(tmp_path):
  results = call(tmp_path, "--sections=products,train,decode", "--minutes=3")
  sections = results["sections"]
  assert results["rates"].keys() == {"product", "copy", "read"}
  assert {name: section["status"].split(":")[0][-2:] for name, section in sections.items()} == dict.fromkeys(
    ("products", "train", "decode"), " s"
  )
  (step,) = sections["train"]["tables"]["Train steps in bfloat16 with float32 parameters and AdamW"]
  assert step["B"] >= 2 and step["predicted peak GB"] <= 0.02 and step["loss"] < 6.3
  profile = next(rows for title, rows in sections["train"]["tables"].items() if "10 most expensive" in title)
  assert len(profile) == 10 and profile[0]["share, %"] >= profile[-1]["share, %"]
  (token,) = sections["decode"]["tables"]["Decode steps"]
  assert 0 < token["share of the memory limit, %"]
  assert "| tiny | 64 | none |" in (tmp_path / "results.md").read_text()


def test_a_run_without_time_says_what_it_skipped(tmp_path):
  results = call(tmp_path, "--sections=products,growth", "--minutes=0.001")
  assert all("no time" in section["status"] or "stop" in section["status"] for section in results["sections"].values())
