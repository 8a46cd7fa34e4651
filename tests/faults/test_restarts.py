"""The restarts of docs/running.md: they act on the exit codes of `cli.train`, and stop where no step was gained."""

import configparser
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from tests.faults import fault_table

ROOT = pathlib.Path(__file__).parent.parent.parent
RUNNING = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
SECTION = RUNNING.partition("## Restarts")[2].partition("\n## ")[0]
TRAINS = "tokenformer_jax.cli.train"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
RESUME, SLURM = (text for language, text in BLOCKS if language == "bash")
# Saves one more step each time it is called, if there is a number left for it in the file `gains`; ends with $CODES's next code.
TRAIN = """#!/bin/bash
count=$(cat calls 2>/dev/null || echo 0); echo $((count + 1)) > calls
set -- $CODES; shift $count
[ "$count" -lt "$GAINS" ] && mkdir -p run/checkpoints/$(((count + 1) * 10))
exit ${1:-0}
"""


def called(folder, script, codes, gains=99):
  """(exit code, number of times that training was started)."""
  (folder / "train").write_text(TRAIN)
  (folder / "script").write_text(script)
  for name in ("train", "script"):
    (folder / name).chmod(0o755)
  env = os.environ | {"CODES": codes, "GAINS": str(gains), "PATH": f"{folder}:{os.environ['PATH']}"}
  ended = subprocess.run(["bash", "./script", "run", "./train"], cwd=folder, env=env, capture_output=True, timeout=30)
  return ended.returncode, int((folder / "calls").read_text())


@pytest.mark.parametrize(
  "codes, gains, expected",
  [
    ("0", 99, (0, 1)),
    ("2", 99, (2, 1)),
    ("3", 99, (3, 1)),
    ("143 1 134 137 0", 99, (0, 5)),
    ("1 1 1 1", 2, (1, 3)),
    ("1 1", 0, (1, 1)),
    ("1 3", 99, (3, 2)),
  ],
)
def test_f23_resume_sh_starts_again_while_steps_are_gained(tmp_path, codes, gains, expected):
  assert called(tmp_path, RESUME, codes, gains) == expected


def test_f3_resume_sh_passes_a_signal_on_and_does_not_start_again(tmp_path):
  (tmp_path / "script").write_text(RESUME)
  train = "trap 'sleep 0.2; mkdir -p run/checkpoints/7; exit 143' TERM; touch started; while true; do sleep 0.1; done"
  process = subprocess.Popen(["bash", "./script", "run", "bash", "-c", train], cwd=tmp_path)
  while not (tmp_path / "started").exists():
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=20) == 143 and (tmp_path / "run/checkpoints/7").exists()


@pytest.mark.parametrize(
  "code, gains, requeued", [(143, 1, True), (1, 1, True), (1, 0, False), (0, 1, False), (2, 1, False), (3, 1, False)]
)
def test_f23_the_slurm_script_asks_for_a_requeue_where_a_step_was_gained(tmp_path, code, gains, requeued):
  (tmp_path / "srun").write_text("#!/bin/bash\nexec ./train\n")
  (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@" > requeued\n')
  for name in ("srun", "scontrol"):
    (tmp_path / name).chmod(0o755)
  script = SLURM.replace("/shared/runs/NAME", "run").replace("$SLURM_JOB_ID", "7")
  ended, _ = called(tmp_path, script, str(code), gains)
  assert (tmp_path / "requeued").exists() == requeued
  assert ended == (0 if requeued else code)
  if requeued:
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_f23_the_job_of_kubernetes_does_not_start_mistakes_again():
  (text,) = (text for language, text in BLOCKS if language == "yaml")
  job = yaml.safe_load(text)
  (fails, ignores), pod = job["spec"]["podFailurePolicy"]["rules"], job["spec"]["template"]["spec"]
  assert fails["action"] == "FailJob" and fails["onExitCodes"] == dict(
    containerName="train", operator="In", values=[2, 3]
  )
  assert ignores["action"] == "Ignore" and ignores["onPodConditions"] == [{"type": "DisruptionTarget"}]
  # A failure policy asks for this.
  assert pod["restartPolicy"] == "Never" and [container["name"] for container in pod["containers"]] == ["train"]


def unit():
  (text,) = (text for language, text in BLOCKS if language == "ini")
  return text


def test_f23_the_unit_starts_training_through_resume_sh(tmp_path):
  parsed = configparser.ConfigParser()
  parsed.optionxform = str
  parsed.read_string(unit().replace("\\\n", ""))
  service = parsed["Service"]
  script, workdir, *command = service["ExecStart"].split()
  assert script.endswith("/resume.sh") and f"--workdir={workdir}" in command and command[1:3] == ["-m", TRAINS]
  # Codes with which resume.sh gives up must not start it again; a signal for it is sent on by itself.
  assert (service["Restart"], service["SuccessExitStatus"], service["KillMode"]) == ("on-abnormal", "143", "mixed")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_f23_systemd_accepts_the_unit(tmp_path):
  path = tmp_path / "train.service"
  path.write_text(unit().replace("/opt/tokenformer/resume.sh", shutil.which("true")))
  ended = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, timeout=60)
  assert ended.returncode == 0 and "train.service:" not in ended.stderr, ended.stderr


def test_the_slurm_script_of_the_document_is_one():
  assert RUNNING.count("#SBATCH --nodes") == 1


def test_the_table_of_faults_is_that_of_the_tests():
  assert fault_table.table() in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
