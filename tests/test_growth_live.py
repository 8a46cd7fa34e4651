"""Live growth: keys that are mixtures of the old ones, values that begin at 0, and the same function for every input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tokenformer_jax as tf
from tests import growth_table, small_run
from tests.small_run import MODEL
from tokenformer_jax.config import GrowthConfig
from tokenformer_jax.growth.grow import grow_leaf, grow_state, leaf_key
from tokenformer_jax.growth.layers import leaves_by_path, token_layers
from tokenformer_jax.growth.plan import LeafPlan, NewRows, layers_of
from tokenformer_jax.growth.shrink import most_used, shrink_tree
from tokenformer_jax.growth.usage import token_usage
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention
from tokenformer_jax.training.program import make_program

LIVE = GrowthConfig(method="live")


def keys_of(kind: str) -> np.ndarray:
  """Two layers of 8 keys with 6 channels."""
  keys = np.random.default_rng(0).normal(size=(2, 8, 6))
  match kind:
    case "rank 2":
      keys = np.concatenate([keys[..., :2], keys[..., :2] @ np.ones((2, 4))], axis=-1)
    case "one of zeros":
      keys[1] = 0.0
    case "huge":
      keys *= 1e15
  return keys


def new_keys(keys: np.ndarray, count: int, seed: int = 3) -> np.ndarray:
  plan = LeafPlan("params/keys", keys.shape, (len(keys), count, keys.shape[2]), 1, NewRows.LIVE)
  return np.asarray(grow_leaf(jnp.asarray(keys), plan, leaf_key(plan, seed), jnp.int32(0)))[:, keys.shape[1] :]


@pytest.mark.parametrize("kind", ["ordinary", "rank 2", "one of zeros", "huge"])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-6)])
def test_every_row_of_scores_grows_by_the_same_factor(kind, dtype, tolerance):
  with jax.enable_x64(True):
    keys = keys_of(kind).astype(dtype)
    new = new_keys(keys, 20)
    assert new.dtype == dtype
  x = np.random.default_rng(1).normal(size=(50, 6))
  for old, rows in zip(keys.astype(np.float64), new.astype(np.float64)):
    before, added = (np.sum((x @ table.T) ** 2, axis=-1) for table in (old, rows))
    np.testing.assert_allclose(added, 12 / 8 * before, rtol=tolerance, atol=tolerance * max(before.max(), 1e-300))


def test_new_keys_are_alive_and_depend_on_seed_and_layer():
  keys = np.repeat(keys_of("ordinary")[:1], 2, axis=0).astype(np.float32)
  new, other = new_keys(keys, 20), new_keys(keys, 20, seed=4)
  assert np.all(np.abs(new).max(axis=-1) > 0.1)
  assert np.abs(new[0] - new[1]).max() > 0.1 and np.abs(new - other).max() > 0.1


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-14), ("float32", 1e-6)])
def test_a_layer_keeps_its_function_and_both_sides_learn(dtype, tolerance):
  rng = np.random.default_rng(2)
  with jax.enable_x64(True):
    x, aim, keys, values = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((5, 6), (5, 3), (8, 6), (8, 3)))
    new = new_keys(np.asarray(keys)[None], 20)[0]
    old_layer = ParameterTokens(keys, values, jnp.asarray(1.7, dtype))
    grown = ParameterTokens(
      jnp.concatenate([keys, new]),
      jnp.concatenate([values, jnp.zeros((12, 3), dtype)]),
      jnp.asarray(1.7 * np.sqrt(20 / 8), dtype),
    )
    np.testing.assert_allclose(pattention(x, grown), pattention(x, old_layer), rtol=0, atol=tolerance)
    gradient = jax.grad(lambda tokens: jnp.sum(aim * pattention(x, tokens)))
    first = gradient(grown)
    assert np.all(np.any(np.asarray(first.values[8:]) != 0, axis=-1))
    moved = dataclasses.replace(grown, values=grown.values - 0.1 * first.values)
    assert np.all(np.any(np.asarray(gradient(moved).keys[8:]) != 0, axis=-1))


def test_a_training_state_keeps_its_loss_its_moments_and_gets_tau_of_its_size():
  config = small_run.replace(small_run.config(), growth=dict(method="live"))
  small, mesh = make_program(config, MODEL, small_run.mesh()), small_run.mesh()
  state = small.initial_state()
  for seed in range(3):
    state, _ = small.train_step(state, small_run.placed(small_run.batch(seed), mesh))
  target = MODEL.grown(qkv_tokens=16, proj_tokens=24, ffn_tokens=32)
  grown, _, report = grow_state(state, MODEL, target, config.growth, seed=3)
  large = make_program(config, target, mesh)
  batch = small_run.placed(small_run.batch(9), mesh)
  before, after = (p.eval_step(s.params, s.tau, batch) for p, s in ((small, state), (large, grown)))
  np.testing.assert_allclose(after.nats, before.nats, rtol=1e-6)
  rows = {leaf.path: leaf.new_rows for leaf in report.leaves}
  for path, leaf in leaves_by_path(grown.tau).items():
    np.testing.assert_allclose(leaf, np.sqrt(token_layers_of(target)[path.rpartition("/")[0]]), rtol=1e-6)
  assert rows["params/blocks/ffn/keys"] is NewRows.LIVE and rows["params/blocks/ffn/values"] is NewRows.ZERO
  assert rows["opt_state/1/mu/blocks/ffn/keys"] is NewRows.ZERO


def token_layers_of(config) -> dict[str, int]:
  return {path: layer.num_tokens for path, layer in layers_of(config).items()}


def test_shrinking_takes_untrained_live_growth_away():
  model = growth_table.lively(MODEL)
  bigger, _ = tf.grow(model, qkv_tokens=16, ffn_tokens=40, method="live")
  batches = [np.random.default_rng(seed).integers(0, MODEL.vocab_size, (2, 13)) for seed in range(2)]
  back, _ = tf.shrink(bigger, batches, qkv_tokens=8, ffn_tokens=16)
  small_run.assert_same(split(back)[1], split(model)[1])
  small_run.assert_close(split(back)[2], split(model)[2], 1e-6)


def test_a_state_of_live_growth_is_shrunk_with_its_moments_and_births():
  shapes = make_program(small_run.config(), MODEL, small_run.mesh()).shapes
  state = small_run.noise(shapes)
  target = MODEL.grown(ffn_tokens=40)
  grown, *_ = grow_state(state, MODEL, target, LIVE)
  graphdef, *_ = split(nnx.eval_shape(lambda: tf.LanguageModel(target, rngs=nnx.Rngs(0))))
  model = nnx.merge(graphdef, grown.params, grown.tau)
  layers = token_layers(model)
  usage = token_usage(model, [np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 13))])
  counts = {path: 16 if path == "blocks/ffn" else layer.num_tokens for path, layer in layers.items()}
  back = shrink_tree(grown, most_used(usage, layers, counts))
  small_run.assert_same(dataclasses.replace(back, tau=state.tau), state)
  small_run.assert_close(back.tau, state.tau, 1e-6)


@pytest.mark.parametrize("theta, instead", [("gelu_l2_norm", "exact"), ("softmax", "duplicate")])
def test_other_thetas_are_refused_with_the_method_that_serves_them(theta, instead):
  model = growth_table.lively(dataclasses.replace(MODEL, theta=theta))
  with pytest.raises(ValueError, match=f"theta='{theta}': method='live' .* choose method='{instead}'"):
    tf.grow(model, ffn_tokens=40, method="live")


def test_fewer_new_keys_than_old_directions_are_refused_with_the_least_count():
  with pytest.raises(ValueError, match="ffn/keys: 16 -> 24 .* directions, 16; choose at least 32 tokens"):
    tf.grow(growth_table.lively(MODEL), ffn_tokens=24, method="live")


def test_few_new_keys_do_for_few_old_directions():
  model = growth_table.lively(MODEL)
  keys = np.zeros((2, 16, 16), np.float32)
  keys[:, :, :3] = np.random.default_rng(0).normal(size=(2, 16, 3))
  model.blocks.ffn.keys[...] = jnp.asarray(keys)
  bigger, _ = tf.grow(model, ffn_tokens=20, method="live")
  before, after = (growth_table.logits(one, "float32") for one in (model, bigger))
  assert np.max(np.abs(after - before)) <= 1e-6 * np.max(np.abs(before))
