"""Runs on images: growth in the middle, resuming, accuracy, and what such a run cannot do."""

import dataclasses
import gzip
import shutil

import numpy as np
import pytest

from tests import small_run
from tests.commands import call
from tokenformer_jax.config import DataConfig, ImagesConfig, ModelConfig
from tokenformer_jax.evaluation.images import measure_image_run, measure_images
from tokenformer_jax.training.checkpoints import Checkpoints, load
from tokenformer_jax.training.loop import train
from tokenformer_jax.training.run_log import read_metrics

STEPS, GROWTH_STEP = 3, 1
MODEL = ModelConfig.named(
  "tiny", "tokenformer-vit", num_layers=2, hidden_size=16, num_heads=2, qkv_tokens=8, proj_tokens=8, ffn_tokens=16,
  vision=dict(image_size=8, patch_size=4, channels=1, num_classes=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Idx files of bright and dark images, which a few updates can tell apart."""
  root, rng = tmp_path_factory.mktemp("idx"), np.random.default_rng(0)
  for name, count in (("train", 40), ("t10k", 13)):
    labels = rng.integers(0, 2, count)
    pixels = rng.integers(0, 100, (count, 8, 8)) + 150 * labels[:, None, None]
    for what, array in (("images-idx3", pixels), ("labels-idx1", labels)):
      head = np.array([0x0800 + array.ndim, *array.shape], ">i4").tobytes()
      (root / f"{name}-{what}-ubyte.gz").write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))
  return root


def config(folder, **images):
  """A run with a growth in its middle."""
  grown = MODEL.grown(qkv_tokens=16, proj_tokens=16, ffn_tokens=32)
  run = small_run.config(stages=[small_run.stage(GROWTH_STEP, grown)])
  training = dict(num_steps=STEPS, log_every=1, eval_every=1, eval_batches=9, checkpoint_every=1, checkpoints_kept=9)
  data = DataConfig(
    source=f"idx:{folder}", held_out_source=f"idx:{folder}@test", batch_size=8,
    images=ImagesConfig(shift=1, label_smoothing=0.1, mixup=0.5, **images),
  )  # fmt: skip
  return dataclasses.replace(run, model=MODEL, data=data, training=dataclasses.replace(run.training, **training))


def measured(workdir):
  rows = read_metrics(str(workdir))
  return [{k: v for k, v in row.items() if "per_second" not in k and k != "train/utilisation"} for row in rows]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "run"
  return workdir, train(config(folder), str(workdir))


def test_a_run_grows_and_after_a_kill_gives_what_it_gave_before(folder, finished, tmp_path):
  workdir, loss = finished
  rows = measured(workdir)
  (seam,) = [row for row in rows if "growth/parameters" in row]
  assert abs(seam["growth/loss_before"] - seam["growth/loss_after"]) <= 1e-5
  assert rows[-1]["held_out/accuracy"] > 0.9 and rows[-1]["held_out/loss"] == loss
  shutil.copytree(workdir, tmp_path / "run")
  for step in range(GROWTH_STEP + 1, STEPS + 1):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
  assert Checkpoints(str(tmp_path / "run")).latest_step() == GROWTH_STEP
  assert train(config(folder), str(tmp_path / "run")) == loss
  assert measured(tmp_path / "run") == rows


def test_evaluation_of_a_run_counts_every_image(folder, finished):
  workdir, loss = finished
  metrics = measure_image_run(workdir, f"idx:{folder}@test")
  assert metrics["images"] == 13 and metrics["loss"] == pytest.approx(loss, rel=1e-5)
  assert metrics["accuracy"] == pytest.approx(measured(workdir)[-1]["held_out/accuracy"])
  few = measure_images(load(str(workdir)), f"idx:{folder}@test", ImagesConfig(), batch_size=4)
  assert few["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


@pytest.mark.parametrize(
  "images, message",
  [(dict(flip=True), "reads data.images.flip=False, this one True"), (dict(std=(0.4,)), "std=.0.5,., this one .0.4")],
)
def test_a_run_does_not_resume_with_images_that_are_changed_otherwise(images, message, folder, finished):
  with pytest.raises(ValueError, match=message):
    train(config(folder, **images), str(finished[0]))


@pytest.mark.parametrize(
  "module, arguments, message",
  [
    ("generate", ["--prompt=a"], "this run reads images; it has no tokenizer, and its model generates no text"),
    ("evaluate", ["--images=idx:{}@test", "--tasks=piqa"], "--images: measures a run on images; give its --workdir"),
  ],
)
def test_what_a_run_on_images_cannot_do_is_one_line(module, arguments, message, folder, finished):
  arguments = [argument.format(folder) for argument in arguments]
  code, _, lines = call(module, f"--workdir={finished[0]}", *arguments)
  assert code == 2 and len(lines) == 1 and message in lines[0]
