"""A run in a bucket: every path stays a gs:// URI, nothing appears on the local disk, and logs can be read meanwhile."""

import os

import pytest

import tokenformer_jax as tf
from tests import small_run
from tests.object_store import bucket  # noqa: F401
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.run_log import read_metrics, read_samples

RUN = "gs://bucket/runs/a"


@pytest.fixture
def bucket_run(bucket, tmp_path, monkeypatch):  # noqa: F811
  """A run of two updates in the bucket, resumed for two more; the current folder is an empty one."""
  (tmp_path / "text.txt").write_text(small_run.TEXT)
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  for num_steps in (2, 4):
    config = small_run.config(
      f"text:{tmp_path}/text.txt", num_steps=num_steps, log_every=1, eval_every=2, checkpoint_every=2, sample_tokens=2
    )
    train(config, RUN, profile=num_steps == 4)
  return bucket


def test_a_run_is_written_to_a_bucket_and_resumes_from_it(bucket_run, tmp_path):
  folder = bucket_run.folder / "runs" / "a"
  assert {path.name for path in folder.iterdir()} == {
    *("checkpoints", "config.json", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "samples.txt"),
    *("tensorboard", "loss.png", "profile"),
  }
  assert list((folder / "profile").rglob("*.xplane.pb")) and list((folder / "tensorboard").iterdir())
  assert [row["step"] for row in read_metrics(RUN) if "train/loss" in row] == [1, 2, 3, 4]
  assert [step for step, _ in read_samples(RUN)] == [2, 4]
  # The URI reaches Orbax and tensorstore untouched, and no local folder is named after it.
  assert Checkpoints(RUN).latest_step() == 4
  assert bucket_run.drivers and all(
    driver["driver"] == "gcs" and driver["bucket"] == "bucket" and driver["path"].startswith("runs/a/checkpoints/")
    for driver in bucket_run.drivers
  )
  assert os.listdir(tmp_path / "here") == []
  model, tokenizer = tf.load(RUN), tf.load_tokenizer(RUN)
  assert model.config == small_run.MODEL and tokenizer.vocab_size == 257
