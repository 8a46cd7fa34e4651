"""Pattention: attention between input tokens and learned parameter tokens (arXiv 2410.23168, eq. 4–5).

    y = Θ(x Kᵀ) V        x [..., d_in],  K [N, d_in],  V [N, d_out]

Θ turns a row of scores into weights, with a scale τ inside it (`nn/theta.py`):

    l2_norm_gelu   Θ(s) = GeLU(τ · s / ‖s‖₂),  τ = √N in a new layer

τ is an argument and not a formula of N, so that rows can be added without changing the function.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Num

from tokenformer_jax.kernels.products import row_products, sum_dtype, weighted_sums, with_fast_gradient
from tokenformer_jax.nn.remat import SCORES, keep_scores
from tokenformer_jax.nn.theta import GELUS, THETAS, check_choices


@functools.partial(
  jax.tree_util.register_dataclass, meta_fields=[], data_fields=["keys", "values", "tau", "key_scales", "value_scales"]
)
@dataclasses.dataclass(frozen=True)
class ParameterTokens:
  """N parameter tokens: `keys` [N, d_in], `values` [N, d_out] and the scale `tau` [] inside Θ.

  Keys and values in int8 come with the scales that multiply them: `key_scales` [N] and `value_scales` [d_out].
  """

  keys: Num[Array, "param_token d_in"]
  values: Num[Array, "param_token d_out"]
  tau: Float[Array, ""]
  key_scales: Float[Array, "param_token"] | None = None
  value_scales: Float[Array, "d_out"] | None = None


def pattention(
  x: Float[Array, "*batch d_in"], tokens: ParameterTokens, theta: str = "l2_norm_gelu", gelu: str = "erf"
) -> Float[Array, "*batch d_out"]:
  """Θ(x Kᵀ) V in x's dtype, with Θ and all sums in float32 (float64 for a float64 x).

  The gradient keeps the scores and recomputes Θ, whose intermediate results would be up to sixteen arrays of their
  size. This holds inside a scan; outside of one, XLA may keep them. The scores of a bfloat16 x are kept in bfloat16 for
  `l2_norm_gelu`, and in float32 for the other Θs, in which they are exponents.

  Args:
    x: inputs [..., d_in], float32 or bfloat16, which is also the dtype of the products' operands. There may be no rows.
    tokens: keys [N, d_in], values [N, d_out], τ []; `nn.theta.initial_tau` gives τ of a new layer.
    theta: `l2_norm_gelu`, `gelu_l2_norm` or `softmax`.
    gelu: `erf` (exact, as released) or `tanh` (its usual approximation).

  Returns:
    [..., d_out] in x's dtype.

  Raises:
    ValueError: unknown `theta` or `gelu`, or shapes that do not fit.
  """

  @keep_scores
  def attend(x: Array, tokens: ParameterTokens) -> Array:
    weights_MxN = token_weights(x, tokens, theta, gelu).astype(x.dtype)
    return weighted_sums(weights_MxN, with_fast_gradient(tokens.values.astype(x.dtype), x))

  y_MxE = attend(x, tokens)
  if tokens.value_scales is not None:
    y_MxE = y_MxE * tokens.value_scales.astype(y_MxE.dtype)[None]
  return y_MxE.astype(x.dtype).reshape(*x.shape[:-1], tokens.values.shape[1])


def token_weights(
  x: Float[Array, "*batch d_in"], tokens: ParameterTokens, theta: str = "l2_norm_gelu", gelu: str = "erf"
) -> Float[Array, "rows param_token"]:
  """Θ(x Kᵀ), the weights of the values in `pattention`: one row for each of x's, in float32 or wider."""
  _check(x, tokens, theta, gelu)
  # The rows are flattened, because XLA's CPU products on [B·T, d] take about half the time of those on [B, T, d].
  scores_MxN = row_products(x.reshape(-1, x.shape[-1]), with_fast_gradient(tokens.keys.astype(x.dtype), x))
  if tokens.key_scales is not None:
    scores_MxN = scores_MxN * tokens.key_scales.astype(scores_MxN.dtype)[None]
  if theta == "l2_norm_gelu" and x.dtype == jnp.bfloat16:
    scores_MxN = scores_MxN.astype(x.dtype)  # bfloat16 has float32's range.
  scores_MxN = checkpoint_name(scores_MxN, SCORES)
  scores_MxN = scores_MxN.astype(sum_dtype(scores_MxN.dtype))
  return THETAS[theta](scores_MxN, jnp.asarray(tokens.tau, scores_MxN.dtype), GELUS[gelu])


def _check(x: Array, tokens: ParameterTokens, theta: str, gelu: str) -> None:
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
      unit = "token" if name == "key" else "output channel"
      raise ValueError(f"{name}_scales {scales.shape}: expected {(size,)}, one for each {unit}.")
