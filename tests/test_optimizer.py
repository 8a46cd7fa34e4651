"""Schedules, AdamW and the beginning of new rows, against formulas in float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import small_run
from tokenformer_jax.config import GrowthConfig, OptimizerConfig
from tokenformer_jax.growth.plan import leaves_by_path
from tokenformer_jax.nn.parameters import logical_axes, split
from tokenformer_jax.training.new_rows import scale_by_adam_of_rows
from tokenformer_jax.training.optimizer import learning_rate_schedule, make_optimizer
from tokenformer_jax.training.state import abstract_model

AXES = {"embedding": ("vocab", "embed"), "keys": ("layer", "param_token", "embed"), "norm": ("norm",)}
SHAPES = {"embedding": (7, 3), "keys": (2, 6, 3), "norm": (3,)}
OLD = 4  # Of the six rows of `keys`, the last two are new.


def draws(steps, seed=0):
  """Gradients of a few steps, their norm now above and now below 1; new rows have none at first."""
  rng = np.random.default_rng(seed)
  return [
    {name: rng.normal(size=shape) * 10.0 ** rng.integers(-2, 2) for name, shape in SHAPES.items()} for _ in range(steps)
  ]


def born(step):
  rows = np.where(np.arange(6) < OLD, 0, step)
  return {"embedding": jnp.int32(0), "keys": jnp.asarray(rows, jnp.int32), "norm": jnp.int32(0)}


def narrow(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


class Adam:
  """Adam of one array in float64."""

  def __init__(self, beta1, beta2, eps):
    self.beta1, self.beta2, self.eps, self.mean, self.square, self.count = beta1, beta2, eps, 0.0, 0.0, 0

  def __call__(self, gradient):
    self.count += 1
    self.mean = self.beta1 * self.mean + (1 - self.beta1) * gradient
    self.square = self.beta2 * self.square + (1 - self.beta2) * gradient**2
    mean, square = self.mean / (1 - self.beta1**self.count), self.square / (1 - self.beta2**self.count)
    return mean / (np.sqrt(square) + self.eps)


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_warmup_cosine(warmup):
  peak, floor, steps = 6e-4, 6e-5, 50
  config = OptimizerConfig("warmup_cosine", peak, floor, warmup_steps=warmup)
  counts = np.arange(steps + 10)
  cosine = floor + (peak - floor) / 2 * (
    np.cos(np.pi * np.minimum(counts - warmup, steps - warmup) / (steps - warmup)) + 1
  )
  expected = np.where(counts < warmup, peak * counts / max(warmup, 1), cosine)
  np.testing.assert_allclose(learning_rate_schedule(config, steps)(counts), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("warmup, decay", [(0, 0), (7, 0), (7, 20), (0, 50), (7, 60)])
def test_warmup_stable_decay(warmup, decay):
  # A decay longer than what the warm-up leaves takes all of that, and ends at the floor all the same.
  peak, floor, steps = 6e-4, 6e-5, 50
  config = OptimizerConfig("warmup_stable_decay", peak, floor, warmup_steps=warmup, decay_steps=decay)
  knots = [(-1, peak), (steps - min(decay, steps - warmup), peak), (steps, floor if decay else peak), (99, 0)]
  counts = np.arange(steps + 1)
  expected = np.where(counts < warmup, peak * counts / max(warmup, 1), np.interp(counts, *zip(*knots)))
  np.testing.assert_allclose(learning_rate_schedule(config, steps)(counts), expected, rtol=1e-5, atol=1e-12)


def test_adamw_is_that_of_float64():
  config = OptimizerConfig(
    "warmup_stable_decay",
    0.1,
    0.01,
    warmup_steps=2,
    decay_steps=3,
    beta1=0.8,
    beta2=0.97,
    eps=1e-3,
    weight_decay=0.3,
    clip_norm=1.0,
  )
  optimizer = make_optimizer(config, 8, GrowthConfig(), AXES)
  rates = [0, 0.05, 0.1, 0.1, 0.1, 0.1, 0.07, 0.04]
  wide = {name: np.random.default_rng(9).normal(size=shape) for name, shape in SHAPES.items()}
  adams = {name: Adam(0.8, 0.97, 1e-3) for name in SHAPES}
  params = narrow(wide)
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  clipped = []
  for gradients, rate in zip(draws(8), rates):
    updates, state = update(narrow(gradients), state, params, born=born(0))
    params = optax.apply_updates(params, updates)
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    clipped.append(norm > 1.0)
    for name, gradient in gradients.items():
      decay = 0.0 if name == "norm" else 0.3 * wide[name]
      wide[name] = wide[name] - rate * (adams[name](gradient / max(norm, 1.0)) + decay)
  assert {True, False} == set(clipped)
  small_run.assert_close(params, wide, 1e-6)


def test_decay_falls_on_all_but_the_final_norm():
  axes, _ = logical_axes(abstract_model(small_run.MODEL))
  _, shapes, _ = split(abstract_model(small_run.MODEL))
  config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.5)
  optimizer = make_optimizer(config, 10, GrowthConfig(), axes)
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
  ages = jax.tree.map(
    lambda leaf, axes: jnp.zeros(leaf.shape[1:2] if "param_token" in axes else (), jnp.int32), shapes, axes
  )
  updates, _ = jax.jit(optimizer.update)(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, born=ages
  )
  moved = {path: float(leaf.min()) for path, leaf in leaves_by_path(updates).items()}
  expected = {path: 0.0 if path.startswith("final_norm/") else -0.25 for path in moved}
  assert moved == expected and sorted(expected.values()) == [-0.25] * 11 + [0.0] * 2


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("size", [1.0, 1e-8])  # Beside Adam's epsilon, 1e-8.
def test_a_new_row_has_an_adam_of_its_own_and_old_rows_keep_theirs(beta2, warmup, size):
  birth = 40
  optimizer = scale_by_adam_of_rows(AXES, 0.9, beta2, 1e-8, warmup)
  whole, fresh = optax.scale_by_adam(0.9, beta2, 1e-8), Adam(0.9, beta2, 1e-8)
  update, adam = jax.jit(optimizer.update), jax.jit(whole.update)
  params = narrow({name: np.zeros(shape) for name, shape in SHAPES.items()})
  state, adam_state = optimizer.init(params), whole.init(params)
  for step, gradients in enumerate(draws(birth + 12)):
    if step < birth:
      gradients["keys"][:, OLD:] = 0.0
    gradients["keys"] *= size
    updates, state = update(narrow(gradients), state, born=born(birth))
    adams, adam_state = adam(narrow(gradients), adam_state)
    old, new = np.asarray(updates["keys"][:, :OLD]), np.asarray(updates["keys"][:, OLD:])
    small_run.assert_same({**updates, "keys": old}, {**adams, "keys": np.asarray(adams["keys"][:, :OLD])})
    if step >= birth:
      rise = min((step - birth + 1) / warmup, 1.0) if warmup else 1.0
      np.testing.assert_allclose(new, rise * fresh(gradients["keys"][:, OLD:]), rtol=1e-4, atol=1e-4 * rise)
  small_run.assert_same(state, adam_state)


def test_moments_in_bfloat16_are_rounded_between_updates_and_not_in_them():
  def rounded(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), tree)

  optimizer = scale_by_adam_of_rows(AXES, 0.9, 0.95, 1e-8, 5, "bfloat16", "bfloat16")
  wide = scale_by_adam_of_rows(AXES, 0.9, 0.95, 1e-8, 5)
  params = narrow({name: np.zeros(shape) for name, shape in SHAPES.items()})
  state, expected_state = optimizer.init(params), wide.init(params)
  for gradients in draws(20):
    expected, after = jax.jit(wide.update)(narrow(gradients), expected_state, born=born(0))
    expected_state = after._replace(mu=rounded(after.mu), nu=rounded(after.nu))
    updates, state = jax.jit(optimizer.update)(narrow(gradients), state, born=born(0))
    small_run.assert_close(updates, expected, 2e-2)
  assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype("bfloat16")}
  small_run.assert_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.nu), expected_state.nu, 2e-2)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("birth", [1, 1000])
def test_no_first_step_of_a_new_row_exceeds_the_learning_rate(beta2, birth):
  config = dataclasses.replace(small_run.OPTIMIZER, beta2=beta2, eps=1e-8, learning_rate=1e-3)
  optimizer = make_optimizer(config, 10**4, GrowthConfig(warmup_steps=0), AXES)
  params = narrow({name: np.zeros(shape) for name, shape in SHAPES.items()})
  gradients = {name: 10.0 ** np.linspace(-12, 6, np.prod(shape)).reshape(shape) for name, shape in SHAPES.items()}
  clip, adam, *rest = optimizer.init(params)
  state = (clip, adam._replace(count=jnp.int32(birth)), *rest)
  updates, _ = jax.jit(optimizer.update)(narrow(gradients), state, params, born=born(birth))
  new = np.abs(updates["keys"][:, OLD:])
  assert new.max() <= 1e-3 and new.max() > 0.999e-3


@pytest.mark.parametrize("new_rate, old_rate", [(0.5, 0.0), (1.0, 0.25)])
def test_rows_of_the_last_growth_and_those_before_have_rates_of_their_own(new_rate, old_rate):
  config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.3)
  plain, rated = (
    make_optimizer(config, 10, GrowthConfig(warmup_steps=0, new_rows_rate=new, old_rows_rate=old), AXES)
    for new, old in ((1.0, 1.0), (new_rate, old_rate))
  )

  def of_step_9(state):
    return (state[0], state[1]._replace(count=jnp.int32(9)), *state[2:])

  params = narrow({name: np.random.default_rng(1).normal(size=shape) for name, shape in SHAPES.items()})
  gradients = narrow(draws(1)[0])
  for births, factors in ((np.zeros(6), np.ones(6)), ([0, 0, 3, 3, 5, 5], [old_rate] * 4 + [new_rate] * 2)):
    ages = {**born(0), "keys": jnp.asarray(births, jnp.int32)}
    one, other = (
      jax.jit(optimizer.update)(gradients, of_step_9(optimizer.init(params)), params, born=ages)[0]
      for optimizer in (plain, rated)
    )
    expected = {**one, "keys": np.asarray(one["keys"]) * np.float32(factors)[:, None]}
    small_run.assert_close(other, expected, 1e-6)
    assert np.all((np.asarray(other["keys"]) == 0) == (np.asarray(expected["keys"]) == 0))
