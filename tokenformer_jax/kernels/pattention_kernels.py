"""Pallas kernels of pattention for TPUs: the forward pass, and the gradients of the scores.

A block of rows keeps its scores in fast memory (VMEM) while the parameter tokens are streamed through it twice. The
first pass computes all scores of the block; then the reference's own Θ, or its gradient, turns them into weights; the
second pass uses the weights.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tokenformer_jax.kernels.gelu import MOSAIC_GELUS
from tokenformer_jax.nn.theta import THETAS

# The number of a TPU's lanes; tokens and channels must be multiples of it.
LANES = 128
# Rows whose scores are in fast memory together, tokens in one streamed block, and rows that Θ processes at once.
_ROWS, _TOKENS, _THETA_ROWS = 256, 512, 8
# Upper bounds of the scores of a block of rows and of the numbers in a block of tokens; together they fit into 16 MiB.
_SCORES, _NUMBERS = 2**20, 2**20
_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))


def forward(x, keys, values, tau, *, theta, gelu, interpret):
  """The output [M, e] in x's dtype, for x [M, d], keys [N, d], values [N, e] and τ [].

  Args:
    theta: a Θ with an L2 norm.
    gelu: `erf` or `tanh`.
    interpret: run the kernel as plain JAX.
  """
  (num_rows, d_in), (num_tokens, d_out) = x.shape, values.shape
  rows, tokens = block_rows(num_rows, num_tokens), _block_tokens(num_tokens, max(d_in, d_out))
  last = num_tokens // tokens - 1
  x = padded(x, rows)
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
    scores_ref[:, columns] = product(x_ref[...], keys_ref[...], 1, 1)

  @pl.when((phase == 1) & (j == 0))
  def _():
    def weigh(rows):
      scores_ref[rows, :] = theta(scores_ref[rows, :], jnp.full((_THETA_ROWS, 1), tau_ref[0, 0]))

    _for_groups_of_rows(scores_ref.shape[0], weigh)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(phase == 1)
  def _():
    sum_ref[...] += product(scores_ref[:, columns].astype(values_ref.dtype), values_ref[...], 1, 0)

  @pl.when((phase == 1) & (j == pl.num_programs(2) - 1))
  def _():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def gradients_of_rows(x, keys, values, tau, d_y, *, theta, gelu, interpret):
  """The gradients of x, and what those of keys, values and τ are computed from; the rows must be whole blocks.

  Returns:
    (d_x [M, d], gradients of the scores [M, N], weights [M, N], parts of τ's gradient, whose sum it is).
  """
  (num_rows, d_in), (num_tokens, d_out) = x.shape, values.shape
  rows, tokens = block_rows(num_rows, num_tokens), _block_tokens(num_tokens, max(d_in, d_out))
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
      pl.BlockSpec((1, _THETA_ROWS, LANES), lambda i, phase, j: (i, 0, 0)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct(shape, dtype)
      for shape, dtype in (
        (x.shape, x.dtype),
        ((num_rows, num_tokens), x.dtype),
        ((num_rows, num_tokens), x.dtype),
        ((blocks, _THETA_ROWS, LANES), jnp.float32),
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
    left_ref[:, columns] = product(x_ref[...], keys_ref[...], 1, 1)
    right_ref[:, columns] = product(d_y_ref[...], values_ref[...], 1, 1)

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
    sum_ref[...] += product(d_scores, keys_ref[...], 1, 0)

  @pl.when((phase == 1) & (j == pl.num_programs(2) - 1))
  def _():
    d_x_ref[...] = sum_ref[...].astype(d_x_ref.dtype)


def block_rows(num_rows, num_tokens):
  """The number of rows in a block: a multiple of the 16 rows of a bfloat16 tile, and no more of them than needed."""
  return min(_ROWS, max(16, _power_of_2(_SCORES // num_tokens)), -(-num_rows // 16) * 16)


def _block_tokens(num_tokens, channels):
  return math.gcd(num_tokens, min(_TOKENS, max(LANES, _power_of_2(_NUMBERS // channels))))


def _power_of_2(number):
  return 2 ** (max(number, 1).bit_length() - 1)


def _for_groups_of_rows(num_rows, apply):
  """Calls `apply(rows)` for a few rows at a time, so that its intermediate results fit into registers."""

  def body(i, carry):
    apply(pl.ds(pl.multiple_of(i * _THETA_ROWS, _THETA_ROWS), _THETA_ROWS))
    return carry

  jax.lax.fori_loop(0, num_rows // _THETA_ROWS, body, 0)


def _columns(j, size):
  return pl.ds(pl.multiple_of(j * size, size), size)


def product(a, b, axis_a, axis_b):
  """The sum over `axis_a` of a matrix and `axis_b` of another one, in float32."""
  return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def padded(a, multiple):
  """Pads with rows of zeros, whose weights and gradients are 0."""
  return jnp.pad(a, ((0, -a.shape[0] % multiple), (0, 0)))


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
