"""F3, F7, F23, F24: signals, and processes that fail, die or hang. Real processes, which take steps together."""

import re
import signal
import time

import pytest

from tests import small_run
from tests.faults import two_processes, two_saves
from tests.test_processes import outcome, run
from tokenformer_jax.training import loop
from tokenformer_jax.training.run_log import read_metrics
from tokenformer_jax.training.watchdog import Watchdog

FAULTS = ("-m", "tests.faults.two_processes")


def after_fault(count, fault, failing=0):
  """(exit codes, seconds from the fault to the end of the others, stdout of each, stderr of each)."""
  processes = run(count, *FAULTS, f"--fault={fault}", f"--failing={failing}")
  others = [process for number, process in enumerate(processes) if number != failing or count == 1]
  for process in others:
    process.wait(timeout=120)
  end = time.time()
  if fault == "freeze":
    processes[failing].kill()
  codes, out, errors = outcome(processes, timeout=60)
  (at,) = re.findall(rf"^{two_processes.AT} (\S+)$", "\n".join(out), re.MULTILINE)
  return codes, end - float(at), out, errors


@pytest.fixture(autouse=True)
def signals_are_not_ignored():
  """Jobs in a shell's background ignore SIGINT, and those of nohup SIGHUP, and so does what they start themselves."""
  usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
  before = {number: signal.signal(number, handler) for number, handler in usual.items()}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


def errors_of(text):
  return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.parametrize(
  "failing, fault, code, reason",
  [(0, "raise", 1, "RuntimeError: the loader broke"), (1, "mistake", 2, "model size '150'")],
)
def test_f23_an_error_of_one_process_ends_all_with_its_reason(failing, fault, code, reason):
  codes, seconds, _, errors = after_fault(2, fault, failing)
  assert codes == [code, code] and seconds < 20, errors
  (line,) = errors_of(errors[1 - failing])
  assert line.startswith(f"error: process {failing} failed: {reason}")
  assert "Traceback" not in errors[1 - failing] and reason in errors[failing]


@pytest.mark.slow
def test_f23_a_process_that_is_killed_ends_all():
  codes, seconds, _, errors = after_fault(2, "kill", failing=1)
  assert codes == [1, -signal.SIGKILL] and seconds < 20, errors
  (line,) = errors_of(errors[0])
  assert line.startswith("error: another process is gone: ")


@pytest.mark.slow
def test_f23_the_first_process_is_killed_and_the_others_end():
  codes, seconds, _, errors = after_fault(2, "kill", failing=0)
  # JAX's own runtime may end the process before it has said its line.
  assert codes[1] in (1, -signal.SIGABRT) and seconds < 20, errors


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_f7_a_save_that_fails_on_one_process_ends_all(tmp_path, failing):
  workdir = tmp_path / "run"
  processes = run(2, "-m", "tests.faults.two_saves", f"--workdir={workdir}", f"--failing={failing}")
  codes, out, errors = outcome(processes, timeout=120)
  end = time.time()
  (at,) = re.findall(rf"^{two_saves.AT} (\S+)$", "\n".join(out), re.MULTILINE)
  assert codes == [1, 1] and end - float(at) < 30, errors
  told = f"{workdir}/checkpoints/2: the checkpoint could not be saved (1 in a row): [Errno 5] Input/output error."
  (line,), (other,) = errors_of(errors[failing]), errors_of(errors[1 - failing])
  assert line == f"error: {told} The newest checkpoint is that of step 1."
  assert other.startswith(f"error: process {failing} failed: {told}")
  assert not any("Traceback" in text for text in errors), errors


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["freeze", "hang"])
def test_f24_a_step_that_hangs_ends_with_the_stacks_of_all_threads(fault):
  codes, seconds, _, errors = after_fault(2, fault, failing=1)
  assert codes[0] == 1 and seconds < 20 + two_processes.STEP_TIMEOUT, errors
  assert "Timeout (0:00:05)!" in errors[0] and "two_processes.py" in errors[0] and "process_allgather" in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_f3_a_signal_to_one_process_stops_all_after_the_same_step(name):
  codes, _, out, errors = after_fault(2, name, failing=1)
  assert codes == [143, 143], errors
  stopped = [re.findall(r"^stopped after (\d+)$", text, re.MULTILINE) for text in out]
  assert stopped[0] == stopped[1] and len(stopped[0]) == 1
  assert f"{name}: saving after this step" in errors[1]


@pytest.mark.parametrize("first, second", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGHUP")])
def test_f3_a_second_signal_ends_a_process_that_hangs(first, second):
  (process,) = run(1, *FAULTS, "--fault=hang", "--failing=0")
  while two_processes.AT not in process.stdout.readline():
    assert process.poll() is None
  sent = [signal.Signals[name] for name in (first, second)]
  process.send_signal(sent[0])
  process.send_signal(sent[0])  # A scheduler may send it more than once.
  time.sleep(1.5)
  assert process.poll() is None
  process.send_signal(sent[1])
  assert process.wait(timeout=10) == 128 + sent[1]
  errors = process.stderr.read()
  assert f"{first}: saving after this step" in errors and f"{second}: ended at once" in errors
  process.stdout.close()
  process.stderr.close()


def test_f3_signals_that_the_process_was_started_to_ignore_stay_ignored():
  program = (
    "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); "  # As nohup does.
    "from tokenformer_jax.distributed import processes; processes.start(stops_by_itself=True); "
    "os.kill(os.getpid(), signal.SIGHUP); import time; time.sleep(0.5); assert not processes.must_stop(1)"
  )
  codes, _, errors = outcome(run(1, "-c", program), timeout=60)
  assert codes == [0] and errors == [""]


@pytest.mark.slow
def test_f3_an_evaluation_on_the_step_of_a_signal_is_done_by_the_run_that_resumes(tmp_path, monkeypatch):
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  config = small_run.config(f"text:{tmp_path}/text.txt", num_steps=4, log_every=1, eval_every=2, checkpoint_every=4)
  with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
    patch.setattr(loop, "must_stop", lambda step: step == 2)
    loop.train(config, str(tmp_path / "run"))
  assert stopped.value.code == 143
  loop.train(config, str(tmp_path / "run"))
  rows = read_metrics(str(tmp_path / "run"))
  assert [row["step"] for row in rows if "held_out/loss" in row] == [2, 4]
  assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]


def test_f24_a_watchdog_lets_a_step_in_time_pass_and_watches_nothing_between_steps():
  # Were one of these not disarmed, it would end this process.
  with Watchdog(0.3):
    pass
  with Watchdog(0):
    time.sleep(0.5)
