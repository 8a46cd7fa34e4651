"""Next-token cross entropy, and its gradient without an array of all logits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tokenformer_jax.distributed.axes import per_device, splits
from tokenformer_jax.kernels.products import sum_dtype

# Tokens whose logits exist at once on a device. At 50,304 entries their float32 logits are 206 MB, and the table's
# gradient, read and written once a chunk, takes less time than the products with it on a v5e (1,000 would be even).
CHUNK = 1024


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


def loss_sums(
  hidden: Float[Array, "batch time embed"],
  table: Float[Array, "vocab embed"],
  labels: Int[Array, "batch time"],
  weights: Float[Array, "batch time"] | None = None,
  z_loss: float = 0.0,
  chunk: int = CHUNK,
) -> tuple[Float[Array, ""], LossSums]:
  """(nats + z_loss · z, its parts) of the logits hidden · tableᵀ, at least in float32.

  Logits exist for `chunk` tokens at a time. Where a gradient is asked for it is computed with the loss, chunk by
  chunk, so that no product is done twice. It is that of the first result, by `hidden` and `table`.
  """
  if weights is None:
    weights = jnp.ones(labels.shape, sum_dtype(hidden.dtype))
  total, sums = _loss(hidden, table, labels, weights, z_loss, chunk)
  return total, jax.lax.stop_gradient(sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss(hidden, table, labels, weights, z_loss, chunk):
  sums, _ = _on_mesh(hidden, table, labels, weights, z_loss, chunk, False)
  return sums.nats + z_loss * sums.z, sums


def _loss_and_gradients(hidden, table, labels, weights, z_loss, chunk):
  sums, gradients = _on_mesh(hidden, table, labels, weights, z_loss, chunk, True)
  return (sums.nats + z_loss * sums.z, sums), gradients


def _scaled_gradients(z_loss, chunk, gradients, cotangents):
  del z_loss, chunk
  return *((cotangents[0] * g.astype(cotangents[0].dtype)).astype(g.dtype) for g in gradients), None, None


_loss.defvjp(_loss_and_gradients, _scaled_gradients)


def _on_mesh(hidden, table, labels, weights, z_loss, chunk, with_gradients):
  """`_by_chunks` of each device's tokens and its part of the vocabulary, added up once after all chunks."""
  rows, vocab = (*splits("batch", labels.shape[0]), *splits("time", labels.shape[1])), splits("vocab", table.shape[0])
  by_token = PartitionSpec(splits("batch", labels.shape[0]) or None, splits("time", labels.shape[1]) or None)
  by_entry = PartitionSpec(vocab or None, None)

  def local(hidden, table, labels, weights):
    flat = (hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), weights.reshape(-1))
    sums, gradients = _by_chunks(flat, table, z_loss, chunk, vocab, with_gradients)
    if with_gradients:
      by_hidden, by_table = gradients
      gradients = (
        jax.lax.psum(by_hidden, vocab).reshape(hidden.shape),
        jax.lax.psum(by_table, rows).astype(table.dtype),
      )
    return LossSums(*jax.lax.psum(tuple(sums), rows)), gradients

  whole = PartitionSpec()
  return per_device(
    local,
    (by_token, by_entry, by_token, by_token),
    (LossSums(whole, whole, whole), (by_token, by_entry) if with_gradients else ()),
  )(hidden, table, labels, weights)


def _by_chunks(tokens, table, z_loss, chunk, vocab, with_gradients):
  """Sums over tokens (hidden [M, d], labels [M], weights [M]); gradients by hidden, and by `table` in float32.

  Args:
    vocab: mesh axes that split the vocabulary; the gradient by hidden is this part's.
  """
  num_tokens, wide = tokens[0].shape[0], sum_dtype(tokens[0].dtype)
  num_chunks = -(-num_tokens // chunk)
  size = -(-num_tokens // num_chunks)
  padding = num_chunks * size - num_tokens  # Of weight 0.
  chunks = [
    jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)).reshape(num_chunks, size, *a.shape[1:]) for a in tokens
  ]
  table_VxD = table.astype(tokens[0].dtype)
  first = jax.lax.axis_index(vocab) * table.shape[0] if vocab else 0

  def add_chunk(carry, tokens):
    sums, by_table = carry
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
      return (sums, by_table), ()
    by_exp_C = weights_C * (1.0 + 2.0 * z_loss * log_z_C) / sum_C
    by_logits_CxV = exp_CxV * by_exp_C[:, None] - jnp.where(is_label_CxV, weights_C[:, None], 0.0)
    by_logits_CxV = by_logits_CxV.astype(hidden_CxD.dtype)
    by_hidden_CxD = jnp.matmul(by_logits_CxV, table_VxD, preferred_element_type=wide).astype(hidden_CxD.dtype)
    return (sums, by_table + jnp.matmul(by_logits_CxV.T, hidden_CxD, preferred_element_type=wide)), by_hidden_CxD

  zeros = (LossSums(*jnp.zeros(3, wide)), jnp.zeros(table.shape, wide) if with_gradients else ())
  (sums, by_table), by_hidden = jax.lax.scan(add_chunk, zeros, chunks)
  return sums, (by_hidden.reshape(-1, table.shape[1])[:num_tokens], by_table) if with_gradients else ()
