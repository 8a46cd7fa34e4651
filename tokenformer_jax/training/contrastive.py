"""Contrastive losses of images and texts over the pairs of a whole batch, which devices share.

Each device scores its own images with all texts, [B / devices, B]. The texts' vectors are gathered once; of the sums over
images that the other direction needs, one number for each text is sent.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tokenformer_jax.config.image_text import CONTRASTIVE_LOSSES
from tokenformer_jax.config.validation import require_choice
from tokenformer_jax.distributed.axes import per_device, splits
from tokenformer_jax.training.objective import ClassSums, Objective


class PairBatch(NamedTuple):
  """Images with their texts.

  Attributes:
    images: float32 [B, height, width, channels], normalised.
    tokens: int32 [B, T].
    segments: int32 [B, T], 1 for the tokens of a text and 0 for padding.
    meanings: int32 [B], see `contrastive_loss`.
  """

  images: jax.Array
  tokens: jax.Array
  segments: jax.Array
  meanings: jax.Array


def contrastive_loss(
  images: Float[Array, "batch shared"],
  texts: Float[Array, "batch shared"],
  scale: Float[Array, ""],
  bias: Float[Array, ""],
  meanings: Int[Array, "batch"] | None = None,
  kind: str = "softmax",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """(the mean loss of an image or text, the share of images whose nearest text of the batch is theirs)::

      softmax   half the mean over images of −log softmax(scores of all texts) at its texts, averaged over these, and half
                the same over texts
      sigmoid   the mean over images of −Σ log σ(± score) over all texts, with + for its texts

  On a mesh the batch is the one of all devices, and the loss is that of one device with all pairs.

  Args:
    images, texts: vectors of length 1; row i of both is a pair.
    scale, bias: the score of an image and a text is scale · cos + bias.
    meanings: a number for each pair. Texts of pairs with an equal number belong to an image as its own text does; None
      is a meaning of its own for each pair.
    kind: one of the above.
  """
  require_choice("kind", kind, CONTRASTIVE_LOSSES)
  if meanings is None:
    meanings = jnp.arange(len(images))
  axes = splits("batch", len(images))

  def local(images, texts, meanings, scale, bias):
    texts, others = (jax.lax.all_gather(a, axes, tiled=True) if axes else a for a in (texts, meanings))
    scores_bxB = scale * jnp.matmul(images, texts.T, preferred_element_type=jnp.float32) + bias
    is_pair_bxB = meanings[:, None] == others[None, :]
    hits = jnp.sum(jnp.take_along_axis(is_pair_bxB, jnp.argmax(scores_bxB, axis=1)[:, None], axis=1))
    if kind == "sigmoid":
      loss = -jnp.sum(jax.nn.log_sigmoid(jnp.where(is_pair_bxB, scores_bxB, -scores_bxB)))
      loss, hits = jax.lax.psum((loss, hits), axes)
      return loss / texts.shape[0], hits / texts.shape[0]
    # Each image and each text spreads a weight of 1 over its pairs; by symmetry both have as many.
    weights_bxB = is_pair_bxB / jnp.sum(is_pair_bxB, axis=1, keepdims=True)
    largest_B = jax.lax.pmax(jnp.max(jax.lax.stop_gradient(scores_bxB), axis=0), axes)
    sums_B = jax.lax.psum(jnp.sum(jnp.exp(scores_bxB - largest_B[None]), axis=0), axes)
    # Every device has all of the sums over images and counts its share of them.
    of_texts = jnp.sum(largest_B + jnp.log(sums_B)) * (images.shape[0] / texts.shape[0])
    of_images = jnp.sum(jax.nn.logsumexp(scores_bxB, axis=1))
    loss = 0.5 * (of_images + of_texts) - jnp.sum(weights_bxB * scores_bxB)
    loss, hits = jax.lax.psum((loss, hits), axes)
    return loss / texts.shape[0], hits / texts.shape[0]

  rows, whole = PartitionSpec(axes or None), PartitionSpec()
  return per_device(local, (rows, rows, rows, whole, whole), (whole, whole))(images, texts, meanings, scale, bias)


def _pairs(model, batch: PairBatch, z_loss: float, training: bool):
  """The loss of an `ImageTextModel`; every micro-batch has pairs of its own."""
  del z_loss, training
  images, texts = model.of_images(batch.images), model.of_texts(batch.tokens, batch.segments > 0)
  loss, hits = contrastive_loss(images, texts, model.scale(), model.offset(), batch.meanings, kind=model.config.loss)
  rows = jnp.float32(len(batch.meanings))
  return loss * rows, ClassSums(*jax.lax.stop_gradient((loss * rows, hits * rows, rows))), {}


CONTRASTIVE = Objective(_pairs, ClassSums, "nats a pair")  # For `make_train_step`.
