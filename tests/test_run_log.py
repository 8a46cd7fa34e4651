"""What a run leaves to look at, also when it was stopped and goes on."""

import struct

import matplotlib.image
import numpy as np
from tensorboardX.proto.event_pb2 import Event

from tokenformer_jax.training.loss_curve import plot_losses
from tokenformer_jax.training.run_log import RunLog, read_metrics

GROWTH = {"growth/parameters": 9000, "growth/loss_before": 2.5, "growth/loss_after": 2.5}


def write(workdir, start_step, steps):
  log = RunLog(str(workdir), start_step)
  for step in steps:
    if step == 4:  # Grown before the update of step 4.
      log.write(3, **GROWTH)
    log.write(step, **{"train/loss": 10.0 - step})
    log.write_sample(step, f"text of {step}\nno head: --- step 1")
  log.close()


def test_a_run_that_goes_on_leaves_what_an_uninterrupted_one_leaves(tmp_path):
  stopped, whole = tmp_path / "stopped", tmp_path / "whole"
  for workdir in (stopped, whole):
    workdir.mkdir()
  write(whole, 0, range(1, 7))
  write(stopped, 0, range(1, 6))
  with (stopped / "metrics.jsonl").open("a") as metrics:
    metrics.write('{"step": 5, "held_o')  # Killed while writing.
  for start in (3, 4, 0):  # At the very step of the growth, after it, and from the beginning.
    write(stopped, start, range(start + 1, 7))
    assert read_metrics(str(stopped)) == read_metrics(str(whole))
    assert (stopped / "samples.txt").read_text() == (whole / "samples.txt").read_text()
  assert [row["step"] for row in read_metrics(str(whole)) if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
  assert [row["step"] for row in read_metrics(str(whole)) if "growth/parameters" in row] == [3]


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
  assert texts[2] == "text of 3\nno head: --- step 1"


def events(records: bytes):
  """The events of a TensorBoard file: length, its checksum, the event, its checksum."""
  while records:
    (length,) = struct.unpack("<Q", records[:8])
    yield Event.FromString(records[12 : 12 + length])
    records = records[16 + length :]


def test_no_metrics_are_no_rows(tmp_path):
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
