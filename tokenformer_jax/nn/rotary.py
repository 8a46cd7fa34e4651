"""Rotary position embedding on the first channels of each head, in GPT-NeoX's split-halves convention."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokenformer_jax.kernels.products import sum_dtype

# (cos, sin) of every position's angles.
Rotation = tuple[Float[Array, "batch time 1 half"], Float[Array, "batch time 1 half"]]


def rotation(positions: Int[Array, "batch time"], rotary_dims: int, base: float) -> Rotation:
  """(cos, sin) of position · base^(−2i / rotary_dims), each float32 [B, T, 1, rotary_dims / 2].

  Args:
    positions: the position of each token, [B, T].
    rotary_dims: how many channels of each head are rotated; even, and 0 rotates none.
    base: the base of the frequencies, such as 10,000.
  """
  frequencies = base ** (-jnp.arange(0, rotary_dims, 2, dtype=jnp.float32) / max(rotary_dims, 1))
  angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  x: Float[Array, "batch time heads channels"], cos_sin: Rotation
) -> Float[Array, "batch time heads channels"]:
  """Rotates channel i with channel i + rotary_dims / 2, for i < rotary_dims / 2; the other channels pass through.

  The rotation is computed in float32 or wider and rounded once, to x's dtype.
  """
  wide = sum_dtype(x.dtype)
  cos, sin = (table.astype(wide) for table in cos_sin)
  half = cos.shape[-1]
  first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
  first, second = first.astype(wide), second.astype(wide)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)
