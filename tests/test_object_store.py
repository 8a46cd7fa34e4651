"""A run in a bucket: every path stays a gs:// URI, nothing appears on the local disk, and logs can be read meanwhile."""

import os
import shutil

import pytest

import tokenformer_jax as tf
from tests import small_run
from tests.object_store import bucket  # noqa: F401
from tokenformer_jax.paths import replace_text, user_path
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.log_file import LogFile
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.resize import grow_run
from tokenformer_jax.training.run_log import RunLog, read_metrics, read_samples

RUN = "gs://bucket/runs/a"


@pytest.fixture
def bucket_run(bucket, tmp_path, monkeypatch):  # noqa: F811
  """A run of two updates in the bucket, resumed for two more; the current folder is an empty one."""
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  for num_steps in (2, 4):
    config = small_run.config(
      f"text:{tmp_path}/text.txt",
      num_steps=num_steps,
      log_every=1,
      eval_every=2,
      checkpoint_every=2,
      checkpoints_kept=1,
    )
    train(config, RUN, profile=num_steps == 4)
  return bucket


def test_a_run_is_written_to_a_bucket_and_resumes_from_it(bucket_run, tmp_path):
  folder = bucket_run.folder / "runs" / "a"
  assert {path.name for path in folder.iterdir()} == {
    *("checkpoints", "config.json", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl"),
    *("tensorboard", "loss.png", "profile"),
  }
  assert list((folder / "profile").rglob("*.xplane.pb")) and list((folder / "tensorboard").iterdir())
  assert [row["step"] for row in read_metrics(RUN) if "train/loss" in row] == [1, 2, 3, 4]
  # The URI reaches Orbax and tensorstore untouched, and no local folder is named after it.
  assert Checkpoints(RUN).latest_step() == 4
  assert bucket_run.drivers and all(
    driver["driver"] == "gcs" and driver["bucket"] == "bucket" and driver["path"].startswith("runs/a/checkpoints/")
    for driver in bucket_run.drivers
  )
  assert os.listdir(tmp_path / "here") == []
  assert [path.name for path in (folder / "checkpoints").iterdir()] == ["4"]
  # A bucket cannot rename: a checkpoint is complete once its commit file is there.
  shutil.copytree(folder / "checkpoints" / "4", folder / "checkpoints" / "6")
  (folder / "checkpoints" / "6" / "commit_success.txt").unlink()
  assert Checkpoints(RUN).latest_step() == 4
  model, tokenizer = tf.load(RUN), tf.load_tokenizer(RUN)
  assert model.config == small_run.MODEL and tokenizer.vocab_size == 257
  # It can be grown into a local folder, too.
  grow_run(RUN, str(tmp_path / "grown"), ffn_tokens=24)
  assert tf.load(str(tmp_path / "grown")).config == small_run.MODEL.grown(ffn_tokens=24)


def test_a_log_in_a_bucket_is_visible_at_intervals_and_at_a_flush(bucket):  # noqa: F811
  path, file = user_path("gs://bucket/log"), bucket.folder / "log"
  rare = LogFile(path, b"a", upload_seconds=1e9)
  rare.write(b"b")
  assert not file.exists()
  rare.flush()
  assert file.read_bytes() == b"ab"
  often = LogFile(path, b"ab", upload_seconds=0)
  often.write(b"c")
  assert file.read_bytes() == b"abc"
  often.write(b"d")
  often.close()
  assert file.read_bytes() == b"abcd"


def test_a_text_in_a_bucket_is_replaced_without_renaming(bucket):  # noqa: F811
  for text in ("one", "two"):
    replace_text(user_path("gs://bucket/text"), text)
    assert (bucket.folder / "text").read_text() == text


@pytest.mark.parametrize(
  "path, message",
  [
    ("", "workdir='': the path is empty"),
    (" ", "workdir=' ': the path is empty"),
    ("gss://bucket/run", "workdir='gss://bucket/run': the scheme gss:// is unknown; give a local path, or .* gs://"),
    ("gs://bucket/run", "workdir='gs://bucket/run': gs:// needs .* pip install 'tokenformer_jax.gcs.'"),
  ],
)
def test_a_path_that_cannot_be_used_is_refused_by_its_name(monkeypatch, path, message):
  def not_installed(scheme):
    raise ImportError(scheme)

  monkeypatch.setattr("fsspec.get_filesystem_class", not_installed)
  with pytest.raises(ValueError, match=message):
    user_path(path, "workdir")


def test_a_home_folder_is_expanded_and_a_relative_path_is_made_absolute(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", "/home/user")
  monkeypatch.chdir(tmp_path)
  assert str(user_path("~/runs/a")) == "/home/user/runs/a"
  assert str(user_path("runs/../b")) == str(tmp_path / "b")


def test_checkpoints_in_other_stores_are_refused(monkeypatch):
  monkeypatch.setattr("fsspec.get_filesystem_class", lambda scheme: None)
  with pytest.raises(ValueError, match="workdir='s3://bucket/run': checkpoints are kept in local folders and gs://"):
    Checkpoints("s3://bucket/run")


def test_metrics_and_samples_in_a_bucket_are_visible_at_each_checkpoint(bucket):  # noqa: F811
  log = RunLog(RUN, 0)
  log.write(1, **{"train/loss": 2.0})
  log.write_sample(1, "text")
  assert read_metrics(RUN) == read_samples(RUN) == []
  log.flush()
  assert read_metrics(RUN) == [{"step": 1, "train/loss": 2.0}] and read_samples(RUN) == [(1, "text")]
  log.close()
