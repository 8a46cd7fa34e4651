"""What each way of growing keeps, and what it makes of τ, values and moments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokenformer_jax as tf
from tests import growth_table, small_run
from tests.growth_table import DEEP, SHALLOW, change
from tests.small_run import MODEL
from tokenformer_jax.config import GrowthConfig
from tokenformer_jax.config.parts import AttentionConfig, FeedForwardConfig
from tokenformer_jax.growth.grow import grow_leaf, grow_state
from tokenformer_jax.growth.plan import LeafPlan, NewRows, leaves_by_path, plan_growth
from tokenformer_jax.nn.initializers import STD, value_std
from tokenformer_jax.nn.theta import initial_tau
from tokenformer_jax.parameter_tokens import ParameterTokens, pattention
from tokenformer_jax.training.program import make_program

DOUBLE = MODEL.grown(qkv_tokens=16, proj_tokens=16, ffn_tokens=48)


@pytest.fixture(scope="module")
def state():
  return small_run.noise(make_program(small_run.config(), MODEL, small_run.mesh()).shapes)


def grown(state, method, theta="l2_norm_gelu", **growth):
  old, new = (dataclasses.replace(config, theta=theta) for config in (MODEL, DOUBLE))
  bigger, _, report = grow_state(state, old, new, GrowthConfig(method=method, **growth), seed=3)
  return bigger, {leaf.path: leaf.new_rows for leaf in report.leaves}


# The function.

TWO_CASES = (("live", "l2_norm_gelu"), ("duplicate", "softmax"))


@pytest.mark.slow
@pytest.mark.parametrize("method, theta", growth_table.CASES)
@pytest.mark.parametrize(
  "dtype, tolerance", [("float64", 1e-12), pytest.param("float32", 1e-6, marks=pytest.mark.every_combination)]
)
def test_logits_stay(method, theta, dtype, tolerance):
  assert change(method, theta, SHALLOW, dtype)[0] <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
  "method, theta",
  [
    pytest.param(*case, marks=[] if case in TWO_CASES else pytest.mark.every_combination) for case in growth_table.CASES
  ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_a_deep_model_stay_within_three_times_its_own_error(method, theta, dtype):
  changed, own = change(method, theta, DEEP, dtype)
  assert 0 < own and changed <= 3 * own


@pytest.mark.parametrize("method, theta", [case for case in growth_table.CASES if case[0] != "live"])
def test_a_layer_stays_and_its_new_rows_are_in_it(method, theta):
  rng = np.random.default_rng(0)
  x, keys, values = rng.normal(size=(5, 6)), rng.normal(size=(1, 4, 6)), rng.normal(size=(1, 4, 3))
  rows = {"exact": (NewRows.ZERO, NewRows.RANDOM), "duplicate": (NewRows.REPEATED, NewRows.PARTS)}[method]
  with jax.enable_x64(True):
    plans = [
      LeafPlan("values", leaf.shape, (1, 12, leaf.shape[2]), 1, kind, 1.0) for leaf, kind in zip((keys, values), rows)
    ]
    new_keys, new_values = (
      np.asarray(jax.jit(lambda leaf: grow_leaf(leaf, plan, jax.random.key(3), jnp.int32(0)))(leaf))
      for leaf, plan in zip((keys, values), plans)
    )
    tau = initial_tau(theta, 4)
    new_tau = tau * initial_tau(theta, 12) / initial_tau(theta, 4) if method == "duplicate" else tau
    before = pattention(x, ParameterTokens(keys[0], values[0], tau), theta)
    after = pattention(x, ParameterTokens(new_keys[0], new_values[0], new_tau), theta)
    moved_keys = new_keys[0] + np.where(np.arange(12)[:, None] < 4, 0.0, rng.normal(size=(12, 6)))
    other = pattention(x, ParameterTokens(moved_keys, new_values[0], new_tau), theta)
  np.testing.assert_allclose(after, before, rtol=0, atol=1e-14)
  assert np.max(np.abs(other - before)) > 0.01


# The default.


def test_auto_is_live_in_layers_with_enough_new_rows_and_exact_in_the_others(state):
  target = MODEL.grown(qkv_tokens=16, proj_tokens=15, ffn_tokens=32)
  _, _, report = grow_state(state, MODEL, target)
  rows = {leaf.path: leaf.new_rows for leaf in report.leaves}
  layers = {"attention/query": True, "attention/proj": False, "ffn": True}  # 8 and 16 new rows do, 7 do not.
  for layer, live in layers.items():
    assert rows[f"params/blocks/{layer}/keys"] is (NewRows.LIVE if live else NewRows.ZERO)
    assert rows[f"params/blocks/{layer}/values"] is (NewRows.ZERO if live else NewRows.RANDOM)
    assert rows[f"tau/blocks/{layer}/tau"] is (NewRows.SCALED_TAU if live else NewRows.NONE)


def test_auto_is_exact_where_live_keys_would_change_the_function(state):
  _, rows = grown(state, "auto", "gelu_l2_norm")
  assert rows["params/blocks/ffn/keys"] is NewRows.ZERO and rows["tau/blocks/ffn/tau"] is NewRows.NONE


def test_auto_gives_hidden_units_random_keys_and_zero_values():
  dense = dataclasses.replace(
    MODEL, qkv_tokens=0, proj_tokens=0, attention=AttentionConfig(projection="dense"), ffn=FeedForwardConfig(kind="mlp")
  )
  shapes = make_program(small_run.config(), dense, small_run.mesh()).shapes
  plan = plan_growth(shapes, dense, dense.grown(ffn_tokens=32))
  assert plan["params/blocks/ffn/keys"].new_rows is NewRows.RANDOM
  assert plan["params/blocks/ffn/values"].new_rows is NewRows.ZERO


# As released.


def test_released_rows_are_random_and_tau_is_that_of_a_new_layer(state):
  bigger, rows = grown(state, "released")
  for name in ("query", "proj"):
    new = {leaf: np.asarray(bigger.params["blocks"]["attention"][name][leaf][:, 8:]) for leaf in ("keys", "values")}
    assert abs(new["keys"].std() / STD - 1) < 0.2 and abs(new["values"].std() / value_std(MODEL) - 1) < 0.2
    np.testing.assert_array_equal(bigger.tau["blocks"]["attention"][name]["tau"], np.float32([4.0, 4.0]))
  assert rows["tau/blocks/ffn/tau"] is NewRows.NEW_TAU
  assert np.all(np.asarray(bigger.opt_state[1].mu["blocks"]["ffn"]["keys"][:, 16:]) == 0)


def test_released_growth_is_no_growth_of_the_function():
  assert all(
    change("released", theta, SHALLOW, "float32")[0] > 0.05 for theta in ("l2_norm_gelu", "gelu_l2_norm", "softmax")
  )


# Duplicates.


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_duplicates_are_as_if_they_had_always_been_there(state, theta):
  bigger, _ = grown(state, "duplicate", theta)
  old, new = leaves_by_path(state), leaves_by_path(bigger)
  keys, values = (np.asarray(new[f"params/blocks/ffn/{leaf}"]).reshape(2, 3, 16, 16) for leaf in ("keys", "values"))
  for copy in range(3):
    np.testing.assert_array_equal(keys[:, copy], old["params/blocks/ffn/keys"])
    np.testing.assert_allclose(values[:, copy], (copy + 1) / 6 * old["params/blocks/ffn/values"], rtol=1e-6)
  np.testing.assert_allclose(values.sum(axis=1), old["params/blocks/ffn/values"], rtol=1e-6)
  np.testing.assert_array_equal(new["born/blocks/ffn/keys"], np.tile(old["born/blocks/ffn/keys"], 3))
  times = 3 if theta == "softmax" else np.sqrt(3)
  np.testing.assert_allclose(new["tau/blocks/ffn/tau"], times * old["tau/blocks/ffn/tau"], rtol=1e-6)


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_duplicates_moments_are_cut_as_their_gradients_are(state, theta):
  # A value's parts have the whole value's gradient, copies of a key share the key's.
  x, aim = np.random.default_rng(0).normal(size=(2, 7, 16))

  def gradients(layer, tau):
    tokens = [leaf[0].astype(jnp.float32) for leaf in (layer["keys"], layer["values"])]
    return jax.grad(
      lambda tokens: jnp.sum(aim * pattention(jnp.asarray(x, jnp.float32), ParameterTokens(*tokens, tau), theta))
    )(tokens)

  bigger, rows = grown(state, "duplicate", theta)
  old, new = (
    gradients(s.params["blocks"]["ffn"], initial_tau(theta, count)) for s, count in ((state, 16), (bigger, 48))
  )
  np.testing.assert_allclose(new[1], np.tile(old[1], (3, 1)), rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(new[0].reshape(3, 16, 16).sum(axis=0), old[0], rtol=1e-3, atol=1e-4)
  for name in ("mu", "nu"):
    was, now = (np.asarray(getattr(s.opt_state[1], name)["blocks"]["ffn"]["keys"]) for s in (state, bigger))
    shares = np.float32([1, 2, 3]) / 6 if name == "mu" else np.float32([1, 4, 9]) / 36
    np.testing.assert_allclose(now.reshape(2, 3, 16, 16), shares[:, None, None] * was[:, None], rtol=1e-5)
    assert rows[f"opt_state/1/{name}/blocks/ffn/values"] is NewRows.REPEATED


@pytest.mark.parametrize(
  "counts, message",
  [
    (
      dict(ffn_tokens=40),
      "ffn_tokens: 16 -> 40: method='duplicate' repeats all rows; choose a whole multiple, 32 or 48",
    ),
    (dict(qkv_tokens=12, ffn_tokens=32), "qkv_tokens: 8 -> 12: .* 8 or 16, or method='exact'"),
  ],
)
def test_duplicates_of_a_part_are_refused(counts, message):
  with pytest.raises(ValueError, match=message):
    tf.grow(growth_table.lively(MODEL), method="duplicate", **counts)


# τ and the values at the seam.


def test_tau_is_kept_or_recomputed(state):
  kept, rows = grown(state, "exact")
  small_run.assert_same(kept.tau, state.tau)
  assert rows["tau/blocks/ffn/tau"] is NewRows.NONE
  recomputed, rows = grown(state, "exact", tau="recomputed")
  np.testing.assert_allclose(recomputed.tau["blocks"]["ffn"]["tau"], np.sqrt([48, 48]), rtol=1e-6)
  assert rows["tau/blocks/ffn/tau"] is NewRows.NEW_TAU


def test_value_scale_is_that_of_the_new_values(state):
  new = [
    np.asarray(grown(state, "exact", value_scale=scale)[0].params["blocks"]["ffn"]["values"]) for scale in (1.0, 5.0)
  ]
  np.testing.assert_allclose(new[1][:, 16:], 5 * new[0][:, 16:], rtol=1e-6)
  np.testing.assert_array_equal(new[1][:, :16], new[0][:, :16])


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(method="zero"), "method='zero': choose one of auto, exact, live, released, duplicate"),
    (dict(tau="grow"), "tau='grow': choose one of kept"),
    (dict(value_scale=0.0), "value_scale=0.0: .* would never learn"),
    (dict(tau_steps=0), "tau_steps=0"),
    (dict(old_rows_rate=-1.0), "old_rows_rate=-1.0"),
    (dict(new_rows_rate=0.0), "new_rows_rate=0.0"),
  ],
)
def test_ways_that_are_none_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    GrowthConfig(**fields)
