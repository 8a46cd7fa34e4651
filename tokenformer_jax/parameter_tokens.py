"""Pattention: attention between input tokens and learned parameter tokens (arXiv 2410.23168, eq. 4–5).

    y = Θ(x Kᵀ) V        x [..., d_in],  K [N, d_in],  V [N, d_out]

Θ turns a row of scores s [N] into weights, with a scale τ inside it:

    l2_norm_gelu   GeLU(τ · s / ‖s‖₂)              τ = √N    the paper's Θ
    gelu_l2_norm   τ · g / ‖g‖₂,  g = GeLU(s)      τ = √N
    softmax        τ · softmax(s)                  τ = N

τ is an argument and not a formula of N, so that rows can be added without changing the function.
The released code has no guard: a row of zero scores gives NaN there. Here value and gradient are
finite wherever the scores are. A row with ‖s‖₂ < 1e-12 counts as zeros: the L2 variants give it
weight 0 and gradient 0. Above, they are the formula, up to scores of 1e18.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Num

# ‖s‖₂ below this counts as a row of zeros.
_ZERO_NORM = 1e-12
# Where the largest score of a row is below this, its GeLUs are near the end of float32's range, or past it.
_GELU_TAIL = -8.0
_TANH_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715
# Squares of s · 2⁻¹³ neither underflow at ‖s‖₂ = 1e-12 nor overflow at s = 1e18, for up to 10⁶ tokens.
_SQUARE_SCALE = 2.0**-13
# XLA:CPU copies the right side of a product into another layout. For up to so many rows the table goes to the left, for
# so many and more the gradient's products are turned.
_FEW_ROWS, _MANY_ROWS = 64, 512
# Names of the two products of a pattention, for policies of `jax.checkpoint`.
SCORES, OUTPUT = "pattention_scores", "pattention_output"


@functools.partial(
  jax.tree_util.register_dataclass, meta_fields=[], data_fields=["keys", "values", "tau", "key_scales", "value_scales"]
)
@dataclasses.dataclass(frozen=True)
class ParameterTokens:
  """N parameter tokens: `keys` [N, d_in], `values` [N, d_out] and the scale `tau` [] inside Θ.

  Where keys and values are int8, `key_scales` [N] and `value_scales` [d_out] say what their steps are worth.
  """

  keys: Num[Array, "param_token d_in"]
  values: Num[Array, "param_token d_out"]
  tau: Float[Array, ""]
  key_scales: Float[Array, "param_token"] | None = None
  value_scales: Float[Array, "d_out"] | None = None


def pattention(
  x: Float[Array, "*batch d_in"],
  tokens: ParameterTokens,
  theta: str = "l2_norm_gelu",
  gelu: str = "erf",
) -> Float[Array, "*batch d_out"]:
  """Θ(x Kᵀ) V in x's dtype, with Θ and all sums in float32 (float64 for a float64 x).

  The gradient keeps the scores and computes Θ again, whose parts are up to sixteen arrays of their size. Within a scan,
  that is; outside of one XLA may keep the parts. Scores of a bfloat16 x go to `l2_norm_gelu` in bfloat16, and to the
  others, where they are exponents, in float32.

  Args:
    x: inputs [..., d_in], float32 or bfloat16. The products run in this dtype.
    tokens: keys [N, d_in], values [N, d_out], tau []; `initial_tau` gives a new layer's τ.
    theta: `l2_norm_gelu`, `gelu_l2_norm` or `softmax`.
    gelu: `erf` (exact, as released) or `tanh` (its usual approximation).

  Returns:
    [..., d_out] in x's dtype.

  Raises:
    ValueError: unknown `theta` or `gelu`, or shapes that do not fit.
  """

  @scores_kept
  def weighted_sum(x, tokens):
    scores_MxN = checkpoint_name(_scores(x, tokens, theta, gelu), SCORES)
    weights_MxN = _weights(scores_MxN, tokens.tau, theta, gelu).astype(x.dtype)
    values_NxE = _for_rows_like(x, tokens.values.astype(x.dtype))
    if len(weights_MxN) > 1:
      return _weighted_sum(weights_MxN, values_NxE)
    # Of one row, in the form in which XLA reads V once and at the memory's rate.
    return jax.lax.platform_dependent(
      weights_MxN, values_NxE, cpu=_sum_by_blocks, cuda=_sum_of_two_rows, default=_weighted_sum
    )

  y_MxE = weighted_sum(x, tokens)
  if tokens.value_scales is not None:
    y_MxE = y_MxE * tokens.value_scales.astype(y_MxE.dtype)[None]
  return y_MxE.astype(x.dtype).reshape(*x.shape[:-1], tokens.values.shape[1])


def token_weights(
  x: Float[Array, "*batch d_in"], tokens: ParameterTokens, theta: str = "l2_norm_gelu", gelu: str = "erf"
) -> Float[Array, "rows param_token"]:
  """Θ(x Kᵀ), what `pattention` weighs the values with: a row for each of x's, in the dtype of its sums."""
  return _weights(_scores(x, tokens, theta, gelu), tokens.tau, theta, gelu)


def _scores(x, tokens, theta, gelu):
  check_choices(theta, gelu)
  keys, values = tokens.keys, tokens.values
  if keys.ndim != 2 or values.ndim != 2 or keys.shape[0] != values.shape[0]:
    raise ValueError(f"keys {keys.shape} and values {values.shape}: expected [N, d_in] and [N, d_out].")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x of {x.dtype}: expected floating point, e.g. x.astype(jnp.float32).")
  if x.shape[-1] != keys.shape[1]:
    raise ValueError(f"x {x.shape} and keys {keys.shape}: the last axes must be equal.")
  for name, scales, size in (("key", tokens.key_scales, len(keys)), ("value", tokens.value_scales, values.shape[1])):
    if scales is not None and scales.shape != (size,):
      raise ValueError(
        f"{name}_scales {scales.shape}: expected {(size,)}, one for each "
        f"{'token' if name == 'key' else 'output channel'}."
      )
  # Flat rows: XLA's CPU products on [B·T, d] take about half the time of those on [B, T, d].
  scores_MxN = row_products(x.reshape(-1, x.shape[-1]), _for_rows_like(x, keys.astype(x.dtype)))
  if tokens.key_scales is not None:
    scores_MxN = scores_MxN * tokens.key_scales.astype(scores_MxN.dtype)[None]
  # bfloat16 has float32's range.
  return scores_MxN.astype(x.dtype) if theta == "l2_norm_gelu" and x.dtype == jnp.bfloat16 else scores_MxN


def _weighted_sum(weights_MxN, values_NxE):
  return wide_einsum("mn,ne->me", weights_MxN, values_NxE)


def _sum_by_blocks(weights_1xN, values_NxE):
  # XLA:CPU gives each thread some columns of V, which are slow to read; of blocks of tokens, some whole ones.
  blocks = math.gcd(weights_1xN.shape[1], 16)
  values_BxNxE = values_NxE.reshape(blocks, -1, values_NxE.shape[1])
  return jnp.sum(wide_einsum("bn,bne->be", weights_1xN.reshape(blocks, -1), values_BxNxE), axis=0, keepdims=True)


def _sum_of_two_rows(weights_1xN, values_NxE):
  # XLA:GPU writes all multiplications of one row out, in float32. Of two it is a product.
  return _weighted_sum(jnp.pad(weights_1xN, ((0, 1), (0, 0))), values_NxE)[:1]


def _weights(scores_MxN, tau, theta, gelu):
  scores_MxN = scores_MxN.astype(sum_dtype(scores_MxN.dtype))
  return THETAS[theta](scores_MxN, jnp.asarray(tau, scores_MxN.dtype), GELUS[gelu])


def scores_kept(f: Callable) -> Callable:
  """f, of whose parts the gradient keeps pattention's scores and a number for each row; the rest it computes again."""
  return jax.checkpoint(f, policy=_is_kept, prevent_cse=False)


def _is_kept(primitive, *_, name=None, **__):
  # A number for each row costs no memory, but over tokens on several devices it is sent.
  return primitive in (jax.lax.reduce_sum_p, jax.lax.reduce_max_p) or name == SCORES


def check_choices(theta: str, gelu: str) -> None:
  """Raises ValueError for an unknown `theta` or `gelu`."""
  if theta not in THETAS:
    raise ValueError(f"theta={theta!r}: choose one of {', '.join(THETAS)}.")
  if gelu not in GELUS:
    raise ValueError(f"gelu={gelu!r}: choose one of {', '.join(GELUS)}.")


def initial_tau(theta: str, num_tokens: int) -> float:
  """τ of a layer born with `num_tokens` tokens: √N for the L2 variants, N for softmax."""
  return float(num_tokens) if theta == "softmax" else math.sqrt(num_tokens)


def row_products(x: Float[Array, "m d"], table: Float[Array, "n d"]) -> Float[Array, "m n"]:
  """x · tableᵀ by `wide_einsum`."""
  if len(x) > _FEW_ROWS or x.dtype != sum_dtype(x.dtype):  # XLA:CPU has bfloat16's product one way about only.
    return _x_first(x, table)
  return jax.lax.platform_dependent(x, table, cpu=_table_first, default=_x_first)


def _x_first(x_MxD, table_NxD):
  return wide_einsum("md,nd->mn", x_MxD, table_NxD)


def _table_first(x_MxD, table_NxD):
  # Without the barrier XLA makes of a product's transpose the product the other way about.
  return jax.lax.optimization_barrier(wide_einsum("nd,md->nm", table_NxD, x_MxD)).T


def _for_rows_like(x, table_NxD):
  """The table itself, in a form whose gradient from products with x's rows is the fastest."""
  tokens, channels = table_NxD.shape
  # Far from small, for XLA:CPU of jax 0.10 aborts where such products have a side of 3 or less and are batched.
  many = x.size >= _MANY_ROWS * x.shape[-1] and 64 <= channels < min(tokens, 1024)
  return _gradient_by_channel(table_NxD) if many and x.dtype == sum_dtype(x.dtype) else table_NxD


@jax.custom_jvp
def _gradient_by_channel(table_NxD):
  return table_NxD


@_gradient_by_channel.defjvp
def _gradient_by_channel_jvp(primals, tangents):
  # XLA:CPU sums over rows faster with the wider side on the right: a gradient [N, d] as the transpose of [d, N].
  (tangent_NxD,) = tangents
  return *primals, jax.lax.platform_dependent(
    tangent_NxD, cpu=lambda tangent: jax.lax.optimization_barrier(tangent.T).T, default=lambda tangent: tangent
  )


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """Where sums and norms of `dtype` run: float32, but float64 for float64."""
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def wide_einsum(equation: str, a: Array, b: Array) -> Array:
  """`jnp.einsum` of two arrays of one dtype, with sums and result in its `sum_dtype`.

  Where that is wider the gradient's products, too, are of two narrow arrays with sums in the wider dtype, also over
  devices, and there is no forward-mode derivative. By the chain rule they would be of wide arrays, at half of a GPU's
  rate or less.
  """
  if a.dtype == sum_dtype(a.dtype):
    return jnp.einsum(equation, a, b)
  return _widening_einsum(equation, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _widening_einsum(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=sum_dtype(a.dtype))


def _widening_einsum_forward(equation, a, b):
  # The product itself, for remat policies to see.
  return jnp.einsum(equation, a, b, preferred_element_type=sum_dtype(a.dtype)), (a, b)


def _widening_einsum_backward(equation, saved, by_y):
  a, b = saved
  operands, of_y = equation.split("->")
  of_a, of_b = operands.split(",")
  by_y = by_y.astype(a.dtype)
  return (
    _widening_einsum(f"{of_y},{of_b}->{of_a}", by_y, b).astype(a.dtype),
    _widening_einsum(f"{of_y},{of_a}->{of_b}", by_y, a).astype(b.dtype),
  )


_widening_einsum.defvjp(_widening_einsum_forward, _widening_einsum_backward)


# A Θ is a function of scores [m, n], τ and a GELU; the L2 variants also of `over`, mesh axes along which the sums over
# tokens go on, where each device has some of them.
def _l2_norm_gelu(s, tau, gelu, over=()):
  return gelu.value(_rows_of_norm(tau, s, jnp.asarray(_SQUARE_SCALE, s.dtype), _ZERO_NORM, over))


def _gelu_l2_norm(s, tau, gelu, over=()):
  top = _largest(jax.lax.stop_gradient(s), over)
  tail = gelu.tail(*(jnp.clip(a, -1e18, _GELU_TAIL) for a in (s, top)))
  g = jnp.where(top < _GELU_TAIL, tail, gelu.precise(s))
  g = jnp.where(_norm(s, _SQUARE_SCALE, over) < _ZERO_NORM * _SQUARE_SCALE, 0.0, g)
  # GeLU's range is too wide for one fixed scale: take each row's own.
  largest = _largest(jnp.abs(jax.lax.stop_gradient(g)), over)
  return _rows_of_norm(tau, g, 1.0 / jnp.clip(largest, 1e-37, 1e37), 1e-37, over)


def _softmax(s, tau, gelu):
  del gelu
  return tau * jax.nn.softmax(s, axis=-1)


THETAS = {"l2_norm_gelu": _l2_norm_gelu, "gelu_l2_norm": _gelu_l2_norm, "softmax": _softmax}


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _rows_of_norm(
  norm: Float[Array, ""], s: Float[Array, "m n"], scale: Float[Array, "..."], zero_norm: float, over=()
) -> Float[Array, "m n"]:
  """norm · s / ‖s‖₂ along the last axis; 0, with zero gradient, where ‖s‖₂ < `zero_norm`.

  The squares are taken of s · `scale` (a scalar or [m, 1]), to keep their sum within float32.
  """
  return s * (norm * _inverse_norm(s, scale, zero_norm, over))


@_rows_of_norm.defjvp
def _rows_of_norm_jvp(zero_norm, over, primals, tangents):
  # Written out, for ∂(s/‖s‖) by the chain rule passes through ‖s‖³, which leaves float32's range. And what is
  # subtracted is made of what it is subtracted from: where all of it lies along s, exactly nothing is left.
  norm, s, scale = primals
  d_norm, ds, _ = tangents
  inverse = _inverse_norm(s, scale, zero_norm, over)
  factor, unit = norm * inverse, s * inverse
  ds = factor * ds
  return s * factor, ds - unit * _sum(unit * ds, over) + unit * d_norm


def _inverse_norm(s, scale, zero_norm, over):
  norm_Mx1 = _norm(s, scale, over)
  live = norm_Mx1 >= zero_norm * scale
  return jnp.where(live, scale / jnp.where(live, norm_Mx1, 1.0), 0.0)


def _norm(s, scale, over):
  return jnp.sqrt(_sum(jnp.square(s * scale), over))


def _sum(s, over):
  sum_Mx1 = jnp.sum(s, axis=-1, keepdims=True)
  return jax.lax.psum(sum_Mx1, over) if over else sum_Mx1


def _largest(s, over):
  largest_Mx1 = jnp.max(s, axis=-1, keepdims=True)
  return jax.lax.pmax(largest_Mx1, over) if over else largest_Mx1


def gelu_by(normal_cdf: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
  """x Φ(x) and its derivative, of a function that computes Φ."""

  @jax.custom_jvp
  def gelu(x):
    return x * normal_cdf(x)

  @gelu.defjvp
  def gelu_jvp(primals, tangents):
    # The slope as one number: the backward pass then has one array of scores' size and not three.
    (x,), (dx,) = primals, tangents
    cdf = normal_cdf(x)
    density = jnp.exp(-0.5 * jnp.square(x)) * (1.0 / math.sqrt(2.0 * math.pi))
    return x * cdf, (cdf + x * density) * dx

  return gelu


def _gelu_erf_tail(x, top):
  # GeLU(x) / φ(top), by Mills' ratio: x Φ(x) / φ(x) = −(1 − 1/(x² + 3)) to 2e-5 at −8 and better below,
  # which cancels between the scores of a row to 1e-6.
  return -(1.0 - 1.0 / (x * x + 3.0)) * jnp.exp(-0.5 * (x - top) * (x + top))


def _gelu_tanh(x):
  # ½(1 + tanh(z/2)) is sigmoid(z), which keeps its precision for negative z. It is 0 or 1 in float32
  # long before |x| = 15; clipping keeps x³ and its slope finite.
  c = jnp.clip(x, -15.0, 15.0)
  return x * jax.nn.sigmoid(_TANH_SLOPE * (c + _TANH_CUBIC * c**3))


def _gelu_tanh_tail(x, top):
  # GeLU(x) / |GeLU(top)|: far below 0, sigmoid(z) is exp(z).
  rise = _TANH_SLOPE * (x - top) * (1.0 + _TANH_CUBIC * (x * x + x * top + top * top))
  return -(x / top) * jnp.exp(rise)


class _Gelu(NamedTuple):
  """Ways to compute a GeLU.

  Attributes:
    value: GeLU(x) to 1e-6 or its own rounding; a third of the time of `precise`.
    precise: GeLU(x) to its own rounding, down to x = −8.
    tail: (x, top), for x ≤ top ≤ −8, is GeLU(x) times a factor of `top` alone.
  """

  value: Callable[[jax.Array], jax.Array]
  precise: Callable[[jax.Array], jax.Array]
  tail: Callable[[jax.Array, jax.Array], jax.Array]


GELUS = {
  "erf": _Gelu(
    gelu_by(lambda x: 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))),
    gelu_by(lambda x: 0.5 * jax.lax.erfc(x * -math.sqrt(0.5))),
    _gelu_erf_tail,
  ),
  "tanh": _Gelu(_gelu_tanh, _gelu_tanh, _gelu_tanh_tail),
}
