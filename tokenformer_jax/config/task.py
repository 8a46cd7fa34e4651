"""What a model is for, and the parts that only some tasks have: images and heads of classes."""

import dataclasses
from typing import Any

from tokenformer_jax.config.validation import Checked, require, require_choice

TASKS = ("next_token", "masked_token", "classify", "encode")
POOLS = ("mean", "class_token")


@dataclasses.dataclass(frozen=True)
class VisionConfig(Checked):
  """A model of images, which are cut into square patches (arXiv 2010.11929).

  Attributes:
    image_size: height and width of the images in pixels; 0 is a model of text.
    patch_size: height and width of a patch; each one is a token.
    channels: of a pixel.
    num_classes: the number of classes of a classifier, 0 otherwise.
    pool: what the classes, or the vector of an image, are read from: the `mean` of all patches, or a `class_token` in front of them.
  """

  image_size: int = 0
  patch_size: int = 16
  channels: int = 3
  num_classes: int = 0
  pool: str = "mean"

  @property
  def num_tokens(self) -> int:
    """The tokens of an image: its patches and the class token."""
    return (self.image_size // self.patch_size) ** 2 + (self.pool == "class_token")

  def validate(self) -> None:
    require_choice("pool", self.pool, POOLS)
    require(self.patch_size >= 1, "patch_size", self.patch_size, "must be at least 1.")
    if self.image_size == 0:
      for field in ("patch_size", "channels", "num_classes", "pool"):
        default = type(self).__dataclass_fields__[field].default
        way_out = f"image_size=0 is a model of text; leave {default!r}, or give the size of the images."
        require(getattr(self, field) == default, field, getattr(self, field), way_out)
      return
    near = max(1, round(self.image_size / self.patch_size)) * self.patch_size
    why = f"must be a multiple of patch_size={self.patch_size}; the nearest is {near}."
    require(self.image_size > 0 and self.image_size % self.patch_size == 0, "image_size", self.image_size, why)
    require(self.channels >= 1, "channels", self.channels, "must be at least 1 for images.")


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(Checked):
  """The head of a classifier of texts: tanh(h₀ W + b) W' + b', where h₀ is the first token's output.

  Attributes:
    num_classes: the number of classes, or 1 for a regression; 0 is no such head.
    pooler_size: the number of channels between W and W'; 0 is the model's. With `task='encode'`, of texts or images, that
      of the vector tanh(h W + b); 0 is h itself.
  """

  num_classes: int = 0
  pooler_size: int = 0

  def validate(self) -> None:
    for field in ("num_classes", "pooler_size"):
      require(getattr(self, field) >= 0, field, getattr(self, field), "must not be negative.")


def check_task(config: Any) -> None:
  """Checks that a `ModelConfig` has what its task needs, and nothing else.

  Raises:
    ValueError: names the field, its value and the way out.
  """
  require_choice("task", config.task, TASKS)
  if config.reads_images:
    size = f"vision.image_size={config.vision.image_size}"
    why = f"{size}: images are classified or encoded; choose 'classify' or 'encode'."
    require(config.task in ("classify", "encode"), "task", config.task, why)
    classes, needs_classes = config.vision.num_classes, config.task == "classify"
    way_out = (
      "must be at least 1 for a classifier of images." if needs_classes else "task='encode' has no classes; give 0."
    )
    require((classes >= 1) == needs_classes, "vision.num_classes", classes, way_out)
    require(config.vocab_size == 0, "vocab_size", config.vocab_size, f"{size}: images have no vocabulary; choose 0.")
    tokens = config.vision.num_tokens
    require(config.seq_length == tokens, "seq_length", config.seq_length, f"{size}: an image has {tokens} tokens.")
  else:
    require(config.vocab_size >= 1, "vocab_size", config.vocab_size, "must be at least 1.")
  needs_head, classes = config.task == "classify" and not config.reads_images, config.classifier.num_classes
  way_out = "a classifier of texts needs at least 1, and one of images has vision.image_size."
  if not needs_head:
    way_out = "only task='classify' of texts has this head; leave 0."
  require((classes >= 1) == needs_head, "classifier.num_classes", classes, way_out)
  pooler, has_pooler = config.classifier.pooler_size, needs_head or config.task == "encode"
  way_out = f"task={config.task!r} has no pooler; only 'encode' and a classifier of texts have; leave 0."
  require(pooler == 0 or has_pooler, "classifier.pooler_size", pooler, way_out)
  if config.task in ("classify", "encode"):
    require(config.tied, "tied", config.tied, f"task={config.task!r} has no logits of tokens; leave True.")
  reads_text = not (config.is_causal or config.reads_images)
  require(config.token_types >= 0, "token_types", config.token_types, "must not be negative; 0 is none.")
  way_out = "only an encoder of texts tells kinds of tokens apart; leave 0."
  require(config.token_types == 0 or reads_text, "token_types", config.token_types, way_out)
  way_out = "only task='masked_token' has such logits; leave False."
  require(config.task == "masked_token" or not config.transform, "transform", config.transform, way_out)
  is_routed = config.depth.capacity < 1.0
  way_out = f"task={config.task!r}: an encoder's tokens all go through every block; leave 1.0."
  require(config.is_causal or not is_routed, "depth.capacity", config.depth.capacity, way_out)
