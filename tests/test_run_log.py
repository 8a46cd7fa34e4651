"""The records of a run: what they hold after a stop and a resume, and when they can be read."""

import struct

import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from tokenformer_jax.training.loss_curve import plot_losses
from tokenformer_jax.training.run_log import RunLog, read_metrics, read_samples

TEXT = "text of {}\n--- step 9\nno heading: --- step 1\n\\--- step 2\n"
GROWTH = {"growth/parameters": 9000, "growth/loss_before": 2.5, "growth/loss_after": 2.5}


def write(workdir, start_step, steps):
  log = RunLog(str(workdir), start_step)
  for step in steps:
    if step == 4:  # The model grew before the update of step 4.
      log.write(3, **GROWTH)
    log.write(step, **{"train/loss": 10.0 - step})
    log.write_sample(step, TEXT.format(step))
  log.close()


def test_a_resumed_run_writes_what_an_uninterrupted_one_writes(tmp_path):
  stopped, whole = tmp_path / "stopped", tmp_path / "whole"
  for workdir in (stopped, whole):
    workdir.mkdir()
  write(whole, 0, range(1, 7))
  write(stopped, 0, range(1, 6))
  with (stopped / "metrics.jsonl").open("a") as metrics:
    metrics.write('{"step": 5, "held_o')  # The run was killed while it wrote.
  for start in (3, 4, 0):  # At the step of the growth, after it, and from the beginning.
    write(stopped, start, range(start + 1, 7))
    assert read_metrics(str(stopped)) == read_metrics(str(whole))
    assert (stopped / "samples.txt").read_text() == (whole / "samples.txt").read_text()
  assert [row["step"] for row in read_metrics(str(whole)) if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
  assert [row["step"] for row in read_metrics(str(whole)) if "growth/parameters" in row] == [3]


def test_samples_come_back_whatever_their_text(tmp_path):
  write(tmp_path, 0, range(1, 4))
  assert read_samples(str(tmp_path)) == [(step, TEXT.format(step)) for step in (1, 2, 3)]


def test_samples_of_an_earlier_version_are_cut_after_the_last_step_that_stays(tmp_path):
  # Headings inside a sample were not escaped.
  (tmp_path / "samples.txt").write_text("--- step 2\na\n--- step 9\n--- step 4\nb\n--- step 6\nc\n--- step 8\nd\n")
  RunLog(str(tmp_path), 5).close()
  assert (tmp_path / "samples.txt").read_text() == "--- step 2\na\n--- step 9\n--- step 4\nb\n"


@pytest.mark.parametrize("broken", ['{"step": 2, "tr', "[]", "7", '{"loss": 1.0}', '{"step": "2"}', "\x00\x00", ""])
def test_a_broken_line_in_the_middle_costs_only_itself(tmp_path, broken, caplog):
  rows = ['{"step": 1, "train/loss": 3.0}', broken, '{"step": 3, "train/loss": 1.0}', ""]
  (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
  kept = [{"step": 1, "train/loss": 3.0}, {"step": 3, "train/loss": 1.0}]
  assert read_metrics(str(tmp_path)) == kept
  RunLog(str(tmp_path), 3).close()
  assert "metrics.jsonl: line 2 cannot be read and is left out." in caplog.text
  assert read_metrics(str(tmp_path)) == kept


def test_metrics_are_on_disk_at_once(tmp_path):
  log = RunLog(str(tmp_path), 0)
  log.write(1, **{"train/loss": 0.5, "train/grad_norm": 2.0})
  assert read_metrics(str(tmp_path)) == [{"step": 1, "train/loss": 0.5, "train/grad_norm": 2.0}]
  log.close()


def test_tensorboard_gets_scalars_and_text(tmp_path):
  write(tmp_path, 0, range(1, 4))
  (file,) = (tmp_path / "tensorboard").iterdir()
  values = [(value.tag, event.step, value) for event in events(file.read_bytes()) for value in event.summary.value]
  scalars = [(step, value.simple_value) for tag, step, value in values if tag == "train/loss"]
  assert scalars == [(1, 9.0), (2, 8.0), (3, 7.0)]
  texts = [value.tensor.string_val[0].decode() for tag, _, value in values if tag.startswith("sample")]
  assert texts[2] == TEXT.format(3)


def events(records: bytes):
  """Yields the events of a TensorBoard file. A record is a length, its checksum, the event and its checksum."""
  while records:
    (length,) = struct.unpack("<Q", records[:8])
    yield Event.FromString(records[12 : 12 + length])
    records = records[16 + length :]


def test_a_folder_without_metrics_has_no_rows(tmp_path):
  assert read_metrics(str(tmp_path)) == []


def test_loss_curve_is_a_picture_with_the_growth_in_it(tmp_path):
  pictures = []
  for name, steps in (("short", range(1, 4)), ("grown", range(1, 7))):
    (tmp_path / name).mkdir()
    write(tmp_path / name, 0, steps)
    path = plot_losses(str(tmp_path / name))
    assert path == str(tmp_path / name / "loss.png")
    pictures.append(matplotlib.image.imread(path))
  assert pictures[0].shape == pictures[1].shape == (540, 960, 4)
  assert np.any(pictures[0] != pictures[1]) and len(np.unique(pictures[1].reshape(-1, 4), axis=0)) > 10
