"""Cross entropy, z-loss and their gradients for the tokens of one device, whose logits exist a chunk at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenformer_jax.kernels.products import sum_dtype


class LossSums(NamedTuple):
  """Sums over tokens, so that the sums of batches and of micro-batches can be added exactly.

  Attributes:
    nats: weighted sum of −log p(label).
    z: weighted sum of log² Σ exp(logits), the z-loss before its coefficient.
    weight: sum of the weights; the number of tokens where nothing is masked.
  """

  nats: Float[Array, ""]
  z: Float[Array, ""]
  weight: Float[Array, ""]


def sums_by_chunks(
  tokens: tuple[jax.Array, jax.Array, jax.Array],
  table: jax.Array,
  z_loss: float,
  chunk: int,
  vocab: tuple[str, ...],
  with_gradients: bool,
) -> tuple[LossSums, tuple]:
  """The sums over tokens and, if asked for, the gradient of nats + z_loss · z.

  Args:
    tokens: (hidden [M, d], labels [M], weights [M]).
    table: this device's part of the output embedding [V, d].
    z_loss: coefficient of the z-loss.
    chunk: tokens whose logits exist at once.
    vocab: the mesh axes that split the vocabulary.
    with_gradients: whether gradients are computed.

  Returns:
    (the sums, of all parts of the vocabulary; the gradients or ()). The gradients are d_hidden [M, d] from this part
    of the vocabulary, in the dtype of `hidden`, and d_table [V, d], at least float32.
  """
  num_tokens, wide = tokens[0].shape[0], sum_dtype(tokens[0].dtype)
  num_chunks = -(-num_tokens // chunk)
  size = -(-num_tokens // num_chunks)
  padding = num_chunks * size - num_tokens  # Padded tokens have weight 0.
  chunks = [
    jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)).reshape(num_chunks, size, *a.shape[1:]) for a in tokens
  ]
  table_VxD = table.astype(tokens[0].dtype)
  first = jax.lax.axis_index(vocab) * table.shape[0] if vocab else 0

  def add_chunk(carry, tokens):
    sums, d_table = carry
    hidden_CxD, labels_C, weights_C = tokens
    logits_CxV = jnp.matmul(hidden_CxD, table_VxD.T, preferred_element_type=wide)
    is_label_CxV = (labels_C - first)[:, None] == jax.lax.broadcasted_iota(labels_C.dtype, logits_CxV.shape, 1)
    largest_C = jax.lax.pmax(jnp.max(logits_CxV, axis=1), vocab)
    exp_CxV = jnp.exp(logits_CxV - largest_C[:, None])
    sum_C, label_C = jax.lax.psum(
      (jnp.sum(exp_CxV, axis=1), jnp.sum(jnp.where(is_label_CxV, logits_CxV, 0.0), axis=1)), vocab
    )
    log_z_C = largest_C + jnp.log(sum_C)
    sums = LossSums(
      sums.nats + jnp.sum(weights_C * (log_z_C - label_C)),
      sums.z + jnp.sum(weights_C * jnp.square(log_z_C)),
      sums.weight + jnp.sum(weights_C),
    )
    if not with_gradients:
      return (sums, d_table), ()
    d_exp_C = weights_C * (1.0 + 2.0 * z_loss * log_z_C) / sum_C
    d_logits_CxV = exp_CxV * d_exp_C[:, None] - jnp.where(is_label_CxV, weights_C[:, None], 0.0)
    d_logits_CxV = d_logits_CxV.astype(hidden_CxD.dtype)
    d_hidden_CxD = jnp.matmul(d_logits_CxV, table_VxD, preferred_element_type=wide).astype(hidden_CxD.dtype)
    return (sums, d_table + jnp.matmul(d_logits_CxV.T, hidden_CxD, preferred_element_type=wide)), d_hidden_CxD

  zeros = (LossSums(*jnp.zeros(3, wide)), jnp.zeros(table.shape, wide) if with_gradients else ())
  (sums, d_table), d_hidden = jax.lax.scan(add_chunk, zeros, chunks)
  return sums, (d_hidden.reshape(-1, table.shape[1])[:num_tokens], d_table) if with_gradients else ()
