"""Parameter tokens in groups: plain pattention where all are chosen, the oracle where some are, and exact growth by groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tokenformer_jax as tf
from tests import oracle, small_run
from tokenformer_jax.config import GrowthConfig, MeshConfig, ModelConfig
from tokenformer_jax.config.parts import FeedForwardConfig
from tokenformer_jax.distributed import axes, mesh
from tokenformer_jax.distributed.collectives import collectives
from tokenformer_jax.growth.plan import plan_growth
from tokenformer_jax.growth.router import with_new_leaves, with_router
from tokenformer_jax.models import counts
from tokenformer_jax.nn.context import Context
from tokenformer_jax.nn.parameters import split
from tokenformer_jax.nn.pattention import Pattention
from tokenformer_jax.nn.token_groups import TokenGroups
from tokenformer_jax.training.flops import product_flops
from tokenformer_jax.training.new_rows import scale_rows
from tokenformer_jax.training.program import make_program
from tokenformer_jax.training.resume import check_same_weights

THETAS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
SIZES = dict(vocab_size=32, num_layers=2, hidden_size=16, num_heads=2, qkv_tokens=8, proj_tokens=8, seq_length=16)


def model_config(ffn_tokens=24, chosen=2, group_tokens=6, **fields) -> ModelConfig:
  ffn = dict(group_tokens=group_tokens, chosen=chosen, **fields.pop("ffn", {}))
  return ModelConfig.named("tiny", **SIZES, ffn_tokens=ffn_tokens, ffn=ffn, **fields)


def layer(**fields) -> TokenGroups:
  """A layer whose scores are of order one."""
  made = TokenGroups(model_config(**fields), rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  for name in ("keys", "values", "router"):
    parameter = getattr(made, name)
    parameter[...] = jnp.asarray(rng.normal(size=parameter.shape), jnp.float32)
  return made


def context(time, **fields):
  return Context(jnp.arange(time)[None], **fields)


X = jax.random.normal(jax.random.key(0), (3, 8, 16))
PLAIN = ModelConfig.named("tiny", **SIZES, ffn_tokens=24)
IDS = np.random.default_rng(0).integers(0, 32, (2, 8))


@pytest.mark.parametrize("theta", THETAS)
def test_with_all_groups_chosen_it_is_plain_pattention_to_the_bit(theta):
  groups = layer(theta=theta, chosen=4)
  plain = Pattention(16, 16, 24, theta=theta, rngs=nnx.Rngs(0))
  for name in ("keys", "values", "tau"):
    getattr(plain, name)[...] = getattr(groups, name)[...]
  (graphdef, state), (plain_def, plain_state) = nnx.split(groups), nnx.split(plain)
  ours = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, context(8))[0])(state, X)
  theirs = jax.jit(lambda state, x: nnx.merge(plain_def, state)(x))(plain_state, X)
  np.testing.assert_array_equal(ours, theirs)


def by_hand(groups: TokenGroups, x: np.ndarray) -> np.ndarray:
  """The layer in float64, one token after the other."""
  keys, values, router, prior = oracle.wide(
    {n: getattr(groups, n)[...] for n in ("keys", "values", "router", "prior")}
  ).values()
  size, k = groups.part.group_tokens, groups.part.chosen
  with np.errstate(divide="ignore"):
    scores = x.astype(np.float64) @ router.T + np.log(prior)
  y = np.zeros(x.shape)
  for where in np.ndindex(x.shape[:-1]):
    chosen = np.argsort(-scores[where])[:k]
    rows = np.concatenate([np.arange(g * size, (g + 1) * size) for g in chosen])
    # τ is that of all rows in `tau`, and of the chosen ones in Θ: √(k n), or k n for softmax.
    tau = float(groups.tau[...]) * (k * size / len(keys)) ** (1.0 if groups.theta == "softmax" else 0.5)
    y[where] = oracle.pattention(x[where][None].astype(np.float64), keys[rows], values[rows], groups.theta, tau)[0]
  return y


@pytest.mark.parametrize("theta", THETAS)
def test_it_is_the_oracle_over_the_rows_of_the_chosen_groups(theta):
  groups = layer(theta=theta, ffn=dict(router_z=0.5))
  groups.prior[...] = jnp.array([1.0, 0.0, 0.2, 1.0])
  graphdef, state = nnx.split(groups)
  run = jax.jit(lambda state, x, real: nnx.merge(graphdef, state)(x, context(x.shape[1], real=real)))
  real = jnp.arange(8)[None] < jnp.array([[5], [8], [8]])
  y, said = run(state, X, real)
  np.testing.assert_allclose(y, by_hand(groups, np.asarray(X)), atol=3e-5)
  # The losses are over real tokens, and the group that nothing chooses has none of the router's probability.
  scores = np.asarray(X, np.float64)[np.asarray(real)] @ np.asarray(groups.router[...]).T + [0, -1e30, np.log(0.2), 0]
  chance = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
  load = np.eye(4)[np.argsort(-scores)[:, :2]].sum(axis=1).mean(axis=0) / 2
  assert load[1] == 0.0
  np.testing.assert_allclose(said["loss/balance"], 0.01 * 4 * load @ chance.mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(said["loss/router_z"], 0.5 * np.mean(np.log(np.exp(scores).sum(axis=-1)) ** 2), rtol=1e-5)
  if theta == "l2_norm_gelu":  # A token depends on no other, and there is no capacity that could drop it.
    np.testing.assert_allclose(y[1:2, 3:4], run(state, X[1:2, 3:4], real[1:2, :1])[0], atol=1e-5)


def test_the_router_learns_through_gates_that_are_1():
  groups = layer()
  graphdef, state = nnx.split(groups)
  gradient = jax.jit(jax.grad(lambda state: jnp.sum(jnp.sin(nnx.merge(graphdef, state)(X, context(8))[0]))))(state)
  assert np.all(np.any(np.asarray(gradient["router"][...]) != 0, axis=-1)) and not np.any(gradient["prior"][...])


def test_flops_are_those_of_the_chosen_groups_and_of_the_formula():
  config = dataclasses.replace(model_config(ffn_tokens=128, group_tokens=16), seq_length=256, num_layers=1)
  abstract = nnx.eval_shape(lambda: TokenGroups(config, rngs=nnx.Rngs(0)))
  traced = jax.jit(lambda layer, x: layer(x, context(256))[0]).trace(abstract, jnp.zeros((4, 256, 16)))
  all_groups, router = 4 * 256 * 2 * 2 * 128 * 16, 4 * 256 * 2 * 8 * 16
  assert 2 / 8 <= (product_flops(traced.jaxpr) - router) / all_groups <= 1.3 * 2 / 8
  plain = dataclasses.replace(config, ffn=FeedForwardConfig())
  fewer = counts.forward_flops_per_token(plain) - counts.forward_flops_per_token(config)
  assert fewer == 2 * 2 * 128 * 16 * 6 / 8 - 2 * 8 * 16


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "softmax"])
def test_devices_that_split_the_groups_give_the_same_without_gathering_them(theta):
  graphdef, params = nnx.split(layer(theta=theta))
  params, x = nnx.to_pure_dict(params), X[:2]

  def loss(params, x):
    y, said = nnx.merge(graphdef, params)(x, context(8))
    return jnp.sum(jnp.sin(y)) + said["loss/balance"]

  step = jax.value_and_grad(loss, argnums=(0, 1))
  devices = mesh.make_mesh(MeshConfig(token=4, fsdp=2))
  names = {"router": ("token_group", "router"), "prior": ("token_group",), "tau": ()}
  names |= dict.fromkeys(("keys", "values"), ("param_token", "embed"))
  shardings = axes.tree_shardings(devices, names, params), axes.batch_sharding(devices, x.shape)
  compiled = jax.jit(axes.traced_on(devices, step), in_shardings=shardings).lower(params, x).compile()
  ours = compiled(*jax.tree.map(jax.device_put, (params, x), shardings))
  theirs = jax.jit(step)(params, x)
  # Values of rounding size are compared with the largest of their array.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max())), ours, theirs)
  sent = [one for one in collectives(compiled.as_text(), devices) if one.axes == ("token",)]
  assert sent and not any(one.argument for one in sent) and "f32[24,16]" not in compiled.as_text()
  assert [one.shape for one in sent if one.shape[-1:] == (16,)] == [(1, 8, 16)] * 2


def test_devices_that_would_split_a_group_are_refused():
  run = axes.traced_on(mesh.make_mesh(MeshConfig(token=8)), lambda x: layer()(x, context(8))[0])
  with pytest.raises(
    ValueError, match="mesh.token=8: .* 3 of ffn_tokens=24, .* groups of ffn.group_tokens=6; .* 4 groups"
  ):
    jax.eval_shape(run, X)


@pytest.mark.parametrize(
  "make, words",
  [
    (
      lambda: model_config(ffn_tokens=20),
      "ffn_tokens=20: ffn.group_tokens=6: these are no whole groups; choose 18 or 24",
    ),
    (
      lambda: model_config(chosen=5),
      "ffn.chosen=5: ffn_tokens=24 are 4 groups of ffn.group_tokens=6; choose at most 4",
    ),
    (lambda: model_config(kernel="fused"), "kernel='fused': ffn.group_tokens=6 has none"),
    (
      lambda: FeedForwardConfig(kind="mlp", group_tokens=6),
      "kind='mlp': group_tokens=6: groups are of parameter tokens",
    ),
    (
      lambda: ModelConfig.named("tiny", "tokenformer-groups", "dense"),
      "model.ffn: kind='mlp': group_tokens=128: groups are of parameter tokens; choose 'pattention'",
    ),
    (lambda: FeedForwardConfig(group_tokens=6, capacity=1.5), "capacity=1.5: group_tokens=6; leave 0.0"),
    (lambda: FeedForwardConfig(group_tokens=6, experts=2), "experts=2: group_tokens=6; leave 1"),
  ],
)
def test_bad_choices_are_refused(make, words):
  with pytest.raises(ValueError, match=words):
    make()


@pytest.fixture(scope="module")
def plain():
  """A TokenFormer with parameters of order one third."""
  graphdef, params, tau = split(nnx.eval_shape(lambda: tf.LanguageModel(PLAIN, rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.2, 0.3, leaf.shape), jnp.float32), params)
  return nnx.merge(graphdef, params, jax.tree.map(lambda leaf: jnp.full(leaf.shape, 3.0), tau))


@jax.jit
def hidden(model):
  return model.hidden(IDS)[0]


def test_a_trained_model_gets_a_router_and_more_groups_and_keeps_its_function(plain):
  routed = with_router(plain, group_tokens=6)
  assert routed.config.ffn == FeedForwardConfig(group_tokens=6, chosen=4) and routed.blocks.ffn.router.shape == (
    2,
    4,
    16,
  )
  before = hidden(plain)
  np.testing.assert_array_equal(hidden(routed), before)
  bigger, report = tf.grow(routed, ffn_tokens=48, method="exact")
  assert bigger.config.ffn.chosen == 4
  np.testing.assert_allclose(hidden(bigger), before, atol=2e-6 * np.abs(before).max())
  np.testing.assert_array_equal(bigger.blocks.ffn.prior[...][0], [1, 1, 1, 1, 0, 0, 0, 0])
  kinds = {leaf.path: leaf.new_rows.value for leaf in report.leaves}
  assert kinds["params/blocks/ffn/router"] == "random" and kinds["params/blocks/ffn/prior"] == "zeros"
  for fields, words in (
    (dict(ffn_tokens=32), "ffn_tokens: 24 -> 32: the new tokens are no whole groups of 6; choose 30 or 36"),
    (dict(ffn_tokens=48, method="duplicate"), "ffn_tokens: 24 -> 48 in groups of 6: method='duplicate': copies"),
  ):
    with pytest.raises(ValueError, match=words):
      tf.grow(routed, **fields)
  with pytest.raises(ValueError, match="the model has a router already"):
    with_router(routed, group_tokens=6)


def test_a_prompt_and_a_step_of_one_row_equal_the_whole_texts():
  config = dataclasses.replace(model_config(), num_layers=1)

  @jax.jit
  def run(ids):
    model = tf.LanguageModel(config, rngs=nnx.Rngs(0))
    decoding = model.for_decoding()
    prompt, cache = decoding.prefill(ids[:1, :5], jnp.zeros(1, jnp.int32), 8)
    return model.hidden(ids)[0], prompt, decoding.extend(ids[:1, 5:6], cache)[0]

  whole, prompt, step = run(IDS)
  np.testing.assert_allclose(jnp.concatenate([prompt, step], axis=1), whole[:1, :6], atol=1e-5)


def test_priors_of_new_groups_rise_with_their_age_and_routers_as_other_new_rows():
  axes = {"prior": ("layer", "token_group"), "router": ("layer", "token_group", "router")}
  born = dict.fromkeys(axes, jnp.array([0, 0, 3, 3], jnp.int32))
  params = {"prior": jnp.array([[1.0, 1.0, 0.0, 0.0]]), "router": jnp.ones((1, 4, 2))}
  ones = jax.tree.map(jnp.ones_like, params)
  for step, risen in ((3, 0.25), (4, 0.5), (9, 1.0)):
    updates, _ = scale_rows(axes, 4, 1.0, 0.5).update(ones, (), params, born=born, step=jnp.int32(step))
    np.testing.assert_array_equal(updates["prior"], [[0, 0, risen, risen]])
    np.testing.assert_array_equal(updates["router"][0, :, 0], [0.5, 0.5, risen, risen])
  # What has risen never falls, as it would when a later growth has a longer warm-up.
  params["prior"] = jnp.ones((1, 4))
  updates, _ = scale_rows(axes, 4, 1.0, 0.5).update(ones, (), params, born=born, step=jnp.int32(3))
  assert not np.any(updates["prior"])


def test_every_leaf_of_a_training_state_grows_by_groups():
  config = dataclasses.replace(small_run.config(), model=routed_run(16))
  shapes = make_program(config, config.model, small_run.mesh(token=2)).shapes
  plan = plan_growth(shapes, config.model, routed_run(48), GrowthConfig(method="exact"))
  found = {path: (leaf.new_shape, leaf.new_rows.name) for path, leaf in plan.items() if "/ffn/" in path}
  assert found == {
    "params/blocks/ffn/keys": ((2, 48, 16), "ZERO"),
    "params/blocks/ffn/values": ((2, 48, 16), "RANDOM"),
    "params/blocks/ffn/router": ((2, 6, 16), "RANDOM"),
    "params/blocks/ffn/prior": ((2, 6), "ZERO"),
    "tau/blocks/ffn/tau": ((2,), "SCALED_TAU"),
    **{
      f"opt_state/1/{m}/blocks/ffn/{name}": ((2, 48, 16), "ZERO") for m in ("mu", "nu") for name in ("keys", "values")
    },
    **{f"opt_state/1/{m}/blocks/ffn/router": ((2, 6, 16), "ZERO") for m in ("mu", "nu")},
    **{f"opt_state/1/{m}/blocks/ffn/prior": ((2, 6), "ZERO") for m in ("mu", "nu")},
    **{f"born/blocks/ffn/{name}": ((48,), "STEP") for name in ("keys", "values")},
    **{f"born/blocks/ffn/{name}": ((6,), "STEP") for name in ("router", "prior")},
  }
  assert shapes.born["blocks"]["ffn"]["keys"].sharding.spec == jax.sharding.PartitionSpec("token")
  assert shapes.params["blocks"]["ffn"]["router"].sharding.is_fully_replicated


def routed_run(ffn_tokens: int) -> ModelConfig:
  return dataclasses.replace(small_run.MODEL, ffn=FeedForwardConfig(group_tokens=8, chosen=1)).grown(
    ffn_tokens=ffn_tokens
  )


def test_a_run_starts_from_weights_without_a_router(plain):
  routed = dataclasses.replace(plain.config, ffn=FeedForwardConfig(group_tokens=6, chosen=4))
  check_same_weights(plain.config, routed, "runs/plain")
  _, params, _ = split(plain)
  filled = jax.jit(lambda params: with_new_leaves(params, routed, 0))(params)
  small_run.assert_same(filled["blocks"]["attention"], params["blocks"]["attention"])
  assert set(filled["blocks"]["ffn"]) == {"keys", "values", "router", "prior"}
  with pytest.raises(ValueError, match="ffn.group_tokens=0, this run's 6"):
    check_same_weights(dataclasses.replace(plain.config, ffn_tokens=30), routed, "runs/plain")
