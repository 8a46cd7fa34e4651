"""Hidden units are rows as parameter tokens are: dense feed-forwards grow and shrink, and keep their function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tokenformer_jax as tf
from tests import small_run, test_stream
from tests.commands import call
from tokenformer_jax.config import GrowthConfig, ModelConfig
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.nn.feed_forward import ACTIVATIONS, MLP
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.training.checkpoints import Checkpoints
from tokenformer_jax.training.resize import grow_run, shrink_run
from tokenformer_jax.training.resume import stored_config

# Attention without rows, a first block that stands before the stack, and biases.
MODEL = ModelConfig.named(
  "tiny",
  "gpt2",
  vocab_size=264,
  num_layers=2,
  hidden_size=16,
  num_heads=2,
  seq_length=16,
  ffn_tokens=8,
  norm="none",
  attention=dict(bias="none"),
)
CONFIG = dataclasses.replace(small_run.config(), model=MODEL)


def drawn(module, dtype=jnp.float32):
  """The module with parameters of order one in `dtype`."""
  graphdef, params, tau = split(module)
  rng = np.random.default_rng(0)
  return nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), params), tau)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_growth_keeps_the_function_and_new_rows_learn_at_once(activation, gated):
  with jax.enable_x64(True):
    for dtype, tolerance in (("float32", 1e-6), ("float64", 1e-12)):
      mlp = drawn(MLP(6, 5, 8, activation=activation, gated=gated, bias=True, count="units", rngs=nnx.Rngs(0)), dtype)
      x = np.random.default_rng(1).normal(size=(64, 6)).astype(dtype)
      exact, duplicate = (tf.grow(mlp, units=24, method=method)[0] for method in ("exact", "duplicate"))

      @jax.jit
      def outputs_and_gradient(mlp, exact, duplicate):
        return mlp(x), exact(x), duplicate(x), jax.grad(lambda mlp: jnp.sum(jnp.square(mlp(x))))(exact)

      y, *grown, gradient = outputs_and_gradient(mlp, exact, duplicate)
      assert y.dtype == dtype and exact.keys.shape == duplicate.keys.shape == (24, 6)
      for other in grown:
        assert np.max(np.abs(other - y)) <= tolerance * np.max(np.abs(y))
      assert np.all(np.any(np.asarray(gradient.values[...])[8:] != 0, axis=1))
      small, _ = tf.shrink(exact, [x], units=8)
      small_run.assert_same(split(small)[1], split(mlp)[1])


def test_moments_of_copies_are_those_of_the_copies_gradients():
  """Divided among the copies, moments that are a gradient and its square are those of the bigger model's gradient."""
  model = drawn(nnx.eval_shape(lambda: tf.LanguageModel(MODEL, rngs=nnx.Rngs(0))))
  graphdef, params, tau = split(model)
  params = jax.tree.map(lambda leaf: 0.3 * leaf, params)
  ids = small_run.batch(rows=2).inputs
  bigger = MODEL.grown(ffn_tokens=3 * MODEL.ffn_tokens)

  def gradient(graphdef, params):
    return jax.jit(jax.grad(lambda params: jnp.mean(jnp.square(nnx.merge(graphdef, params, {})(ids)))))(params)

  def moments(gradient):
    return {"mu": gradient, "nu": jax.tree.map(jnp.square, gradient)}

  state = State(params, tau, moments(gradient(graphdef, params)))
  grown, _, report = grow_state(state, MODEL, bigger, GrowthConfig(method="duplicate"))
  assert report.num_parameters == (MODEL.num_parameters, bigger.num_parameters)
  small_run.assert_close(grown.opt_state, moments(gradient(graphdef, grown.params)), 1e-4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  params: dict
  tau: dict
  opt_state: dict


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """(the work folder of a run, its configuration); not to be changed."""
  folder = tmp_path_factory.mktemp("source")
  (folder / "text.txt").write_text(small_run.TEXT)
  config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, source=f"text:{folder}/text.txt"))
  return test_stream.write_source(folder / "run", config), config


def test_growth_and_shrinking_of_a_folder_are_those_in_memory(source, tmp_path):
  run, config = source
  grown_model = MODEL.grown(ffn_tokens=16)
  state = restored(run, config, MODEL)
  grow_run(str(run), str(tmp_path / "grown"), method="exact", ffn_tokens=16)
  of_folder = stored_config(str(tmp_path / "grown"))
  expected, *_ = grow_state(state, MODEL, grown_model, of_folder.growth, seed=config.training.seed)
  small_run.assert_same(restored(tmp_path / "grown", of_folder, grown_model), expected)
  assert Checkpoints(str(tmp_path / "grown")).record(test_stream.STEP)["losses"] == []
  report = shrink_run(str(tmp_path / "grown"), str(tmp_path / "back"), ffn_tokens=8)
  assert report.losses[0] == pytest.approx(report.losses[1], rel=1e-6)
  assert set(report.tokens) == {"first/ffn", "blocks/ffn"}
  small_run.assert_same(restored(tmp_path / "back", config, MODEL), state)


def restored(folder, config, model):
  return Checkpoints(str(folder)).restore(test_stream.STEP, test_stream.shapes(config, model))


def test_new_units_whose_keys_have_the_default_size_are_not_zero():
  mlp = MLP(6, 5, 8, count="units", rngs=nnx.Rngs(0))
  mlp.keys.set_metadata(rows=dataclasses.replace(mlp.keys.rows, std=None))
  bigger, _ = tf.grow(mlp, units=12, method="exact")
  assert np.all(np.any(np.asarray(bigger.keys[...])[8:] != 0, axis=1)) and not np.any(bigger.values[...][8:])


def test_live_growth_of_hidden_units_is_refused():
  with pytest.raises(ValueError, match="ffn_tokens: method='live' keeps a norm over parameter tokens, and these rows"):
    grow_state(State({}, {}, {}), MODEL, MODEL.grown(ffn_tokens=16), GrowthConfig(method="live"))


def test_rows_that_a_dense_model_lacks_are_refused(source, tmp_path):
  model = nnx.eval_shape(lambda: tf.LanguageModel(MODEL, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="qkv_tokens=32: the model has no such layer; its counts are ffn_tokens"):
    tf.grow(model, qkv_tokens=32)
  reason = (
    "qkv_tokens=32: attention.projection='dense', attention.values='projected': there are no such tokens; choose 0."
  )
  with pytest.raises(ValueError, match=reason):
    MODEL.grown(qkv_tokens=32)
  stage = tf.GrowthStage(step=5, qkv_tokens=32, proj_tokens=0, ffn_tokens=16)
  with pytest.raises(ValueError, match=f"growth.stages: at step 5: {reason}"):
    small_run.replace(CONFIG, growth=dict(stages=(stage,)))
  run, _ = source
  for flags in (["--qkv_tokens=32"], ["--ffn_tokens=16", "--method=live"]):
    code, out, errors = call("grow", f"--workdir={run}", f"--output={tmp_path}/grown", *flags)
    assert (code, out, len(errors)) == (2, "", 1), errors
    assert errors[0].startswith("error: ") and ("no such tokens" in errors[0] or "hidden units" in errors[0])
  assert not (tmp_path / "grown").exists()
