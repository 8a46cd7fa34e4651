"""Vision transformers (arXiv 2010.11929) of the parts that their configuration describes: vectors and classes of images."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.models.positions import WithPositions
from tokenformer_jax.models.text_encoder import make_pooler
from tokenformer_jax.nn.block import Said
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.initializers import STD
from tokenformer_jax.nn.norm import Norm
from tokenformer_jax.nn.parameters import parameter
from tokenformer_jax.nn.projection import Dense
from tokenformer_jax.nn.stack import Apply, make_blocks, mean_over_layers, run_block, through_blocks


class VisionEncoder(WithPositions, nnx.Module):
  """Patches as tokens, `num_layers` blocks under one scan, a final norm, and a vector h: the mean or a class token's.

  Where `config.classifier.pooler_size` is set, the vector is tanh(h W + b).

  Parameters are float32; products run in `config.compute_dtype`, sums in float32 or wider.

  Args:
    config: sizes and choices, which the model keeps as `model.config`; `config.vision` describes the images.
    rngs: parameters are drawn from `rngs.params()`.
  """

  class_token: nnx.Param | None = None
  pooler: Dense | None = None

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    part, size, normal = config.vision, config.hidden_size, nnx.initializers.normal(STD)
    pixels = part.patch_size**2 * part.channels
    self.patches = Dense(pixels, size, axes=(None, "embed"), bias=True, init=nnx.initializers.lecun_normal(), rngs=rngs)
    if part.pool == "class_token":
      self.class_token = parameter(rngs, (size,), ("embed",), normal, decayed=False)
    self.make_positions(rngs)
    self.embedding_norm = Norm(config.embedding_norm, size, config.norm_epsilon, rngs=rngs)
    self.first, self.blocks = make_blocks(config, rngs=rngs)
    self.final_norm = Norm(config.final_norm, size, config.norm_epsilon, rngs=rngs)
    self.pooler = make_pooler(config, rngs=rngs)

  def __call__(self, images: Float[Array, "batch height width channel"]) -> Float[Array, "batch pooled"]:
    """Float32 vectors [B, channels] of normalised images [B, H, W, C].

    Raises:
      ValueError: images of another size or number of channels than the model's.
    """
    return self.pooled(self.hidden(images)[0])

  def hidden(
    self, images: Float[Array, "batch height width channel"], training: bool = False
  ) -> tuple[Float[Array, "batch time embed"], Said]:
    """(outputs of the final norm [B, T, d], what the blocks say beside them); see a call of the model.

    Args:
      images: normalised images [B, H, W, C].
      training: whether routers may drop tokens, as they do in training.
    """

    hidden, said = self.through_layers(run_block, images, training)
    return hidden, mean_over_layers(said)

  def through_layers(
    self, apply: Apply, images: Float[Array, "batch height width channel"], training: bool = False
  ) -> tuple[Float[Array, "batch time embed"], dict]:
    """As `LanguageModel.through_layers`, for images."""
    x_BxTxD = self.embed(images)
    positions = jnp.arange(x_BxTxD.shape[1])[None]
    context = Context(positions, self.rotation(positions), causal=False, training=training)
    x_BxTxD, observed = through_blocks(self.first, self.blocks, x_BxTxD, context, self.config, apply)
    return self.final_norm(x_BxTxD), observed

  def embed(self, images: Float[Array, "batch height width channel"]) -> Float[Array, "batch time embed"]:
    """The class token, where there is one, and the patches row by row, with their positions [B, T, d]."""
    part, dtype = self.config.vision, self.config.compute_dtype
    expected = (part.image_size, part.image_size, part.channels)
    if images.shape[1:] != expected:
      raise ValueError(
        f"images {images.shape}: expected [batch, {', '.join(map(str, expected))}], height, width, channels."
      )
    side, p = part.image_size // part.patch_size, part.patch_size
    x = images.astype(dtype).reshape(-1, side, p, side, p, part.channels).swapaxes(2, 3)
    x_BxTxD = self.patches(x.reshape(len(images), side**2, -1))
    if self.class_token is not None:
      token = jnp.broadcast_to(self.class_token[...].astype(dtype), (len(images), 1, x_BxTxD.shape[-1]))
      x_BxTxD = jnp.concatenate([token, x_BxTxD], axis=1)
    return self.embedding_norm(self.placed(x_BxTxD, jnp.arange(x_BxTxD.shape[1])[None]))

  def pooled(self, hidden: Float[Array, "batch time embed"]) -> Float[Array, "batch pooled"]:
    """Float32 vectors [B, channels] from the outputs of the final norm [B, T, d]."""
    wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    h = jnp.mean(wide, axis=1) if self.class_token is None else wide[:, 0]
    return h if self.pooler is None else jnp.tanh(self.pooler(h))


class VisionClassifier(VisionEncoder):
  """A `VisionEncoder` with a head of classes, h W + b, which `config.vision` describes."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    normal, classes = nnx.initializers.normal(STD), config.vision.num_classes
    self.classes = Dense(config.hidden_size, classes, axes=("embed", None), bias=True, init=normal, rngs=rngs)

  def __call__(self, images: Float[Array, "batch height width channel"]) -> Float[Array, "batch class"]:
    """Float32 logits [B, classes] of normalised images [B, H, W, C]; see `VisionEncoder`."""
    return self.logits(self.hidden(images)[0])

  def logits(self, hidden: Float[Array, "batch time embed"]) -> Float[Array, "batch class"]:
    """Float32 logits [B, classes] from the outputs of the final norm [B, T, d]."""
    return self.classes(self.pooled(hidden))
