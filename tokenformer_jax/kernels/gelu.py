"""GELUs for kernels on TPUs, built from operations that Mosaic, the compiler of TPU kernels, supports."""

import functools
import math

import jax
import jax.numpy as jnp

from tokenformer_jax.nn.theta import GELUS, gelu_from_cdf

# Mosaic has no erfc. These are the coefficients of Cephes' erfcf, which is 1 − erf(x) below 1, and exp(−x²) times a
# polynomial in 1/x² above; one polynomial up to 2, another from 2 on.
_ERFC_TO_2 = (
  2.326819970068386e-2,
  -1.387039388740657e-1,
  3.687424674597105e-1,
  -5.824733027278666e-1,
  6.210004621745983e-1,
  -4.944515323274145e-1,
  3.404879937665872e-1,
  -2.741127028184656e-1,
  5.638259427386472e-1,
)
_ERFC_FROM_2 = (
  -1.047766399936249e1,
  1.297719955372516e1,
  -7.495518717768503,
  2.921019019210786,
  -1.015265279202700,
  4.218463358204948e-1,
  -2.820767439740514e-1,
  5.641895067754075e-1,
)


def _erfc(x):
  """1 − erf(x) with a relative error of at most 3e-6."""
  size = jnp.minimum(jnp.maximum(jnp.abs(x), 1.0), 14.0)
  inverse = 1.0 / size
  square = inverse * inverse
  near, far = (
    functools.reduce(lambda sum, c: sum * square + c, coefficients[1:], jnp.full_like(x, coefficients[0]))
    for coefficients in (_ERFC_TO_2, _ERFC_FROM_2)
  )
  tail = jnp.exp(-size * size) * inverse * jnp.where(size < 2.0, near, far)
  return jnp.where(jnp.abs(x) < 1.0, 1.0 - jax.lax.erf(jnp.clip(x, -1.0, 1.0)), jnp.where(x > 0, tail, 2.0 - tail))


# `nn.theta.GELUS`, with the erfc above in the precise form.
MOSAIC_GELUS = GELUS | {"erf": GELUS["erf"]._replace(precise=gelu_from_cdf(lambda x: 0.5 * _erfc(x * -math.sqrt(0.5))))}
