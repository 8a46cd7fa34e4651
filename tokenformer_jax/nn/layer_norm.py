"""Layer normalisation: without parameters inside the blocks, with them once at the end."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tokenformer_jax.kernels.products import sum_dtype
from tokenformer_jax.nn.parameters import parameter

EPSILON = 1e-5


def layer_norm(x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
  """Zero mean and unit (biased) variance over the last axis, [..., d] -> [..., d] in x's dtype.

  Mean and variance are computed in float32 or wider; ε = 1e-5 is added to the variance.
  """
  return _normalised(x).astype(x.dtype)


class LayerNorm(nnx.Module):
  """`layer_norm(x) · scale + bias`, [..., size] -> [..., size] in x's dtype.

  Args:
    size: the number of channels.
    rngs: as for every layer; whatever its keys, the initial scale is 1 and the initial bias is 0.
  """

  def __init__(self, size: int, *, rngs: nnx.Rngs):
    self.scale = parameter(rngs, (size,), ("norm",), nnx.initializers.ones)
    self.bias = parameter(rngs, (size,), ("norm",), nnx.initializers.zeros)

  def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
    normalised = _normalised(x)
    scale, bias = (
      jnp.expand_dims(weight[...].astype(normalised.dtype), range(x.ndim - 1)) for weight in (self.scale, self.bias)
    )
    return (normalised * scale + bias).astype(x.dtype)


# Without rematerialisation the backward pass would keep float32 intermediate results beside x.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _normalised(x):
  wide = x.astype(sum_dtype(x.dtype))
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + EPSILON)
