"""What a router that chooses among experts, or among groups of parameter tokens, computes and says of its choices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenformer_jax.config.parts import FeedForwardConfig
from tokenformer_jax.kernels.products import sum_dtype


def router_scores(
  x: Float[Array, "batch time embed"], table: Float[Array, "entry embed"]
) -> Float[Array, "batch time entry"]:
  """x · tableᵀ in float32 or wider."""
  wide = sum_dtype(x.dtype)
  return jnp.einsum("btd,ed->bte", x.astype(wide), table.astype(wide))


def router_said(
  part: FeedForwardConfig,
  scores: Float[Array, "batch time entry"],
  chosen: Int[Array, "batch time choice"],
  num_balanced: int,
  real: Bool[Array, "batch time"] | None,
) -> dict[str, Array]:
  """The losses with their coefficients, and how evenly the choices are spread, over the real tokens.

      balance    E Σ f_e P_e, with f the shares of the balanced entries in all choices of such, and P the means of softmax
                 over these entries: 1 where all are equal (arXiv 2101.03961, eq. 4)
      router_z   the mean of log² Σ exp(h), over all entries (arXiv 2202.08906, eq. 5)

  Args:
    part: the coefficients.
    scores: h.
    chosen: the entries that each token chose.
    num_balanced: the number of entries, from the first on, that are balanced; the others are free of this loss's pull.
    real: which tokens are not padding; None is all.
  """
  real = jnp.ones(scores.shape[:2], scores.dtype) if real is None else real.astype(scores.dtype)
  num_real = jnp.maximum(jnp.sum(real), 1.0)
  load = jnp.sum(jax.nn.one_hot(chosen, num_balanced, dtype=scores.dtype) * real[:, :, None, None], axis=(0, 1, 2))
  load = load / jnp.maximum(jnp.sum(load), 1.0)
  chance = jnp.sum(jax.nn.softmax(scores[..., :num_balanced], axis=-1) * real[:, :, None], axis=(0, 1)) / num_real
  said = {
    "loss/balance": part.balance * num_balanced * jnp.sum(load * chance),
    "router/busiest": num_balanced * jnp.max(load),
  }
  if part.router_z:
    z = jnp.sum(jnp.square(jax.nn.logsumexp(scores, axis=-1)) * real) / num_real
    said["loss/router_z"] = part.router_z * z
  return said
