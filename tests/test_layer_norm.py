"""Layer norm equals the oracle, and rounds once in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import oracle
from tokenformer_jax.nn.layer_norm import LayerNorm, layer_norm

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def random_inputs(dtype=np.float32):
  """Rows of very different sizes and offsets; the last is constant."""
  rng = np.random.default_rng(0)
  sizes = np.array([1e-4, 1.0, 100.0, 0.0])[:, None, None]
  return jnp.asarray(rng.normal(size=(4, 3, 32)) * sizes + 2.0 * sizes + (sizes == 0.0), dtype)


def test_norm_equals_the_oracle():
  x = random_inputs()
  np.testing.assert_allclose(layer_norm(x), oracle.layer_norm(np.asarray(x, np.float64)), atol=2e-5)


def test_bfloat16_is_rounded_once():
  """Mean, variance, scale and bias are computed in float32."""
  x = random_inputs(jnp.bfloat16)
  np.testing.assert_array_equal(layer_norm(x), layer_norm(x.astype(jnp.float32)).astype(jnp.bfloat16))
  norm = LayerNorm(32, rngs=nnx.Rngs(0))
  norm.scale[...], norm.bias[...] = jnp.linspace(0.5, 2.0, 32), jnp.linspace(-1.0, 1.0, 32)
  np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_the_backward_pass_keeps_only_the_input():
  _, pull = jax.vjp(layer_norm, random_inputs(jnp.bfloat16))
  assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(pull)] == [((4, 3, 32), jnp.bfloat16)]


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_scale_and_bias(lead):
  norm = LayerNorm(32, rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(1).normal(size=(*lead, 32)), jnp.float32)
  np.testing.assert_array_equal(norm(x), layer_norm(x))
  scale, bias = np.random.default_rng(2).normal(size=(2, 32)).astype(np.float32)
  norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
  np.testing.assert_allclose(norm(x), np.asarray(layer_norm(x)) * scale + bias, atol=1e-6)
