"""Θ: from a row of scores s [N] to the weights of the values, in float32 or wider.

    l2_norm_gelu   GeLU(τ · s / ‖s‖₂)              τ = √N    the paper's Θ
    gelu_l2_norm   τ · g / ‖g‖₂,  g = GeLU(s)      τ = √N
    softmax        τ · softmax(s)                  τ = N

The released code has no guard: a row of zero scores gives NaN there. Here value and gradient are finite wherever the
scores are. A row with ‖s‖₂ < 1e-12 counts as zeros: the L2 variants give it weight 0 and gradient 0. Above that, they
are the formula, up to scores of 1e18.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A row with ‖s‖₂ below this counts as a row of zeros.
_ZERO_NORM = 1e-12
# Where the largest score of a row is below this, its GeLUs are near the end of float32's range, or past it.
_GELU_TAIL = -8.0
_TANH_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715
# Squares of s · 2⁻¹³ neither underflow at ‖s‖₂ = 1e-12 nor overflow at s = 1e18, for up to 10⁶ tokens.
_SQUARE_SCALE = 2.0**-13


class Gelu(NamedTuple):
  """Ways to compute one GeLU.

  Attributes:
    value: GeLU(x) to 1e-6 or its own rounding, in a third of the time of `precise`.
    precise: GeLU(x) to its own rounding, down to x = −8.
    tail: (x, top) -> GeLU(x) times a factor that depends on `top` alone, for x ≤ top ≤ −8.
  """

  value: Callable[[jax.Array], jax.Array]
  precise: Callable[[jax.Array], jax.Array]
  tail: Callable[[jax.Array, jax.Array], jax.Array]


def check_choices(theta: str, gelu: str) -> None:
  """Raises ValueError for an unknown `theta` or `gelu`."""
  if theta not in THETAS:
    raise ValueError(f"theta={theta!r}: choose one of {', '.join(THETAS)}.")
  if gelu not in GELUS:
    raise ValueError(f"gelu={gelu!r}: choose one of {', '.join(GELUS)}.")


def initial_tau(theta: str, num_tokens: int) -> float:
  """τ of a new layer with `num_tokens` parameter tokens: √N for the L2 variants, N for softmax."""
  return float(num_tokens) if theta == "softmax" else math.sqrt(num_tokens)


# A Θ is a function of scores [m, n], τ and a GELU. The L2 variants also take `over`: the mesh axes that split the
# tokens, where each device holds some of them and the sums over tokens continue across devices.
def _l2_norm_gelu(s, tau, gelu, over=()):
  return gelu.value(_scaled_to_norm(tau, s, jnp.asarray(_SQUARE_SCALE, s.dtype), _ZERO_NORM, over))


def _gelu_l2_norm(s, tau, gelu, over=()):
  top = _largest(jax.lax.stop_gradient(s), over)
  tail = gelu.tail(*(jnp.clip(a, -1e18, _GELU_TAIL) for a in (s, top)))
  g = jnp.where(top < _GELU_TAIL, tail, gelu.precise(s))
  g = jnp.where(_norm(s, _SQUARE_SCALE, over) < _ZERO_NORM * _SQUARE_SCALE, 0.0, g)
  # The range of GeLU's values is too wide for one fixed scale, so each row gets its own.
  largest = _largest(jnp.abs(jax.lax.stop_gradient(g)), over)
  return _scaled_to_norm(tau, g, 1.0 / jnp.clip(largest, 1e-37, 1e37), 1e-37, over)


def _softmax(s, tau, gelu):
  del gelu
  return tau * jax.nn.softmax(s, axis=-1)


THETAS = {"l2_norm_gelu": _l2_norm_gelu, "gelu_l2_norm": _gelu_l2_norm, "softmax": _softmax}


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _scaled_to_norm(
  norm: Float[Array, "..."], s: Float[Array, "m n"], scale: Float[Array, "..."], zero_norm: float, over=()
) -> Float[Array, "m n"]:
  """norm · s / ‖s‖₂ along the last axis; 0, with zero gradient, where ‖s‖₂ < `zero_norm`.

  `norm` and `scale` are scalars or [m, 1]. The squares are taken of s · `scale`, which keeps their sum within float32.
  """
  return s * (norm * _inverse_norm(s, scale, zero_norm, over))


@_scaled_to_norm.defjvp
def _scaled_to_norm_jvp(zero_norm, over, primals, tangents):
  # The derivative is written out, because the chain rule for s/‖s‖ passes through ‖s‖³, which leaves float32's range.
  # The projection is computed from the very term that it is subtracted from: where d_s lies along s, exactly 0 is left.
  norm, s, scale = primals
  d_norm, d_s, _ = tangents
  inverse = _inverse_norm(s, scale, zero_norm, over)
  factor, unit = norm * inverse, s * inverse
  d_s = factor * d_s
  return s * factor, d_s - unit * _sum(unit * d_s, over) + unit * d_norm


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


def gelu_from_cdf(normal_cdf: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
  """x Φ(x) with its derivative, given a function that computes Φ."""

  @jax.custom_jvp
  def gelu(x):
    return x * normal_cdf(x)

  @gelu.defjvp
  def gelu_jvp(primals, tangents):
    # The slope is computed as one number, so that the backward pass has one array of the scores' size and not three.
    (x,), (d_x,) = primals, tangents
    cdf = normal_cdf(x)
    density = jnp.exp(-0.5 * jnp.square(x)) * (1.0 / math.sqrt(2.0 * math.pi))
    return x * cdf, (cdf + x * density) * d_x

  return gelu


def _gelu_erf_tail(x, top):
  # GeLU(x) / φ(top), by Mills' ratio: x Φ(x) / φ(x) = −(1 − 1/(x² + 3)) to 2e-5 at −8 and better below,
  # an error that cancels between the scores of a row to 1e-6.
  return -(1.0 - 1.0 / (x * x + 3.0)) * jnp.exp(-0.5 * (x - top) * (x + top))


def _gelu_tanh(x):
  # ½(1 + tanh(z/2)) is sigmoid(z), which keeps its precision for negative z. It is 0 or 1 in float32 long before
  # |x| = 15, and clipping there keeps x³ and its slope finite.
  c = jnp.clip(x, -15.0, 15.0)
  return x * jax.nn.sigmoid(_TANH_SLOPE * (c + _TANH_CUBIC * c**3))


def _gelu_tanh_tail(x, top):
  # GeLU(x) / |GeLU(top)|: far below 0, sigmoid(z) is exp(z).
  rise = _TANH_SLOPE * (x - top) * (1.0 + _TANH_CUBIC * (x * x + x * top + top * top))
  return -(x / top) * jnp.exp(rise)


GELUS = {
  "erf": Gelu(
    value=gelu_from_cdf(lambda x: 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))),
    precise=gelu_from_cdf(lambda x: 0.5 * jax.lax.erfc(x * -math.sqrt(0.5))),
    tail=_gelu_erf_tail,
  ),
  "tanh": Gelu(_gelu_tanh, _gelu_tanh, _gelu_tanh_tail),
}
