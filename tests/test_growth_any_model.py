"""Growing and shrinking NNX models of one's own that contain pattention layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tokenformer_jax as tf

X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
Y = np.sin(X @ np.random.default_rng(1).normal(size=(6, 2))).astype(np.float32)


class Regressor(nnx.Module):
  """Two pattention layers with a norm that has statistics of its own between them, and a linear layer."""

  def __init__(self, rngs: nnx.Rngs):
    self.layers = nnx.List([tf.Pattention(6, 8, 12, rngs=rngs), tf.Pattention(8, 8, 10, count="inner", rngs=rngs)])
    self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
    self.head = nnx.Linear(8, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(jax.nn.silu(self.layers[1](self.norm(self.layers[0](x)))))


def loss(model, batch):
  return jnp.mean(jnp.square(model(batch[0]) - batch[1]))


def trained(model, steps=20):
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p, rest), (X, Y)))(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  state = optimizer.init(params)
  for _ in range(steps):
    params, state, value = step(params, state)
  return nnx.merge(graphdef, params, rest), float(value)


@pytest.fixture(scope="module")
def model():
  return trained(Regressor(nnx.Rngs(0)))[0]


@pytest.mark.parametrize("method", ["exact", "live", "duplicate"])
def test_a_trained_model_grows_keeps_its_function_and_learns_on(model, method):
  bigger, report = tf.grow(model, num_tokens=24, method=method)
  assert bigger.layers[0].keys.shape == (24, 6) and bigger.layers[1].keys.shape == (10, 8)
  np.testing.assert_allclose(bigger(X), model(X), atol=1e-6)
  assert type(bigger) is Regressor and model.layers[0].keys.shape == (12, 6)
  assert report.summary.endswith("leaves reset.") and f"{report.num_parameters[1]:,} parameters" in report.summary
  later, after = trained(bigger, 40)
  assert after < float(loss(model, (X, Y)))
  assert np.all(np.any(np.asarray(later.layers[0].keys[12:]) != np.asarray(bigger.layers[0].keys[12:]), axis=-1))


def test_layers_grow_by_path_pattern_and_name(model):
  by_path, _ = tf.grow(model, {"layers/1": 20})
  by_pattern, _ = tf.grow(model, {"layers/*": 20})
  by_name, _ = tf.grow(model, inner=20)
  sizes = [[len(layer.keys) for layer in one.layers] for one in (by_path, by_pattern, by_name)]
  assert sizes == [[12, 20], [20, 20], [12, 20]]
  np.testing.assert_allclose(by_pattern(X), model(X), atol=1e-6)


def test_untrained_growth_is_shrunk_away(model):
  bigger, _ = tf.grow(model, {"layers/*": 20}, method="live")
  back, report = tf.shrink(bigger, [(X, Y)], num_tokens=12, inner=10, apply=lambda m, b: m(b[0]), loss=loss)
  for new, old in zip(back.layers, model.layers):
    np.testing.assert_array_equal(new.keys[...], old.keys[...])
    np.testing.assert_array_equal(new.values[...], old.values[...])
  np.testing.assert_allclose(back(X), model(X), atol=1e-6)
  assert report.losses[0] == pytest.approx(report.losses[1], rel=1e-5)
  assert report.tokens["layers/1"] == (20, 10, pytest.approx(0.0, abs=1e-6))


def test_shrinking_without_a_loss_says_none(model):
  _, report = tf.shrink(model, [X], num_tokens=6)
  assert report.losses is None and "loss" not in str(report)


@pytest.mark.parametrize(
  "counts, named, message",
  [
    (None, {}, "growth changes nothing: num_tokens=12, inner=10"),
    (None, {"num_token": 20}, "num_token=20: the model has no such layer; .* Did you mean 'num_tokens'"),
    ({"layers/7": 20}, {}, "'layers/7': 20: the model has no such layer; .*layers/0, layers/1.* Did you mean 'layers/"),
    ({"layers/0": 20}, {"num_tokens": 24}, "layers/0 is to have 24 tokens by another entry"),
    (None, {"inner": 9}, "inner: 10 -> 9: growth cannot take rows away; choose at least 10"),
    (None, {"inner": 0}, "inner=0: must be a whole number of at least 1"),
  ],
)
def test_what_does_not_fit_the_model_is_refused(model, counts, named, message):
  with pytest.raises(ValueError, match=message):
    tf.grow(model, counts, **named)


def test_a_model_without_parameter_tokens_and_what_is_no_model_are_refused():
  with pytest.raises(ValueError, match="no layer of parameter tokens"):
    tf.grow(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), num_tokens=4)
  with pytest.raises(TypeError, match="model is a dict: expected an NNX module"):
    tf.grow({}, num_tokens=4)


def test_a_language_model_has_one_number_for_each_count():
  config = tf.ModelConfig.named("tiny", vocab_size=16, num_layers=1)
  model = tf.LanguageModel(config, rngs=nnx.Rngs(0))
  bigger, _ = tf.grow(model, {"blocks/attention/proj": 80})
  assert bigger.config == config.grown(proj_tokens=80)
  with pytest.raises(ValueError, match="blocks/attention/.*one number for all of them; give qkv_tokens=…"):
    tf.grow(model, {"blocks/attention/query": 80})


def test_forms_for_inference_are_neither_grown_nor_shrunk():
  model = tf.LanguageModel(tf.ModelConfig.named("tiny", vocab_size=16, num_layers=1), rngs=nnx.Rngs(0))
  for form, message in ((tf.int8_tokens(model), "int8"), (model.for_decoding(), "only decodes")):
    with pytest.raises(ValueError, match=f"{message}.* cannot be grown"):
      tf.grow(form, ffn_tokens=512)
    with pytest.raises(ValueError, match=f"{message}.* cannot be shrunk"):
      tf.shrink(form, [np.zeros((1, 4), int)], ffn_tokens=128)


@pytest.mark.parametrize("method", ["exact", "live", "duplicate"])
def test_tokens_stored_in_bfloat16_grow_in_bfloat16(method):
  layer = tf.Pattention(6, 8, 12, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  bigger, _ = tf.grow(layer, num_tokens=24, method=method)
  assert bigger.keys.dtype == bigger.values.dtype == jnp.bfloat16 and bigger.keys.shape == (24, 6)
  np.testing.assert_allclose(bigger(X), layer(X), atol=0.02)
  back, _ = tf.shrink(bigger, [X], num_tokens=12)
  assert back.keys.shape == (12, 6)


class Nested(nnx.Module):
  """Layers whose paths end in one another's."""

  def __init__(self, rngs: nnx.Rngs):
    self.a = tf.Pattention(6, 6, 8, rngs=rngs)
    self.z = nnx.Dict(a=tf.Pattention(6, 6, 10, rngs=rngs))

  def __call__(self, x):
    return self.z["a"](self.a(x))


@pytest.mark.parametrize("path, sizes", [("a", (32, 10)), ("z/a", (8, 32))])
def test_a_path_that_ends_in_anothers_is_a_layer_of_its_own(path, sizes):
  model = Nested(nnx.Rngs(0))
  bigger, _ = tf.grow(model, {path: 32}, method="live")
  assert (len(bigger.a.keys), len(bigger.z["a"].keys)) == sizes
  np.testing.assert_allclose(bigger(X), model(X), atol=1e-6)
  back, report = tf.shrink(bigger, [X], counts={path: 8 if path == "a" else 10})
  np.testing.assert_allclose(back(X), model(X), atol=1e-6)
  assert [sizes[:2] for sizes in report.tokens.values() if sizes[0] == sizes[1]]


class Wrapper(nnx.Module):
  """A language model with a layer of one's own."""

  def __init__(self, rngs: nnx.Rngs):
    self.config = tf.ModelConfig.named("tiny", vocab_size=16, num_layers=1)
    self.model = tf.LanguageModel(self.config, rngs=rngs)
    self.adapter = tf.Pattention(6, 6, 8, rngs=rngs)


def test_a_layer_beside_a_language_model_has_a_count_of_its_own():
  bigger, _ = tf.grow(Wrapper(nnx.Rngs(0)), num_tokens=16, ffn_tokens=512)
  assert len(bigger.adapter.keys) == 16 and bigger.config.ffn_tokens == bigger.model.config.ffn_tokens == 512
