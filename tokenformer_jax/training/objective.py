"""What a model is trained for: the loss of a batch for each task, and what an evaluation reads from its sums."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.nn.block import Said
from tokenformer_jax.training.loss import LossSums, loss_sums


class ClassSums(NamedTuple):
  """Sums over examples, so that the sums of batches and of micro-batches can be added exactly.

  Attributes:
    nats: weighted sum of the cross entropy; of a regression, of the squared error.
    right: weighted number of examples whose most likely class is the label's; 0 for a regression.
    weight: sum of the weights; the number of examples.
  """

  nats: Float[Array, ""]
  right: Float[Array, ""]
  weight: Float[Array, ""]


class Objective(NamedTuple):
  """The loss of one task.

  Attributes:
    loss: `(model, batch, z_loss, training) -> (loss summed over the batch, sums, what the blocks say)`; only the first
      has a gradient.
    sums: the type of the sums, which have a field `nats`, the loss without its z-loss, and a field `weight`.
    unit: what the mean loss is measured in.
  """

  loss: Callable[[Any, Any, float, bool], tuple[Float[Array, ""], Any, Said]]
  sums: type[LossSums] | type[ClassSums]
  unit: str

  def zeros(self) -> LossSums | ClassSums:
    return self.sums(*jnp.zeros(len(self.sums._fields)))


def objective_of(config: ModelConfig) -> Objective:
  """The objective of a model's task.

  Raises:
    ValueError: the task has none.
  """
  if config.task not in _OBJECTIVES:
    raise ValueError(
      f"model.task={config.task!r}: it has no loss of its own; choose one of {', '.join(_OBJECTIVES)}, or see "
      "training/contrastive.py."
    )
  return _REGRESSION if is_regression(config) else _OBJECTIVES[config.task]


def is_regression(config: ModelConfig) -> bool:
  """Whether the model gives a number for each example instead of a class."""
  return config.task == "classify" and not config.reads_images and config.classifier.num_classes == 1


def measures(config: ModelConfig, sums: LossSums | ClassSums) -> dict[str, float]:
  """The mean loss, and beside it the accuracy of a classifier or the perplexity of a language model.

  Args:
    config: the model.
    sums: numbers, summed over batches.
  """
  loss = float(sums.nats / sums.weight)
  if isinstance(sums, ClassSums):
    return {"loss": loss} if is_regression(config) else {"loss": loss, "accuracy": float(sums.right / sums.weight)}
  return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))} if config.is_causal else {"loss": loss}


def next_token(model, batch, z_loss: float, training: bool):
  """The cross entropy of each token's successor in a `data.Batch`."""
  real = None if batch.segments is None else batch.segments > 0
  hidden, said = model.hidden(batch.inputs, batch.positions, batch.segments, real, training)
  return *loss_sums(hidden, model.table(), batch.labels, batch.weights, z_loss), said


def masked_tokens(model, batch, z_loss: float, training: bool):
  """The cross entropy of the masked tokens of a `data.MaskedBatch`, whose hidden states alone become logits."""
  real = None if batch.segments is None else batch.segments > 0
  hidden, said = model.hidden(batch.inputs, batch.positions, batch.segments, real, training)
  chosen_BxMxD = jnp.take_along_axis(hidden, batch.places[..., None], axis=1)
  chosen_BxMxD, table = model.factors(chosen_BxMxD)
  return *loss_sums(chosen_BxMxD, table, batch.labels, batch.weights, z_loss), said


def classes(model, batch, z_loss: float, training: bool):
  """The cross entropy of each class of a `data.ClassBatch`, or the squared error of each number."""
  del z_loss
  logits, said = class_logits(model, batch, training)
  losses_B, right_B = class_losses(logits, batch.labels)
  weights_B = jnp.ones_like(losses_B) if batch.weights is None else batch.weights.astype(losses_B.dtype)
  total, weight = jnp.sum(weights_B * losses_B), jnp.sum(weights_B)
  return total, ClassSums(*jax.lax.stop_gradient((total, jnp.sum(weights_B * right_B), weight))), said


def class_logits(model, batch, training: bool) -> tuple[Float[Array, "batch class"], Said]:
  """(the logits of a `data.ClassBatch`, what the blocks say); types of tokens are for models that have two of them."""
  if batch.inputs.ndim > 2:
    hidden, said = model.hidden(batch.inputs, training=training)
  else:
    real = None if batch.segments is None else batch.segments > 0
    types = batch.types if model.config.token_types > 1 else None
    hidden, said = model.hidden(batch.inputs, real=real, training=training, types=types)
  return model.logits(hidden), said


def class_losses(
  logits: Float[Array, "batch class"], labels: Array
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
  """(the loss of each example, 1 where its most likely class is the label's and 0 elsewhere).

  Args:
    logits: one number for each class; a single one is a regression.
    labels: int [B], classes; float [B, classes], shares of classes, of which the largest is the label; or float [B],
      numbers of a regression.
  """
  if logits.shape[-1] == 1:
    return jnp.square(logits[:, 0] - labels), jnp.zeros_like(logits[:, 0])
  log_probabilities = jax.nn.log_softmax(logits)
  if labels.ndim == 1:
    losses = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
  else:
    losses, labels = -jnp.sum(labels * log_probabilities, axis=1), jnp.argmax(labels, axis=1)
  return losses, (jnp.argmax(logits, axis=1) == labels).astype(losses.dtype)


def summed(of_batches: list[LossSums] | list[ClassSums]) -> LossSums | ClassSums:
  """The sums of several batches, on the host, as one in float64."""
  return type(of_batches[0])(*np.asarray(of_batches, np.float64).sum(axis=0))


NEXT_TOKEN = Objective(next_token, LossSums, "nats a token")
_OBJECTIVES = {
  "next_token": NEXT_TOKEN,
  "masked_token": Objective(masked_tokens, LossSums, "nats a masked token"),
  "classify": Objective(classes, ClassSums, "nats an example"),
}
_REGRESSION = Objective(classes, ClassSums, "squared error")
