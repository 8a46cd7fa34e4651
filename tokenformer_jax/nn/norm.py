"""Norms over the channels of each token."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokenformer_jax.config.parts import NORMS
from tokenformer_jax.config.validation import require_choice
from tokenformer_jax.kernels.products import sum_dtype
from tokenformer_jax.nn.parameters import parameter


class Norm(nnx.Module):
  """A norm over the last axis, [..., size] -> [..., size] in x's dtype; computed in float32 or wider.

      plain            (x − mean x) / √(var x + ε), with the biased variance
      layer_norm       plain · scale + bias
      rms_norm         x / √(mean x² + ε) · scale
      rms_norm_outer   x / (√(mean x²) + ε) · scale
      none             x

  Args:
    kind: one of the above.
    size: the number of channels.
    epsilon: ε.
    rngs: as for every layer; whatever its keys, the initial scale is 1 and the initial bias is 0.

  Raises:
    ValueError: an unknown kind.
  """

  scale: nnx.Param | None = None
  bias: nnx.Param | None = None

  def __init__(self, kind: str, size: int, epsilon: float = 1e-5, *, rngs: nnx.Rngs):
    require_choice("norm", kind, NORMS)
    self.kind = kind
    self.epsilon = epsilon
    if kind in ("layer_norm", "rms_norm", "rms_norm_outer"):
      self.scale = parameter(rngs, (size,), ("norm",), nnx.initializers.ones, decayed=False)
    if kind == "layer_norm":
      self.bias = parameter(rngs, (size,), ("norm",), nnx.initializers.zeros, decayed=False)

  def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
    if self.kind == "none":
      return x
    normalised = _normalised(x, self.kind, self.epsilon)
    if self.scale is not None:
      normalised = normalised * _along_channels(self.scale[...], normalised)
    if self.bias is not None:
      normalised = normalised + _along_channels(self.bias[...], normalised)
    return normalised.astype(x.dtype)


def _along_channels(weight: Array, x: Array) -> Array:
  return jnp.expand_dims(weight.astype(x.dtype), range(x.ndim - 1))


# Without rematerialisation the backward pass would keep float32 intermediate results beside x.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(1, 2))
def _normalised(x, kind, epsilon):
  wide = x.astype(sum_dtype(x.dtype))
  if kind == "rms_norm":
    return wide * jax.lax.rsqrt(_mean_square(wide) + epsilon)
  if kind == "rms_norm_outer":
    return wide / (_root(_mean_square(wide)) + epsilon)
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(_mean_square(centred) + epsilon)


def _mean_square(x):
  return jnp.mean(jnp.square(x), axis=-1, keepdims=True)


def _root(square):
  """√x, whose derivative at 0 is 0 instead of infinite."""
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
