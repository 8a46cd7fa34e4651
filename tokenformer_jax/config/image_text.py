"""A pair of encoders, of images and of texts, with a space that both share."""

import dataclasses

from tokenformer_jax.config.model import ModelConfig
from tokenformer_jax.config.validation import Checked, require, require_choice

CONTRASTIVE_LOSSES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class ImageTextConfig(Checked):
  """Two towers and the losses that pull the vectors of a pair together (`models/image_text.py`).

  Attributes:
    image, text: the towers, any presets with `task='encode'`: `ModelConfig.named("mini", "vit", task="encode", …)`.
    size: channels of the shared space.
    loss: `softmax`, CLIP's (arXiv 2103.00020), or `sigmoid`, SigLIP's (arXiv 2303.15343), of all pairs of a batch.
  """

  image: ModelConfig
  text: ModelConfig
  size: int = 128
  loss: str = "softmax"

  def validate(self) -> None:
    for name, tower, needs_images in (("image", self.image, True), ("text", self.text, False)):
      require(tower.task == "encode", f"{name}.task", tower.task, "a tower has no head; choose 'encode'.")
      size = tower.vision.image_size
      way_out = "give the size of the images." if needs_images else "this tower reads texts; choose 0."
      require((size > 0) == needs_images, f"{name}.vision.image_size", size, way_out)
    require(self.size >= 1, "size", self.size, "must be at least 1.")
    require_choice("loss", self.loss, CONTRASTIVE_LOSSES)
