"""Faults of files: what a run finds in its work folder after kills, damage and hands. Each test has the id of its fault.

docs/reliability.md says what is promised.
"""

import dataclasses
import errno
import fcntl
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath

import tokenformer_jax as tf
from tests import small_run
from tests.small_run import MODEL
from tokenformer_jax import data
from tokenformer_jax.interop.convert import convert
from tokenformer_jax.training import checkpoint_files, lock, loop, manifest
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.lock import WorkFolderLock
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.resume import check_position, check_same_model
from tokenformer_jax.training.run_log import RunLog, read_metrics
from tokenformer_jax.training.step_folders import damage, newest_good_step, whole_steps

SHAPES = make_program(small_run.config(), MODEL, small_run.mesh()).shapes
STATES = {step: small_run.noise(SHAPES, step) for step in (2, 4)}
BYTES = data.open_tokenizer("bytes")
RECORD = {"model": dataclasses.asdict(MODEL), "data": {"next_batch": 4}, "tokenizer": BYTES.fingerprint}


def write(workdir, steps=(2, 4), kept=None):
  checkpoints = Checkpoints(str(workdir), kept)
  for step in steps:
    checkpoints.save(step, STATES.get(step, STATES[2]), RECORD)
  checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A work folder with checkpoints of steps 2 and 4; tests must not change it."""
  workdir = tmp_path_factory.mktemp("saved") / "run"
  write(workdir)
  data.save_tokenizer(BYTES, workdir / "tokenizer.json")
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  """A copy of it that a test may damage."""
  return shutil.copytree(saved, tmp_path / "run")


def names(workdir):
  return sorted(os.listdir(workdir / "checkpoints"))


def newest(folder):
  return newest_good_step(epath.Path(folder))


def files_of(folder):
  return manifest._files(epath.Path(folder))


def forge(folder, **changes):
  """Changes entries of a manifest, and its own SHA-256 with them."""
  path = folder / "manifest.json"
  content = json.loads(path.read_text()) | changes
  del content["sha256"]
  path.write_text(json.dumps({"sha256": manifest._digest(content), **content}))


def forget_manifest(folder, **changes):
  """Makes the folder of a step one that an earlier version wrote, with changed entries in its record."""
  (folder / "manifest.json").unlink()
  path = folder / "record" / "metadata"
  record = json.loads(path.read_text()) | changes
  del record["format"]
  path.write_text(json.dumps(record))


# F1, F2: what kills leave. tests/faults/test_storage_kills.py kills at every operation.


def test_F2_what_a_killed_save_and_a_killed_deletion_left_is_removed_by_the_next_run(workdir):
  folder = workdir / "checkpoints"
  shutil.copytree(folder / "4", folder / "6.orbax-checkpoint-tmp")
  (folder / "0.trash" / "model").mkdir(parents=True)
  checkpoints = Checkpoints(str(workdir))
  assert checkpoints.latest_step() == 4 and len(names(workdir)) == 4
  checkpoints.claim()
  assert names(workdir) == ["2", "4"]
  checkpoints.close()


def test_F2_a_half_deleted_step_is_never_offered(workdir):
  files = [path for path in (workdir / "checkpoints" / "4").rglob("*") if path.is_file()]
  for path in files[::3]:
    path.unlink()
  assert whole_steps(epath.Path(workdir / "checkpoints")) == [2] and newest(workdir / "checkpoints") == 2


def test_F2_an_old_step_leaves_by_one_rename(tmp_path, monkeypatch):
  monkeypatch.setattr("tokenformer_jax.training.step_folders._delete", lambda path: None)
  write(tmp_path, (1, 2, 3), kept=1)
  assert names(tmp_path) == ["1.trash", "2.trash", "3"]


# F4, F5, F6: damaged files.

DAMAGES = {
  "empty": lambda content: b"",
  "half": lambda content: content[: len(content) // 2],
  "99 %": lambda content: content[: len(content) * 99 // 100],
  "zeroed": lambda content: bytes(len(content)),
  "longer": lambda content: content + b"x",
  "deleted": lambda content: None,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_F4_a_damaged_file_of_the_newest_step_is_named_and_the_step_before_is_taken(workdir, kind, caplog):
  folder = workdir / "checkpoints" / "4"
  files = [folder / name for name in [*files_of(folder), "manifest.json"]]
  assert len(files) > 20
  for path in files:
    content = path.read_bytes()
    if (changed := DAMAGES[kind](content)) == content:
      continue
    path.unlink() if changed is None else path.write_bytes(changed)
    caplog.clear()
    assert newest(folder.parent) == 2, path
    with pytest.raises(
      ValueError,
      match=r"checkpoints/4: its (file .*|manifest.json) (is|has|cannot)|/4: it has no (model|optimizer|record)|/4: its record",
    ):
      checkpoint_files.chosen_step(str(workdir), 4)
    path.write_bytes(content)
  assert newest(folder.parent) == 4


def test_F5_a_flipped_bit_is_seen_in_every_file(workdir):
  folder = workdir / "checkpoints" / "4"
  seed = random.randrange(2**32)
  print("seed", seed)
  draw = random.Random(seed)
  for name in [*files_of(folder), *["manifest.json"] * 50]:
    path = folder / name
    content = bytearray(path.read_bytes())
    if not content:
      continue
    place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
    content[place] ^= bit
    path.write_bytes(content)
    assert newest(folder.parent) == 2, (name, place, bit)
    content[place] ^= bit
    path.write_bytes(content)


def test_F5_a_damaged_step_is_set_aside_and_the_run_ends_as_if_nothing_had_happened(tmp_path, capsys, caplog):
  run, config = tmp_path / "run", run_config(tmp_path)
  losses = [train(config, str(run))]
  state = Checkpoints(str(run)).restore(4, SHAPES)
  largest = max((run / "checkpoints" / "4").rglob("d/*"), key=os.path.getsize)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  assert tf.load(str(run)).config == MODEL and names(run) == ["2", "4"]  # A reader changes nothing.
  losses.append(train(config, str(run)))
  assert "resumed at step 2" in capsys.readouterr().out
  assert (
    f"checkpoints/4: its file {largest.relative_to(run / 'checkpoints' / '4')} is not what was saved" in caplog.text
  )
  assert names(run) == ["2", "4", "4.set_aside"]
  assert losses[0] == losses[1]
  small_run.assert_same(Checkpoints(str(run)).restore(4, SHAPES), state)


def test_F6_each_process_reads_its_share_and_one_of_them_finds_the_damage(workdir):
  folder = workdir / "checkpoints" / "4"
  for name in files_of(folder):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes(255 - byte for byte in content))
    assert sum(bool(manifest.damaged(epath.Path(folder), share, 3)) for share in range(3)) == bool(content), name
    (folder / name).write_bytes(content)


def test_F6_the_damage_that_another_process_sees_is_damage_here(workdir, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", lambda bad: np.array([bad, 1]))
  assert damage(epath.Path(workdir / "checkpoints" / "4")) == "process 1 cannot use it"


@pytest.mark.slow
def test_F6_two_processes_take_the_same_good_step_and_save_the_next(workdir):
  for name in files_of(workdir / "checkpoints" / "4"):
    if name.endswith("d/" + os.path.basename(name)):  # One file with arrays.
      (workdir / "checkpoints" / "4" / name).unlink()
      break
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  command = [sys.executable, "-m", "tests.faults.newest_step", str(workdir), address]
  two = [
    subprocess.Popen(
      [*command, str(number)],
      env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for number in range(2)
  ]
  for out, errors in [process.communicate(timeout=200) for process in two]:
    assert "newest 2 then 4 of 2" in out, errors
  content = json.loads((workdir / "checkpoints" / "4" / "manifest.json").read_text())
  assert any("process_1" in name for name in content["files"]) and "4.set_aside" in names(workdir)
  small_run.assert_same(Checkpoints(str(workdir)).restore(4, SHAPES), STATES[2])


# F7: saves that fail.


def full(*_):
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ended(checkpoints):
  """Waits for the save, without looking at how it ended."""
  checkpoints._saving[1].join()
  return checkpoints


@pytest.mark.parametrize("moment", ["at the commit", "before it begins"])
def test_F7_a_failed_save_is_told_at_the_next_step_cleaned_up_and_done_again(workdir, monkeypatch, caplog, moment):
  checkpoints = Checkpoints(str(workdir))
  with monkeypatch.context() as patch:
    if moment == "at the commit":
      patch.setattr(checkpoint_files, "write_manifest", full)
    else:
      patch.setattr(checkpoints._checkpointer, "create_temporary_path", full)
    checkpoints.save(6, STATES[2], RECORD)
    ended(checkpoints).check()
  assert "checkpoints/6: the checkpoint could not be saved (1 in a row): [Errno 28] No space left" in caplog.text
  assert names(workdir) == ["2", "4"] and checkpoints.latest_step() == 4
  checkpoints.save(8, STATES[2], RECORD)
  checkpoints.close()
  small_run.assert_same(Checkpoints(str(workdir)).restore(8, SHAPES), STATES[2])


def test_F7_three_failed_saves_in_a_row_end_the_run_and_so_does_a_failed_last_one(workdir, monkeypatch):
  monkeypatch.setattr(checkpoint_files, "write_manifest", full)
  checkpoints = Checkpoints(str(workdir))
  for step in (5, 6):
    checkpoints.save(step, STATES[2], RECORD)
    ended(checkpoints).check()
  checkpoints.save(7, STATES[2], RECORD)
  with pytest.raises(OSError, match=r"7: .* \(3 in a row\): .*No space left.* The newest checkpoint is that of step 4"):
    ended(checkpoints).check()
  checkpoints.close()
  last = Checkpoints(str(workdir))
  last.save(8, STATES[2], RECORD)
  with pytest.raises(OSError, match=r"checkpoints/8: .* \(1 in a row\)"):
    last.close()
  assert names(workdir) == ["2", "4"]
  WorkFolderLock(epath.Path(workdir)).release()


def test_F7_a_clock_that_is_set_forward_during_a_save_does_not_fail_it(workdir, monkeypatch):
  real, calls = time.time, []

  def jumping():
    calls.append(1)
    return real() + 600 * len(calls)

  checkpoints = Checkpoints(str(workdir))
  with monkeypatch.context() as patch:
    patch.setattr(time, "time", jumping)
    checkpoints.save(6, STATES[2], RECORD)
    checkpoints.close()
  assert len(calls) > 6 and newest(workdir / "checkpoints") == 6


def test_F7_a_log_that_was_deleted_ends_the_run(tmp_path):
  log = RunLog(str(tmp_path), 0)
  log.write(1, **{"train/loss": 1.0})
  log.flush()
  (tmp_path / "metrics.jsonl").unlink()
  with pytest.raises(
    FileNotFoundError, match="metrics.jsonl: it was deleted or replaced while this run was writing it"
  ):
    log.flush()
  with pytest.raises(FileNotFoundError):
    log.close()


def run_config(tmp_path):
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  return small_run.config(f"text:{tmp_path}/text.txt", num_steps=4, log_every=1, eval_every=4, checkpoint_every=2)


def test_F7_a_work_folder_that_is_deleted_under_a_run_ends_it(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "must_stop", lambda step: step == 1 and shutil.rmtree(tmp_path / "run"))
  with pytest.raises(
    FileNotFoundError, match="run/metrics.jsonl: it was deleted or replaced while this run was writing"
  ):
    train(run_config(tmp_path), str(tmp_path / "run"))
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_F7_a_read_only_work_folder_is_named_before_anything_is_computed(tmp_path, monkeypatch):
  mkdir = os.mkdir

  def read_only(path, *args, **kwargs):
    if str(path).startswith(f"{tmp_path}/run"):
      raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    mkdir(path, *args, **kwargs)

  monkeypatch.setattr(os, "mkdir", read_only)
  monkeypatch.setattr(loop, "first_state", lambda *_: pytest.fail("computed"))
  with pytest.raises(OSError, match="Read-only file system: .*/run"):
    train(run_config(tmp_path), str(tmp_path / "run"))


def test_F7_an_error_of_the_system_inside_tensorstores_text_is_told_by_its_own(workdir, monkeypatch, caplog):
  text = f"RESOURCE_EXHAUSTED: Failed writing: {'x' * 400} No space left on device [os_error_code='28']"
  checkpoints = Checkpoints(str(workdir))
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint_files, "write_manifest", mock.Mock(side_effect=ValueError(text)))
    checkpoints.save(6, STATES[2], RECORD)
    ended(checkpoints).check()
  assert "6: the checkpoint could not be saved (1 in a row): No space left on device. The run saves" in caplog.text
  # A write that nobody waited for ends late.
  (workdir / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
  checkpoints.close()
  assert names(workdir) == ["2", "4"]


# F8: numbered entries that are no checkpoints.

STRAYS = {
  "an empty folder": (lambda folder: (folder / "7").mkdir(), 4, ["2", "4", "7.set_aside"]),
  "a file": (lambda folder: (folder / "9").write_text(""), 4, ["2", "4", "9.set_aside"]),
  "a copy": (lambda folder: shutil.copytree(folder / "4", folder / "9"), 4, ["2", "4", "9.set_aside"]),
  "a renamed step": (lambda folder: (folder / "4").rename(folder / "80"), 2, ["2", "80.set_aside"]),
  "a dangling link": (lambda folder: (folder / "11").symlink_to("nowhere"), 4, ["11.set_aside", "2", "4"]),
  "a link to another step": (lambda folder: (folder / "12").symlink_to("4"), 4, ["12.set_aside", "2", "4"]),
  "a step on another disk": (
    lambda folder: (shutil.move(folder / "4", folder.parent / "4"), (folder / "4").symlink_to(folder.parent / "4")),
    4,
    ["2", "4"],
  ),
  "other names": (lambda folder: [(folder / name).mkdir() for name in ("007", "-1", "٣", "1e3")], 4, None),
  "no manifest": (lambda folder: (folder / "4" / "manifest.json").unlink(), 2, ["2", "4.set_aside"]),
}


@pytest.mark.parametrize("stray", STRAYS)
def test_F8_a_stray_entry_is_set_aside_and_neither_taken_nor_fatal(workdir, stray):
  make, expected, left = STRAYS[stray]
  make(workdir / "checkpoints")
  assert newest(workdir / "checkpoints") == expected
  checkpoints = Checkpoints(str(workdir), kept=1)
  checkpoints.claim()
  assert checkpoints.latest_step() == expected
  assert left is None or names(workdir) == left
  checkpoints.save(5, STATES[2], RECORD)
  checkpoints.close()
  assert whole_steps(epath.Path(workdir / "checkpoints")) == [5]


def test_F8_an_entry_that_appears_during_the_run_is_in_no_saves_way(workdir):
  checkpoints = Checkpoints(str(workdir))
  checkpoints.claim()
  (workdir / "checkpoints" / "6").mkdir()
  checkpoints.save(6, STATES[2], RECORD)
  checkpoints.close()
  assert newest(workdir / "checkpoints") == 6 and "6.set_aside" in names(workdir)


# F9: two runs in one work folder.


def test_F9_a_second_run_is_refused_and_a_kill_gives_the_folder_back(tmp_path):
  program = (
    f"import pathlib, time; from etils import epath; from tokenformer_jax.training.lock import WorkFolderLock; "
    f"lock = WorkFolderLock(epath.Path({str(tmp_path)!r})); print('locked', flush=True); time.sleep(100)"
  )
  first = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
  assert first.stdout.readline() == "locked\n"
  checkpoints = Checkpoints(str(tmp_path))
  with pytest.raises(
    ValueError, match=f"{tmp_path}: process {first.pid} on .* writes this work folder .since .*Stop it"
  ):
    checkpoints.save(1, STATES[2], RECORD)
  first.kill()
  first.communicate()
  checkpoints.save(1, STATES[2], RECORD)
  checkpoints.close()
  assert os.listdir(tmp_path) == ["checkpoints"]


def test_F9_without_locks_the_owner_renews_its_file_and_one_that_does_not_is_gone(tmp_path, monkeypatch):
  def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", no_locks)
  monkeypatch.setattr(lock, "RENEWED_SECONDS", 0.05)
  monkeypatch.setattr(lock, "_GONE_AFTER", 2.0)
  monkeypatch.setattr(lock, "_myself", lambda: json.dumps({"host": "a", "process": 1, "time": time.time()}).encode())
  first = WorkFolderLock(epath.Path(tmp_path))
  with pytest.raises(ValueError, match="process 1 on a writes this work folder .*; if it is not running, delete"):
    WorkFolderLock(epath.Path(tmp_path))
  first._end.set()  # It was killed.
  time.sleep(0.1)
  second = WorkFolderLock(epath.Path(tmp_path))
  assert not second.lost
  second.release()
  assert not (tmp_path / "lock").exists()
  third = WorkFolderLock(epath.Path(tmp_path))
  (tmp_path / "lock").write_text("of a run that took the folder over")
  third.release()
  assert (tmp_path / "lock").exists()


def test_F9_a_run_whose_folder_was_taken_while_it_slept_ends(workdir):
  checkpoints = Checkpoints(str(workdir))
  checkpoints.claim()
  checkpoints._lock.lost = "process 1 on a writes this work folder."
  with pytest.raises(OSError, match="process 1 on a"):
    checkpoints.check()
  checkpoints.close()


# F12: other formats.


def test_F12_a_checkpoint_of_a_newer_version_is_refused_and_stays(workdir):
  forge(workdir / "checkpoints" / "4", format=manifest.FORMAT + 1)
  checkpoints = Checkpoints(str(workdir))
  for use in (checkpoints.claim, checkpoints.latest_step, lambda: tf.load(str(workdir))):
    with pytest.raises(
      ValueError, match="checkpoints/4: a newer version .* wrote this checkpoint .format 2, .* up to 1"
    ):
      use()
  assert names(workdir) == ["2", "4"]


def test_F12_a_field_that_this_version_does_not_know_is_named(workdir):
  model = RECORD["model"] | {"hyper_loops": 3}
  forget_manifest(workdir / "checkpoints" / "4", model=model)
  with pytest.raises(ValueError, match="checkpoints/4: its model cannot be built .*model.hyper_loops is unknown"):
    tf.load(str(workdir))
  with pytest.raises(ValueError, match="run: model.hyper_loops is unknown"):
    check_same_model(model, small_run.config(), 4, str(workdir))


def test_F12_a_checkpoint_of_an_earlier_version_loads_with_a_warning(workdir, caplog):
  forget_manifest(workdir / "checkpoints" / "4")
  assert tf.load(str(workdir)).config == MODEL
  assert "checkpoints/4: an earlier version wrote this checkpoint without a manifest" in caplog.text


# F16: a bad state is never saved as good.


@pytest.mark.parametrize("part", ["params", "tau", "opt_state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_F16_a_state_that_is_not_finite_is_not_saved(workdir, part, value):
  spoilt = jax.tree.map(
    lambda leaf: leaf.at[(0,) * leaf.ndim].set(value) if leaf.dtype == np.float32 else leaf, getattr(STATES[2], part)
  )
  checkpoints = Checkpoints(str(workdir))
  with pytest.raises(FloatingPointError, match=f"6: not saved, because {part}/.* is not finite .* that of step 4"):
    checkpoints.save(6, dataclasses.replace(STATES[2], **{part: spoilt}), RECORD)
  checkpoints.close()
  assert names(workdir) == ["2", "4"]


# F19, F20: records and tokenizers.


def test_F19_a_record_that_was_edited_is_damage_and_in_an_old_checkpoint_a_mistake(workdir):
  path = workdir / "checkpoints" / "4" / "record" / "metadata"
  path.write_text(path.read_text().replace('"next_batch": 4', '"next_batch": 5'))
  assert newest(workdir / "checkpoints") == 2
  check_position(RECORD, 4, 4, "run")
  for record, updates in ((RECORD | {"data": {"next_batch": 5}}, 4), (RECORD, 3), (RECORD | {"data": 7}, 4)):
    with pytest.raises(ValueError, match="run/checkpoints/4: its state counts . updates .* changed by hand"):
      check_position(record, updates, 4, "run")


def test_F20_a_swapped_tokenizer_is_refused(workdir, tmp_path):
  assert tf.load_tokenizer(str(workdir)).fingerprint == BYTES.fingerprint
  other = data.open_tokenizer("bytes")
  forget_manifest(workdir / "checkpoints" / "4", tokenizer="another")
  with pytest.raises(ValueError, match=f"tokenizer.json: this is not the tokenizer another .* but {other.fingerprint}"):
    tf.load_tokenizer(str(workdir))
  with pytest.raises(ValueError, match="this is not the tokenizer another"):
    convert(workdir, tmp_path / "exported")
  assert not (tmp_path / "exported").exists()


# F29: names that Orbax would mix up.


@pytest.mark.parametrize(
  "params, message",
  [
    ({"a": {"b": 1}, "a.b": 2}, r"checkpoints/6: the leaves params/a.b and params/a/b|params/a/b and params/a.b"),
    ({"a": np.zeros((0, 3))}, r"checkpoints/6: the leaf params/a \(0, 3\) has no entries"),
  ],
)
def test_F29_leaves_that_could_not_be_restored_are_refused_at_save(workdir, params, message):
  state = dataclasses.replace(STATES[2], params=jax.tree.map(jax.numpy.asarray, params))
  checkpoints = Checkpoints(str(workdir))
  with pytest.raises(ValueError, match=message):
    checkpoints.save(6, state, RECORD)
  checkpoints.close()


def test_a_line_of_the_metrics_that_cannot_be_read_costs_only_itself(tmp_path):
  lines = ['{"step": 1, "train/loss": 1.0}', "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "\x00", '{"step": 2}', ""]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  RunLog(str(tmp_path), 2).close()
  assert [row["step"] for row in read_metrics(str(tmp_path))] == [1, 2]
