"""Pattention for TPUs whose scores [rows, N] never exist as a whole, forward or backward.

A block of rows keeps its scores in fast memory while the tokens stream past, twice: with all its scores known, the
reference's own Θ, or its gradient, turns them into weights. For the gradient the scores are computed again; it does
five products where the reference does four, and saves what the reference keeps. Where the tokens are split over
devices the same is done in plain JAX, by chunks of rows: the sums inside Θ go between devices.
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
from tokenformer_jax.kernels.gelu import IN_KERNEL
from tokenformer_jax.nn.theta import GELUS, THETAS, check_choices
from tokenformer_jax.parameter_tokens import ParameterTokens

# A TPU's lanes: tokens and channels come in multiples.
_LANES = 128
# Rows whose scores are in fast memory together, tokens that stream past at once, and rows that Θ takes at once.
_ROWS, _TOKENS, _THETA_ROWS = 256, 512, 8
# Scores of a block of rows, and numbers of a block of tokens, so that 16 MiB hold all.
_SCORES, _NUMBERS = 2**20, 2**20
_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))
# Rows whose weights, and the gradients of their scores, exist at once in the backward pass.
_CHUNK = 2048


def fused_pattention(
  x: Float[Array, "*batch d_in"],
  tokens: ParameterTokens,
  theta: str = "l2_norm_gelu",
  gelu: str = "erf",
  interpret: bool = False,
) -> Float[Array, "*batch d_out"]:
  """`pattention(x, tokens, theta, gelu)` for float32 and bfloat16 x, and Θs with an L2 norm; scores stay in float32.

  Args:
    interpret: run the kernels as plain JAX, on any device.

  Raises:
    ValueError: another Θ, sizes that are no multiples of 128, or int8 tokens.
  """
  check_choices(theta, gelu)
  num_tokens, d_in = tokens.keys.shape
  d_out = tokens.values.shape[1]
  if theta == "softmax":
    raise ValueError("kernel='fused': theta='softmax' has none; choose kernel='reference'.")
  for name, size in (("param_token", num_tokens), ("d_in", d_in), ("d_out", d_out)):
    if size % _LANES:
      raise ValueError(f"kernel='fused': {name}={size} is no multiple of {_LANES}; choose kernel='reference'.")
  if tokens.key_scales is not None or tokens.value_scales is not None:
    raise ValueError("kernel='fused': it takes no int8 tokens with scales; choose kernel='reference'.")
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


def _fused_backward(theta, gelu, interpret, saved, by_y):
  return _on_mesh(
    functools.partial(_backward, theta=theta, gelu=gelu, interpret=interpret),
    functools.partial(_backward_in_parts, theta=theta, gelu=gelu),
    *saved,
    by_y,
  )


_fused.defvjp(_fused_forward, _fused_backward)


def _on_mesh(function, in_parts, x, keys, values, tau, by_y=None):
  """`function(x [M, d], keys, values, tau, by_y [M, e])` on each device's rows; gradients of the rest are added up.

  Where tokens are split, Θ's sums go over devices, and no device has all scores of a row: `in_parts`, with the mesh
  axes `over`, is then called in the place of `function`.
  """
  along = [splits(axis, size) for axis, size in zip(("batch", "time"), x.shape[:-1])] if x.ndim == 3 else []
  rows, over = tuple(axis for axes in along for axis in axes), splits("param_token", keys.shape[0])
  by_row, by_token = PartitionSpec(*[axes or None for axes in along]), PartitionSpec(over or None)
  whole = PartitionSpec()

  def local(x, keys, values, tau, *by_y):
    flat = [a.reshape(-1, a.shape[-1]) for a in (x, *by_y)]
    apply = functools.partial(in_parts, over=over) if over else function
    results = apply(flat[0], keys.astype(x.dtype), values.astype(x.dtype), tau, *flat[1:])
    if not by_y:
      return results.reshape(*x.shape[:-1], -1)
    by_x, by_keys, by_values, by_tau = results
    return (
      by_x.reshape(x.shape),
      jax.lax.psum(by_keys, rows).astype(keys.dtype),
      jax.lax.psum(by_values, rows).astype(values.dtype),
      jax.lax.psum(by_tau, (*rows, *over)),
    )

  given = () if by_y is None else (by_y,)
  return per_device(
    local,
    (by_row, by_token, by_token, whole, *(by_row for _ in given)),
    (by_row, by_token, by_token, whole) if given else by_row,
  )(x, keys, values, tau, *given)


def _forward(x, keys, values, tau, *, theta, gelu, interpret):
  """[M, e]."""
  (num_rows, d_in), (num_tokens, d_out) = x.shape, values.shape
  rows, tokens = _block_rows(num_rows, num_tokens), _block_tokens(num_tokens, max(d_in, d_out))
  last = num_tokens // tokens - 1
  x = _padded(x, rows)
  y = pl.pallas_call(
    functools.partial(_forward_kernel, theta=functools.partial(THETAS[theta], gelu=IN_KERNEL[gelu])),
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

    _by_rows(scores_ref.shape[0], weigh)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(phase == 1)
  def _():
    sum_ref[...] += _product(scores_ref[:, columns].astype(values_ref.dtype), values_ref[...], 1, 0)

  @pl.when((phase == 1) & (j == pl.num_programs(2) - 1))
  def _():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _backward(x, keys, values, tau, by_y, *, theta, gelu, interpret):
  """Gradients by x [M, d] in its dtype, and by keys, values and τ in float32."""
  kernel = functools.partial(_backward_call, theta=theta, gelu=gelu, interpret=interpret)
  return _sum_over_chunks(x, keys, values, tau, by_y, _block_rows(x.shape[0], keys.shape[0]), kernel)


def _sum_over_chunks(x, keys, values, tau, by_y, block, gradients):
  """`_backward` by `gradients(x, keys, values, tau, by_y)`, `_backward_call`'s, of chunks of whole blocks of rows."""
  num_rows = x.shape[0]
  chunk = min(_CHUNK, -(-num_rows // block) * block)

  def add_chunk(total, rows):
    x, by_y = rows
    by_x, by_scores, weights, by_tau = gradients(x, keys, values, tau, by_y)
    by_tokens = _product(by_scores, x, 0, 0), _product(weights, by_y, 0, 0), jnp.sum(by_tau)
    return jax.tree.map(jnp.add, total, by_tokens), by_x

  zeros = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32), jnp.float32(0))
  chunks = [_padded(a, chunk).reshape(-1, chunk, a.shape[1]) for a in (x, by_y)]
  total, by_x = jax.lax.scan(add_chunk, zeros, chunks)
  return by_x.reshape(-1, x.shape[1])[:num_rows], *total


def _forward_in_parts(x, keys, values, tau, *, theta, gelu, over):
  """`_forward` in plain JAX, with the tokens split along the mesh axes `over`, by chunks of rows."""
  chunk = min(_CHUNK, x.shape[0])

  def weigh(_, x):
    weights = THETAS[theta](_product(x, keys, 1, 1), tau, GELUS[gelu], over)
    return None, jax.lax.psum(_product(weights.astype(x.dtype), values, 1, 0), over).astype(x.dtype)

  _, y = jax.lax.scan(weigh, None, _padded(x, chunk).reshape(-1, chunk, x.shape[1]))
  return y.reshape(-1, values.shape[1])[: x.shape[0]]


def _backward_in_parts(x, keys, values, tau, by_y, *, theta, gelu, over):
  """`_backward`, likewise."""

  def gradients(x, keys, values, tau, by_y):
    scores = _product(x, keys, 1, 1)
    weights, pull = jax.vjp(lambda scores, tau: THETAS[theta](scores, tau, GELUS[gelu], over), scores, tau)
    by_scores, by_tau = pull(_product(by_y, values, 1, 1))
    by_scores = by_scores.astype(x.dtype)
    by_x = jax.lax.psum(_product(by_scores, keys, 1, 0), over).astype(x.dtype)
    return by_x, by_scores, weights.astype(x.dtype), by_tau

  return _sum_over_chunks(x, keys, values, tau, by_y, 1, gradients)


def _backward_call(x, keys, values, tau, by_y, *, theta, gelu, interpret):
  """Gradients by x and by the scores, weights, and parts of the gradient by τ, of rows that are whole blocks."""
  (num_rows, d_in), (num_tokens, d_out) = x.shape, values.shape
  rows, tokens = _block_rows(num_rows, num_tokens), _block_tokens(num_tokens, max(d_in, d_out))
  last = num_tokens // tokens - 1
  blocks = num_rows // rows

  def by_row(i, phase, j):
    return (i, 0)

  def by_token(i, phase, j):
    return (i, jnp.where(phase == 0, 0, j))

  *gradients, by_tau = pl.pallas_call(
    functools.partial(_backward_kernel, theta=functools.partial(THETAS[theta], gelu=IN_KERNEL[gelu])),
    grid=(blocks, 2, num_tokens // tokens),
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      pl.BlockSpec((rows, d_in), by_row),
      pl.BlockSpec((tokens, d_in), lambda i, phase, j: (j, 0)),
      pl.BlockSpec((tokens, d_out), lambda i, phase, j: (jnp.where(phase == 0, j, last), 0)),
      pl.BlockSpec((rows, d_out), by_row),
    ],
    out_specs=[
      pl.BlockSpec((rows, d_in), by_row),
      pl.BlockSpec((rows, tokens), by_token),
      pl.BlockSpec((rows, tokens), by_token),
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
  )(tau.reshape(1, 1), x, keys, values, by_y)
  return *gradients, by_tau[:, :, 0]  # The same in every lane.


def _backward_kernel(
  tau_ref,
  x_ref,
  keys_ref,
  values_ref,
  by_y_ref,
  by_x_ref,
  by_scores_ref,
  weights_ref,
  by_tau_ref,
  left_ref,
  right_ref,
  sum_ref,
  *,
  theta,
):
  """`left_ref` has the scores and then their gradients, `right_ref` the weights' gradients and then the weights."""
  phase, j = pl.program_id(1), pl.program_id(2)
  columns = _columns(j, keys_ref.shape[0])

  @pl.when(phase == 0)
  def _():
    left_ref[:, columns] = _product(x_ref[...], keys_ref[...], 1, 1)
    right_ref[:, columns] = _product(by_y_ref[...], values_ref[...], 1, 1)

  @pl.when((phase == 1) & (j == 0))
  def _():
    by_tau_ref[...] = jnp.zeros_like(by_tau_ref)

    def pull(rows):
      tau_Rx1 = jnp.full((_THETA_ROWS, 1), tau_ref[0, 0])
      weights, pull_back = jax.vjp(theta, left_ref[rows, :], tau_Rx1)
      left_ref[rows, :], by_tau_Rx1 = pull_back(right_ref[rows, :])
      right_ref[rows, :] = weights
      by_tau_ref[0] += jnp.broadcast_to(by_tau_Rx1, by_tau_ref.shape[1:])

    _by_rows(left_ref.shape[0], pull)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(phase == 1)
  def _():
    by_scores = left_ref[:, columns].astype(x_ref.dtype)
    by_scores_ref[...] = by_scores
    weights_ref[...] = right_ref[:, columns].astype(x_ref.dtype)
    sum_ref[...] += _product(by_scores, keys_ref[...], 1, 0)

  @pl.when((phase == 1) & (j == pl.num_programs(2) - 1))
  def _():
    by_x_ref[...] = sum_ref[...].astype(by_x_ref.dtype)


def _by_rows(num_rows, apply):
  """`apply(rows)` for a few rows after the others: what it holds then fits into registers."""

  def body(i, carry):
    apply(pl.ds(pl.multiple_of(i * _THETA_ROWS, _THETA_ROWS), _THETA_ROWS))
    return carry

  jax.lax.fori_loop(0, num_rows // _THETA_ROWS, body, 0)


def _columns(j, size):
  return pl.ds(pl.multiple_of(j * size, size), size)


def _product(a, b, axis_a, axis_b):
  return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _cost(x, num_tokens, channels, moved):
  """For the compiler: products of so many channels, and numbers a row read and written."""
  num_rows, once = x.shape[0], num_tokens * channels
  return pl.CostEstimate(
    flops=2 * num_rows * once,
    transcendentals=2 * num_rows * num_tokens,
    bytes_accessed=x.dtype.itemsize * (num_rows * moved + once),
  )


def _block_rows(num_rows, num_tokens):
  """Rows in a block: few where there are few, in multiples of the 16 that bfloat16's tiles have."""
  return min(_ROWS, max(16, _power_of_2(_SCORES // num_tokens)), -(-num_rows // 16) * 16)


def _block_tokens(num_tokens, channels):
  return math.gcd(num_tokens, min(_TOKENS, max(_LANES, _power_of_2(_NUMBERS // channels))))


def _power_of_2(number):
  return 2 ** (max(number, 1).bit_length() - 1)


def _padded(a, multiple):
  """More rows, of zeros: they get weights and gradients of 0."""
  return jnp.pad(a, ((0, -a.shape[0] % multiple), (0, 0)))
