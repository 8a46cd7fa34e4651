"""How images become the inputs of a model: normalisation, and the random changes of training images."""

import dataclasses
from typing import Any

from tokenformer_jax.config.validation import Checked, require, require_choice

BAD_IMAGES = ("error", "skip")
_OF_TEXTS = ("tokenizer", "special_tokens", "packing", "bad_text")  # Fields of a DataConfig.


@dataclasses.dataclass(frozen=True)
class ImagesConfig(Checked):
  """What happens to an image before the model reads it. Everything but the first four fields is for training images.

  Pixels are numbers from 0 to 1, of which the model reads (pixel − mean) / std.

  Attributes:
    mean, std: of a pixel, one number for each channel, or one for all channels.
    resize: images are resized so that their shorter side has this many pixels, and their centre is cropped to the
      model's `image_size`; 0 reads images of exactly that size.
    bad_image: an image that cannot be read stops the run (`error`), or it is left out of the loss, and counted (`skip`).
    shift: the most pixels by which an image is moved, along each side; black moves in.
    smallest_crop: the smallest share of an image's area that a random crop, resized to `image_size`, takes, with a ratio
      of its sides from 3/4 to 4/3 (arXiv 1409.4842); 1 takes no random crops. It replaces `resize` in training.
    flip: whether half of the images are mirrored left to right.
    randaugment: the number of random operations on each image (RandAugment, arXiv 1909.13719); 0 is none.
    magnitude: their strength, up to 10.
    mixup: α of mixup (arXiv 1710.09412): images and labels become λ x + (1 − λ) x', λ ~ Beta(α, α); 0 is none.
    cutmix: α of cutmix (arXiv 1905.04899), where a rectangle of 1 − λ of the area comes from x'; 0 is none. Where both
      are given, each pair of images takes one of the two.
    label_smoothing: the share of a label that all classes have alike.
  """

  mean: tuple[float, ...] = (0.5,)
  std: tuple[float, ...] = (0.5,)
  resize: int = 0
  bad_image: str = "error"
  shift: int = 0
  smallest_crop: float = 1.0
  flip: bool = False
  randaugment: int = 0
  magnitude: float = 9.0
  mixup: float = 0.0
  cutmix: float = 0.0
  label_smoothing: float = 0.0

  def validate(self) -> None:
    require_choice("bad_image", self.bad_image, BAD_IMAGES)
    for field in ("mean", "std"):
      require(len(getattr(self, field)) >= 1, field, getattr(self, field), "give one number, or one a channel.")
    require(min(self.std) > 0, "std", self.std, "must be positive.")
    for field in ("resize", "shift", "randaugment", "mixup", "cutmix"):
      require(getattr(self, field) >= 0, field, getattr(self, field), "must not be negative.")
    require(0 < self.smallest_crop <= 1, "smallest_crop", self.smallest_crop, "must be in (0, 1]; 1 is no random crop.")
    require(0 <= self.magnitude <= 10, "magnitude", self.magnitude, "must be in [0, 10].")
    require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "must be in [0, 1).")

  @property
  def mixes(self) -> bool:
    """Whether pairs of images are mixed."""
    return self.mixup > 0 or self.cutmix > 0


def check_images(model: Any, data: Any) -> None:
  """Checks that a `DataConfig` fits a `ModelConfig`: fields for what the model does not read are at their defaults.

  Raises:
    ValueError: names the field, its value and the way out.
  """
  images, vision = data.images, model.vision
  unread, prefix, what = images, "images.", "images"
  fields = tuple(field.name for field in dataclasses.fields(images))
  if model.reads_images:
    unread, prefix, what, fields = data, "", "texts", _OF_TEXTS
  for field in fields:
    value, default = getattr(unread, field), type(unread).__dataclass_fields__[field].default
    way_out = (
      f"is for {what}, which a model with vision.image_size={vision.image_size} does not read; leave {default!r}."
    )
    require(value == default, f"data.{prefix}{field}", value, way_out)
  if model.reads_images:
    for field in ("mean", "std"):
      value, way_out = getattr(images, field), f"give one number, or vision.channels={vision.channels} numbers."
      require(len(value) in (1, vision.channels), f"data.images.{field}", value, way_out)
    way_out = f"must be at least vision.image_size={vision.image_size}, or 0."
    require(images.resize == 0 or images.resize >= vision.image_size, "data.images.resize", images.resize, way_out)
