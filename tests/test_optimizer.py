"""Schedules, optimizers, new rows and the average of the weights, against formulas in float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests import small_run
from tokenformer_jax.config import GrowthConfig, OptimizerConfig
from tokenformer_jax.growth.plan import leaves_by_path
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.parameters import declared, split
from tokenformer_jax.training.layer_rates import scale_layers
from tokenformer_jax.training.new_rows import scale_by_adam_of_rows, scale_rows
from tokenformer_jax.training.optimizer import make_optimizer
from tokenformer_jax.training.schedules import learning_rate_schedule
from tokenformer_jax.training.weight_average import average_weights

AXES = {"embedding": ("vocab", "embed"), "keys": ("layer", "param_token", "embed"), "norm": ("norm",)}
DECAYED = {"embedding": True, "keys": True, "norm": False}
SHAPES = {"embedding": (7, 3), "keys": (2, 6, 3), "norm": (3,)}
OLD = 4  # The last two of the six rows of `keys` are new.


def draws(steps, seed=0):
  """Gradients of a few steps, whose norm is above 1 at some of them and below 1 at others."""
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


PEAK, FLOOR, STEPS = 6e-4, 6e-5, 50


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_warmup_cosine(warmup):
  config = OptimizerConfig("warmup_cosine", PEAK, FLOOR, warmup_steps=warmup)
  number, top = np.arange(1, STEPS + 10), max(warmup, 1)  # Updates counted from 1, and the first of them with PEAK.
  share = np.clip((number - top) / (STEPS - top), 0, 1)
  cosine = FLOOR + (PEAK - FLOOR) / 2 * (np.cos(np.pi * share) + 1)
  expected = np.where(number < top, PEAK * number / top, cosine)
  rates = learning_rate_schedule(config, STEPS)(number - 1)
  np.testing.assert_allclose(rates, expected, rtol=1e-5)
  assert rates[0] > 0 and rates[STEPS - 1] == np.float32(FLOOR)


def test_budget_triangle():
  """A quarter of the peak at the beginning of the run, all of it at three quarters, and the floor at the end."""
  rates = learning_rate_schedule(OptimizerConfig("budget_triangle", PEAK, FLOOR), 40)(np.arange(40))
  number = np.arange(1, 41)
  expected = np.interp(number, [0, 30, 40], [PEAK / 4, PEAK, 0.0])
  np.testing.assert_allclose(rates, np.maximum(expected, FLOOR), rtol=1e-5)
  assert rates[29] == np.float32(PEAK) and rates[39] == np.float32(FLOOR)


@pytest.mark.parametrize("warmup, decay", [(0, 0), (7, 0), (7, 20), (0, 49), (30, 20)])
def test_warmup_stable_decay(warmup, decay):
  config = OptimizerConfig("warmup_stable_decay", PEAK, FLOOR, warmup_steps=warmup, decay_steps=decay)
  number, top = np.arange(1, STEPS + 1), max(warmup, 1)
  knots = [(0, 0 if warmup else PEAK), (top, PEAK), (STEPS - decay, PEAK), (STEPS, FLOOR if decay else PEAK)]
  rates = learning_rate_schedule(config, STEPS)(number - 1)
  np.testing.assert_allclose(rates, np.interp(number, *zip(*knots)), rtol=1e-5)
  assert rates[0] > 0 and rates[-1] == np.float32(FLOOR if decay else PEAK)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(warmup_steps=31, decay_steps=20), "warmup_steps=31 and optimizer.decay_steps=20 do not fit .* at least 51"),
    (dict(warmup_steps=0, decay_steps=50), "warmup_steps=0 and optimizer.decay_steps=50 do not fit .* at least 51"),
    (dict(warmup_steps=51), "optimizer.warmup_steps=51 .* do not fit into training.num_steps=50"),
    (dict(warmup_steps=50, schedule="warmup_cosine"), "optimizer.warmup_steps=50 do not fit into .* at least 51"),
  ],
)
def test_a_schedule_longer_than_the_run_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    learning_rate_schedule(OptimizerConfig(**fields), STEPS)


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
  optimizer = make_optimizer(config, 8, GrowthConfig(), AXES, DECAYED)
  rates = [0.05, 0.1, 0.1, 0.1, 0.1, 0.07, 0.04, 0.01]
  wide = {name: np.random.default_rng(9).normal(size=shape) for name, shape in SHAPES.items()}
  adams = {name: Adam(0.8, 0.97, 1e-3) for name in SHAPES}
  params = narrow(wide)
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  clipped = []
  for gradients, rate in zip(draws(8), rates):
    updates, state = update(narrow(gradients), state, params, born=born(0), step=0)
    params = optax.apply_updates(params, updates)
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    clipped.append(norm > 1.0)
    for name, gradient in gradients.items():
      decay = 0.0 if name == "norm" else 0.3 * wide[name]
      wide[name] = wide[name] - rate * (adams[name](gradient / max(norm, 1.0)) + decay)
  assert {True, False} == set(clipped)
  small_run.assert_close(params, wide, 1e-6)


def test_decay_falls_on_all_but_the_final_norm():
  axes, decayed = (declared(abstract_model(small_run.MODEL), nnx.Param, name) for name in ("axes", "decayed"))
  _, shapes, _ = split(abstract_model(small_run.MODEL))
  config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.5)
  optimizer = make_optimizer(config, 10, GrowthConfig(), axes, decayed)
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
  ages = jax.tree.map(
    lambda leaf, axes: jnp.zeros(leaf.shape[1:2] if "param_token" in axes else (), jnp.int32), shapes, axes
  )
  updates, _ = jax.jit(optimizer.update)(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, born=ages, step=0
  )
  moved = {path: float(leaf.min()) for path, leaf in leaves_by_path(updates).items()}
  expected = {path: 0.0 if path.startswith("final_norm/") else -0.25 for path in moved}
  assert moved == expected and sorted(expected.values()) == [-0.25] * 11 + [0.0] * 2


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("size", [1.0, 1e-8])  # Adam's epsilon is 1e-8.
def test_a_new_row_has_an_adam_of_its_own_and_old_rows_keep_theirs(beta2, size):
  birth = 40
  optimizer = scale_by_adam_of_rows(AXES, 0.9, beta2, 1e-8)
  whole, fresh = optax.scale_by_adam(0.9, beta2, 1e-8), Adam(0.9, beta2, 1e-8)
  update, adam = jax.jit(optimizer.update), jax.jit(whole.update)
  params = narrow({name: np.zeros(shape) for name, shape in SHAPES.items()})
  state, adam_state = optimizer.init(params), whole.init(params)
  for step, gradients in enumerate(draws(birth + 12)):
    if step < birth:
      gradients["keys"][:, OLD:] = 0.0
    gradients["keys"] *= size
    updates, state = update(narrow(gradients), state, born=born(birth), step=step)
    adams, adam_state = adam(narrow(gradients), adam_state)
    old, new = np.asarray(updates["keys"][:, :OLD]), np.asarray(updates["keys"][:, OLD:])
    small_run.assert_same({**updates, "keys": old}, {**adams, "keys": np.asarray(adams["keys"][:, :OLD])})
    if step >= birth:
      np.testing.assert_allclose(new, fresh(gradients["keys"][:, OLD:]), rtol=1e-4, atol=1e-4)
  small_run.assert_same(state, adam_state)


def test_a_row_added_after_skipped_updates_has_an_age():
  """Skipped updates are counted in the step and not in Adam's state."""
  optimizer, fresh = scale_by_adam_of_rows(AXES, 0.9, 0.999, 1e-8), Adam(0.9, 0.999, 1e-8)
  params = narrow({name: np.zeros(shape) for name, shape in SHAPES.items()})
  (gradients,) = draws(1)
  updates, _ = optimizer.update(narrow(gradients), optimizer.init(params), born=born(40), step=40)
  np.testing.assert_allclose(updates["keys"][:, OLD:], fresh(gradients["keys"][:, OLD:]), rtol=1e-4)


def test_moments_in_bfloat16_are_rounded_between_updates_and_not_in_them():
  def rounded(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), tree)

  optimizer = scale_by_adam_of_rows(AXES, 0.9, 0.95, 1e-8, "bfloat16", "bfloat16")
  wide = scale_by_adam_of_rows(AXES, 0.9, 0.95, 1e-8)
  params = narrow({name: np.zeros(shape) for name, shape in SHAPES.items()})
  state, expected_state = optimizer.init(params), wide.init(params)
  for gradients in draws(20):
    expected, after = jax.jit(wide.update)(narrow(gradients), expected_state, born=born(0), step=0)
    expected_state = after._replace(mu=rounded(after.mu), nu=rounded(after.nu))
    updates, state = jax.jit(optimizer.update)(narrow(gradients), state, born=born(0), step=0)
    small_run.assert_close(updates, expected, 2e-2)
  assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {jnp.dtype("bfloat16")}
  small_run.assert_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.nu), expected_state.nu, 2e-2)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("birth", [1, 1000])
def test_no_first_step_of_a_new_row_exceeds_the_learning_rate(beta2, birth):
  config = dataclasses.replace(small_run.OPTIMIZER, beta2=beta2, eps=1e-8, learning_rate=1e-3)
  optimizer = make_optimizer(config, 10**4, GrowthConfig(warmup_steps=0), AXES, DECAYED)
  params = narrow({name: np.zeros(shape) for name, shape in SHAPES.items()})
  gradients = {name: 10.0 ** np.linspace(-12, 6, np.prod(shape)).reshape(shape) for name, shape in SHAPES.items()}
  clip, adam, *rest = optimizer.init(params)
  state = (clip, adam._replace(count=jnp.int32(birth)), *rest)
  updates, _ = jax.jit(optimizer.update)(narrow(gradients), state, params, born=born(birth), step=birth)
  new = np.abs(updates["keys"][:, OLD:])
  assert new.max() <= 1e-3 and new.max() > 0.999e-3


def factors(births, step, warmup=0, new=1.0, old=1.0):
  """What `scale_rows` makes of updates that are all 1."""
  updates = narrow({name: np.ones(shape) for name, shape in SHAPES.items()})
  scaled, state = scale_rows(AXES, warmup, new, old).update(
    updates, optax.EmptyState(), born={**born(0), "keys": jnp.asarray(births, jnp.int32)}, step=jnp.int32(step)
  )
  assert jax.tree.leaves(state) == []
  keys = scaled.pop("keys")
  small_run.assert_same(scaled, {name: updates[name] for name in scaled})  # Other parameters keep their updates.
  return np.asarray(keys[0, :, 0]).tolist()


@pytest.mark.parametrize("new, old", [(0.5, 0.0), (1.0, 0.25)])
def test_rows_of_the_latest_growth_and_those_before_have_rates_of_their_own(new, old):
  assert factors([0, 0, 0, 0, 0, 0], 9, new=new, old=old) == [1.0] * 6
  assert factors([0, 0, 3, 3, 5, 5], 9, new=new, old=old) == [old] * 4 + [new] * 2


def test_the_updates_of_new_rows_rise_over_the_warm_up():
  births = [0, 0, 3, 3, 7, 7]  # 2 rows for 4 old ones take half of the warm-up.
  assert factors(births, 7, warmup=8) == [1, 1, 1, 1, 0.25, 0.25]  # The first update after the second growth.
  assert factors(births, 8, warmup=8) == [1, 1, 1, 1, 0.5, 0.5]
  assert factors(births, 99, warmup=8) == [1] * 6
  assert factors([0, 0, 3, 3, 3, 3], 3, warmup=8) == [1, 1] + [1 / 16] * 4


def test_a_parameter_that_did_not_grow_keeps_its_rate():
  """A growth of q, k and v only does not slow the feed-forward down."""
  axes = {"ffn": AXES["keys"], "query": AXES["keys"]}
  births = {"ffn": jnp.zeros(2, jnp.int32), "query": jnp.asarray([0, 5], jnp.int32)}
  updates = {name: jnp.ones((1, 2, 1)) for name in axes}
  scaled, _ = scale_rows(axes, 0, 1.0, 0.5).update(updates, optax.EmptyState(), born=births, step=jnp.int32(9))
  assert scaled["ffn"].ravel().tolist() == [1.0, 1.0] and scaled["query"].ravel().tolist() == [0.5, 1.0]


def test_the_decay_of_new_rows_is_warmed_up_like_their_updates():
  config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.5)
  optimizer = make_optimizer(config, 10, GrowthConfig(warmup_steps=8, old_rows_rate=1.0), AXES, DECAYED)
  params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
  zeros = jax.tree.map(jnp.zeros_like, params)
  clip, adam, *rest = optimizer.init(params)
  state = (clip, adam._replace(count=jnp.int32(1)), *rest)
  updates, _ = optimizer.update(zeros, state, params, born=born(1), step=jnp.int32(1))
  assert updates["keys"][0, :, 0].tolist() == [-0.25] * OLD + [-0.0625] * 2


def test_lion_is_that_of_float64():
  config = OptimizerConfig(
    learning_rate=0.1, warmup_steps=0, name="lion", beta1=0.8, beta2=0.9, weight_decay=0.3, clip_norm=1e9
  )
  optimizer = make_optimizer(config, 8, GrowthConfig(warmup_steps=4, old_rows_rate=1.0), AXES, DECAYED)
  wide = {name: np.random.default_rng(9).normal(size=shape) for name, shape in SHAPES.items()}
  momentum = {name: np.zeros(shape) for name, shape in SHAPES.items()}
  params = narrow(wide)
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for step, gradients in enumerate(draws(4)):
    updates, state = update(narrow(gradients), state, params, born=born(1), step=step)
    params = optax.apply_updates(params, updates)
    for name, gradient in gradients.items():
      direction = np.sign(0.8 * momentum[name] + 0.2 * gradient) + (0.0 if name == "norm" else 0.3 * wide[name])
      if name == "keys":
        direction[:, OLD:] *= min(step / 2, 1.0)
      wide[name] = wide[name] - 0.1 * direction
      momentum[name] = 0.9 * momentum[name] + 0.1 * gradient
  small_run.assert_close(params, wide, 1e-6)


def test_muon_orthogonalises_every_layer_by_itself_and_leaves_the_rest_to_adam():
  config = OptimizerConfig(
    learning_rate=1.0, min_learning_rate=0.0, warmup_steps=0, name="muon", weight_decay=0.0, clip_norm=1e9
  )
  optimizer = make_optimizer(config, 8, GrowthConfig(warmup_steps=4, old_rows_rate=1.0), AXES, DECAYED)
  params = narrow({name: np.zeros(shape) for name, shape in SHAPES.items()})
  (gradients,) = draws(1)
  updates, state = optimizer.update(narrow(gradients), optimizer.init(params), params, born=born(0), step=0)
  for name in ("embedding", "norm"):
    np.testing.assert_allclose(updates[name], -np.sign(gradients[name]), rtol=1e-4)
  for layer, gradient in zip(np.asarray(updates["keys"]), gradients["keys"]):
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    # Five Newton-Schulz steps bring every singular value near 1; the size is that of AdamW's updates.
    rotated = -left.T @ layer @ right.T / (0.2 * np.sqrt(6))
    assert np.all(np.abs(np.diag(rotated) - 1) < 0.35) and np.abs(rotated - np.diag(np.diag(rotated))).max() < 1e-4
  grown, _ = optimizer.update(narrow(gradients), optimizer.init(params), params, born=born(4), step=4)
  np.testing.assert_allclose(grown["keys"][:, OLD:], 0.5 * updates["keys"][:, OLD:], rtol=1e-6)
  assert jax.tree.map(jnp.shape, optax.tree.get(state, "nu"))["embedding"] == SHAPES["embedding"]


def test_the_average_of_the_weights_is_that_of_float64():
  decay = 0.3
  average = average_weights(decay)
  weights = np.random.default_rng(0).normal(size=(2, 3))
  mean, state = weights.copy(), average.init({"w": jnp.asarray(weights, jnp.float32)})
  for number in range(1, 9):
    step = np.random.default_rng(number).normal(size=(2, 3))
    weights = weights + step
    d = min(decay, number / (number + 9))  # 0.1, 0.18, 0.25, and then 0.3.
    mean = d * mean + (1 - d) * weights
    updates, state = average.update({"w": jnp.asarray(step, jnp.float32)}, state)
    np.testing.assert_array_equal(updates["w"], np.float32(step))
    np.testing.assert_allclose(weights - np.asarray(state.lag["w"]), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule, decay", [("warmup_stable_decay", 200), ("warmup_cosine", 0)])
def test_no_rate_is_below_the_minimum(schedule, decay):
  config = OptimizerConfig(
    schedule=schedule, learning_rate=2e-3, min_learning_rate=0.0, warmup_steps=50, decay_steps=decay
  )
  rate = learning_rate_schedule(config, 400)
  rates = np.asarray(jax.vmap(rate)(jnp.arange(400)))
  assert rates[-1] == 0.0 and rates.min() == 0.0


@pytest.mark.parametrize("pattern", [1, 2])
def test_the_rate_falls_by_a_factor_from_layer_to_layer_towards_the_input(pattern):
  """Four layers, the first of which may stand alone: 0.5 in the last, 0.5⁴ in the first, 0.5⁵ before it, 1 behind."""
  ones = {"patches": jnp.ones((2, 3)), "classes": jnp.ones(3), "final_norm": {"scale": jnp.ones(3)}}
  if pattern == 1:
    ones |= {"first": {"norm": jnp.ones(3)}, "blocks": {"ffn": jnp.ones((3, 2, 3)), "norm": jnp.ones((3, 3))}}
  else:
    ones |= {"blocks": {name: {"norm": jnp.ones((2, 3))} for name in ("0", "1")}}
  transformation = scale_layers(optax.with_extra_args_support(optax.identity()), 0.5)
  scaled, _ = transformation.update(ones, transformation.init(ones))
  found = {
    path: np.unique(np.asarray(leaf).reshape(len(leaf), -1)[:, 0])[::-1].tolist()
    for path, leaf in leaves_by_path(scaled).items()
  }
  assert (found.pop("patches"), found.pop("classes"), found.pop("final_norm/scale")) == ([0.5**5], [1], [1])
  if pattern == 1:
    assert found == {"first/norm": [0.5**4], "blocks/ffn": [0.5, 0.25, 0.125], "blocks/norm": [0.5, 0.25, 0.125]}
  else:
    assert found == {"blocks/0/norm": [0.25, 0.0625], "blocks/1/norm": [0.5, 0.125]}
