"""Pattention for TPUs whose scores [rows, N] never exist as a whole, forward or backward.

The kernels (`pattention_kernels`) compute the scores of a block of rows in fast memory. The backward pass computes the
scores again, so it takes five matrix products where the reference takes four, and saves the memory for the scores that
the reference keeps. On a mesh each device computes its own rows. Where the tokens are split over devices, the same is
done in plain JAX by chunks of rows, because the sums inside Θ then need communication between devices.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from tokenformer_jax.distributed.axes import per_device, splits
from tokenformer_jax.kernels.pattention_kernels import LANES, block_rows, forward, gradients_of_rows, padded, product
from tokenformer_jax.nn.theta import GELUS, THETAS, check_choices
from tokenformer_jax.parameter_tokens import ParameterTokens

# The backward pass stores the weights and the gradients of the scores of this many rows at once.
_CHUNK = 2048


def fused_pattention(
  x: Float[Array, "*batch d_in"],
  tokens: ParameterTokens,
  theta: str = "l2_norm_gelu",
  gelu: str = "erf",
  interpret: bool = False,
) -> Float[Array, "*batch d_out"]:
  """`pattention(x, tokens, theta, gelu)` for float32 and bfloat16 x and a Θ with an L2 norm; scores stay in float32.

  Args:
    x: inputs [..., d_in]. There may be no rows.
    tokens: keys [N, d_in], values [N, d_out], τ [].
    theta: `l2_norm_gelu` or `gelu_l2_norm`.
    gelu: `erf` or `tanh`.
    interpret: run the kernels as plain JAX, on any device.

  Returns:
    [..., d_out] in x's dtype.

  Raises:
    ValueError: another Θ, sizes that are not multiples of 128, or int8 tokens.
  """
  check_choices(theta, gelu)
  num_tokens, d_in = tokens.keys.shape
  d_out = tokens.values.shape[1]
  if theta == "softmax":
    raise ValueError("kernel='fused': theta='softmax' has no fused kernel; choose kernel='reference'.")
  for name, size in (("param_token", num_tokens), ("d_in", d_in), ("d_out", d_out)):
    if size % LANES:
      raise ValueError(f"kernel='fused': {name}={size} is not a multiple of {LANES}; choose kernel='reference'.")
  if tokens.key_scales is not None or tokens.value_scales is not None:
    raise ValueError("kernel='fused': int8 tokens with scales are not supported; choose kernel='reference'.")
  if 0 in x.shape[:-1]:
    return jnp.zeros((*x.shape[:-1], d_out), x.dtype)  # A kernel cannot have an empty grid.
  tau = jnp.asarray(tokens.tau, jnp.float32)
  return _fused(x, tokens.keys, tokens.values, tau, theta, gelu, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _fused(x, keys, values, tau, theta, gelu, interpret):
  return _on_mesh(
    functools.partial(forward, theta=theta, gelu=gelu, interpret=interpret),
    functools.partial(_forward_in_parts, theta=theta, gelu=gelu),
    x,
    keys,
    values,
    tau,
  )


def _fused_forward(x, keys, values, tau, theta, gelu, interpret):
  return _fused(x, keys, values, tau, theta, gelu, interpret), (x, keys, values, tau)


def _fused_backward(theta, gelu, interpret, saved, d_y):
  return _on_mesh(
    functools.partial(_backward, theta=theta, gelu=gelu, interpret=interpret),
    functools.partial(_backward_in_parts, theta=theta, gelu=gelu),
    *saved,
    d_y,
  )


_fused.defvjp(_fused_forward, _fused_backward)


def _on_mesh(function, in_parts, x, keys, values, tau, d_y=None):
  """Calls `function(x [M, d], keys, values, tau, d_y [M, e])` on each device with the rows that it holds.

  With `d_y` the function returns gradients, and those of keys, values and τ are summed over the devices. Where tokens
  are split over devices, no device has all scores of a row: `in_parts` is then called instead, with the mesh axes
  `over` that split the tokens.
  """
  along = [splits(axis, size) for axis, size in zip(("batch", "time"), x.shape[:-1])] if x.ndim == 3 else []
  rows, over = tuple(axis for axes in along for axis in axes), splits("param_token", keys.shape[0])
  split_rows, split_tokens = PartitionSpec(*[axes or None for axes in along]), PartitionSpec(over or None)
  replicated = PartitionSpec()

  def local(x, keys, values, tau, *d_y):
    flat = [a.reshape(-1, a.shape[-1]) for a in (x, *d_y)]
    apply = functools.partial(in_parts, over=over) if over else function
    results = apply(flat[0], keys.astype(x.dtype), values.astype(x.dtype), tau, *flat[1:])
    if not d_y:
      return results.reshape(*x.shape[:-1], -1)
    d_x, d_keys, d_values, d_tau = results
    return (
      d_x.reshape(x.shape),
      jax.lax.psum(d_keys, rows).astype(keys.dtype),
      jax.lax.psum(d_values, rows).astype(values.dtype),
      jax.lax.psum(d_tau, (*rows, *over)),
    )

  inputs = (split_rows, split_tokens, split_tokens, replicated)
  if d_y is None:
    return per_device(local, inputs, split_rows)(x, keys, values, tau)
  return per_device(local, (*inputs, split_rows), inputs)(x, keys, values, tau, d_y)


def _backward(x, keys, values, tau, d_y, *, theta, gelu, interpret):
  """Gradients: of x [M, d] in its dtype, and of keys, values and τ in float32."""
  kernel = functools.partial(gradients_of_rows, theta=theta, gelu=gelu, interpret=interpret)
  return _sum_over_chunks(x, keys, values, tau, d_y, block_rows(x.shape[0], keys.shape[0]), kernel)


def _sum_over_chunks(x, keys, values, tau, d_y, block, gradients):
  """`_backward` with `gradients(x, keys, values, tau, d_y)` called for one chunk of rows after the other.

  A chunk is a whole number of blocks of `block` rows; `gradients` returns what `gradients_of_rows` does.
  """
  num_rows = x.shape[0]
  chunk = min(_CHUNK, -(-num_rows // block) * block)

  def add_chunk(total, rows):
    x, d_y = rows
    d_x, d_scores, weights, d_tau = gradients(x, keys, values, tau, d_y)
    d_tokens = product(d_scores, x, 0, 0), product(weights, d_y, 0, 0), jnp.sum(d_tau)
    return jax.tree.map(jnp.add, total, d_tokens), d_x

  zeros = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32), jnp.float32(0))
  chunks = [padded(a, chunk).reshape(-1, chunk, a.shape[1]) for a in (x, d_y)]
  total, d_x = jax.lax.scan(add_chunk, zeros, chunks)
  return d_x.reshape(-1, x.shape[1])[:num_rows], *total


def _forward_in_parts(x, keys, values, tau, *, theta, gelu, over):
  """`forward` in plain JAX by chunks of rows, with the tokens split along the mesh axes `over`."""
  chunk = min(_CHUNK, x.shape[0])

  def weigh(_, x):
    weights = THETAS[theta](product(x, keys, 1, 1), tau, GELUS[gelu], over)
    return None, jax.lax.psum(product(weights.astype(x.dtype), values, 1, 0), over).astype(x.dtype)

  _, y = jax.lax.scan(weigh, None, padded(x, chunk).reshape(-1, chunk, x.shape[1]))
  return y.reshape(-1, values.shape[1])[: x.shape[0]]


def _backward_in_parts(x, keys, values, tau, d_y, *, theta, gelu, over):
  """`_backward` in plain JAX by chunks of rows, with the tokens split along the mesh axes `over`."""

  def gradients(x, keys, values, tau, d_y):
    scores = product(x, keys, 1, 1)
    weights, pull = jax.vjp(lambda scores, tau: THETAS[theta](scores, tau, GELUS[gelu], over), scores, tau)
    d_scores, d_tau = pull(product(d_y, values, 1, 1))
    d_scores = d_scores.astype(x.dtype)
    d_x = jax.lax.psum(product(d_scores, keys, 1, 0), over).astype(x.dtype)
    return d_x, d_scores, weights.astype(x.dtype), d_tau

  return _sum_over_chunks(x, keys, values, tau, d_y, 1, gradients)
