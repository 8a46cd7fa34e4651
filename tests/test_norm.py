"""Norms equal the oracle, round once in bfloat16, and keep only their input for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import oracle
from tokenformer_jax.nn.norm import Norm

pytestmark = pytest.mark.usefixtures("strict_dtypes")

EPSILON = 1e-5


def random_inputs(dtype=np.float32):
  """Rows of very different sizes and offsets; the last is constant."""
  rng = np.random.default_rng(0)
  sizes = np.array([1e-4, 1.0, 100.0, 0.0])[:, None, None]
  return jnp.asarray(rng.normal(size=(4, 3, 32)) * sizes + 2.0 * sizes + (sizes == 0.0), dtype)


def expected(kind, x):
  x = np.asarray(x, np.float64)
  square = np.mean(np.square(x), axis=-1, keepdims=True)
  match kind:
    case "rms_norm":
      return x / np.sqrt(square + EPSILON)
    case "rms_norm_outer":
      return x / (np.sqrt(square) + EPSILON)
    case "none":
      return x
  return oracle.layer_norm(x)


def moved(norm):
  """The norm with other scales and biases, where it has them."""
  for name, values in (("scale", jnp.linspace(0.5, 2.0, 32)), ("bias", jnp.linspace(-1.0, 1.0, 32))):
    if getattr(norm, name) is not None:
      getattr(norm, name)[...] = values
  return norm


@pytest.mark.parametrize("kind", ["plain", "layer_norm", "rms_norm", "rms_norm_outer", "none"])
def test_norm_equals_the_oracle(kind):
  x, norm = random_inputs(), Norm(kind, 32, EPSILON, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(norm(x), expected(kind, x), atol=2e-5, rtol=1e-6)
  assert {name for name in ("scale", "bias") if getattr(norm, name) is not None} == {
    "plain": set(),
    "layer_norm": {"scale", "bias"},
    "none": set(),
  }.get(kind, {"scale"})


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "rms_norm_outer"])
def test_bfloat16_is_rounded_once(kind):
  """Mean, variance, scale and bias are computed in float32."""
  x = random_inputs(jnp.bfloat16)
  norm = moved(Norm(kind, 32, rngs=nnx.Rngs(0)))
  np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_the_backward_pass_keeps_only_the_input():
  _, pull = jax.vjp(Norm("plain", 32, rngs=nnx.Rngs(0)), random_inputs(jnp.bfloat16))
  assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(pull)] == [((4, 3, 32), jnp.bfloat16)]


@pytest.mark.parametrize("kind", ["rms_norm", "rms_norm_outer"])
def test_a_row_of_zeros_has_a_finite_gradient(kind):
  norm = Norm(kind, 32, rngs=nnx.Rngs(0))
  assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(norm(x) ** 2))(jnp.zeros((2, 32)))))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_scale_and_bias(lead):
  norm, plain = (Norm(kind, 32, rngs=nnx.Rngs(0)) for kind in ("layer_norm", "plain"))
  x = jnp.asarray(np.random.default_rng(1).normal(size=(*lead, 32)), jnp.float32)
  np.testing.assert_array_equal(norm(x), plain(x))
  scale, bias = np.random.default_rng(2).normal(size=(2, 32)).astype(np.float32)
  norm.scale[...], norm.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
  np.testing.assert_allclose(norm(x), np.asarray(plain(x)) * scale + bias, atol=1e-6)
