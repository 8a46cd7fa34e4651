"""Matrix products in the forms that XLA runs fastest on each backend.

All of them are `x · tableᵀ` or `weights · table` with sums in float32 or wider. What they do beyond `jnp.einsum` is a
matter of speed alone: a change of layout, of the order of the two sides, or of the gradient's products.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenformer_jax.distributed.axes import is_split

# XLA:CPU copies the right side of a product into another layout. Up to `_FEW_ROWS` rows the table is the left side
# instead; from `_MANY_ROWS` rows on, the products of the gradient are transposed.
_FEW_ROWS, _MANY_ROWS = 64, 512


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype of sums and norms over arrays of `dtype`: float32, but float64 for float64."""
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def row_products(x: Float[Array, "m d"], table: Float[Array, "n d"]) -> Float[Array, "m n"]:
  """x · tableᵀ in the `sum_dtype` of x."""
  if len(x) > _FEW_ROWS or x.dtype != sum_dtype(x.dtype):  # XLA:CPU has only one form of a bfloat16 product.
    return _x_on_the_left(x, table)
  return jax.lax.platform_dependent(x, table, cpu=_table_on_the_left, default=_x_on_the_left)


def weighted_sums(weights: Float[Array, "m n"], table: Float[Array, "n e"]) -> Float[Array, "m e"]:
  """weights · table in the `sum_dtype` of the weights."""
  if len(weights) != 1:
    return _weighted_sums(weights, table)
  # A single row: each form reads the table once and at the memory's rate.
  return jax.lax.platform_dependent(
    weights, table, cpu=_weighted_sum_in_blocks, cuda=_weighted_sum_of_two_rows, default=_weighted_sums
  )


def with_fast_gradient(table: Float[Array, "n d"], x: Float[Array, "*batch channels"]) -> Float[Array, "n d"]:
  """The table itself, in a form whose gradient from products with the rows of `x` is computed the fastest."""
  num_tokens, channels = table.shape
  # The lower bound is far from small: XLA:CPU of jax 0.10 aborts where such products have a side of 3 or less and
  # are batched.
  transposed = x.size >= _MANY_ROWS * x.shape[-1] and 64 <= channels < min(num_tokens, 1024)
  return _with_transposed_gradient(table) if transposed and x.dtype == sum_dtype(x.dtype) else table


def by_rows(function: Callable[[Array], Array], x: Float[Array, "*batch d"]) -> Float[Array, "*batch e"]:
  """`function` [M, d] -> [M, e] of all rows of x, flattened: XLA:CPU takes half of the time of products on [B, T, d]."""
  if x.ndim > 2 and is_split("time"):
    # Flattened rows [B·T] cannot be split along both B and T, so each row of the batch is computed on its own.
    return jax.vmap(lambda x: by_rows(function, x))(x)
  y_MxE = function(x.reshape(-1, x.shape[-1]))
  return y_MxE.reshape(*x.shape[:-1], y_MxE.shape[-1])


def wide_einsum(equation: str, a: Array, b: Array) -> Array:
  """`jnp.einsum` of two arrays of one dtype, with sums and result in its `sum_dtype`.

  Where that is wider than the dtype, the gradient's products are also of two narrow arrays with sums in the wider
  dtype, and there is no forward-mode derivative. The chain rule alone would multiply wide arrays, at half of a GPU's
  rate or less.
  """
  if a.dtype == sum_dtype(a.dtype):
    return jnp.einsum(equation, a, b)
  return _widening_einsum(equation, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _widening_einsum(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=sum_dtype(a.dtype))


def _widening_einsum_forward(equation, a, b):
  # This repeats the product itself, so that remat policies see it.
  return jnp.einsum(equation, a, b, preferred_element_type=sum_dtype(a.dtype)), (a, b)


def _widening_einsum_backward(equation, saved, d_y):
  a, b = saved
  operands, of_y = equation.split("->")
  of_a, of_b = operands.split(",")
  d_y = d_y.astype(a.dtype)
  return (
    _widening_einsum(f"{of_y},{of_b}->{of_a}", d_y, b).astype(a.dtype),
    _widening_einsum(f"{of_y},{of_a}->{of_b}", d_y, a).astype(b.dtype),
  )


_widening_einsum.defvjp(_widening_einsum_forward, _widening_einsum_backward)


def _x_on_the_left(x_MxD, table_NxD):
  return wide_einsum("md,nd->mn", x_MxD, table_NxD)


def _table_on_the_left(x_MxD, table_NxD):
  # Without the barrier XLA rewrites the transpose of a product as the product with its sides exchanged.
  return jax.lax.optimization_barrier(wide_einsum("nd,md->nm", table_NxD, x_MxD)).T


def _weighted_sums(weights_MxN, table_NxE):
  return wide_einsum("mn,ne->me", weights_MxN, table_NxE)


def _weighted_sum_in_blocks(weights_1xN, table_NxE):
  # XLA:CPU gives each thread a block of tokens; without blocks, each would get columns, which are slow to read.
  blocks = math.gcd(weights_1xN.shape[1], 16)
  table_BxNxE = table_NxE.reshape(blocks, -1, table_NxE.shape[1])
  return jnp.sum(wide_einsum("bn,bne->be", weights_1xN.reshape(blocks, -1), table_BxNxE), axis=0, keepdims=True)


def _weighted_sum_of_two_rows(weights_1xN, table_NxE):
  # XLA:GPU writes out all multiplications of a single row in float32. For two rows it emits a matrix product.
  return _weighted_sums(jnp.pad(weights_1xN, ((0, 1), (0, 0))), table_NxE)[:1]


@jax.custom_jvp
def _with_transposed_gradient(table_NxD):
  return table_NxD


@_with_transposed_gradient.defjvp
def _with_transposed_gradient_jvp(primals, tangents):
  # XLA:CPU sums over rows faster with the wider side on the right: a gradient [N, d] as the transpose of [d, N].
  (tangent_NxD,) = tangents
  return *primals, jax.lax.platform_dependent(
    tangent_NxD, cpu=lambda tangent: jax.lax.optimization_barrier(tangent.T).T, default=lambda tangent: tangent
  )
