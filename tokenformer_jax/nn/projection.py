"""The projections of attention: parameter tokens or a matrix, from channels to channels."""

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.kernels.products import by_rows, weighted_sums, with_fast_gradient
from tokenformer_jax.nn.initializers import STD, value_std
from tokenformer_jax.nn.parameters import Axes, parameter
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.nn.remat import OUTPUT


class Dense(nnx.Module):
  """x W + bias, [..., d_in] -> [..., d_out] in x's dtype.

  Args:
    d_in, d_out: the number of channels.
    axes: the logical axes of the matrix [d_in, d_out].
    bias: whether there is a bias, 0 at first.
    init: the matrix's initialiser.
    rngs: parameters are drawn from `rngs.params()`.
  """

  def __init__(self, d_in: int, d_out: int, *, axes: Axes, bias: bool, init: nnx.Initializer, rngs: nnx.Rngs):
    self.weight = parameter(rngs, (d_in, d_out), axes, init)
    # Biases stay in float32: parameters with an axis `embed` are cast to the dtype of the products.
    bias_axes = (None if axes[1] == "embed" else axes[1],)
    self.bias = parameter(rngs, (d_out,), bias_axes, nnx.initializers.zeros, decayed=False) if bias else None

  def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
    weight = self.weight[...].astype(x.dtype)

    def product(x_MxD):
      y_MxE = weighted_sums(x_MxD, with_fast_gradient(weight, x_MxD))
      if self.bias is not None:
        y_MxE = y_MxE + self.bias[...].astype(y_MxE.dtype)[None]
      return y_MxE.astype(x.dtype)

    return checkpoint_name(by_rows(product, x), OUTPUT)


class IdentityPlus(nnx.Module):
  """α x + β Projection(x), whose projection gives 0 at first (arXiv 2311.01906, eq. 6).

  Args:
    projection: it becomes one that gives 0; see `give_zero`.
    beta: the initial β; the initial α is 1. Both are trained without decay.
    rngs: parameters are drawn from `rngs.params()`.
  """

  def __init__(self, projection: "Pattention | Dense", beta: float, *, rngs: nnx.Rngs):
    self.projection = give_zero(projection)
    self.alpha = parameter(rngs, (), (), nnx.initializers.constant(1.0), decayed=False)
    self.beta = parameter(rngs, (), (), nnx.initializers.constant(beta), decayed=False)

  def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
    return weighted(self.alpha[...], x) + weighted(self.beta[...], self.projection(x))


def weighted(gain: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
  """gain · x, multiplied in the wider of the two dtypes and rounded once to x's."""
  dtype = jnp.promote_types(gain.dtype, x.dtype)
  return (gain.astype(dtype) * x.astype(dtype)).astype(x.dtype)


def make_projection(
  config: ModelConfig,
  d_in: int,
  d_out: int,
  count: str,
  *,
  axes: Axes,
  init: nnx.Initializer,
  bias: bool = False,
  rngs: nnx.Rngs,
) -> Pattention | Dense:
  """A projection of the kind that `config.attention.projection` names.

  Args:
    config: sizes and choices of the model.
    d_in, d_out: the number of channels.
    count: the name of the count of its parameter tokens, of which a dense projection has none.
    axes, init, bias: of a dense projection; see `Dense`.
    rngs: parameters are drawn from `rngs.params()`.
  """
  if config.attention.projection == "dense":
    return Dense(d_in, d_out, axes=axes, bias=bias, init=init, rngs=rngs)
  return token_projection(config, d_in, d_out, count, rngs=rngs)


def token_projection(config: ModelConfig, d_in: int, d_out: int, count: str, *, rngs: nnx.Rngs) -> Pattention:
  """A `Pattention` layer with the choices and initialisation of `config`; arguments as in `make_projection`."""
  return Pattention(
    d_in,
    d_out,
    getattr(config, count),
    theta=config.theta,
    gelu=config.gelu,
    kernel=config.kernel,
    key_std=STD,
    value_std=value_std(config),
    count=count,
    rngs=rngs,
  )


def give_zero(projection: Pattention | Dense) -> Pattention | Dense:
  """The projection itself, with zeros in its matrix or in the values of its parameter tokens."""
  weight = projection.values if isinstance(projection, Pattention) else projection.weight
  weight[...] = jnp.zeros_like(weight[...])
  return projection
