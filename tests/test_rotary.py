"""The rotary embedding equals the oracle, and rotations compose."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tokenformer_jax.nn.rotary import rotate, rotation

POSITIONS = np.array([[0, 1, 2, 5, 100, 2047]], np.int32)


def random_heads(dtype=np.float32):
  return jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 3, 8)), dtype)


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize("dims", [0, 2, 6, 8])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 5e-4), (jnp.bfloat16, 0.02)])
def test_rotation_equals_the_oracle(dims, dtype, tolerance):
  """The float32 table has an error of 1e-7 for each radian of the angle, which goes up to 2047 here."""
  x = random_heads(dtype)
  rotated = rotate(x, rotation(POSITIONS, dims, 10_000.0))
  assert rotated.dtype == dtype
  expected = oracle.rotary(np.asarray(x, np.float64), POSITIONS, dims, 10_000.0)
  np.testing.assert_allclose(np.asarray(rotated, np.float64), expected, atol=tolerance)
  np.testing.assert_array_equal(rotated[..., dims:], x[..., dims:])


def test_bfloat16_is_rounded_once():
  """A bfloat16 array is rotated in float32, and the result is rounded to bfloat16."""
  x, cos_sin = random_heads(jnp.bfloat16), rotation(POSITIONS, 8, 10_000.0)
  np.testing.assert_array_equal(rotate(x, cos_sin), rotate(x.astype(jnp.float32), cos_sin).astype(jnp.bfloat16))


def test_rotations_add_up_and_keep_lengths():
  x = random_heads()
  first, then, both = (
    rotation(positions, 8, 100.0) for positions in (POSITIONS, POSITIONS[:, ::-1], POSITIONS + POSITIONS[:, ::-1])
  )
  at_once = rotate(x, both)
  np.testing.assert_allclose(rotate(rotate(x, first), then), at_once, atol=2e-3)
  np.testing.assert_allclose(jnp.linalg.norm(at_once, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
