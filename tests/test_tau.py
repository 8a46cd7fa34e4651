"""τ after growth against its formulas in float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small_run
from tests.small_run import GROWN, MODEL
from tokenformer_jax.config import GrowthConfig
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.plan import leaves_by_path
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.tau import make_tau_rule, moved

BIRTH, STEPS = 7, 5


def births(*steps):
  return {"a": {"keys": jnp.asarray(steps, jnp.int32), "values": jnp.asarray(steps, jnp.int32)}}


def test_moved_tau_rises_in_equal_steps_of_its_square_from_growth_on():
  tau = {"a": {"tau": jnp.float32([2.0, 5.0])}}
  born = births(0, 0, *[BIRTH] * 14)  # A layer of 16 rows: τ moves to 4.
  move = jax.jit(lambda tau, step: moved(tau, born, step, STEPS, "l2_norm_gelu"))
  for step in range(BIRTH, BIRTH + STEPS + 3):
    tau = move(tau, jnp.int32(step))
    share = min((step - BIRTH + 1) / STEPS, 1.0)
    expected = np.sqrt([4 + share * (16 - 4), 25 + share * (16 - 25)])
    np.testing.assert_allclose(tau["a"]["tau"], expected, rtol=1e-6)
  assert tau["a"]["tau"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("name", ["moved", "learned"])
def test_a_layer_that_has_not_grown_keeps_its_tau_when_another_grows(name):
  rule = make_tau_rule(dataclasses.replace(small_run.config(), growth=GrowthConfig(tau=name)))
  tau = {layer: {"tau": jnp.float32([2.5])} for layer in "ab"}
  born = {**births(0, 0, 0), "b": births(0, 0, BIRTH)["a"]}
  after, _ = rule.update(tau, tau, rule.init(tau), born, jnp.int32(BIRTH))
  assert after["a"]["tau"] == 2.5 and after["b"]["tau"] != 2.5


@pytest.mark.parametrize("name", ["kept", "recomputed"])
def test_training_keeps_tau_unless_a_rule_changes_it(name):
  rule = make_tau_rule(dataclasses.replace(small_run.config(), growth=GrowthConfig(tau=name)))
  tau = {"a": {"tau": jnp.float32([2.5])}}
  assert rule.update(tau, None, rule.init(tau), births(0, BIRTH), jnp.int32(BIRTH)) == (tau, ()) and not rule.learns


@pytest.mark.parametrize("birth", [0, BIRTH])
def test_learned_tau_is_adam_on_its_logarithm_once_grown(birth):
  config = small_run.config()
  config = dataclasses.replace(config, growth=GrowthConfig(tau="learned"))
  rule, optimizer = make_tau_rule(config), config.optimizer
  tau, log_tau = {"a": {"tau": jnp.float32([2.0, 5.0])}}, np.log([2.0, 5.0])
  state, mean, square = rule.init(tau), 0.0, 0.0
  for count, gradient in enumerate(np.random.default_rng(0).normal(size=(6, 2)), start=1):
    d_log = np.exp(log_tau) * gradient
    mean = optimizer.beta1 * mean + (1 - optimizer.beta1) * d_log
    square = optimizer.beta2 * square + (1 - optimizer.beta2) * d_log**2
    step = mean / (1 - optimizer.beta1**count) / (np.sqrt(square / (1 - optimizer.beta2**count)) + optimizer.eps)
    log_tau = log_tau - (optimizer.learning_rate * step if birth else 0)
    tau, state = rule.update(tau, {"a": {"tau": jnp.float32(gradient)}}, state, births(0, birth), jnp.int32(count))
    np.testing.assert_allclose(tau["a"]["tau"], np.exp(log_tau), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["learned", pytest.param("moved", marks=pytest.mark.every_combination)])
def test_a_run_moves_tau_by_its_rule_from_growth_on(rule):
  config = dataclasses.replace(
    small_run.config(), growth=GrowthConfig(method="exact", tau=rule, tau_steps=2, warmup_steps=0)
  )
  small, large = (make_program(config, model, small_run.mesh()) for model in (MODEL, GROWN))
  state, _ = small.train_step(small.initial_state(), small_run.batch(0))
  small_run.assert_same(state.tau, small.initial_state().tau)
  state, *_ = grow_state(state, MODEL, GROWN, config.growth)
  before = leaves_by_path(jax.tree.map(np.array, state.tau))
  for seed in range(2):
    state, _ = large.train_step(state, small_run.batch(seed))
  for path, tau in leaves_by_path(state.tau).items():
    if rule == "moved":
      count = GROWN.ffn_tokens if "ffn" in path else GROWN.proj_tokens if "proj" in path else GROWN.qkv_tokens
      np.testing.assert_array_equal(tau, np.float32([np.sqrt(count)] * 2))
    else:
      assert np.all(tau != before[path]) and np.allclose(tau, before[path], rtol=0.05)
