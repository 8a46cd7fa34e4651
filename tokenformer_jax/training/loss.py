"""Next-token cross entropy and its gradient, computed without an array of all logits, on any mesh."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tokenformer_jax.distributed.axes import per_device, splits
from tokenformer_jax.kernels.products import sum_dtype
from tokenformer_jax.training.loss_chunks import LossSums, sums_by_chunks

# Tokens whose logits exist at once on a device. With 50,304 entries their float32 logits take 206 MB. The gradient of
# the table is read and written once a chunk, which on a v5e takes less time than the products with it; at about 1,000
# tokens the two would take equally long.
CHUNK = 1024


def loss_sums(
  hidden: Float[Array, "batch time embed"],
  table: Float[Array, "vocab embed"],
  labels: Int[Array, "batch time"],
  weights: Float[Array, "batch time"] | None = None,
  z_loss: float = 0.0,
  chunk: int = CHUNK,
) -> tuple[Float[Array, ""], LossSums]:
  """The loss of the logits hidden · tableᵀ, summed over tokens.

  Logits exist for `chunk` tokens at a time. Where a gradient is asked for, it is computed together with the loss, chunk
  by chunk, so that no product is computed twice. Sums are at least float32.

  Args:
    hidden: outputs of the model's last layer.
    table: the output embedding.
    labels: the next token of every position.
    weights: weight of every position; None counts each as 1.
    z_loss: coefficient of the z-loss.
    chunk: tokens whose logits exist at once on a device.

  Returns:
    (nats + z_loss · z, the sums); only the first has a gradient, with respect to `hidden` and `table`.
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
  """`sums_by_chunks` of each device's tokens and its part of the vocabulary, summed over devices after all chunks."""
  rows, vocab = (*splits("batch", labels.shape[0]), *splits("time", labels.shape[1])), splits("vocab", table.shape[0])
  token_spec = PartitionSpec(splits("batch", labels.shape[0]) or None, splits("time", labels.shape[1]) or None)
  table_spec = PartitionSpec(vocab or None, None)

  def local(hidden, table, labels, weights):
    flat = (hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), weights.reshape(-1))
    sums, gradients = sums_by_chunks(flat, table, z_loss, chunk, vocab, with_gradients)
    if with_gradients:
      d_hidden, d_table = gradients
      gradients = (
        jax.lax.psum(d_hidden, vocab).reshape(hidden.shape),
        jax.lax.psum(d_table, rows).astype(table.dtype),
      )
    return LossSums(*jax.lax.psum(tuple(sums), rows)), gradients

  whole = PartitionSpec()
  return per_device(
    local,
    (token_spec, table_spec, token_spec, token_spec),
    (LossSums(whole, whole, whole), (token_spec, table_spec) if with_gradients else ()),
  )(hidden, table, labels, weights)
