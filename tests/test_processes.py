"""Several processes compute what one computes, each reads its own rows, and they agree on when to stop."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest

import tokenformer_jax as tf
from tests import process_checks, small_run
from tests.small_run import GROWN
from tokenformer_jax.distributed.axes import batch_sharding
from tokenformer_jax.distributed.processes import check_agree, share_of_rows, whole
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.run_log import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
STEPS, GROWTH_STEP = 8, 4
PROMPT = "def f1(x):\n"
SPEED = ("train/tokens_per_second", "train/utilisation")


class Device(NamedTuple):
  id: int
  process_index: int


class Sharding:
  """`sharding` with its devices on several processes: `places[device]` is the process of each."""

  def __init__(self, sharding, places):
    self.mesh, self._sharding, self._places = sharding.mesh, sharding, places

  def devices_indices_map(self, shape):
    return {
      Device(device.id, self._places[device.id]): index
      for device, index in self._sharding.devices_indices_map(shape).items()
    }


@pytest.mark.parametrize(
  "sizes, places, share",
  [
    ((8, 1, 1), [0, 0, 0, 0, 1, 1, 1, 1], (0, 2)),
    ((8, 1, 1), [1, 1, 0, 0, 2, 2, 3, 3], (1, 4)),
    ((2, 2, 2), [1, 1, 1, 1, 0, 0, 0, 0], (1, 2)),
    # Devices that differ along the token axis have the same rows.
    ((1, 1, 8), [0, 0, 1, 1, 2, 2, 3, 3], (0, 1)),
    ((2, 1, 4), [1, 1, 2, 2, 0, 0, 3, 3], (1, 2)),
    # On a torus the devices of a process need not be neighbours in the mesh.
    ((8, 1, 1), [0, 1, 0, 1, 2, 3, 2, 3], (0, 4)),
  ],
)
def test_a_process_reads_the_rows_of_its_devices(sizes, places, share):
  sharding = batch_sharding(small_run.mesh(*sizes), (16,))
  assert share_of_rows(Sharding(sharding, places), (16,)) == share


def test_rows_that_lie_unevenly_are_refused():
  sharding = batch_sharding(small_run.mesh(8), (16,))
  with pytest.raises(ValueError, match="mesh .*'data': 8.*: 16 rows would lie unevenly on 2 processes"):
    share_of_rows(Sharding(sharding, [0, 0, 0, 1, 1, 1, 1, 1]), (16,))


def test_one_process_agrees_with_itself_and_has_all_of_an_array():
  check_agree(a=1, b=[None, "x"])
  array = jax.device_put(np.arange(16), batch_sharding(small_run.mesh(8), (16,)))
  assert whole(array).tolist() == list(range(16))


# Real processes. Starting one and compiling its programs takes most of the time, so each does several things.


def run(count, *command, **variables):
  """Starts `python COMMAND` in `count` processes that know each other."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  env = os.environ | {
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    **variables,
    # This halves the time that compiling takes.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
  }
  several = [f"--coordinator_address={address}", f"--num_processes={count}"] if count > 1 else []
  return [
    subprocess.Popen(
      [sys.executable, *command, *several, *([f"--process_id={number}"] if several else [])],
      cwd=ROOT,
      env=env,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for number in range(count)
  ]


def outcome(processes, timeout=280):
  """(exit codes, stdout of each, stderr of each)."""
  out, errors = zip(*[process.communicate(timeout=timeout) for process in processes])
  out = ["".join(line for line in text.splitlines(True) if not line.startswith("[Gloo]")) for text in out]
  return [process.returncode for process in processes], out, list(errors)


def test_a_single_process_opens_no_port_and_stops_at_sigterm():
  program = (
    "import os, signal, jax; from tokenformer_jax.distributed import processes; "
    "processes.start(stops_by_itself=True); from jax._src import distributed; "
    "assert distributed.global_state.client is None and distributed.global_state.service is None; "
    "assert not processes.must_stop(1); os.kill(os.getpid(), signal.SIGTERM); import time; time.sleep(0.5); "
    "assert processes.must_stop(2); print(jax.devices())"
  )
  codes, out, errors = outcome(run(1, "-c", program, http_proxy="http://127.0.0.1:9"), timeout=60)
  assert codes == [0] and "CpuDevice" in out[0]
  assert errors == ["SIGTERM: saving after this step; a second signal ends the process at once.\n"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  """The configuration of a run with a growth and an evaluation, and a file that has it."""
  folder = tmp_path_factory.mktemp("config")
  (folder / "text.txt").write_text(small_run.TEXT)
  config = small_run.config(
    f"text:{folder}/text.txt",
    [small_run.stage(GROWTH_STEP)],
    num_steps=STEPS,
    log_every=1,
    eval_every=STEPS,
    checkpoint_every=STEPS,
  )
  (folder / "config.py").write_text(
    f"import json\nimport ml_collections\n\ndef get_config():\n  return "
    f"ml_collections.ConfigDict(json.loads({json.dumps(config.to_dict())!r}))\n"
  )
  return config, folder / "config.py"


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory):
  """The work folder of the run in this one process."""
  workdir = tmp_path_factory.mktemp("alone")
  train(config_file[0], str(workdir))
  return workdir


@pytest.fixture(scope="module")
def stopped(config_file, tmp_path_factory):
  """(work folder, step): the run on two processes that split the rows, stopped by a SIGTERM to one of them."""
  workdir = tmp_path_factory.mktemp("together") / "run"
  two = run(2, "-m", "tokenformer_jax.cli.train", f"--config={config_file[1]}", f"--workdir={workdir}")
  while not (workdir / "metrics.jsonl").exists():  # It appears before the first step is compiled.
    assert two[0].poll() is None, two[0].communicate()[1]
    time.sleep(0.01)
  two[1].send_signal(signal.SIGTERM)
  codes, out, errors = outcome(two)
  assert codes == [143, 143], errors
  step = Checkpoints(str(workdir)).latest_step()
  assert 1 <= step < STEPS and f"step {step}: stopped by a signal, and saved" in out[0] and out[1] == ""
  return workdir, step


@pytest.fixture(scope="module")
def ended(config_file, stopped):
  """(work folder, stdout of each): the run resumed and ended by two processes of two devices that split the tokens.

  Before that the processes try to start a run with configurations that differ; after it they write a text.
  """
  workdir, step = stopped
  asked = (f"--workdir={workdir}", f"--prompt={PROMPT}", "--max_new_tokens=4", "--temperature=0")
  codes, out, errors = outcome(
    run(2, "-m", "tests.process_checks", str(config_file[1]), *asked, JAX_NUM_CPU_DEVICES="2")
  )
  assert codes == [0, 0], errors
  assert f"resumed at step {step}" in out[0] and "resumed" not in out[1]
  return workdir, out


@pytest.mark.slow
def test_several_processes_have_the_numbers_of_one(alone, ended):
  ours, theirs = (
    [{name: value for name, value in row.items() if name not in SPEED} for row in read_metrics(str(workdir))]
    for workdir in (ended[0], alone)
  )
  assert [row.keys() for row in ours] == [row.keys() for row in theirs]
  for row, other in zip(ours, theirs):
    assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_the_state_that_several_processes_save_is_that_of_one(config_file, alone, ended):
  shapes = make_program(config_file[0], GROWN, small_run.mesh()).shapes
  states = [Checkpoints(str(workdir)).restore(STEPS, shapes) for workdir in (ended[0], alone)]
  small_run.assert_close(states[0].params, states[1].params, 1e-4)
  small_run.assert_same((states[0].tau, states[0].born), (states[1].tau, states[1].born))


@pytest.mark.slow
def test_several_processes_write_the_text_of_one_and_the_first_prints_it(ended):
  workdir, out = ended
  model, tokenizer = tf.load(str(workdir)), tf.load_tokenizer(str(workdir))
  (text,) = tf.generate(model, tokenizer, PROMPT, max_new_tokens=4, temperature=0)
  written = [said.partition(process_checks.WRITTEN)[2] for said in out]
  assert written == [PROMPT + text + "\n", ""]


@pytest.mark.slow
def test_processes_that_do_not_agree_all_say_so_and_write_nothing(ended):
  workdir, out = ended
  assert not workdir.with_name(process_checks.REFUSED_WORKDIR).exists()
  for text in out:
    assert f"{process_checks.REFUSED} configuration is not the same on all 2 processes: [1] differ from" in text
