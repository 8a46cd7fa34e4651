"""Growth: the same function with more rows, nothing of the old lost, and new rows that learn at once."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokenformer_jax as tf
from tests import growth_table, small_run
from tests.small_run import GROWN, MODEL
from tokenformer_jax.config import GrowthConfig
from tokenformer_jax.growth.grow import grow_leaf, grow_state, leaf_key
from tokenformer_jax.growth.plan import LeafPlan, NewRows, leaves_by_path, plan_growth
from tokenformer_jax.models.model_class import abstract_model
from tokenformer_jax.nn.initializers import value_std
from tokenformer_jax.training.program import make_program

EXACT = GrowthConfig(method="exact")
GROWN_FURTHER = GROWN.grown(qkv_tokens=24, ffn_tokens=40)
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, MODEL.seq_length))
FIELDS = {"query": "qkv_tokens", "key": "qkv_tokens", "value": "qkv_tokens", "proj": "proj_tokens", "ffn": "ffn_tokens"}


def program(model=MODEL, **mesh):
  return make_program(small_run.config(), model, small_run.mesh(**mesh))


@pytest.fixture(scope="module")
def state():
  noise = small_run.noise(program().shapes)
  return dataclasses.replace(noise, step=jax.device_put(np.int32(12), noise.step.sharding))  # After all births.


@pytest.fixture(scope="module")
def grown(state):
  return grow_state(state, MODEL, GROWN, EXACT, seed=3)


def pattention_of(path):
  """The field that counts the rows of a leaf; None for a leaf without parameter tokens."""
  names = path.split("/")
  return FIELDS[names[-2]] if names[-1] in ("keys", "values") else None


def old_and_new_rows(path, leaf):
  axis = 0 if path.startswith("born/") else 1
  count = getattr(MODEL, pattention_of(path))
  return np.split(np.asarray(leaf), [count], axis)


# The plan.


@pytest.mark.parametrize(
  "target", [GROWN, MODEL.grown(ffn_tokens=17), MODEL.grown(qkv_tokens=9)], ids=["all", "ffn", "qkv"]
)
def test_plan_lists_every_leaf_with_its_shape_in_the_bigger_state(target):
  plan = plan_growth(program().shapes, MODEL, target, EXACT)
  old, new = leaves_by_path(program().shapes), leaves_by_path(program(target).shapes)
  assert {path: leaf.old_shape for path, leaf in plan.items()} == {path: leaf.shape for path, leaf in old.items()}
  assert {path: leaf.new_shape for path, leaf in plan.items()} == {path: leaf.shape for path, leaf in new.items()}
  assert all((leaf.old_shape == leaf.new_shape) == (leaf.new_rows is NewRows.NONE) for leaf in plan.values())


@pytest.mark.parametrize(
  "target, message",
  [
    (MODEL, "growth changes nothing: qkv_tokens=8, proj_tokens=8, ffn_tokens=16"),
    (MODEL.grown(qkv_tokens=32, ffn_tokens=15), "ffn_tokens: 16 -> 15: growth cannot take rows away"),
    (dataclasses.replace(GROWN, hidden_size=32), "hidden_size: 16 -> 32: growth changes parameter tokens alone"),
    (dataclasses.replace(GROWN, vocab_size=512), "vocab_size: 264 -> 512"),
    (dataclasses.replace(GROWN, num_layers=3), "num_layers: 2 -> 3"),
    (dataclasses.replace(GROWN, theta="gelu_l2_norm"), "theta: 'l2_norm_gelu' -> 'gelu_l2_norm'"),
  ],
)
def test_what_is_no_growth_is_refused(target, message):
  with pytest.raises(ValueError, match=message):
    plan_growth(program().shapes, MODEL, target)


def test_softmax_is_refused():
  softmax = dataclasses.replace(MODEL, theta="softmax")
  with pytest.raises(ValueError, match="exp\\(0\\).*method='duplicate' does"):
    tf.grow(abstract_model(softmax), ffn_tokens=32)


def test_a_state_of_another_model_is_refused(state):
  with pytest.raises(ValueError, match="params/blocks/attention/proj/keys.*axis 1 should have the model's 9 rows"):
    grow_state(state, MODEL.grown(proj_tokens=9), GROWN)


def test_grow_keeps_the_counts_not_given():
  bigger, _ = tf.grow(growth_table.lively(MODEL), proj_tokens=11, method="exact", seed=3)
  assert bigger.config == MODEL.grown(proj_tokens=11)
  assert bigger.blocks.attention.proj.keys.shape == (2, 11, 16) and bigger.blocks.ffn.keys.shape == (2, 16, 16)
  new = np.asarray(bigger.blocks.attention.proj.values)[:, 8:]
  np.testing.assert_array_equal(new, drawn("params/blocks/attention/proj/values", MODEL.grown(proj_tokens=11)))


# The state.


def test_old_rows_moments_and_all_else_are_kept_to_the_bit(state, grown):
  old, new = leaves_by_path(state), leaves_by_path(grown[0])
  assert old.keys() == new.keys()
  kept = {
    path: old_and_new_rows(path, leaf)[0] if pattention_of(path) and not path.startswith("tau/") else leaf
    for path, leaf in new.items()
  }
  small_run.assert_same(old, kept)


def test_new_rows_begin_as_planned(state, grown):
  for path, leaf in leaves_by_path(grown[0]).items():
    if not pattention_of(path):
      continue
    _, rows = old_and_new_rows(path, leaf)
    assert rows.size
    if path.startswith("born/"):
      assert np.all(rows == state.step)
    elif path.startswith("params/") and path.endswith("/values"):
      assert np.all(rows != 0)
    else:
      assert np.all(rows == 0)  # Keys, and the moments of both.


def test_new_rows_learn_at_once(grown):
  large = program(GROWN, data=8)
  state = jax.device_put(jax.tree.map(np.array, grown[0]), large.shardings)
  steps = [jax.tree.map(np.array, state.params)]
  for seed in range(6):
    state, metrics = large.train_step(state, small_run.placed(small_run.batch(seed), small_run.mesh(data=8)))
    assert metrics["skipped"] == 0
    steps.append(jax.tree.map(np.array, state.params))
  rows = {
    path: [old_and_new_rows(path, leaves_by_path(step)[path])[1] for step in steps]
    for path in leaves_by_path(steps[0])
    if pattention_of(path)
  }
  assert len(rows) == 10
  for path, (at_birth, after_one, *_, after_all) in rows.items():
    # Zero keys give their values no gradient, but values give one to their keys.
    changed = np.any(after_one != at_birth, axis=-1)
    assert np.all(changed) if path.endswith("/keys") else not np.any(changed), path
    assert np.all(np.any(after_all != after_one, axis=-1)), path


# The random rows.


def drawn(path, target, seed=3, old=MODEL):
  """The new rows of one leaf when `old` grows to `target`."""
  plan = plan_growth(program(old).shapes, old, target, EXACT)[path]
  grown = grow_leaf(jnp.zeros(plan.old_shape), plan, leaf_key(plan, seed), jnp.int32(0))
  return np.asarray(grown)[:, plan.old_shape[1] :]


def new_values(state):
  """(leaf, layer) -> the new rows of the values."""
  return {
    (path, layer): old_and_new_rows("params/" + path, leaf)[1][layer]
    for path, leaf in leaves_by_path(state.params).items()
    if path.endswith("/values")
    for layer in range(2)
  }


def test_new_rows_depend_on_seed_leaf_layer_and_old_count_alone(grown):
  rows, ffn = new_values(grown[0]), "params/blocks/ffn/values"
  # Not on what else grows, nor on the rows that are there.
  ffn_alone = drawn(ffn, MODEL.grown(ffn_tokens=32))
  np.testing.assert_array_equal(ffn_alone, [rows["blocks/ffn/values", layer] for layer in range(2)])
  other_seed = drawn(ffn, MODEL.grown(ffn_tokens=32), seed=4)
  other_count = drawn(ffn, MODEL.grown(ffn_tokens=40), old=MODEL.grown(ffn_tokens=24))
  draws = [*rows.values(), *other_seed, *other_count]
  assert len(draws) == 14
  for a, b in itertools.combinations(draws, 2):
    assert not np.any(np.isin(a, b))


def test_a_leaf_grows_in_slices_along_its_layers_as_it_does_whole(state, grown):
  plan = plan_growth(state, MODEL, GROWN, EXACT)
  for path, whole in leaves_by_path(grown[0]).items():
    if plan[path].axis == 1:
      leaf, key = leaves_by_path(state)[path], leaf_key(plan[path], 3)
      slices = [grow_leaf(leaf[layer : layer + 1], plan[path], key, state.step, layer) for layer in range(2)]
      assert np.concatenate(slices).tobytes() == np.asarray(whole).tobytes(), path


@pytest.mark.parametrize("new_rows", [NewRows.RANDOM, NewRows.LIVE])
def test_experts_grow_in_slices_along_their_layers_as_they_do_whole(new_rows):
  keys = np.random.default_rng(0).normal(size=(2, 3, 4, 6)).astype(np.float32)
  plan = LeafPlan("params/keys", keys.shape, (2, 3, 8, 6), 2, new_rows, 1.0)
  grow = jax.jit(lambda keys, first: grow_leaf(keys, plan, leaf_key(plan, 3), jnp.int32(0), first))
  whole = np.asarray(grow(keys, 0))
  np.testing.assert_array_equal(np.concatenate([grow(keys[layer : layer + 1], layer) for layer in range(2)]), whole)
  assert len(np.unique(whole[:, :, 4:].reshape(6, -1), axis=0)) == 6


def test_new_values_have_the_spread_of_the_first_times_their_scale(grown):
  rows = np.concatenate([rows.ravel() for rows in new_values(grown[0]).values()]) / GrowthConfig().value_scale
  assert abs(rows.std() / value_std(MODEL) - 1) < 0.08 and abs(rows.mean()) < 0.1 * value_std(MODEL)


# Growth on a mesh, twice, and what is said of it.


def test_growth_onto_a_mesh_with_a_wider_token_axis(state, grown):
  wide = program(GROWN, data=2, token=4)
  sharded = jax.device_put(state, program(data=8).shardings)
  onto, *_ = grow_state(sharded, MODEL, GROWN, EXACT, seed=3, out_shardings=wide.shardings)
  small_run.assert_same(onto, grown[0])
  assert jax.tree.map(lambda leaf: leaf.sharding, onto) == wide.shardings
  keys = onto.params["blocks"]["attention"]["proj"]["keys"]
  assert {shard.data.shape for shard in keys.addressable_shards} == {(2, 24 // 4, 16)}


def test_growth_twice(grown):
  second, config, _ = grow_state(dataclasses.replace(grown[0], step=jnp.int32(77)), GROWN, GROWN_FURTHER, EXACT)
  assert config == GROWN_FURTHER
  born = np.asarray(second.born["blocks"]["ffn"]["values"])
  assert [int(step) for step in born[[16, 31, 32, 39]]] == [int(grown[0].step)] * 2 + [77] * 2
  small_run.assert_same(grown[0].tau, second.tau)
  small_run.assert_same(grown[0].born["blocks"]["attention"]["proj"], second.born["blocks"]["attention"]["proj"])


def test_report_says_what_grew(grown):
  _, config, report = grown
  assert config == GROWN
  assert report.num_parameters == (MODEL.num_parameters, GROWN.num_parameters)
  lines = {line.split()[0]: line for line in str(report).splitlines()}
  assert lines["params/blocks/ffn/keys"].split(maxsplit=1)[1] == "(2, 16, 16)  (2, 32, 16)  zeros"
  assert lines["params/blocks/ffn/values"].endswith("random") and lines["born/blocks/ffn/keys"].endswith("this step")
  assert lines["params/embedding"].endswith("copied") and lines["tau/blocks/ffn/tau"].endswith("copied")
  assert lines["parameters:"] == f"parameters: {MODEL.num_parameters:,} -> {GROWN.num_parameters:,}"
