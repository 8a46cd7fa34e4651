"""Pattention for TPUs whose scores [rows, N] never exist as a whole, forward or backward.

A block of rows keeps its scores in fast memory (VMEM) while the parameter tokens are streamed through it twice. The
first pass computes all scores of the block; then the reference's own Θ, or its gradient, turns them into weights; the
second pass uses the weights. The backward pass computes the scores again, so it takes five matrix products where the reference
takes four, and saves the memory for the scores that the reference keeps. Where the tokens are split over devices, the
same is done in plain JAX by chunks of rows, because the sums inside Θ then need communication between devices.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from tokenformer_jax.distributed.axes import per_device, splits
from tokenformer_jax.kernels.gelu import MOSAIC_GELUS
from tokenformer_jax.nn.theta import GELUS, THETAS, check_choices
from tokenformer_jax.parameter_tokens import ParameterTokens

# The number of a TPU's lanes; tokens and channels must be multiples of it.
_LANES = 128
# Rows whose scores are in fast memory together, tokens in one streamed block, and rows that Θ processes at once.
_ROWS, _TOKENS, _THETA_ROWS = 256, 512, 8
# Upper bounds of the scores of a block of rows and of the numbers in a block of tokens; together they fit into 16 MiB.
_SCORES, _NUMBERS = 2**20, 2**20
_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))
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
    if size % _LANES:
      raise ValueError(f"kernel='fused': {name}={size} is not a multiple of {_LANES}; choose kernel='reference'.")
  if tokens.key_scales is not None or tokens.value_scales is not None:
    raise ValueError("kernel='fused': int8 tokens with scales are not supported; choose kernel='reference'.")
  if 0 in x.shape[:-1]:
    return jnp.zeros((*x.shape[:-1], d_out), x.dtype)  # A kernel cannot have an empty grid.
  tau = jnp.asarray(tokens.tau, jnp.float32)
  return _fused(x, tokens.keys, tokens.values, tau, theta, gelu, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _fused(x, keys, values, tau, theta, gelu, interpret):
  return _on_mesh(
    functools.partial(_forward, theta=theta, gelu=gelu, interpret=interpret),
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


def _forward(x, keys, values, tau, *, theta, gelu, interpret):
  """The output [M, e] for x [M, d]."""
  (num_rows, d_in), (num_tokens, d_out) = x.shape, values.shape
  rows, tokens = _block_rows(num_rows, num_tokens), _block_tokens(num_tokens, max(d_in, d_out))
  last = num_tokens // tokens - 1
  x = _padded(x, rows)
  y = pl.pallas_call(
    functools.partial(_forward_kernel, theta=functools.partial(THETAS[theta], gelu=MOSAIC_GELUS[gelu])),
    grid=(x.shape[0] // rows, 2, num_tokens // tokens),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      pl.BlockSpec((rows, d_in), lambda i, phase, j: (i, 0)),
      pl.BlockSpec((tokens, d_in), lambda i, phase, j: (jnp.where(phase == 0, j, last), 0)),
      pl.BlockSpec((tokens, d_out), lambda i, phase, j: (jnp.where(phase == 0, 0, j), 0)),
    ],
    out_specs=pl.BlockSpec((rows, d_out), lambda i, phase, j: (i, 0)),
    out_shape=jax.ShapeDtypeStruct((x.shape[0], d_out), x.dtype),
    scratch_shapes=[pltpu.VMEM((rows, num_tokens), jnp.float32), pltpu.VMEM((rows, d_out), jnp.float32)],
    compiler_params=_PARAMS,
    interpret=interpret,
    name=f"pattention_{theta}",
    cost_estimate=_cost(x, num_tokens, d_in + d_out, d_in + d_out),
  )(tau.reshape(1, 1), x, keys, values)
  return y[:num_rows]


def _forward_kernel(tau_ref, x_ref, keys_ref, values_ref, y_ref, scores_ref, sum_ref, *, theta):
  phase, j = pl.program_id(1), pl.program_id(2)
  columns = _columns(j, keys_ref.shape[0])

  @pl.when(phase == 0)
  def _():
    scores_ref[:, columns] = _product(x_ref[...], keys_ref[...], 1, 1)

  @pl.when((phase == 1) & (j == 0))
  def _():
    def weigh(rows):
      scores_ref[rows, :] = theta(scores_ref[rows, :], jnp.full((_THETA_ROWS, 1), tau_ref[0, 0]))

    _for_groups_of_rows(scores_ref.shape[0], weigh)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(phase == 1)
  def _():
    sum_ref[...] += _product(scores_ref[:, columns].astype(values_ref.dtype), values_ref[...], 1, 0)

  @pl.when((phase == 1) & (j == pl.num_programs(2) - 1))
  def _():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _backward(x, keys, values, tau, d_y, *, theta, gelu, interpret):
  """Gradients: of x [M, d] in its dtype, and of keys, values and τ in float32."""
  kernel = functools.partial(_backward_call, theta=theta, gelu=gelu, interpret=interpret)
  return _sum_over_chunks(x, keys, values, tau, d_y, _block_rows(x.shape[0], keys.shape[0]), kernel)


def _sum_over_chunks(x, keys, values, tau, d_y, block, gradients):
  """`_backward` with `gradients(x, keys, values, tau, d_y)` called for one chunk of rows after the other.

  A chunk is a whole number of blocks of `block` rows; `gradients` returns what `_backward_call` does.
  """
  num_rows = x.shape[0]
  chunk = min(_CHUNK, -(-num_rows // block) * block)

  def add_chunk(total, rows):
    x, d_y = rows
    d_x, d_scores, weights, d_tau = gradients(x, keys, values, tau, d_y)
    d_tokens = _product(d_scores, x, 0, 0), _product(weights, d_y, 0, 0), jnp.sum(d_tau)
    return jax.tree.map(jnp.add, total, d_tokens), d_x

  zeros = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32), jnp.float32(0))
  chunks = [_padded(a, chunk).reshape(-1, chunk, a.shape[1]) for a in (x, d_y)]
  total, d_x = jax.lax.scan(add_chunk, zeros, chunks)
  return d_x.reshape(-1, x.shape[1])[:num_rows], *total


def _forward_in_parts(x, keys, values, tau, *, theta, gelu, over):
  """`_forward` in plain JAX by chunks of rows, with the tokens split along the mesh axes `over`."""
  chunk = min(_CHUNK, x.shape[0])

  def weigh(_, x):
    weights = THETAS[theta](_product(x, keys, 1, 1), tau, GELUS[gelu], over)
    return None, jax.lax.psum(_product(weights.astype(x.dtype), values, 1, 0), over).astype(x.dtype)

  _, y = jax.lax.scan(weigh, None, _padded(x, chunk).reshape(-1, chunk, x.shape[1]))
  return y.reshape(-1, values.shape[1])[: x.shape[0]]


def _backward_in_parts(x, keys, values, tau, d_y, *, theta, gelu, over):
  """`_backward` in plain JAX by chunks of rows, with the tokens split along the mesh axes `over`."""

  def gradients(x, keys, values, tau, d_y):
    scores = _product(x, keys, 1, 1)
    weights, pull = jax.vjp(lambda scores, tau: THETAS[theta](scores, tau, GELUS[gelu], over), scores, tau)
    d_scores, d_tau = pull(_product(d_y, values, 1, 1))
    d_scores = d_scores.astype(x.dtype)
    d_x = jax.lax.psum(_product(d_scores, keys, 1, 0), over).astype(x.dtype)
    return d_x, d_scores, weights.astype(x.dtype), d_tau

  return _sum_over_chunks(x, keys, values, tau, d_y, 1, gradients)


def _backward_call(x, keys, values, tau, d_y, *, theta, gelu, interpret):
  """(d_x, d_scores, weights, parts of d_tau) of rows that are whole blocks."""
  (num_rows, d_in), (num_tokens, d_out) = x.shape, values.shape
  rows, tokens = _block_rows(num_rows, num_tokens), _block_tokens(num_tokens, max(d_in, d_out))
  last = num_tokens // tokens - 1
  blocks = num_rows // rows

  def row_block(i, phase, j):
    return (i, 0)

  def score_block(i, phase, j):
    return (i, jnp.where(phase == 0, 0, j))

  *gradients, d_tau = pl.pallas_call(
    functools.partial(_backward_kernel, theta=functools.partial(THETAS[theta], gelu=MOSAIC_GELUS[gelu])),
    grid=(blocks, 2, num_tokens // tokens),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      pl.BlockSpec((rows, d_in), row_block),
      pl.BlockSpec((tokens, d_in), lambda i, phase, j: (j, 0)),
      pl.BlockSpec((tokens, d_out), lambda i, phase, j: (jnp.where(phase == 0, j, last), 0)),
      pl.BlockSpec((rows, d_out), row_block),
    ],
    out_specs=[
      pl.BlockSpec((rows, d_in), row_block),
      pl.BlockSpec((rows, tokens), score_block),
      pl.BlockSpec((rows, tokens), score_block),
      pl.BlockSpec((1, _THETA_ROWS, _LANES), lambda i, phase, j: (i, 0, 0)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct(shape, dtype)
      for shape, dtype in (
        (x.shape, x.dtype),
        ((num_rows, num_tokens), x.dtype),
        ((num_rows, num_tokens), x.dtype),
        ((blocks, _THETA_ROWS, _LANES), jnp.float32),
      )
    ],
    scratch_shapes=[
      pltpu.VMEM((rows, num_tokens), jnp.float32),
      pltpu.VMEM((rows, num_tokens), jnp.float32),
      pltpu.VMEM((rows, d_in), jnp.float32),
    ],
    compiler_params=_PARAMS,
    interpret=interpret,
    name=f"pattention_{theta}_gradient",
    cost_estimate=_cost(x, num_tokens, 2 * d_in + d_out, 2 * d_in + d_out + 2 * num_tokens),
  )(tau.reshape(1, 1), x, keys, values, d_y)
  return *gradients, d_tau[:, :, 0]  # Every lane holds the same number.


def _backward_kernel(
  tau_ref,
  x_ref,
  keys_ref,
  values_ref,
  d_y_ref,
  d_x_ref,
  d_scores_ref,
  weights_ref,
  d_tau_ref,
  left_ref,
  right_ref,
  sum_ref,
  *,
  theta,
):
  """One step of the backward pass.

  `left_ref` holds the scores in phase 0 and their gradients in phase 1; `right_ref` holds the gradients of the weights
  in phase 0 and the weights in phase 1.
  """
  phase, j = pl.program_id(1), pl.program_id(2)
  columns = _columns(j, keys_ref.shape[0])

  @pl.when(phase == 0)
  def _():
    left_ref[:, columns] = _product(x_ref[...], keys_ref[...], 1, 1)
    right_ref[:, columns] = _product(d_y_ref[...], values_ref[...], 1, 1)

  @pl.when((phase == 1) & (j == 0))
  def _():
    d_tau_ref[...] = jnp.zeros_like(d_tau_ref)

    def pull(rows):
      tau_Rx1 = jnp.full((_THETA_ROWS, 1), tau_ref[0, 0])
      weights, pull_back = jax.vjp(theta, left_ref[rows, :], tau_Rx1)
      left_ref[rows, :], d_tau_Rx1 = pull_back(right_ref[rows, :])
      right_ref[rows, :] = weights
      d_tau_ref[0] += jnp.broadcast_to(d_tau_Rx1, d_tau_ref.shape[1:])

    _for_groups_of_rows(left_ref.shape[0], pull)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(phase == 1)
  def _():
    d_scores = left_ref[:, columns].astype(x_ref.dtype)
    d_scores_ref[...] = d_scores
    weights_ref[...] = right_ref[:, columns].astype(x_ref.dtype)
    sum_ref[...] += _product(d_scores, keys_ref[...], 1, 0)

  @pl.when((phase == 1) & (j == pl.num_programs(2) - 1))
  def _():
    d_x_ref[...] = sum_ref[...].astype(d_x_ref.dtype)


def _for_groups_of_rows(num_rows, apply):
  """Calls `apply(rows)` for a few rows at a time, so that its intermediate results fit into registers."""

  def body(i, carry):
    apply(pl.ds(pl.multiple_of(i * _THETA_ROWS, _THETA_ROWS), _THETA_ROWS))
    return carry

  jax.lax.fori_loop(0, num_rows // _THETA_ROWS, body, 0)


def _columns(j, size):
  return pl.ds(pl.multiple_of(j * size, size), size)


def _product(a, b, axis_a, axis_b):
  return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _cost(x, num_tokens, channels, moved):
  """The cost for the compiler's scheduler.

  Args:
    x: the inputs.
    num_tokens: the number of parameter tokens.
    channels: the sum of the channels of all products.
    moved: how many numbers are read and written for each row.
  """
  num_rows, once = x.shape[0], num_tokens * channels
  return pl.CostEstimate(
    flops=2 * num_rows * once,
    transcendentals=2 * num_rows * num_tokens,
    bytes_accessed=x.dtype.itemsize * (num_rows * moved + once),
  )


def _block_rows(num_rows, num_tokens):
  """The number of rows in a block: no more than there are, and a multiple of the 16 rows of a bfloat16 tile."""
  return min(_ROWS, max(16, _power_of_2(_SCORES // num_tokens)), -(-num_rows // 16) * 16)


def _block_tokens(num_tokens, channels):
  return math.gcd(num_tokens, min(_TOKENS, max(_LANES, _power_of_2(_NUMBERS // channels))))


def _power_of_2(number):
  return 2 ** (max(number, 1).bit_length() - 1)


def _padded(a, multiple):
  """Pads with rows of zeros, whose weights and gradients are 0."""
  return jnp.pad(a, ((0, -a.shape[0] % multiple), (0, 0)))
