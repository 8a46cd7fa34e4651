"""The import hook that `conftest.py` installs checks annotated shapes and dtypes."""

import jax.numpy as jnp
import jaxtyping
import pytest

from tokenformer_jax.nn.rotary import rotate, rotation


def test_an_axis_too_few_is_found():
  with pytest.raises(jaxtyping.TypeCheckError, match="typechecking parameter 'positions'"):
    rotation(jnp.zeros(4, jnp.int32), 2, 10_000.0)


def test_a_wrong_dtype_is_found():
  with pytest.raises(jaxtyping.TypeCheckError, match="typechecking parameter 'x'"):
    rotate(jnp.zeros((1, 4, 1, 2), jnp.int32), rotation(jnp.zeros((1, 4), jnp.int32), 2, 10_000.0))


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_check_can_be_switched_off_for_tests_of_error_messages():
  with pytest.raises(IndexError):
    rotation(jnp.zeros(4, jnp.int32), 2, 10_000.0)
