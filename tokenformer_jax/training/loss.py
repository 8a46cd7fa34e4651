"""Next-token cross entropy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LossSums(NamedTuple):
  """Sums over tokens, so that batches and micro-batches add up exactly.

  Attributes:
    nats: weighted sum of −log p(label).
    z: weighted sum of log² Σ exp(logits), the z-loss before its coefficient.
    weight: sum of the weights; the number of tokens where nothing is masked.
  """

  nats: Float[Array, ""]
  z: Float[Array, ""]
  weight: Float[Array, ""]


def loss_sums(logits: Float[Array, "batch time vocab"], labels: Int[Array, "batch time"],
              weights: Float[Array, "batch time"] | None = None) -> LossSums:
  """Sums of cross entropy (nats) and of squared log-normalisers over a batch, in float32."""
  log_normaliser = jax.nn.logsumexp(logits, axis=-1)
  label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  if weights is None:
    weights = jnp.ones(labels.shape, jnp.float32)
  return LossSums(nats=jnp.sum(weights * (log_normaliser - label_logits)),
                  z=jnp.sum(weights * jnp.square(log_normaliser)),
                  weight=jnp.sum(weights))
