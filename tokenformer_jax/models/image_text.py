"""A dual encoder: images and texts as vectors of one space, in which those of a pair are near each other."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.config.image_text import ImageTextConfig
from tokenformer_jax.models.text_encoder import TextEncoder
from tokenformer_jax.models.vision_classifier import VisionEncoder
from tokenformer_jax.nn.initializers import STD
from tokenformer_jax.nn.parameters import parameter
from tokenformer_jax.nn.projection import Dense

# The initial log of the scale and the initial bias, by loss: those of the papers.
_START = {"softmax": (math.log(1 / 0.07), 0.0), "sigmoid": (math.log(10.0), -10.0)}
_LARGEST_SCALE = 100.0  # CLIP's bound, beyond which training becomes unstable.


class ImageTextModel(nnx.Module):
  """Two encoders with a projection each, whose vectors are scaled to length 1.

  The score of an image and a text is scale · cos + bias; the scale is exp of a trained number and at most 100, and
  `softmax` has no bias. Both towers grow as other models do: `tf.grow(model, {"image/blocks/ffn": 2048})`.

  Args:
    config: the towers and the space, which the model keeps as `model.config`.
    rngs: parameters are drawn from `rngs.params()`.
  """

  bias: nnx.Param | None = None

  def __init__(self, config: ImageTextConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.image = VisionEncoder(config.image, rngs=rngs)
    self.text = TextEncoder(config.text, rngs=rngs)

    def projection(tower):
      channels = tower.classifier.pooler_size or tower.hidden_size
      normal = nnx.initializers.normal(STD if tower.classifier.pooler_size else channels**-0.5)
      return Dense(channels, config.size, axes=("embed", None), bias=False, init=normal, rngs=rngs)

    self.image_projection, self.text_projection = projection(config.image), projection(config.text)
    log_scale, bias = _START[config.loss]
    self.log_scale = parameter(rngs, (), (), nnx.initializers.constant(log_scale), decayed=False)
    if config.loss == "sigmoid":
      self.bias = parameter(rngs, (), (), nnx.initializers.constant(bias), decayed=False)

  def __call__(
    self,
    images: Float[Array, "batch height width channel"],
    tokens: Int[Array, "texts time"],
    real: Bool[Array, "texts time"] | None = None,
  ) -> Float[Array, "batch texts"]:
    """Float32 scores [images, texts]; see `of_images` and `of_texts` for the arguments."""
    return self.scale() * self.of_images(images) @ self.of_texts(tokens, real).T + self.offset()

  def of_images(self, images: Float[Array, "batch height width channel"]) -> Float[Array, "batch shared"]:
    """Float32 vectors of length 1 [B, size] of normalised images [B, H, W, C]."""
    return _normalised(self.image_projection(self.image(images)))

  def of_texts(
    self, tokens: Int[Array, "batch time"], real: Bool[Array, "batch time"] | None = None
  ) -> Float[Array, "batch shared"]:
    """Float32 vectors of length 1 [B, size] of texts.

    Args:
      tokens: ids [B, T] whose first one, such as [CLS], is the same in all texts: the vector is made of its output.
      real: which tokens are not padding, by default all.
    """
    return _normalised(self.text_projection(self.text(tokens, real)))

  def scale(self) -> Float[Array, ""]:
    """The factor of cosines in scores, which is the inverse of the temperature."""
    return jnp.minimum(jnp.exp(self.log_scale[...]), _LARGEST_SCALE)

  def offset(self) -> Float[Array, ""]:
    """What is added to the scores."""
    return jnp.float32(0.0) if self.bias is None else self.bias[...]


def _normalised(x: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
