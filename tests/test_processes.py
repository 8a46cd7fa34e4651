"""Several processes: the numbers of one, whatever their number; what each of them reads, how they stop."""

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
from tests import small_run
from tests.small_run import GROWN
from tokenformer_jax.distributed.axes import batch_sharding
from tokenformer_jax.distributed.processes import check_agree, share_of_rows, whole
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.run_log import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
STEPS, GROWTH_STEP = 8, 4
SPEED = ("train/tokens_per_second", "train/utilisation")


class Device(NamedTuple):
  id: int
  process_index: int


class Sharding:
  """`sharding` with its devices on several processes, `places[device]` being the process of each."""

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
    # Along the token axis all have the same rows.
    ((1, 1, 8), [0, 0, 1, 1, 2, 2, 3, 3], (0, 1)),
    ((2, 1, 4), [1, 1, 2, 2, 0, 0, 3, 3], (1, 2)),
    # As on a torus, where a process's devices need not be neighbours in the mesh.
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


# Real processes.


def run(count, *command, **variables):
  """`python COMMAND` in `count` processes that know each other; {process} in it is the number of each."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  env = os.environ | {
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    **variables,
    # Compiled in half the time.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
  }
  several = [f"--coordinator_address={address}", f"--num_processes={count}"] if count > 1 else []
  several += ["--process_id={process}"] if several else []
  commands = [[word.replace("{process}", str(i)) for word in (*command, *several)] for i in range(count)]
  return [
    subprocess.Popen(
      [sys.executable, *command], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for command in commands
  ]


def outcome(processes, timeout=280):
  """Exit codes, and stdout and stderr of each."""
  out, errors = zip(*[process.communicate(timeout=timeout) for process in processes])
  out = ["".join(line for line in text.splitlines(True) if not line.startswith("[Gloo]")) for text in out]
  return [process.returncode for process in processes], out, list(errors)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  """A run with a growth and an evaluation."""
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
def together(config_file, tmp_path_factory):
  """The work folder of the run begun by two processes, stopped by a SIGTERM to one, and ended by four."""
  workdir = tmp_path_factory.mktemp("together") / "run"
  door = ("-m", "tokenformer_jax.cli.train", f"--config={config_file[1]}", f"--workdir={workdir}")
  two = run(2, *door)
  while not (workdir / "metrics.jsonl").exists():  # The first step is about to be compiled.
    assert two[0].poll() is None, two[0].communicate()[1]
    time.sleep(0.01)
  two[1].send_signal(signal.SIGTERM)
  codes, out, errors = outcome(two)
  assert codes == [143, 143], errors
  stopped = Checkpoints(str(workdir)).latest_step()
  assert 1 <= stopped < STEPS and f"step {stopped}: stopped by SIGTERM, and saved" in out[0] and out[1] == ""
  codes, out, errors = outcome(run(4, *door, "--config.mesh.data=2", "--config.mesh.token=2"))
  assert codes == [0] * 4, errors
  assert f"resumed at step {stopped}" in out[0] and out[1:] == [""] * 3
  return workdir


@pytest.mark.slow
def test_two_and_then_four_processes_have_the_numbers_of_one(alone, together):
  ours, theirs = (
    [{name: value for name, value in row.items() if name not in SPEED} for row in read_metrics(str(workdir))]
    for workdir in (together, alone)
  )
  assert [row.keys() for row in ours] == [row.keys() for row in theirs]
  for row, other in zip(ours, theirs):
    assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_the_state_that_four_processes_save_is_that_of_one(config_file, alone, together):
  shapes = make_program(config_file[0], GROWN, small_run.mesh()).shapes
  states = [Checkpoints(str(workdir)).restore(STEPS, shapes) for workdir in (together, alone)]
  small_run.assert_close(states[0].params, states[1].params, 1e-4)
  small_run.assert_same((states[0].tau, states[0].born), (states[1].tau, states[1].born))


@pytest.mark.slow
def test_two_processes_write_as_one(config_file, together):
  prompt = "def f1(x):\n"
  (text,) = tf.generate(
    tf.load(str(together)), tf.load_tokenizer(str(together)), prompt, max_new_tokens=4, temperature=0
  )
  codes, out, errors = outcome(
    run(
      2,
      "-m",
      "tokenformer_jax.cli.generate",
      f"--workdir={together}",
      f"--prompt={prompt}",
      "--max_new_tokens=4",
      "--temperature=0",
    )
  )
  assert codes == [0, 0] and out == [prompt + text + "\n", ""], errors


@pytest.mark.slow
def test_processes_that_do_not_agree_all_say_so_and_write_nothing(config_file, tmp_path):
  codes, out, errors = outcome(
    run(
      2,
      "-m",
      "tokenformer_jax.cli.train",
      f"--config={config_file[1]}",
      f"--workdir={tmp_path}/run",
      "--config.training.num_steps=1{process}",
    )
  )
  assert codes == [2, 2] and out == ["", ""] and not (tmp_path / "run").exists()
  for said in errors:
    assert said.startswith("error: configuration is not the same on all 2 processes: [1] have another than")
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_proxy_is_not_asked_for_the_way_to_this_machine():
  program = "import jax; from tokenformer_jax.distributed import processes; processes.start(); print(jax.devices())"
  codes, out, errors = outcome(run(1, "-c", program, http_proxy="http://127.0.0.1:9"), timeout=60)
  assert codes == [0] and "CpuDevice" in out[0] and errors == [""]
