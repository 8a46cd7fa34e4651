"""The layer is a drop-in for nnx.Linear."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tokenformer_jax as tf
from tests import oracle


class Regressor(nnx.Module):
  """A plain NNX model of a user, with a Pattention in the place of a linear layer."""

  def __init__(self, rngs):
    self.first = nnx.Linear(4, 16, rngs=rngs)
    self.second = tf.Pattention(16, 3, 32, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.tanh(self.first(x)))


def test_trains_inside_a_plain_model_and_keeps_tau():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)
  y = jnp.sin(x @ rng.normal(size=(4, 3)).astype(np.float32))
  model = Regressor(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adamw(3e-3, weight_decay=0.1), wrt=nnx.Param)
  before = jax.tree.map(np.array, nnx.state(model))

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(jnp.square(model(x) - y)))(model)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(model, optimizer)) for _ in range(30)]
  assert losses[-1] < 0.5 * losses[0]
  assert model.second.tau[...] == before["second"]["tau"][...] == np.sqrt(np.float32(32))
  for name in ("keys", "values"):
    assert np.all(getattr(model.second, name)[...] != before["second"][name][...])


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_the_layer_equals_the_equation(theta):
  layer = tf.Pattention(6, 5, 7, theta=theta, gelu="tanh", rngs=nnx.Rngs(0))
  x = np.random.default_rng(1).normal(size=(2, 3, 6)).astype(np.float32)
  keys, values = (np.asarray(array[...], np.float64) for array in (layer.keys, layer.values))
  np.testing.assert_allclose(layer(x), oracle.pattention(x, keys, values, theta, kind="tanh"), atol=1e-5)


def test_keys_and_values_are_the_only_parameters():
  layer = tf.Pattention(6, 5, 7, rngs=nnx.Rngs(0))
  shapes = {path[-1]: array.shape for path, array in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
  assert shapes == {"keys": (7, 6), "values": (7, 5)}


def test_default_initialisation_keeps_the_size_of_normalised_inputs():
  x = np.random.default_rng(2).normal(size=(256, 64)).astype(np.float32)
  for num_tokens in (16, 1024):
    y = tf.Pattention(64, 64, num_tokens, rngs=nnx.Rngs(0))(x)
    assert 0.3 < np.std(y) < 1.5


@pytest.mark.parametrize("size", ["d_in", "d_out", "num_tokens"])
def test_empty_layers_are_refused(size):
  sizes = {"d_in": 1, "d_out": 1, "num_tokens": 1, size: 0}
  with pytest.raises(ValueError, match=f"{size}=0: must be at least 1"):
    tf.Pattention(**sizes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("choice", [{"theta": "l2"}, {"gelu": "relu"}, {"kernel": "fuse"}])
def test_unknown_choices_are_refused(choice):
  with pytest.raises(ValueError, match="choose one of"):
    tf.Pattention(2, 2, 2, **choice, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_rows_give_no_rows_as_in_a_linear_layer(dtype):
  layer = tf.Pattention(6, 5, 7, rngs=nnx.Rngs(0))
  for shape in ((0, 6), (2, 0, 6)):
    x = jnp.zeros(shape, dtype)
    grads = nnx.grad(lambda layer: jnp.sum(layer(x)))(layer)
    assert (layer(x).shape, layer(x).dtype) == ((*shape[:-1], 5), dtype)
    assert not np.any(grads["keys"][...]) and not np.any(grads["values"][...])


@pytest.mark.parametrize("given", [None, "float32", jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_the_one_of_computation_and_output(given, x_dtype):
  """It is that of the inputs by default; parameters and their gradients stay in `param_dtype`."""
  plain = tf.Pattention(6, 5, 7, rngs=nnx.Rngs(0))
  layer = tf.Pattention(6, 5, 7, dtype=given, rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), x_dtype)
  computed = x_dtype if given is None else jnp.dtype(given)
  assert layer(x).dtype == computed
  np.testing.assert_array_equal(layer(x), plain(x.astype(computed)))
  assert layer.keys.dtype == layer.values.dtype == jnp.float32
  grads = nnx.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32)))(layer)
  assert grads["keys"].dtype == jnp.float32


def test_param_dtype_is_the_one_of_stored_parameters():
  """They are the rounded parameters of the same seed; τ stays float32, and the output has the dtype of the inputs."""
  wide, narrow = (tf.Pattention(6, 5, 7, param_dtype=dtype, rngs=nnx.Rngs(0)) for dtype in ("float32", jnp.bfloat16))
  for name in ("keys", "values"):
    assert getattr(narrow, name).dtype == jnp.bfloat16
    np.testing.assert_array_equal(getattr(narrow, name)[...], getattr(wide, name)[...].astype(jnp.bfloat16))
  assert narrow.tau.dtype == jnp.float32
  x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
  assert narrow(x).dtype == jnp.float32
  np.testing.assert_allclose(narrow(x), wide(x), atol=0.05)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_a_dtype_that_is_not_floating_point_is_refused(name):
  with pytest.raises(ValueError, match=f"{name}=int32: must be a floating-point dtype"):
    tf.Pattention(2, 2, 2, **{name: jnp.int32}, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="x of int32: expected floating point"):
    tf.Pattention(2, 2, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))(jnp.ones((1, 2), jnp.int32))
