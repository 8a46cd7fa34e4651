"""The accuracy of a classifier of images on images with labels."""

import os
from typing import Any

import jax
from flax import nnx

from tokenformer_jax.config import DataConfig, ImagesConfig
from tokenformer_jax.config.data import MAIN_HELD_OUT
from tokenformer_jax.data.image_dataset import open_image_data
from tokenformer_jax.evaluation.report import Metrics
from tokenformer_jax.models.vision_classifier import VisionClassifier
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.paths import user_path
from tokenformer_jax.training.checkpoints import load
from tokenformer_jax.training.objective import classes, measures, summed
from tokenformer_jax.training.resume import stored_config


def measure_images(model: VisionClassifier, source: str, images: ImagesConfig, batch_size: int = 128) -> Metrics:
  """Measures a classifier on all images of a source, without random changes.

  Args:
    model: the model.
    source: the spec of the images, such as `folder:FOLDER` or `tfds:NAME@SPLIT`.
    images: how images become inputs; its `mean`, `std`, `resize` and `bad_image` count.
    batch_size: images in one forward pass.

  Returns:
    `loss`, nats an image; `accuracy`, the share of the images whose most likely class is their label; `images`, their
    number without those that could not be read.

  Raises:
    ValueError: another kind of model, or a source that cannot be used.
  """
  if not isinstance(model, VisionClassifier):
    raise ValueError(f"model is a {type(model).__name__}, which reads texts: expected a VisionClassifier.")
  config = DataConfig(source=source, held_out_source=source, batch_size=batch_size, images=images)
  batches = open_image_data(config, model.config.vision).named_held_out_batches()[MAIN_HELD_OUT]
  graphdef, *leaves = split(model)

  @jax.jit
  def sums(leaves, batch):
    return classes(nnx.merge(graphdef, *leaves), batch, 0.0, False)[1]

  total = summed([jax.device_get(sums(leaves, batch)) for batch in batches])
  return {**measures(model.config, total), "images": int(total.weight)}


def measure_image_run(
  workdir: str | os.PathLike, source: str, step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> Metrics:
  """`measure_images` of the model of a run, whose configuration says how images become inputs.

  Args:
    workdir: the work folder of the run.
    source: the spec of the images.
    step: the checkpoint; by default the newest.
    mesh: where the parameters go, as `load` takes it.
  """
  folder = os.fspath(user_path(workdir, "workdir"))
  model: Any = load(folder, step, mesh)
  return measure_images(model, source, stored_config(folder).data.images)
